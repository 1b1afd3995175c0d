"""Maps side by side give what each gives alone, and no more is computed in vain than calls are saved."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trivium.layers.shelves import CALL, in_shelves, shelves

SIDE = st.integers(1, 40)


@given(st.lists(st.tuples(st.integers(1, 4), SIDE, SIDE), min_size=1, max_size=8), st.integers(1, 2))
def test_each_run_stands_once_and_a_call_is_saved_for_what_is_computed_in_vain(
    runs: list[tuple[int, int, int]], gap: int
) -> None:
    found = shelves(runs, gap)
    assert sorted(number for shelf in found for number in shelf) == list(range(len(runs)))
    for first, *others in found:
        for count, h, w in (runs[number] for number in others):
            assert h <= runs[first][1]
            assert count * (runs[first][1] * (w + gap) - h * w) <= CALL


@pytest.mark.parametrize("dilation", [1, 2])
def test_values_and_gradients_are_those_of_each_run_alone(dilation: int) -> None:
    draw = torch.Generator().manual_seed(dilation)
    runs = [(1, 5, 7), (3, 6, 4), (1, 30, 9), (2, 1, 1), (1, 28, 12)]
    assert 1 < len(shelves(runs, dilation)) < len(runs)
    maps = [torch.randn(n, 4, h, w, generator=draw, dtype=torch.float64).requires_grad_() for n, h, w in runs]
    weight = torch.randn(6, 4, 3, 3, generator=draw, dtype=torch.float64).requires_grad_()
    bias = torch.randn(6, generator=draw, dtype=torch.float64).requires_grad_()
    convolve = partial(F.conv2d, weight=weight, bias=bias, padding=dilation, dilation=dilation)
    found, expected = in_shelves(convolve, maps, dilation), [convolve(x) for x in maps]
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
    scale = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in expected]
    gradients = [
        torch.autograd.grad(
            torch.stack([(x.square() * s).sum() for x, s in zip(each, scale, strict=True)]).sum(),
            [weight, bias, *maps],
        )
        for each in (found, expected)
    ]
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-10)
