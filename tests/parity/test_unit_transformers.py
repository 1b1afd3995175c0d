"""UniT's picture side beside transformers' DETR: a UniT of one task without task tokens and residual is a DETR.

transformers has no dilated backbone, so both have the plain one here; DC5 is tests/parity/test_unit_plain.py's. With
`auxiliary_loss` its decoder hands the *normed* states of a layer to the next, which neither DETR nor UniT does: it is
off here, and the states of all layers are normed by the test. Gradients of key biases, which are zero, stay below 1e-9
of the norm of their key weight's gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from published_unit import set_losses
from torch import Tensor

from tests.parity.test_unit_plain import draw_weights
from trivium.convert.places import Place, give
from trivium.convert.unit import detr_places
from trivium.models.unit import Unit, UnitConfig, UnitTask
from trivium.objectives import detection
from trivium.objectives.detection import Objects

TINY = UnitConfig(
    tasks=(UnitTask("coco", "detection", "image", 7, 0, 6),), width=32, num_heads=4, mlp_width=40, decoder_layers=3,
    image_width=32, image_layers=2, backbone_widths=(4, 6, 8, 10), backbone_blocks=(1, 2, 3, 1), dilated=False,
    text_layers=0, dropout=0.0, num_task_tokens=0, residual=False,
)  # fmt: skip
BASE = UnitConfig(
    tasks=(UnitTask("coco", "detection", "image", 91, 0, 100),), width=256, image_width=256, dilated=False,
    text_layers=0, dropout=0.0, num_task_tokens=0, residual=False,
)  # fmt: skip


def their_name(name: str) -> tuple[str, ...]:
    """DETR's own name -> transformers'; three of them for a packed projection."""
    for old, new in (
        ("backbone.0.body.conv1.", "model.backbone.model.embedder.embedder.convolution."),
        ("backbone.0.body.bn1.", "model.backbone.model.embedder.embedder.normalization."),
        ("backbone.0.body.", "model.backbone.model.encoder.stages."),
        (".downsample.0.", ".shortcut.convolution."), (".downsample.1.", ".shortcut.normalization."),
        ("transformer.encoder.", "model.encoder."), ("transformer.decoder.norm.", "model.decoder.layernorm."),
        ("transformer.decoder.", "model.decoder."), ("input_proj.", "model.input_projection."),
        ("query_embed.", "model.query_position_embeddings."), ("class_embed.", "class_labels_classifier."),
        ("bbox_embed.", "bbox_predictor."), (".multihead_attn.", ".encoder_attn."), (".out_proj.", ".o_proj."),
        (".linear1.", ".mlp.fc1."), (".linear2.", ".mlp.fc2."),
    ):  # fmt: skip
        name = name.replace(old, new)
    for stage in range(4):
        name = name.replace(f"stages.layer{stage + 1}.", f"stages.{stage}.layers.")
    for n in range(3):
        name = name.replace(f".conv{n + 1}.", f".layer.{n}.convolution.")
        name = name.replace(f".bn{n + 1}.", f".layer.{n}.normalization.")
    if "encoder.layers" in name and "backbone" not in name:
        name = name.replace("norm1", "self_attn_layer_norm").replace("norm2", "final_layer_norm")
    name = name.replace("norm1", "self_attn_layer_norm").replace("norm2", "encoder_attn_layer_norm")
    name = name.replace("norm3", "final_layer_norm")
    if ".in_proj_" in name:
        start, part = name.split(".in_proj_")
        return tuple(f"{start}.{piece}_proj.{part}" for piece in "qkv")
    return (name,)


def their_places(config: UnitConfig) -> list[Place]:
    places = []
    for place in detr_places(config):
        there = their_name(place.theirs[0])
        places.append(Place(place.ours, there, "stacked" if len(there) > 1 else "plain", place.shape))
    return places


def both(config: UnitConfig, dtype: torch.dtype, std: float) -> tuple[Unit, Any]:
    ours = Unit(config)
    draw_weights(ours, std)
    task = config.tasks[0]
    backbone = transformers.ResNetConfig(
        embedding_size=config.backbone_widths[0], hidden_sizes=[4 * width for width in config.backbone_widths],
        depths=list(config.backbone_blocks), layer_type="bottleneck", out_features=["stage4"],
    )  # fmt: skip
    theirs = transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=backbone, num_queries=task.num_queries, num_labels=task.num_labels, d_model=config.width,
        encoder_layers=config.image_layers, decoder_layers=config.decoder_layers,
        encoder_ffn_dim=config.mlp_width, decoder_ffn_dim=config.mlp_width,
        encoder_attention_heads=config.num_heads, decoder_attention_heads=config.num_heads,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, attn_implementation="eager",
    ))  # fmt: skip
    theirs.requires_grad_(True)  # its backbone comes frozen
    state = {name: tensor.clone() for name, tensor in give(ours.state_dict(), their_places(config)).items()}
    theirs.load_state_dict(state, strict=True)
    return ours.to(dtype).train(), theirs.to(dtype).train()


def run_both(
    config: UnitConfig, dtype: torch.dtype, std: float, size: tuple[int, int]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    ours, theirs = both(config, dtype, std)
    task = config.tasks[0]
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, *size, generator=draw).to(dtype)
    row_M = torch.tensor([0, 0, 0, 1])
    size_M2 = torch.rand(4, 2, generator=draw) * 0.4 + 0.05
    box_M4 = torch.cat([size_M2 / 2 + torch.rand(4, 2, generator=draw) * (1 - size_M2), size_M2], 1).to(dtype)
    there = Objects(row_M, torch.randint(0, task.num_labels, (4,), generator=draw), box_M4)

    image = ours.encode_image(pixels)
    seen: Any = ours.heads["coco"](ours.decode("coco", image))
    matches = detection.match(seen.logits_LBQK, seen.boxes_LBQ4, there)
    box, giou = detection.box_losses(seen.boxes_LBQ4, matches, there.box_M4)
    sums = {"class": detection.class_loss(seen.logits_LBQK, matches, there.label_M), "box": box, "giou": giou}
    counts = detection.counts(there, 2, task.num_queries)
    my_losses = {name: value / counts[name] for name, value in sums.items()}

    of_layers: list[Tensor] = []
    for layer in theirs.model.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, state: of_layers.append(state))
    output = theirs(pixel_values=pixels)
    hidden = theirs.model.decoder.layernorm(torch.stack(of_layers))
    logits, boxes = theirs.class_labels_classifier(hidden), theirs.bbox_predictor(hidden).sigmoid()
    torch.testing.assert_close(boxes[-1], output.pred_boxes)
    targets = [{"class_labels": there.label_M[row_M == n], "boxes": box_M4[row_M == n]} for n in range(2)]
    found, matchings = set_losses(logits, boxes, targets, task.num_labels)
    for layer, matching in enumerate(matchings):
        for row, (queries, numbers) in enumerate(matching):
            here = (matches.layer_P == layer) & (matches.row_P == row)
            first = int((row_M < row).sum())
            mine = zip(matches.object_P[here].tolist(), matches.query_P[here].tolist(), strict=True)
            assert set(mine) == set(zip((numbers + first).tolist(), queries.tolist(), strict=True))
    their_losses = {"class": found["loss_ce"], "box": found["loss_bbox"], "giou": found["loss_giou"]}
    for losses in (my_losses, their_losses):
        sum(losses.values()).backward()  # type: ignore[union-attr]
    nothing = {name: torch.zeros_like(buffer) for name, buffer in ours.named_buffers()}
    my_grads = give(nothing | {n: p.grad for n, p in ours.named_parameters()}, their_places(config))
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    return {
        "states": (
            {"memory": image.states.detach(), "logits": seen.logits_LBQK.detach(), "boxes": seen.boxes_LBQ4.detach()},
            {"memory": output.encoder_last_hidden_state.detach(), "logits": logits.detach(), "boxes": boxes.detach()},
        ),
        "losses": tuple({n: t.detach() for n, t in losses.items()} for losses in (my_losses, their_losses)),
        "gradients": ({name: my_grads[name] for name in their_grads}, their_grads),
    }  # type: ignore[return-value]


@pytest.mark.parametrize("size", ["tiny", pytest.param("base", marks=pytest.mark.slow)])
def test_agrees_in_float64(size: str) -> None:
    """Base too: in float32 some of a hundred queries with drawn weights cost the same, and either may be matched."""
    config, std, sides = (TINY, 0.2, (64, 96)) if size == "tiny" else (BASE, 0.02, (160, 192))
    found = run_both(config, torch.float64, std, sides)
    for mine, yours in found.values():
        for tensor, expected in yours.items():
            if not tensor.endswith("k_proj.bias"):
                error = float((mine[tensor] - expected).abs().max())
                assert error <= 1e-9 * float(expected.abs().max()) + 1e-15, f"{tensor}: differs by {error:.3g}"
    for grads in found["gradients"]:
        for name in (name for name in grads if name.endswith("k_proj.bias")):
            bias, weight = float(grads[name].norm()), float(grads[f"{name.removesuffix('bias')}weight"].norm())
            assert bias <= 1e-9 * weight + 1e-15, f"{name}: {bias:.3g} beside {weight:.3g}"
