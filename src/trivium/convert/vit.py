"""ViT, DeiT and DINO weights in and out: the layouts of timm (DeiT's and DINO's too) and of Hugging Face.

timm          blocks.3.attn.qkv.weight, pos_embed; a classifier under head., which is left out
DINO          the same under backbone., and its projection head under head.mlp. and head.last_layer.
Hugging Face  encoder.layer.3.attention.attention.query.weight, under vit. in a model with a classifier; q, k, v apart
ours          encoder.blocks.3.attention.qkv.weight, under backbone. in a Dino

In timm's layout sizes are read from shapes; the number of heads, which no shape shows, is width / 64, as in every
released ViT, unless the config.json beside says it. A DINO checkpoint as it was saved in training holds a student and a
teacher; the teacher is taken, as in the published files.

D width, P side of a patch, K prototypes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.convert.places import Place, give, pair, take
from trivium.convert.weights import State, listed
from trivium.errors import TriviumError
from trivium.models.dino import Dino, DinoConfig
from trivium.models.vit import ViT, ViTConfig

HEAD_WIDTH = 64  # of one attention head in every released ViT
_TIMM_LEFT = re.compile(r"(head|head_dist|pre_logits)\.")  # classifiers
_HF_LEFT = re.compile(r"(classifier|pooler|cls_classifier|distillation_classifier|decoder)\.")
_QKV = {"q": "query", "k": "key", "v": "value"}
_HF_IN_MEMORY: tuple[
    tuple[str, str | Callable[[re.Match[str]], str]], ...
] = (  # names that a model of the newer library has in memory, where files keep the older ones
    (r"^layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.([qkv])_proj\.", lambda match: f".attention.attention.{_QKV[match[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


# ------------------------------------------------------------------------------------------ timm, DeiT and DINO


def timm_places(config: ViTConfig, ours: str = "", theirs: str = "") -> Iterator[Place]:
    """Where every tensor of a ViT stands in timm's layout. ours, theirs: prefixes of all names."""
    P, D = config.patch_size, config.width
    yield Place(f"{ours}class_token", (f"{theirs}cls_token",))
    if config.mask_token:
        yield Place(f"{ours}mask_token", (f"{theirs}mask_token",), shape=(1, D))
    yield Place(f"{ours}positions", (f"{theirs}pos_embed",))
    yield Place(f"{ours}patches.projection.weight", (f"{theirs}patch_embed.proj.weight",), shape=(D, 3, P, P))
    yield Place(f"{ours}patches.projection.bias", (f"{theirs}patch_embed.proj.bias",))
    names = (("attention_norm", "norm1"), ("attention.qkv", "attn.qkv"), ("attention.out", "attn.proj"),
             ("mlp_norm", "norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"))  # fmt: skip
    for n in range(config.num_layers):
        for mine, other in names:
            yield from pair(f"{ours}encoder.blocks.{n}.{mine}", f"{theirs}blocks.{n}.{other}")
    yield from pair(f"{ours}norm", f"{theirs}norm")


def dino_places(config: DinoConfig) -> Iterator[Place]:
    """The tower and the head of DINO."""
    yield from timm_places(config, "backbone.", "backbone.")
    for layer in (0, 2, 4):
        yield from pair(f"head.mlp.{layer}", f"head.mlp.{layer}")
    yield Place("head.gain", ("head.last_layer.weight_g",), shape=(config.num_prototypes, 1))
    yield Place("head.prototypes", ("head.last_layer.weight_v",))


def from_timm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ViTConfig, State, list[str]]:
    """A ViT of timm, DeiT or DINO (the published backbones) -> ours, and what was left out.

    Args:
        config: the config.json beside it, as timm writes one; {} without.

    Raises:
        TriviumError: missing, unexpected or wrongly shaped tensors; a distilled DeiT, whose second token has no place.
    """
    if "dist_token" in state:
        raise TriviumError("this is a distilled DeiT, whose second class token has no place in a ViT: take one without")
    left = sorted(name for name in state if _TIMM_LEFT.match(name))
    kept = {name: tensor for name, tensor in state.items() if name not in set(left)}
    offset = 0.0 if left else DinoConfig.position_offset  # the published backbones of DINO have no classifier
    ours = ViTConfig(**_sizes(kept, config), position_offset=offset)
    return ours, take(kept, timm_places(ours), _shapes(ViT, ours), "ViT"), left


def from_dino(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[DinoConfig, State]:
    """The student or the teacher of a full DINO checkpoint -> ours.

    Whether its gain was fixed is not told by a file: it is taken as fixed where all of it is 1.

    Raises:
        TriviumError: missing, unexpected or wrongly shaped tensors.
    """
    tower = {name.removeprefix("backbone."): state[name] for name in state if name.startswith("backbone.")}
    needed = ("head.mlp.0.weight", "head.last_layer.weight_v", "head.last_layer.weight_g")
    missing = [name for name in needed if name not in state]
    if missing:
        raise TriviumError(f"this DINO checkpoint {listed('misses', missing)}: is it one with batch norm in its head?")
    hidden, prototypes, gain = (state[name] for name in needed)
    ours = DinoConfig(
        **_sizes(tower, config),
        head_width=hidden.shape[0],
        bottleneck_width=prototypes.shape[1],
        num_prototypes=prototypes.shape[0],
        fixed_gain=bool((gain == 1).all()),
    )
    return ours, take(state, dino_places(ours), _shapes(Dino, ours), "DINO")


def to_timm(model: ViT | Dino) -> State:
    """Our tower under timm's names, as DINO publishes its backbones. Tensors may be views."""
    tower = model.backbone if isinstance(model, Dino) else model
    return give(tower.state_dict(), timm_places(tower.config))


def to_dino(model: Dino) -> State:
    """Tower and head under the names of a full checkpoint's teacher."""
    return give(model.state_dict(), dino_places(model.config))


def config_to_timm(config: ViTConfig) -> dict[str, Any]:
    """A config.json as timm writes one; `model_args` are what its VisionTransformer takes."""
    return {
        "architecture": "vit_base_patch16_224",  # any of its plain ViTs: model_args say the rest
        "num_classes": 0,
        "num_features": config.width,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.num_layers,
            "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_width / config.width,
        },
    }


