"""The global contrastive loss against a plain construction, row by row, float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trivium.objectives.contrastive import contrastive

WIDTH = 6


def plain(
    image_GD: Tensor,
    text_GD: Tensor,
    scale: Tensor,
    kept_G: list[bool],
    same_image_G: list[int],
    same_text_G: list[int],
) -> Tensor:
    """Sum over the kept rows of (image to text + text to image) / 2, every softmax written out."""
    total = torch.zeros((), dtype=torch.float64)
    for row, kept in enumerate(kept_G):
        if not kept:
            continue
        for query_D, key_GD, same, others in (
            (image_GD[row], text_GD, same_image_G[row], same_text_G),
            (text_GD[row], image_GD, same_text_G[row], same_image_G),
        ):
            columns = [column for column in range(len(kept_G)) if column == row or others[column] != same]
            scores = torch.stack([scale.exp()[0] * query_D @ key_GD[column] for column in columns])
            total = total + 0.5 * (scores.logsumexp(0) - scores[columns.index(row)])
    return total


def unit_rows(rows: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1).requires_grad_()


def ours(
    image_GD: Tensor,
    text_GD: Tensor,
    scale: Tensor,
    kept_G: list[bool],
    same_image_G: list[int],
    same_text_G: list[int],
    mine: list[int],
    order: list[int],
) -> Tensor:
    """My rows against everyone's, who stand in any order."""
    kept, same_image, same_text = torch.tensor(kept_G), torch.tensor(same_image_G), torch.tensor(same_text_G)
    return contrastive(
        image_GD[mine], text_GD[mine], image_GD[order], text_GD[order], scale, torch.tensor(mine), torch.tensor(order),
        kept_B=kept[mine], same_image_B=same_image[mine], same_text_B=same_text[mine],
        same_image_G=same_image[order], same_text_G=same_text[order],
    )  # fmt: skip


@st.composite
def global_batches(draw: st.DrawFn) -> dict:
    rows = draw(st.integers(1, 6))
    numbers = st.lists(st.integers(0, 4), min_size=rows, max_size=rows)  # few numbers: many repeat
    return {
        "rows": rows,
        "kept_G": draw(st.lists(st.booleans(), min_size=rows, max_size=rows)),
        "same_image_G": draw(numbers),
        "same_text_G": draw(numbers),
        "order": draw(st.permutations(range(rows))),
        "cut": draw(st.integers(0, rows)),
        "seed": draw(st.integers(0, 99)),
    }


@given(global_batches())
def test_agrees_with_the_plain_construction_in_value_and_gradient(batch: dict) -> None:
    marks = {name: batch[name] for name in ("kept_G", "same_image_G", "same_text_G")}
    image, text = unit_rows(batch["rows"], batch["seed"]), unit_rows(batch["rows"], batch["seed"] + 1000)
    scale = torch.tensor([math.log(1 / 0.07)], dtype=torch.float64, requires_grad=True)
    expected = plain(image, text, scale, **marks)
    # Two processes: each counts its own rows against all of them.
    processes = [part for part in (batch["order"][: batch["cut"]], batch["order"][batch["cut"] :]) if part]
    found = sum(ours(image, text, scale, **marks, mine=part, order=batch["order"]) for part in processes)
    assert isinstance(found, Tensor)
    assert float(found) == pytest.approx(float(expected), rel=1e-12, abs=1e-12)
    if any(batch["kept_G"]):
        inputs = (image, text, scale)
        for mine, reference in zip(
            torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            assert float((mine - reference).abs().max()) <= 1e-10


def test_chance_is_the_logarithm_of_the_batch_when_all_rows_are_alike() -> None:
    rows = torch.nn.functional.normalize(torch.ones(8, WIDTH, dtype=torch.float64), dim=-1)
    numbers = list(range(8))
    loss = ours(rows, rows, torch.ones(1), [True] * 8, numbers, numbers, numbers, numbers)
    assert float(loss / 8) == pytest.approx(math.log(8))


def test_one_concept_alone_has_no_negatives_and_no_loss() -> None:
    image, text = unit_rows(3, 0), unit_rows(3, 1)
    scale = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = ours(image, text, scale, [True] * 3, [5] * 3, [5] * 3, [0, 1, 2], [0, 1, 2])
    loss.backward()
    assert float(loss) == 0
    for tensor in (image, text, scale):
        assert tensor.grad is not None and not tensor.grad.any()


def test_a_dropped_row_is_still_a_column_of_the_others() -> None:
    image, text = unit_rows(3, 0), unit_rows(3, 1)
    numbers, scale = [0, 1, 2], torch.ones(1, dtype=torch.float64)
    loss = ours(image, text, scale, [True, True, False], numbers, numbers, numbers, numbers)
    loss.backward()
    assert image.grad is not None and text.grad is not None
    assert image.grad[2].any() and text.grad[2].any()
