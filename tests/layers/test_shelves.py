"""Maps side by side give what each gives alone, and no more is computed in vain than calls are saved."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trivium.layers.shelves import CALL, POSITIONS, in_shelves, shelves

SIDE = st.integers(1, 40)


@given(
    st.lists(st.tuples(st.integers(1, 4), SIDE, SIDE), min_size=1, max_size=8), st.integers(1, 2), st.integers(1, 800)
)
def test_each_run_stands_once_and_no_more_is_computed_in_vain_than_calls_are_saved(
    runs: list[tuple[int, int, int]], gap: int, channels: int
) -> None:
    found = shelves(runs, channels, gap)
    assert sorted(number for shelf in found for number in shelf) == list(range(len(runs)))
    for shelf in (shelf for shelf in found if len(shelf) > 1):
        on_it = [runs[number] for number in shelf]
        height, width = max(h for _, h, _ in on_it), sum(n * (w + gap) for n, _, w in on_it)
        assert height == on_it[0][1]
        assert height * width - sum(n * h * w for n, h, w in on_it) <= CALL * (len(shelf) - 1)
        assert all(h * w <= POSITIONS * channels for _, h, w in on_it)


def test_small_maps_of_nearly_one_height_stand_together_and_large_ones_alone() -> None:
    runs = [(1, 16, 16), (3, 16, 22), (1, 16, 24), (1, 22, 16), (1, 24, 16)]
    assert shelves(runs, 512, 1) == [[4, 3, 0], [1, 2]]
    assert shelves(runs, 64, 1) == [[number] for number in range(5)]


@pytest.mark.parametrize("dilation", [1, 2])
def test_values_and_gradients_are_those_of_each_run_alone(dilation: int) -> None:
    draw = torch.Generator().manual_seed(dilation)
    runs = [(1, 5, 7), (3, 6, 4), (1, 30, 9), (2, 1, 1), (1, 28, 12)]
    assert 1 < len(shelves(runs, 200, dilation)) < len(runs)
    maps = [torch.randn(n, 200, h, w, generator=draw, dtype=torch.float64).requires_grad_() for n, h, w in runs]
    weight = torch.randn(6, 200, 3, 3, generator=draw, dtype=torch.float64).requires_grad_()
    bias = torch.randn(6, generator=draw, dtype=torch.float64).requires_grad_()
    plain = partial(F.conv2d, weight=weight, bias=bias, padding=dilation, dilation=dilation)

    def convolve(x: Tensor) -> Tensor:
        assert len(x) > 1 or x.is_contiguous(memory_format=torch.channels_last), "or it would be copied"
        return plain(x)

    found, expected = in_shelves(convolve, maps, dilation), [plain(x) for x in maps]
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
