"""Towers that were trained alone, as the start of a model's: FLAVA's by name, each tensor taken or said to be left out.

FLAVA's image encoder is a ViT with the same blocks, so a ViT, a DeiT and a DINO come over number by number. What makes
their features the same to the last digit besides is LayerNorm's eps (1e-6 there, 1e-12 in the published FLAVA) and
the mean and deviation that pixels are normalised with.

N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.errors import TriviumError
from trivium.layers.embeddings import interpolate_positions
from trivium.models.flava import Flava, FlavaConfig
from trivium.models.vit import ViT, ViTConfig

State = dict[str, Tensor]
TEXT = ("text.", "mlm_head.")  # the text encoder, and the head that is trained with it alone


def check_shape(tower: str, its: Mapping[str, int], config: Any) -> None:
    """Raises TriviumError where a tower is of another shape than the model's; the sentence names the flags to set.

    its: what the tower has, by the fields of the model's config.
    """
    different = {name: value for name, value in its.items() if value != getattr(config, name)}
    if different:
        flags = " ".join(f"--model.{name.replace('_', '-')} {value}" for name, value in different.items())
        raise TriviumError(f"{tower} is of another shape than the model's: set {flags}")


def shape_of(vit: ViTConfig) -> dict[str, int]:
    """What of a ViT must agree, by the fields of FLAVA's config and of ALBEF's."""
    return {"width": vit.width, "num_heads": vit.num_heads, "mlp_width": vit.mlp_width, "image_layers": vit.num_layers,
            "patch_size": vit.patch_size}  # fmt: skip


def image_from_vit(state: Mapping[str, Tensor], vit: ViTConfig, config: FlavaConfig) -> tuple[State, list[str]]:
    """The tensors of a ViT under the names of FLAVA's image encoder, and sentences for what differs.

    Raises:
        TriviumError: another shape; the sentence names the flags that make FLAVA's the same.
    """
    check_shape("the image tower", shape_of(vit), config)
    taken = {f"image.{name}": tensor for name, tensor in state.items()}
    said = []
    if vit.grid != config.grid:
        class_1D, patches_ND = state["positions"][0].split([1, vit.grid**2])
        grids = ((vit.grid, vit.grid), (config.grid, config.grid))
        patches_ND = interpolate_positions(patches_ND.float(), *grids, offset=vit.position_offset)
        taken["image.positions"] = torch.cat([class_1D.float(), patches_ND])[None]
        said.append(
            f"its positions, of {vit.grid} x {vit.grid} patches, are interpolated to {grids[1][0]} x {grids[1][0]}"
        )
    if vit.eps != config.eps:
        said.append(
            f"its LayerNorms have eps {vit.eps:g}, the model's {config.eps:g}: for equal features set --model.eps"
            f" {vit.eps:g}"
        )
    if not vit.mask_token:
        said.append("it has no token for hidden patches: the model's is drawn")
    return taken, said


def vit_of(model: Flava) -> ViT:
    """The image encoder of a FLAVA as a ViT. Its tensors are the same: what trains one trains the other."""
    config = model.config
    vit_config = ViTConfig(
        config.width, config.num_heads, config.mlp_width, config.image_layers, config.image_size, config.patch_size,
        config.eps, config.dropout, mask_token=True,
    )  # fmt: skip
    with torch.device("meta"):
        vit = ViT(vit_config)
    state = {name: tensor for name, tensor in model.image.state_dict().items() if not name.startswith("pooler.")}
    vit.load_state_dict(state, assign=True)
    return vit


def parts_of(state: Mapping[str, Tensor], parts: tuple[str, ...]) -> State:
    """Of a FLAVA's weights those of some parts, such as TEXT."""
    return {name: tensor for name, tensor in state.items() if name.startswith(parts)}