def _sizes(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config that shapes tell."""
    needed = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    wrong = [name for name, ndim in needed.items() if name not in state or state[name].ndim != ndim]
    if wrong:
        raise TriviumError(f"this ViT {listed('misses', wrong)}")
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    numbers = [int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, state) if match]
    heads = (config.get("model_args") or {}).get("num_heads")
    if heads is None:
        if width % HEAD_WIDTH:
            raise TriviumError(
                f"width {width} is no multiple of {HEAD_WIDTH}, so the number of attention heads is not known: put a"
                ' config.json with {"model_args": {"num_heads": ...}} beside the weights'
            )
        heads = width // HEAD_WIDTH
    return {
        "width": width,
        "num_heads": heads,
        "mlp_width": state["blocks.0.mlp.fc1.weight"].shape[0],
        "num_layers": 1 + max(numbers),
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "mask_token": "mask_token" in state,
    }


# ------------------------------------------------------------------------------------- Hugging Face transformers


def hf_places(config: ViTConfig) -> Iterator[Place]:
    """Where every tensor of a ViT stands in the files of a ViTModel."""
    P, D = config.patch_size, config.width
    yield Place("class_token", ("embeddings.cls_token",))
    if config.mask_token:
        yield Place("mask_token", ("embeddings.mask_token",))
    yield Place("positions", ("embeddings.position_embeddings",))
    projection = "embeddings.patch_embeddings.projection"
    yield Place("patches.projection.weight", (f"{projection}.weight",), shape=(D, 3, P, P))
    yield Place("patches.projection.bias", (f"{projection}.bias",))
    for n in range(config.num_layers):
        ours, theirs = f"encoder.blocks.{n}", f"encoder.layer.{n}"
        yield from pair(f"{ours}.attention_norm", f"{theirs}.layernorm_before")
        for part in ("weight", "bias"):
            pieces = tuple(f"{theirs}.attention.attention.{piece}.{part}" for piece in _QKV.values())
            yield Place(f"{ours}.attention.qkv.{part}", pieces, "stacked")
        yield from pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
        yield from pair(f"{ours}.mlp_norm", f"{theirs}.layernorm_after")
        yield from pair(f"{ours}.mlp_in", f"{theirs}.intermediate.dense")
        yield from pair(f"{ours}.mlp_out", f"{theirs}.output.dense")
    yield from pair("norm", "layernorm")


def from_hf(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ViTConfig, State, list[str]]:
    """Weights of a ViTModel, or of one with a classifier, and its config.json -> ours, and what was left out.

    The names that such a model has in memory, which newer releases of the library changed, are taken too.

    Raises:
        TriviumError: another family or an unsupported variant (names what differs); missing, unexpected or wrongly
            shaped tensors.
    """
    named = {}
    for key, tensor in state.items():
        name = re.sub(r"^(vit|deit)\.", "", key)
        for pattern, replacement in _HF_IN_MEMORY:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    left = sorted(name for name in named if _HF_LEFT.match(name))
    kept = {name: tensor for name, tensor in named.items() if name not in set(left)}
    ours = config_from_hf(config, mask_token="embeddings.mask_token" in kept)
    return ours, take(kept, hf_places(ours), _shapes(ViT, ours), "ViT"), left


def to_hf(model: ViT | Dino) -> State:
    """Our tower under the names in the files of a ViTModel without a pooler. Tensors may be views."""
    tower = model.backbone if isinstance(model, Dino) else model
    return give(tower.state_dict(), hf_places(tower.config))


def config_from_hf(config: Mapping[str, Any], mask_token: bool) -> ViTConfig:
    """The config.json of a ViTModel -> ours. Absent fields have the library's defaults.

    Raises:
        TriviumError: another family, or a variant that this model does not have; the sentence names the field.
    """
    if not config:
        raise TriviumError("Hugging Face's layout needs the config.json of the model beside its weights: add it")
    family = config.get("model_type", "vit")
    if family == "deit":
        raise TriviumError("config.json says model_type \"deit\", a distilled DeiT, whose second class token has no"
                           ' place in a ViT: take one without ("vit")')  # fmt: skip
    if family != "vit":
        raise TriviumError(f'config.json says model_type "{family}" where "vit" is needed: give a ViT checkpoint')
    for field, value in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        if config.get(field, value) != value:
            raise TriviumError(f"config.json: {field} is {config[field]!r}, only {value!r} is supported")
    for field in ("image_size", "patch_size"):
        if not isinstance(config.get(field, 16), int):
            raise TriviumError(f"config.json: {field} is {config[field]}, only squares are supported")
    return ViTConfig(
        width=config.get("hidden_size", 768),
        num_heads=config.get("num_attention_heads", 12),
        mlp_width=config.get("intermediate_size", 3072),
        num_layers=config.get("num_hidden_layers", 12),
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 16),
        eps=config.get("layer_norm_eps", 1e-12),
        dropout=max(config.get(f"{name}_dropout_prob", 0.0) for name in ("hidden", "attention_probs")),
        mask_token=mask_token,
    )


def config_to_hf(config: ViTConfig) -> dict[str, Any]:
    """Our config as the config.json of a ViTModel."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "layer_norm_eps": config.eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "qkv_bias": True,
    }


def _shapes(make: type[ViT] | type[Dino], config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make(config).state_dict().items()}
