"""Matching against every possible one, boxes against counted pixels, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.errors import TriviumError
from trivium.objectives import detection
from trivium.objectives.detection import Objects, corners, giou, match

L, B, Q, K = 3, 4, 5, 4  # of the classes three and "no object"
NUMBERS = (2, 0, 5, 3)  # of objects in each row


def boxes(count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    size = torch.rand(count, 2, generator=draw, dtype=torch.float64) * 0.4 + 0.05
    centre = size / 2 + torch.rand(count, 2, generator=draw, dtype=torch.float64) * (1 - size)
    return torch.cat([centre, size], 1)


def objects(numbers: tuple[int, ...] = NUMBERS, attributes: bool = False) -> Objects:
    draw = torch.Generator().manual_seed(2)
    count = sum(numbers)
    row_M = torch.arange(len(numbers)).repeat_interleave(torch.tensor(numbers))
    slots = torch.randint(-1, 6, (count, 3), generator=draw) if attributes else None
    return Objects(row_M, torch.randint(0, K - 1, (count,), generator=draw), boxes(count, 3), slots)


def seen(queries: int = Q) -> tuple[Tensor, Tensor]:
    logits = torch.randn(L, B, queries, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return logits, boxes(L * B * queries).view(L, B, queries, 4)


def plain_giou(a: list[float], b: list[float]) -> float:
    """Of two boxes given by their corners."""
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inner / union - (hull - union) / hull


def pair_cost(logits_K: Tensor, box_4: Tensor, label: int, true_4: Tensor) -> float:
    distance = float((box_4 - true_4).abs().sum())
    overlap = plain_giou(corners(box_4).tolist(), corners(true_4).tolist())
    return 5 * distance - float(logits_K.softmax(-1)[label]) - 2 * overlap


@pytest.mark.parametrize("queries", [5, 3])
def test_no_other_matching_costs_less(queries: int) -> None:
    (logits, seen_boxes), there = seen(queries), objects()
    matches = match(logits, seen_boxes, there)
    for layer in range(L):
        for row in range(B):
            mine = (there.row_M == row).nonzero()[:, 0].tolist()
            here = (matches.layer_P == layer) & (matches.row_P == row)
            found = list(zip(matches.object_P[here].tolist(), matches.query_P[here].tolist(), strict=True))
            assert len(found) == min(len(mine), queries)
            assert {number for number, _ in found} <= set(mine)
            assert len({query for _, query in found}) == len(found)
            cost = {
                (n, q): pair_cost(logits[layer, row, q], seen_boxes[layer, row, q], int(there.label_M[n]),
                                  there.box_M4[n])
                for n in mine for q in range(queries)
            }  # fmt: skip
            some = itertools.permutations(mine, min(len(mine), queries))
            every = itertools.permutations(range(queries), len(found))
            best = min(
                (sum(cost[pair] for pair in zip(ns, qs, strict=True)) for ns, qs in itertools.product(some, every)),
                default=0.0,
            )
            assert sum(cost[pair] for pair in found) == pytest.approx(best, abs=1e-12)


def test_all_layers_and_rows_take_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        calls.append(tensor.shape)
        return real(tensor)

    monkeypatch.setattr(Tensor, "cpu", counted)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, lambda tensor: pytest.fail("something else was read from the device"))
    match(*seen(), objects())
    assert calls == [(L, sum(NUMBERS), Q)]


def test_a_batch_without_objects_matches_nothing_and_still_has_a_gradient() -> None:
    (logits, seen_boxes), there = seen(), objects((0,) * B)
    logits.requires_grad_()
    seen_boxes.requires_grad_()
    matches = match(logits, seen_boxes, there)
    assert matches.query_P.numel() == 0
    box, overlap = detection.box_losses(seen_boxes, matches, there.box_M4)
    loss = detection.class_loss(logits, matches, there.label_M)
    assert float(box.detach()) == float(overlap.detach()) == 0
    expected = 0.1 * F.cross_entropy(logits.flatten(0, 2), torch.full((L * B * Q,), K - 1), reduction="sum")
    assert float(loss) == pytest.approx(float(expected))
    (loss + box + overlap).backward()
    assert seen_boxes.grad is not None
    assert not seen_boxes.grad.any()


def test_predictions_that_are_no_numbers_are_matched_and_give_no_number() -> None:
    (logits, seen_boxes), there = seen(), objects()
    logits[1, 2] = float("nan")
    seen_boxes[0, 0, 1] = float("inf")
    matches = match(logits, seen_boxes, there)
    assert len(matches.query_P) == L * sum(NUMBERS)
    assert math.isnan(float(detection.class_loss(logits, matches, there.label_M)))


def test_losses_are_sums_whose_counts_come_from_labels_alone() -> None:
    (logits, seen_boxes), there = seen(3), objects(attributes=True)  # fewer queries than row 2 has objects
    matches = match(logits, seen_boxes, there)
    wanted = torch.full((L, B, 3), K - 1)
    weight = torch.full((L, B, 3), 0.1, dtype=torch.float64)
    for layer, row, query, number in zip(
        matches.layer_P, matches.row_P, matches.query_P, matches.object_P, strict=True
    ):
        wanted[layer, row, query], weight[layer, row, query] = there.label_M[number], 1.0
    each = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none")
    loss = detection.class_loss(logits, matches, there.label_M)
    assert float(loss) == pytest.approx(float((each * weight.flatten()).sum()), rel=1e-12)
    counts = detection.counts(there, B, 3)
    assert float(counts["class"]) * L == pytest.approx(float(weight.sum()))
    assert float(counts["box"]) == float(counts["giou"]) == sum(NUMBERS)
    assert there.attributes_MA is not None
    assert float(counts["attributes"]) == sum(max(row) >= 0 for row in there.attributes_MA.tolist())
    box, overlap = detection.box_losses(seen_boxes, matches, there.box_M4)
    pairs = [(matches.of(seen_boxes)[p], there.box_M4[n]) for p, n in enumerate(matches.object_P.tolist())]
    assert float(box) == pytest.approx(sum(float((a - b).abs().sum()) for a, b in pairs), rel=1e-12)
    by_hand = sum(1 - plain_giou(corners(a).tolist(), corners(b).tolist()) for a, b in pairs)
    assert float(overlap) == pytest.approx(by_hand, rel=1e-12)


def test_the_loss_of_attributes_is_half_the_mean_over_those_there_are() -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = detection.attribute_loss(logits, torch.tensor([[2, -1, 5], [-1, -1, -1], [0, 0, 0]]))
    log = logits.log_softmax(-1)
    expected = -0.5 * ((log[0, 2] + log[0, 5]) / 2 + log[2, 0])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad[1].any()


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.1, 0.1, 0.5, 0.3], [0.1, 0.1, 0.5, 0.3], 1.0),
        ([0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], -0.5),  # they touch at a corner: half of the hull is empty
        ([0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75], 0.25),  # one inside of the other
        ([0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 1.0, 1.0], 0.0),  # a predicted box without area
    ],
)
def test_giou_of_known_boxes(a: list[float], b: list[float], expected: float) -> None:
    assert float(giou(torch.tensor(a), torch.tensor(b))) == pytest.approx(expected, abs=1e-6)


def test_giou_of_drawn_boxes_and_its_gradient() -> None:
    a, b = corners(boxes(20, 4)).requires_grad_(), corners(boxes(20, 5))
    found = giou(a, b)
    for number in range(20):
        assert float(found[number]) == pytest.approx(plain_giou(a[number].tolist(), b[number].tolist()), abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: giou(x, b), a)


@pytest.mark.parametrize(
    ("number", "box", "label", "sentence"),
    [
        (1, [0.5, 0.5, 0.0, 0.2], 1, "picture 0 of the batch has a box without area"),
        (1, [0.5, 0.5, 0.2, -0.1], 1, "a box without area"),
        (2, [float("nan"), 0.5, 0.2, 0.1], 1, "picture 2 of the batch has a box that is no number"),
        (2, [0.5, 0.5, float("inf"), 0.1], 1, "a box that is no number"),
        (6, [0.9, 0.5, 0.3, 0.1], 1, "picture 2 of the batch has a box that reaches out of its picture"),
        (9, [0.5, 0.5, 0.3, 0.1], 3, "picture 3 of the batch has a class that is none of 3"),
        (9, [0.5, 0.5, 0.3, 0.1], -1, "a class that is none of 3"),
    ],
)
def test_what_no_loss_is_defined_for_is_refused_where_it_enters(
    number: int, box: list[float], label: int, sentence: str
) -> None:
    there = objects()
    there.check(B, K - 1, "stream 'coco'")
    there.box_M4[number] = torch.tensor(box)
    there.label_M[number] = label
    with pytest.raises(TriviumError, match=f"stream 'coco': .*{sentence}"):
        there.check(B, K - 1, "stream 'coco'")


def test_bfloat16_is_matched_and_judged_in_float32() -> None:
    (logits, seen_boxes), there = seen(), objects()
    low = logits.bfloat16()
    wide = match(low.float(), seen_boxes.float(), there)
    assert torch.equal(match(low, seen_boxes.float(), there).query_P, wide.query_P)
    loss = detection.class_loss(low, wide, there.label_M)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, detection.class_loss(low.float(), wide, there.label_M))
