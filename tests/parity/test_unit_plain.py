"""UniT beside its description written out: states, losses and gradients of every kind of task, through the converter.

Weights are drawn in the plain model and read by the converter, so it runs too. Gradients are compared under the names
of the released layout; those of key biases, whose true gradient is zero, stay below 1e-9 of the norm of their key
weight's gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from published_unit import PlainUnit, set_losses
from torch import Tensor
from torch.nn import functional as F

from trivium.convert.unit import build, config_beside, from_mmf, to_mmf
from trivium.models.unit import PUBLISHED_TASKS, Unit, UnitConfig, UnitTask
from trivium.objectives import detection
from trivium.objectives.detection import Objects

LABELS = {"coco": 7, "vg": 9, "vqav2": 11, "snli_ve": 3}
SMALL_TASKS = tuple(
    replace(task, num_labels=LABELS.get(task.name, task.num_labels), num_queries=5,
            num_attributes=task.num_attributes and 6)
    for task in PUBLISHED_TASKS
)  # fmt: skip
TINY = UnitConfig(
    tasks=SMALL_TASKS, width=32, num_heads=4, mlp_width=40, decoder_layers=3, image_width=16, image_layers=2,
    backbone_widths=(4, 6, 8), backbone_blocks=(1, 2, 3), text_width=24, text_heads=3, text_mlp_width=36,
    text_layers=2, vocab_size=50, max_length=12, dropout=0.0, num_task_tokens=16, attribute_width=8,
)  # fmt: skip
BASE = UnitConfig(dropout=0.0)
SIZES = [(53, 37), (64, 31), (33, 64)]


def draw_weights(model: torch.nn.Module, std: float) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.endswith("empty_weight"):
                continue
            if tensor.ndim == 4:  # convolutions keep the scale of what passes
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=draw)
            elif name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.uniform_(0.7, 1.3, generator=draw)
                if "bn3.weight" in name or "convolutions.2.norm.weight" in name:
                    tensor.mul_(0.2)  # or sixteen blocks, each added to its input, make numbers grow without end
            else:
                tensor.normal_(0, std, generator=draw)


def both(config: UnitConfig, dtype: torch.dtype, std: float = 0.1) -> tuple[Unit, PlainUnit]:
    plain = PlainUnit(config)
    draw_weights(plain, std)
    found, state = from_mmf(plain.official_state(), config_beside(config))
    assert replace(found, dropout=0.0) == config
    return build(replace(found, dropout=0.0), state).to(dtype).train(), plain.to(dtype).train()


def inputs(config: UnitConfig, task: UnitTask, dtype: torch.dtype, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    rows = len(sizes)
    mask_BT = torch.arange(7) < torch.tensor([7, 3, 5])[:rows, None]
    ids_BT = torch.randint(1, config.vocab_size, (rows, 7), generator=draw).where(mask_BT, 0)
    segments_BT = torch.randint(0, 2, (rows, 7), generator=draw)
    pictures = [torch.randn(1, 3, *size, generator=draw).to(dtype) for size in sizes]
    numbers = torch.tensor([3, 0, 4])[:rows]
    row_M = torch.arange(rows).repeat_interleave(numbers)
    size_M2 = torch.rand(len(row_M), 2, generator=draw) * 0.4 + 0.05
    box_M4 = torch.cat([size_M2 / 2 + torch.rand(len(row_M), 2, generator=draw) * (1 - size_M2), size_M2], 1).to(dtype)
    attributes = torch.randint(-1, 6, (len(row_M), 4), generator=draw)
    attributes[0] = -1
    there = Objects(row_M, torch.randint(0, task.num_labels, (len(row_M),), generator=draw), box_M4,
                    attributes if task.num_attributes else None)  # fmt: skip
    return {
        "pictures": pictures, "text": (ids_BT, mask_BT, segments_BT), "objects": there,
        "soft": torch.rand(rows, task.num_labels, generator=draw).to(dtype),
        "label": torch.randint(0, task.num_labels, (rows,), generator=draw),
    }  # fmt: skip


def padded(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    sizes_B2 = torch.tensor([picture.shape[2:] for picture in pictures])
    height, width = sizes_B2.amax(0).tolist()
    pixels = pictures[0].new_full((len(pictures), 3, height, width), 9.0)  # what stands there has no effect
    for row, picture in enumerate(pictures):
        pixels[row, :, : picture.shape[2], : picture.shape[3]] = picture[0]
    return pixels, sizes_B2


def ours(model: Unit, task: UnitTask, given: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States and losses, divided as the public code divides them."""
    pixels, sizes_B2 = padded(given["pictures"])
    image = model.encode_image(pixels, sizes_B2, task.name) if task.reads != "text" else None
    text = model.encode_text(*given["text"], task.name) if task.reads != "image" else None
    if task.kind == "labels":
        logits = model.label(task.name, image, text)
        loss = F.cross_entropy(logits, given["label"])
        if task.name == "vqav2":
            loss = F.binary_cross_entropy_with_logits(logits, given["soft"], reduction="sum") / len(logits)
        return {"logits": logits}, {"loss": loss}
    there, head = given["objects"], model.heads[task.name]
    seen = head(model.decode(task.name, image))
    matches = detection.match(seen.logits_LBQK, seen.boxes_LBQ4, there)
    box, giou = detection.box_losses(seen.boxes_LBQ4, matches, there.box_M4)
    sums = {"class": detection.class_loss(seen.logits_LBQK, matches, there.label_M), "box": box, "giou": giou}
    if task.num_attributes is not None:
        logits_PK = head.attributes(matches.of(seen.hidden_LBQD), there.label_M[matches.object_P])
        sums["attributes"] = detection.attribute_loss(logits_PK, there.attributes_MA[matches.object_P])
    counts = detection.counts(there, len(pixels), task.num_queries)
    losses = {name: value / counts[name] for name, value in sums.items()}
    return {"logits": seen.logits_LBQK, "boxes": seen.boxes_LBQ4, "hidden": seen.hidden_LBQD}, losses


