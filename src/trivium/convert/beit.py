"""BEiT's weights (Bao et al., arXiv 2106.08254) as those of a ViT: the layout of its authors and that of Hugging Face.

BEiT is a ViT with additions, and a ViT can hold some of them without loss:

* queries and values have a bias, keys have none: theirs is zero, which changes nothing in any attention;
* LayerScale multiplies what a branch adds, number by number: folded into the branch's last linear map;
* the token of hidden patches is the ViT's own.

It cannot hold a relative position bias, which the models released for ImageNet-22k have *instead of* positions: those
come without both. The variant of absolute positions (beit_base_patch16_224_pt1k_800ep, with neither bias nor scale)
loads as it is.

D width, P side of a patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.convert.weights import State, listed
from trivium.errors import TriviumError
from trivium.models.vit import ViTConfig

EPS = 1e-6  # of its authors' code; Hugging Face's config.json says its own
HEAD_WIDTH = 64  # of every published BEiT
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # what its authors normalise with, unless told otherwise
_FROM_HF = (
    (r"^beit\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^encoder\.layer\.", "blocks."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^(blocks\.\d+)\.attention\.attention\.relative_position_bias\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.attention\.attention\.(query|key|value)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.lambda_", r"\1.gamma_"),
    (r"^layernorm\.", "norm."),
)
_RELATIVE = re.compile(r"(^|\.)relative_position_(bias_table|index)$")
_HEADS = re.compile(r"^(lm_head|head|classifier|pooler)\.")


def from_beit(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ViTConfig, State, list[str]]:
    """A BEiT -> a ViT with a mask token where it has one, and the sentences that say what was left out.

    Args:
        config: Hugging Face's config.json; {} for the files of its authors. Sizes are read from the shapes.

    Raises:
        TriviumError: missing or unexpected tensors; a fine-tuned BEiT, which has no norm over its tokens.
    """
    theirs = {_renamed(name): tensor for name, tensor in state.items()}
    if "norm.weight" not in theirs:
        raise TriviumError(
            "this BEiT has no final norm over its tokens, so it was fine-tuned to classify their mean: give one as it"
            " was pretrained"
        )
    used: set[str] = set()

    def take(name: str) -> Tensor:
        if name not in theirs:
            raise TriviumError(f"this BEiT misses the tensor {name}")
        used.add(name)
        return theirs[name]

    vit = _config(theirs, config)
    D = vit.width
    ours: State = {
        "patches.projection.weight": take("patch_embed.proj.weight").reshape(D, -1),
        "patches.projection.bias": take("patch_embed.proj.bias"),
        "class_token": take("cls_token"),
        "norm.weight": take("norm.weight"),
        "norm.bias": take("norm.bias"),
    }
    ours["positions"] = take("pos_embed") if "pos_embed" in theirs else torch.zeros(1, 1 + vit.grid**2, D)
    if vit.mask_token:
        ours["mask_token"] = take("mask_token")
    for n in range(vit.num_layers):
        block, its = f"encoder.blocks.{n}", f"blocks.{n}"
        for part in ("weight", "bias"):
            ours[f"{block}.attention_norm.{part}"] = take(f"{its}.norm1.{part}")
            ours[f"{block}.mlp_norm.{part}"] = take(f"{its}.norm2.{part}")
            ours[f"{block}.mlp_in.{part}"] = take(f"{its}.mlp.fc1.{part}")
            for branch, last, gamma in (("attention.out", "attn.proj", 1), ("mlp_out", "mlp.fc2", 2)):
                tensor = take(f"{its}.{last}.{part}")
                if f"{its}.gamma_{gamma}" in theirs:
                    scale_D = take(f"{its}.gamma_{gamma}")
                    tensor = tensor * (scale_D[:, None] if tensor.ndim == 2 else scale_D)
                ours[f"{block}.{branch}.{part}"] = tensor
        if f"{its}.attn.qkv.weight" in theirs:
            weight, query_bias, value_bias = (take(f"{its}.attn.{name}") for name in ("qkv.weight", "q_bias", "v_bias"))
        else:
            weight = torch.cat([take(f"{its}.attn.{name}.weight") for name in ("query", "key", "value")])
            query_bias, value_bias = take(f"{its}.attn.query.bias"), take(f"{its}.attn.value.bias")
        ours[f"{block}.attention.qkv.weight"] = weight
        ours[f"{block}.attention.qkv.bias"] = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
    return vit, ours, _left_out(theirs, used)


def _renamed(name: str) -> str:
    for pattern, replacement in _FROM_HF:
        name = re.sub(pattern, replacement, name)
    return name


def _config(theirs: Mapping[str, Tensor], config: Mapping[str, Any]) -> ViTConfig:
    patches = theirs.get("patch_embed.proj.weight")
    if patches is None:
        raise TriviumError("this BEiT misses the tensor patch_embed.proj.weight")
    D, _, P, _ = patches.shape
    tables = [tensor for name, tensor in theirs.items() if name.endswith("relative_position_bias_table")]
    grid = 0
    if "pos_embed" in theirs:
        grid = math.isqrt(theirs["pos_embed"].shape[1] - 1)
    elif tables:  # (2 grid - 1)^2 distances, and three for the class token
        grid = (math.isqrt(tables[0].shape[0] - 3) + 1) // 2
    layers = [int(match[1]) for name in theirs if (match := re.match(r"blocks\.(\d+)\.", name))]
    if not grid or not layers:
        raise TriviumError("this BEiT has no blocks, or neither positions nor a relative position bias")
    if config.get("hidden_act", "gelu") != "gelu":
        raise TriviumError(f"config.json: hidden_act is {config['hidden_act']!r}, only 'gelu' is supported")
    fc1 = theirs.get("blocks.0.mlp.fc1.weight")
    return ViTConfig(
        width=D,
        num_heads=config.get("num_attention_heads") or (tables[0].shape[1] if tables else max(1, D // HEAD_WIDTH)),
        mlp_width=4 * D if fc1 is None else fc1.shape[0],
        num_layers=1 + max(layers),
        image_size=grid * P,
        patch_size=P,
        eps=config.get("layer_norm_eps", 1e-12) if config else EPS,
        mask_token="mask_token" in theirs,
    )


def _left_out(theirs: Mapping[str, Tensor], used: set[str]) -> list[str]:
    """Sentences for what a ViT has no place for. Raises TriviumError for a tensor that no BEiT has."""
    left = theirs.keys() - used
    relative = {name for name in left if _RELATIVE.search(name)}
    heads = {name for name in left if _HEADS.match(name)}
    if unknown := sorted(left - relative - heads):
        raise TriviumError(f"this BEiT {listed('has unexpected', unknown)}")
    said = []
    if relative:
        places = "" if "pos_embed" in theirs else ", and it has no other positions: those here are zero"
        said.append(f"left out: BEiT's relative position bias, for which a ViT has no place{places}")
    if heads:
        names = ", ".join(sorted({name.split(".")[0] for name in heads}))
        said.append(f"left out: BEiT's own head ({names}); that of masked patches is one linear map, FLAVA's has two")
    return said
