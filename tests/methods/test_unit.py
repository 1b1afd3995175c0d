"""One step of UniT: losses against a plain construction, padding, several processes' worth of micro-batches, and what a
step leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from trivium.errors import TriviumError
from trivium.invariance import split
from trivium.invariance.unit import TINY, make_batch, random_unit, unit_method
from trivium.methods.unit import PARTS, UnitMethod, different
from trivium.objectives.detection import counts, match
from trivium.train import optim
from trivium.train.protocol import Batch, Images, Key
from trivium.train.step import backward
from trivium.train.step import step as take_step


def losses_and_gradients(method: UnitMethod, batches: list[Batch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    method.zero_grad(set_to_none=True)
    sums, divisors, _ = backward(method, batches, Key(0, batches[0].stream, 0))
    losses = {n: float(v / divisors[n].clamp(min=1)) for n, v in sums.items() if not n.startswith("stat/")}
    return losses, {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", ["vg", "vqav2", "qnli"])
def test_a_step_means_the_same_in_any_micro_batches(task: str) -> None:
    method, batch = unit_method(random_unit()), make_batch(task, 8)
    whole, of_whole = losses_and_gradients(method, [batch])
    parts, of_parts = losses_and_gradients(method, split(batch, 4))
    assert whole == pytest.approx(parts, rel=1e-12) and of_whole.keys() == of_parts.keys()
    for name, gradient in of_whole.items():
        torch.testing.assert_close(of_parts[name], gradient, rtol=0, atol=1e-11 * max(1.0, float(gradient.abs().max())))


@pytest.mark.parametrize("way", ["apart", "padded"])  # as on a processor, and as on a GPU
def test_pictures_of_different_sizes_in_one_batch_give_what_each_gives_alone(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivium.models.unit_image.goes_apart", lambda device: way == "apart")
    method, batch = unit_method(random_unit()), make_batch("vg", 4)

    def alone(row: int) -> Batch:
        one = batch.part(row, row + 1, row)
        sizes_B2 = one.images[0].sizes_B2
        assert sizes_B2 is not None
        height, width = sizes_B2[0].tolist()
        return replace(one, images=(Images(one.images[0].pixels_BCHW[:, :, :height, :width], one.images[0].same_B),))

    whole, of_whole = losses_and_gradients(method, [batch])
    parts, of_parts = losses_and_gradients(method, [alone(row) for row in range(4)])
    assert whole == pytest.approx(parts, rel=1e-10)
    for name, gradient in of_whole.items():
        torch.testing.assert_close(of_parts[name], gradient, rtol=0, atol=1e-9 * max(1.0, float(gradient.abs().max())))


def test_a_picture_that_several_rows_are_about_is_encoded_once_to_the_same_losses_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, batch = unit_method(random_unit()), make_batch("vqav2", 6)
    of_B = torch.tensor([2, 0, 0, 1, 2, 2])
    images = batch.images[0]
    assert images.sizes_B2 is not None
    pixels_BCHW, sizes_B2 = images.pixels_BCHW[of_B], images.sizes_B2[of_B]
    alike = replace(batch, images=(Images(pixels_BCHW, of_B, sizes_B2),))
    apart = replace(batch, images=(Images(pixels_BCHW, torch.arange(6), sizes_B2),))
    expected, of_expected = losses_and_gradients(method, [apart])
    seen: list[int] = []
    encode = method.model.encode_image
    monkeypatch.setattr(method.model, "encode_image", lambda x, *rest: seen.append(len(x)) or encode(x, *rest))
    found, of_found = losses_and_gradients(method, [alike])
    assert seen == [3]
    assert found == pytest.approx(expected, rel=1e-12) and of_found.keys() == of_expected.keys()
    for name, gradient in of_expected.items():
        torch.testing.assert_close(of_found[name], gradient, rtol=0, atol=1e-11 * max(1.0, float(gradient.abs().max())))


def test_pictures_with_one_number_are_one_only_where_they_look_the_same() -> None:
    """A number is that of a picture, of which two rows may show two crops."""
    pixels_BCHW = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    pixels_BCHW[3, 0, 0, 0] = 1
    sizes_B2 = torch.full((5, 2), 4)
    sizes_B2[4] = torch.tensor([4, 3])  # the same but for where its padding begins
    first_U, of_B = different(Images(pixels_BCHW, torch.tensor([7, 5, 7, 7, 5]), sizes_B2))
    assert first_U.tolist() == [0, 1, 3, 4] and of_B.tolist() == [0, 1, 0, 2, 3]


def test_sizes_of_pictures_stay_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model looks at them there, and waits for nothing that the device has still to do."""
    method, batch = unit_method(random_unit()), make_batch("vg", 4)
    moved: list[torch.Tensor] = []
    to = method._to
    monkeypatch.setattr(method, "_to", lambda tensor: moved.append(tensor) or to(tensor))
    method.image(batch)
    assert [tensor is batch.images[0].pixels_BCHW for tensor in moved] == [True]