def theirs(model: PlainUnit, task: UnitTask, given: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    hidden = model(task, given["pictures"], *given["text"])
    if task.kind == "labels":
        logits = model.logits(task, hidden)
        loss = F.cross_entropy(logits, given["label"])
        if task.name == "vqav2":
            loss = F.binary_cross_entropy_with_logits(logits, given["soft"]) * task.num_labels
        return {"logits": logits}, {"loss": loss}
    logits, boxes = model.detected(task, hidden)
    there = given["objects"]
    targets = [
        {"class_labels": there.label_M[there.row_M == row], "boxes": there.box_M4[there.row_M == row]}
        for row in range(logits.shape[1])
    ]
    found, matchings = set_losses(logits, boxes, targets, task.num_labels)
    losses = {"class": found["loss_ce"], "box": found["loss_bbox"], "giou": found["loss_giou"]}
    if task.num_attributes is not None:  # for each layer: every query its target class and its attributes
        total = torch.zeros(())
        for layer, matching in enumerate(matchings):
            each = []
            for row, (queries, numbers) in enumerate(matching):
                classes = torch.full((task.num_queries,), task.num_labels)
                classes[queries] = targets[row]["class_labels"][numbers]
                scores = model.attributes(task, hidden[layer, row], classes)
                mine = there.attributes_MA[there.row_M == row]
                for query, number in zip(queries, numbers, strict=True):
                    valid = mine[number][mine[number] >= 0]
                    if len(valid):
                        each.append(0.5 * F.cross_entropy(scores[query].expand(len(valid), -1), valid))
            total = total + torch.stack(each).sum() / len(each)
        losses["attributes"] = total
    return {"logits": logits, "boxes": boxes, "hidden": hidden}, losses


def run_both(
    config: UnitConfig, name: str, dtype: torch.dtype, sizes: list[tuple[int, int]], std: float
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    mine, plain = both(config, dtype, std)
    task = mine.task(name)
    given = inputs(config, task, dtype, sizes)
    found = [side(model, task, given) for side, model in ((ours, mine), (theirs, plain))]
    for _, losses in found:
        sum(losses.values()).backward()  # type: ignore[union-attr]
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in mine.named_parameters()}
    buffers = {n: torch.zeros_like(b) for n, b in mine.named_buffers()}
    in_their_names = to_mmf({**buffers, **grads}, config)
    parameters = dict(plain.named_parameters())  # each once, whatever names it has
    their_grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in parameters.items()}
    # The pooler is left out of ours, and nothing reads it.
    their_grads = {n: g for n, g in their_grads.items() if ".pooler." not in n}
    (my_states, my_losses), (their_states, their_losses) = found
    return {
        "states": ({n: t.detach() for n, t in my_states.items()}, {n: t.detach() for n, t in their_states.items()}),
        "losses": ({n: t.detach() for n, t in my_losses.items()}, {n: t.detach() for n, t in their_losses.items()}),
        "gradients": ({n: in_their_names[n] for n in their_grads}, their_grads),
    }


