"""The contrastive loss against a plain construction, row by row, float64: softmax and sigmoid, any scope, any tiles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.objectives.contrastive import Scope, contrastive

WIDTH = 6
SCOPES: tuple[Scope, ...] = ("global", "local_gradient", "local")


def plain(
    image_GD: Tensor,
    text_GD: Tensor,
    scale: Tensor,
    kept_G: list[bool],
    same_image_G: list[int],
    same_text_G: list[int],
    bias: Tensor | None = None,
    scope: str = "global",
    num_ranks: int = 1,
) -> Tensor:
    """Sum over the kept rows of (image to text + text to image) / 2, every softmax or sigmoid written out."""
    total = torch.zeros((), dtype=torch.float64)
    rank_G = [row * num_ranks // len(kept_G) for row in range(len(kept_G))]
    for row, kept in enumerate(kept_G):
        if not kept:
            continue
        for query_D, key_GD, same, others in (
            (image_GD[row], text_GD, same_image_G[row], same_text_G),
            (text_GD[row], image_GD, same_text_G[row], same_image_G),
        ):
            columns = [column for column in range(len(kept_G)) if column == row or others[column] != same]
            if scope == "local":
                columns = [column for column in columns if rank_G[column] == rank_G[row]]
            detached = [scope == "local_gradient" and rank_G[column] != rank_G[row] for column in columns]
            keys = [key_GD[c].detach() if is_detached else key_GD[c]
                    for c, is_detached in zip(columns, detached, strict=True)]  # fmt: skip
            scores = torch.stack([scale.exp()[0] * query_D @ key_D for key_D in keys])
            if bias is None:
                total = total + 0.5 * (scores.logsumexp(0) - scores[columns.index(row)])
            else:
                sign = torch.tensor([1.0 if column == row else -1.0 for column in columns], dtype=scores.dtype)
                total = total + 0.5 * (1 + (-sign * (scores + bias)).exp()).log().sum()
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
    bias: Tensor | None = None,
    tile: int | None = None,
    scope: Scope = "global",
    num_ranks: int = 1,
) -> Tensor:
    """My rows against everyone's, who stand in any order."""
    kept, same_image, same_text = torch.tensor(kept_G), torch.tensor(same_image_G), torch.tensor(same_text_G)
    return contrastive(
        image_GD[mine], text_GD[mine], image_GD[order], text_GD[order], scale, torch.tensor(mine), torch.tensor(order),
        kept_B=kept[mine], same_image_B=same_image[mine], same_text_B=same_text[mine],
        same_image_G=same_image[order], same_text_G=same_text[order], logit_bias=bias, tile=tile,
        scope=scope, num_ranks=num_ranks,
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
        "tile": draw(st.integers(1, 7)),
        "bias": draw(st.sampled_from([None, -2.5])),
        "scope": draw(st.sampled_from(SCOPES)),
        "num_ranks": draw(st.integers(1, rows)),
    }


@given(global_batches())
def test_agrees_with_the_plain_construction_in_value_and_gradient(batch: dict) -> None:
    marks = {name: batch[name] for name in ("kept_G", "same_image_G", "same_text_G")}
    image, text = unit_rows(batch["rows"], batch["seed"]), unit_rows(batch["rows"], batch["seed"] + 1000)
    scale = torch.tensor([math.log(1 / 0.07)], dtype=torch.float64, requires_grad=True)
    bias = None if batch["bias"] is None else torch.tensor([batch["bias"]], dtype=torch.float64, requires_grad=True)
    scope = {"scope": batch["scope"], "num_ranks": batch["num_ranks"]}
    expected = plain(image, text, scale, **marks, bias=bias, **scope)
    # Two processes: each counts its own rows against all of them.
    processes = [part for part in (batch["order"][: batch["cut"]], batch["order"][batch["cut"] :]) if part]
    options = {"order": batch["order"], "bias": bias, "tile": batch["tile"], **scope}
    parts = [ours(image, text, scale, **marks, mine=mine, **options) for mine in processes]
    found = sum(parts)
    assert isinstance(found, Tensor)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    if any(batch["kept_G"]):
        inputs = (image, text, scale) if bias is None else (image, text, scale, bias)
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
    assert loss.item() == 0
    for tensor in (image, text, scale):
        assert tensor.grad is not None and not tensor.grad.any()


def test_a_dropped_row_is_still_a_column_of_the_others() -> None:
    image, text = unit_rows(3, 0), unit_rows(3, 1)
    numbers, scale = [0, 1, 2], torch.ones(1, dtype=torch.float64)
    loss = ours(image, text, scale, [True, True, False], numbers, numbers, numbers, numbers)
    loss.backward()
    assert image.grad is not None and text.grad is not None
    assert image.grad[2].any() and text.grad[2].any()