def test_losses_of_detection_are_those_of_the_paper_written_out() -> None:
    """Weighted mean of cross-entropies, L1 and 1 - GIoU over the number of boxes, attributes over the boxes that have
    some: each layer for itself, box by box in plain Python."""
    method, batch = unit_method(random_unit()), make_batch("vg", 6)
    found, _ = losses_and_gradients(method, [batch])
    objects = method.objects(batch, method.model.task("vg"))
    head: Any = method.model.heads["vg"]
    seen = head(method.model.decode("vg", method.image(batch)))
    matches = match(seen.logits_LBQK, seen.boxes_LBQ4, objects)
    expected = dict.fromkeys(PARTS, 0.0)
    for layer in range(len(seen.logits_LBQK)):
        pairs = [
            (int(row), int(query), int(thing))
            for of, row, query, thing in zip(*vars(matches).values(), strict=True)
            if int(of) == layer
        ]
        wanted = torch.full(seen.logits_LBQK.shape[1:3], 6)
        for row, query, thing in pairs:
            wanted[row, query] = objects.label_M[thing]
        weights = torch.tensor([1.0] * 6 + [0.1]).double()
        expected["class"] += float(
            F.cross_entropy(seen.logits_LBQK[layer].detach().flatten(0, 1), wanted.flatten(), weights)
        )
        with_some = int((batch.targets["box_attributes"] >= 0).any(1).sum())
        for row, query, thing in pairs:
            box, true = seen.boxes_LBQ4[layer, row, query].tolist(), objects.box_M4[thing].tolist()
            expected["box"] += sum(abs(a - b) for a, b in zip(box, true, strict=True)) / len(objects.row_M)
            expected["giou"] += (1 - plain_giou(box, true)) / len(objects.row_M)
            attributes = [a for a in batch.targets["box_attributes"][thing].tolist() if a >= 0]
            logits = head.attributes(seen.hidden_LBQD[layer, row, query][None], objects.label_M[thing][None])[0]
            if attributes:
                each = [float(F.cross_entropy(logits.detach(), torch.tensor(a))) for a in attributes]
                expected["attributes"] += 0.5 * sum(each) / len(each) / with_some
    assert found == pytest.approx({f"vg.{part}": value for part, value in expected.items()}, rel=1e-6)


def plain_giou(a: list[float], b: list[float]) -> float:
    (al, at, ar, ab), (bl, bt, br, bb) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (a, b))
    shared = max(0.0, min(ar, br) - max(al, bl)) * max(0.0, min(ab, bb) - max(at, bt))
    union = (ar - al) * (ab - at) + (br - bl) * (bb - bt) - shared
    hull = (max(ar, br) - min(al, bl)) * (max(ab, bb) - min(at, bt))
    return shared / union - (hull - union) / hull


def test_answers_cost_their_sum_over_classes() -> None:
    method, batch = unit_method(random_unit()), make_batch("vqav2", 5)
    losses, _ = losses_and_gradients(method, [batch])
    logits, answers = method.logits(batch), batch.targets["answers"].double()
    mean = F.binary_cross_entropy_with_logits(logits.detach(), answers)
    assert losses == {"vqav2": pytest.approx(float(mean) * 4, rel=1e-9)}


def test_a_step_leaves_what_only_other_tasks_use_and_its_moments_alone() -> None:
    method = unit_method(random_unit(replace(TINY, decoder="separate")))
    optimizer = optim.build(method, optim.Optim(lr=1e-2, weight_decay=0.1))
    for number, task in enumerate(("vg", "vqav2")):  # both have moments now
        take_step(method, [make_batch(task, 4)], Key(0, task, number), optimizer)

    def held() -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([p.detach().flatten(), *(v.flatten() for v in optimizer.state.get(p, {}).values())]).clone()
            for name, p in method.named_parameters()
        }

    before = held()
    take_step(method, [make_batch("vqav2", 4, seed=1)], Key(0, "vqav2", 2), optimizer)
    after = held()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    of_vg = {n for n in before if n.split(".")[2] == "vg" and n.split(".")[1] in ("decoders", "queries", "heads")}
    tokens = {n for n in before if "task_tokens" in n}
    of_vqa = {"model.image.task_tokens.of.vqav2.weight", "model.text_task_tokens.of.vqav2.weight"}
    assert of_vg and not of_vg & changed
    assert "model.image.task_tokens.of.vg.weight" in tokens and tokens & changed == of_vqa
    assert all(dict(method.named_parameters())[name].shape[0] == 1 for name in of_vqa)
    assert {n for n in changed if ".image." in n} and {n for n in changed if ".text." in n}


def test_a_loss_of_weight_0_is_not_computed_and_its_head_not_touched() -> None:
    model, batch = random_unit(), make_batch("vg", 4)
    whole, expected = losses_and_gradients(unit_method(model), [batch])
    method = unit_method(model)
    method.weights["vg.attributes"] = 0.0
    found, gradients = losses_and_gradients(method, [batch])
    assert found == {name: value for name, value in whole.items() if name != "vg.attributes"}
    own = {name for name in expected if ".attributes." in name}
    assert own and not any(name in gradients for name in own)
    assert {n for n in expected if n not in own} == set(gradients)


def test_boxes_that_cannot_be_are_refused_by_a_sentence() -> None:
    method, batch = unit_method(random_unit()), make_batch("vg", 4)
    batch.targets["box"][0, 2] = float("nan")
    with pytest.raises(TriviumError, match=r"stream 'vg'.*no number"):
        backward(method, [batch], Key(0, "vg", 0))


def test_a_batch_of_a_task_that_there_is_not_is_refused() -> None:
    method, batch = unit_method(random_unit()), make_batch("vg", 4)
    with pytest.raises(TriviumError, match="hateful_memes"):
        method.counts(replace(batch, stream="hateful_memes"))


def test_what_divides_a_loss_comes_from_labels_alone() -> None:
    """More boxes than queries: the queries bound what is matched, the boxes still count."""
    batch = make_batch("vg", 4)
    objects = unit_method(random_unit()).objects(batch, TINY.tasks[0])
    found = counts(objects, 4, 2)
    of_row = torch.bincount(objects.row_M, minlength=4)
    assert float(found["box"]) == len(objects.row_M)
    assert float(found["class"]) == pytest.approx(float((of_row.clamp(max=2) + 0.1 * (2 - of_row.clamp(max=2))).sum()))