def without_key_bias(name: str, grad: Tensor) -> Tensor:
    """A packed bias without its middle third: a key's bias moves all scores of a query alike."""
    third = len(grad) // 3
    return torch.cat([grad[:third], grad[2 * third :]]) if name.endswith("in_proj_bias") else grad


def key_biases(grads: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Norms of the gradients of each key bias and of its weight, the middle third of a packed one."""
    found = {}
    for name, grad in grads.items():
        if name.endswith(("in_proj_bias", "self.key.bias")):
            pair = grad, grads[name.removesuffix("bias") + "weight"]
            keys = pair if name.endswith("key.bias") else (each.chunk(3)[1] for each in pair)
            bias, weight = (float(each.norm()) for each in keys)
            found[name] = bias, weight
    return found


def assert_no_gradient_at_key_biases(gradients: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    """Where there is one key, or all values are alike, weights have none either but for roundings."""
    for grads in gradients:
        sizes = key_biases(grads)
        for name, (bias, weight) in sizes.items():
            assert bias <= 1e-9 * weight + 1e-15, f"{name}: {bias:.3g} beside {weight:.3g}"
        assert sum(weight > 1e-12 for _, weight in sizes.values()) >= 2


def assert_agrees_in_float64(found: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]) -> None:
    for kind, (mine, yours) in found.items():
        assert mine.keys() == yours.keys()
        for tensor, expected in yours.items():
            if tensor.endswith("self.key.bias"):
                continue
            a, b = (without_key_bias(tensor, t) if kind == "gradients" else t for t in (mine[tensor], expected))
            error, scale = float((a - b).abs().max()), float(b.abs().max())
            assert error <= 1e-9 * scale + 1e-15, f"{tensor}: differs by {error:.3g} of {scale:.3g}"
    assert_no_gradient_at_key_biases(found["gradients"])
    used = sum(bool(grad.any()) for grad in found["gradients"][1].values())
    assert used > 60, "most parameters take part"


@pytest.mark.parametrize("decoder", ["shared", "separate"])
@pytest.mark.parametrize("name", ["coco", "vg", "vqav2", "snli_ve", "mnli"])
def test_tiny_agrees_in_float64(name: str, decoder: str) -> None:
    config = replace(TINY, decoder=decoder, num_task_tokens=16 if decoder == "shared" else 0)  # type: ignore[arg-type]
    assert_agrees_in_float64(run_both(config, name, torch.float64, SIZES, 0.2))


def pad_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of all sizes in one pass, as on a GPU: a processor takes those of each size apart."""
    monkeypatch.setattr("trivium.models.unit_image.goes_apart", lambda device: False)


@pytest.mark.parametrize("name", ["coco", "vqav2"])
def test_tiny_agrees_in_float64_with_pictures_padded_to_the_largest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pad_all(monkeypatch)
    assert_agrees_in_float64(run_both(TINY, name, torch.float64, SIZES, 0.2))


@pytest.mark.parametrize(("name", "padded"), [("vqav2", True), pytest.param("vg", False, marks=pytest.mark.slow)])
def test_base_agrees(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """States and losses in float32; gradients in float64, since through fifty layers of ReLU float32 leaves those of
    the first convolution 2e-4 to 6e-4 apart."""
    if padded:
        pad_all(monkeypatch)
    config = replace(BASE, tasks=tuple(task for task in PUBLISHED_TASKS if task.name == name))
    sizes = [(96, 130), (128, 80)]
    found = run_both(config, name, torch.float32, sizes, 0.02)
    for tensor, expected in found["states"][1].items():
        error = float((found["states"][0][tensor] - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), f"{tensor}: differs by {error:.3g}"
    for tensor, expected in found["losses"][1].items():
        assert float(found["losses"][0][tensor]) == pytest.approx(float(expected), rel=1e-5)
    assert_agrees_in_float64(run_both(config, name, torch.float64, sizes, 0.02))
