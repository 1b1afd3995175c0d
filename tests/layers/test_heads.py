"""The masked heads on few rows: decoded in float32 under autocast, as near to the truth as can be, nothing cast.

M rows, D width, V classes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.layers import heads
from trivium.layers.heads import FEW_ROWS, MaskedHead, TiedMaskedHead, decode

D, V = 16, 300


def plain(rows: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    return F.linear(rows, weight_VD, bias_V)


def values(logits: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    wanted = [x for x in inputs if x.requires_grad]
    return [logits, *torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(logits)), reduction="sum"), wanted)]


def inputs_of(num_rows: int, dtype: torch.dtype, frozen: bool = False) -> list[Tensor]:
    made = [torch.randn(shape, dtype=dtype) for shape in ((num_rows, D), (V, D), (V,))]
    return [x.requires_grad_(not (frozen and n > 0)) for n, x in enumerate(made)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, FEW_ROWS, FEW_ROWS + 1])
def test_without_autocast_it_is_the_plain_product(num_rows: int, frozen: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = inputs_of(num_rows, dtype, frozen)
        for mine, expected in zip(values(decode(*inputs), inputs), values(plain(*inputs), inputs), strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, expected)


def test_under_autocast_few_rows_are_exact_and_many_are_low() -> None:
    for num_rows, dtype in ((FEW_ROWS, torch.float32), (FEW_ROWS + 1, torch.bfloat16)):
        inputs = inputs_of(num_rows, torch.float32)
        expected = values(plain(*inputs), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            logits = decode(*inputs)
        assert logits.dtype == dtype
        found = values(logits, inputs)
        for mine, true in zip(found, expected, strict=True):
            if dtype == torch.float32:
                assert torch.equal(mine, true)
            else:
                assert float((mine - true).detach().norm()) <= 2e-2 * float(true.detach().norm())


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_few_rows_is_nearer_to_the_truth_than_the_plain_one(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = (TiedMaskedHead if tied else MaskedHead)(D, V, 1e-12)
    rows, word_VD = torch.randn(2, 10, D), torch.randn(V, D, requires_grad=True)
    given = (rows, word_VD) if tied else (rows,)
    inputs = [*head.parameters(), *([word_VD] if tied else [])]
    truth = values(head(*given).flatten(0, 1), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        mine_MV = head(*given).flatten(0, 1)
        monkeypatch.setattr(heads, "decode", plain)
        low_MV = head(*given).flatten(0, 1)
    mine, low = values(mine_MV, inputs), values(low_MV, inputs)
    for my, their, true in zip(mine, low, truth, strict=True):
        error, their_error = (float((found - true).detach().norm()) for found in (my, their))
        assert error <= 0.03 * float(true.detach().norm())
        if true.shape[-2:] in ((20, V), (V, D)):  # the logits and the large matrix
            assert error <= their_error


def test_a_matrix_used_twice_within_autocast_keeps_both_gradients() -> None:
    """Autocast keeps its copy of a weight: one made without a graph would swallow the second use's gradient."""
    rows, weight_VD, bias_V = inputs_of(5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        both = decode(rows, weight_VD, bias_V).sum() + F.linear(rows, weight_VD).float().sum()
    [grad] = torch.autograd.grad(both, weight_VD)
    expected = 2 * rows.sum(0).expand(V, D)
    assert float((grad - expected).detach().abs().max()) <= 2e-2 * float(expected.detach().abs().max())