def test_local_is_the_sum_of_the_losses_of_each_rank_alone() -> None:
    image, text, scale = unit_rows(6, 0), unit_rows(6, 1), torch.ones(1, dtype=torch.float64)
    numbers, kept = list(range(6)), [True] * 6
    whole = ours(image, text, scale, kept, numbers, numbers, numbers, numbers, scope="local", num_ranks=2)
    few, few_kept = list(range(3)), [True] * 3
    halves = [ours(image[part], text[part], scale, few_kept, few, few, few, few) for part in (slice(0, 3), slice(3, 6))]
    assert float(whole) == pytest.approx(float(halves[0] + halves[1]), rel=1e-12)
    assert float(whole) < float(ours(image, text, scale, kept, numbers, numbers, numbers, numbers))


def test_on_one_rank_every_scope_is_the_global_one_and_on_several_none_is() -> None:
    image, text = unit_rows(6, 0), unit_rows(6, 1)
    scale, numbers = torch.ones(1, dtype=torch.float64), list(range(6))

    def gradient(scope: Scope, num_ranks: int) -> Tensor:
        loss = ours(
            image, text, scale, [True] * 6, numbers, numbers, numbers, numbers, scope=scope, num_ranks=num_ranks
        )
        return torch.autograd.grad(loss, image)[0]

    whole = gradient("global", 3)
    for scope in SCOPES:
        assert torch.allclose(gradient(scope, 1), whole, rtol=0, atol=1e-12)
        assert torch.allclose(gradient(scope, 3), whole, rtol=0, atol=1e-3) == (scope == "global")


# Tiles. Numbers of concepts repeat, so that some columns are no negatives, and every third row is dropped.

ROWS = 70
MARKS = {
    "kept_B": torch.arange(ROWS) % 3 > 0,
    "same_image_B": torch.arange(ROWS) % 20,
    "same_text_B": torch.arange(ROWS) % 33,
}
MARKS |= {"same_image_G": MARKS["same_image_B"], "same_text_G": MARKS["same_text_B"]}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("tile", [1, 7, 64, ROWS])
def test_tiles_change_neither_value_nor_gradient(tile: int, sigmoid: bool, scope: Scope) -> None:
    image, text = unit_rows(ROWS, 0), unit_rows(ROWS, 1)
    scale = torch.tensor([math.log(100.0)], dtype=torch.float64, requires_grad=True)  # logits of a long run
    bias = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True) if sigmoid else None
    inputs = [x for x in (image, text, scale, bias) if x is not None]
    marks = {f"{name}_G": MARKS[f"{name}_B"].tolist() for name in ("kept", "same_image", "same_text")}
    expected = plain(image, text, scale, **marks, bias=bias, scope=scope, num_ranks=5)
    reference = torch.autograd.grad(expected, inputs)
    row = torch.arange(ROWS)
    options = {**MARKS, "logit_bias": bias, "tile": tile, "scope": scope, "num_ranks": 5}
    same = contrastive(image, text, image, text, scale, row, row, **options)
    image_G, text_G = image.detach().clone().requires_grad_(), text.detach().clone().requires_grad_()
    apart = contrastive(image, text, image_G, text_G, scale, row, row, **options)
    of_columns = torch.autograd.grad(apart, (image_G, text_G), retain_graph=True)
    for loss, columns in ((same, None), (apart, of_columns)):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        grads = list(torch.autograd.grad(loss, inputs))
        if columns is not None:  # the rows stand apart from the columns: their gradients are the two summands
            grads[:2] = [mine + others for mine, others in zip(grads[:2], columns, strict=True)]
        for mine, true in zip(grads, reference, strict=True):
            assert float((mine - true).abs().max()) <= 1e-10 * float(true.abs().max())


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))]
        )
        return out


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_no_tensor_is_larger_than_a_tile_forward_or_backward(sigmoid: bool, scope: Scope) -> None:
    image, text = unit_rows(ROWS, 0), unit_rows(ROWS, 1)
    bias = torch.full((1,), -10.0, dtype=torch.float64, requires_grad=True) if sigmoid else None
    scale, row, tile = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.arange(ROWS), 9
    with LargestTensor() as largest:
        contrastive(
            image, text, image, text, scale, row, row, **MARKS, logit_bias=bias, tile=tile, scope=scope, num_ranks=5
        ).backward()
    assert WIDTH * ROWS < largest.numel <= tile * ROWS


def test_the_sigmoid_loss_is_the_published_formula() -> None:
    """SigLIP, algorithm 1: -sum(log_sigmoid(labels * logits)) / n, where no concept stands twice."""
    image, text = unit_rows(9, 0).detach(), unit_rows(9, 1).detach()
    scale, bias = torch.tensor([math.log(10.0)], dtype=torch.float64), torch.tensor([-10.0], dtype=torch.float64)
    logits = image @ text.T * scale.exp() + bias
    labels = 2 * torch.eye(9, dtype=torch.float64) - 1
    published = -torch.nn.functional.logsigmoid(labels * logits).sum() / 9
    numbers = list(range(9))
    found = ours(image, text, scale, [True] * 9, numbers, numbers, numbers, numbers, bias=bias)
    assert float(found / 9) == pytest.approx(float(published), rel=1e-12)
