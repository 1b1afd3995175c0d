"""Which false pairs are drawn: never what is not allowed, as often as the softmax says, and no crash at any logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trivium.objectives.matching import hard_negatives, matching


@given(
    scale=st.sampled_from([1e-3, 1.0, 50.0, 1e4, 1e30]), seed=st.integers(0, 50), rows=st.integers(1, 9),
    share=st.floats(0, 1),
)  # fmt: skip
def test_what_is_not_allowed_is_never_drawn(scale: float, seed: int, rows: int, share: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, rows, generator=draw)
    allowed = torch.rand(rows, rows, generator=draw) < share
    for uniform in (0.0, 0.3, 1 - 2**-53):  # the ends of [0, 1) too
        drawn = hard_negatives(logits, allowed, torch.full((rows,), uniform, dtype=torch.float64))
        for row, column in enumerate(drawn.tolist()):
            assert allowed[row, column] if allowed[row].any() else column == row


def test_they_are_drawn_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.5]]).expand(4, 4)
    allowed = ~torch.eye(4, dtype=torch.bool)
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counted = torch.zeros(4, 4)
    for each in uniform[:: n // 2000]:
        drawn = hard_negatives(logits, allowed, each.expand(4))
        counted[torch.arange(4), drawn] += 1 / 2000
    expected = logits.masked_fill(~allowed, -torch.inf).softmax(1)
    assert torch.allclose(counted, expected, atol=2e-3)


def test_rows_that_do_not_count_give_neither_loss_nor_gradient() -> None:
    logits = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    matched, kept = torch.tensor([1, 0, 0, 1, 1]).bool(), torch.tensor([1, 1, 0, 1, 0]).bool()
    loss = matching(logits, matched, kept)
    plain = F.cross_entropy(logits[kept], matched[kept].long(), reduction="sum")
    assert float(loss) == pytest.approx(float(plain), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(plain, logits)[0])
    assert float(matching(logits, matched)) == pytest.approx(
        float(F.cross_entropy(logits, matched.long(), reduction="sum"))
    )
