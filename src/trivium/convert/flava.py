"""FLAVA's weights in the layout of Hugging Face transformers, in and out, and a start from a BERT.

One table, made from the config, says where every tensor of ours stands there. What differs beside names:

* they keep queries, keys and values apart, we keep one matrix with the rows of q, k, v in that order;
* their patch projection is a convolution [D, 3, P, P], ours the same numbers as [D, 3 * P * P];
* their logit scale has no dimension, ours one;
* they hold the bias of a masked head twice (``bias`` and ``decoder.bias``), one tensor under two names;
* ``position_ids`` and ``token_type_ids`` are counting numbers, not weights: ignored.

D width, P side of a patch.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trivium.convert import places as moving
from trivium.convert.places import Place, pair
from trivium.convert.weights import State
from trivium.errors import TriviumError
from trivium.models.flava import Flava, FlavaConfig

HEADS = ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head", "itm_head")
# Files may lack these as a whole: a bare FlavaModel has no heads, torchmultimodal's no logit scale.
OPTIONAL = (*(f"{head}." for head in HEADS), "image.mask_token", "logit_scale", "image.pooler.", "text.pooler.",
            "multimodal.pooler.")  # fmt: skip
_IGNORED = re.compile(r"(^|\.)(position_ids|token_type_ids)$")


def places(config: FlavaConfig) -> Iterator[Place]:
    """The whole table for a model of this config, under the names of FlavaForPreTraining."""
    P, side = config.patch_size, config.grid
    yield Place("logit_scale", ("flava.logit_scale",), shape=())
    for name in ("image_projection", "text_projection"):
        yield from pair(name, f"flava.{name}")
    for tower in ("image", "text"):
        yield from pair(f"multimodal.{tower}_projection", f"flava.{tower}_to_mm_projection")
    image = "flava.image_model.embeddings"
    yield Place("image.class_token", (f"{image}.cls_token",))
    yield Place("image.mask_token", (f"{image}.mask_token",))
    yield Place("image.positions", (f"{image}.position_embeddings",), shape=(1, 1 + side**2, config.width))
    projection = f"{image}.patch_embeddings.projection"
    yield Place("image.patches.projection.weight", (f"{projection}.weight",), shape=(config.width, 3, P, P))
    yield Place("image.patches.projection.bias", (f"{projection}.bias",))
    text = "flava.text_model.embeddings"
    for ours, theirs in (("word", "word"), ("position", "position"), ("segment", "token_type")):
        yield Place(f"text.embeddings.{ours}.weight", (f"{text}.{theirs}_embeddings.weight",))
    yield from pair("text.embeddings.norm", f"{text}.LayerNorm")
    yield Place("multimodal.class_token", ("flava.multimodal_model.cls_token",))
    layers = {"image": config.image_layers, "text": config.text_layers, "multimodal": config.multimodal_layers}
    for tower, num_layers in layers.items():
        theirs = f"flava.{tower}_model"
        for n in range(num_layers):
            yield from _block(f"{tower}.encoder.blocks.{n}", f"{theirs}.encoder.layer.{n}")
        yield from pair(f"{tower}.norm", f"{theirs}.layernorm")
        yield from pair(f"{tower}.pooler", f"{theirs}.pooler.dense")
    for head in HEADS[:4]:
        yield from pair(f"{head}.transform", f"{head}.transform.dense")
        yield from pair(f"{head}.norm", f"{head}.transform.LayerNorm")
        yield Place(f"{head}.decoder.weight", (f"{head}.decoder.weight",))
        yield Place(f"{head}.decoder.bias", (f"{head}.decoder.bias", f"{head}.bias"), "tied")
    yield from pair("itm_head.transform", "itm_head.pooler.dense")
    yield from pair("itm_head.decoder", "itm_head.seq_relationship")


def _block(ours: str, theirs: str) -> Iterator[Place]:
    yield from pair(f"{ours}.attention_norm", f"{theirs}.layernorm_before")
    for part in ("weight", "bias"):
        pieces = tuple(f"{theirs}.attention.attention.{piece}.{part}" for piece in ("query", "key", "value"))
        yield Place(f"{ours}.attention.qkv.{part}", pieces, "stacked")
    yield from pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense")
    yield from pair(f"{ours}.mlp_norm", f"{theirs}.layernorm_after")
    yield from pair(f"{ours}.mlp_in", f"{theirs}.intermediate.dense")
    yield from pair(f"{ours}.mlp_out", f"{theirs}.output.dense")


# ------------------------------------------------------------------------------------- Hugging Face transformers


def from_hf(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[FlavaConfig, State]:
    """Weights of FlavaForPreTraining, or of a bare FlavaModel, and its config.json -> ours.

    Keys of an image codebook are left for `convert.dalle`. The state lacks what the file lacks as a whole (OPTIONAL).

    Raises:
        TriviumError: another family or an unsupported variant (names what differs); missing, unexpected or
            wrongly shaped tensors (the first five and how many).
    """
    ours = config_from_hf(config)
    bare = not any(key.startswith("flava.") for key in state)
    names = {f"flava.{key}" if bare and not key.startswith((*HEADS, "image_codebook.")) else key: key for key in state}
    return ours, take({name: state[key] for name, key in names.items()}, ours, lambda name: name)


def to_hf(state: Mapping[str, Tensor], config: FlavaConfig) -> State:
    """Our weights under the names of FlavaForPreTraining; the tied biases under both names. Tensors may be views."""
    return moving.give(state, places(config))


def config_from_hf(config: Mapping[str, Any]) -> FlavaConfig:
    """The config.json of a FlavaModel or FlavaForPreTraining -> ours. Absent fields have the library's defaults.

    Raises:
        TriviumError: another family, or a variant that this model does not have; the sentence names the field.
    """
    family = config.get("model_type", "flava")
    if family != "flava":
        raise TriviumError(f'config.json says model_type "{family}" where "flava" is needed: give a FLAVA checkpoint')
    sections = {name: {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}
                for name in ("image", "text", "multimodal")}  # fmt: skip

    def agreed(field: str, default: Any) -> Any:
        values = {name: section.get(field, default) for name, section in sections.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            raise TriviumError(f"config.json: {field} must be one for all three encoders of FLAVA, but is {said}")
        return values["image"]

    def only(where: str, section: Mapping[str, Any], field: str, value: Any) -> None:
        if section.get(field, value) != value:
            raise TriviumError(f"config.json: {where}.{field} is {section[field]!r}, only {value!r} is supported")

    for name, section in sections.items():
        only(f"{name}_config", section, "hidden_act", "gelu")
        only(f"{name}_config", section, "qkv_bias", True)
    only("image_config", sections["image"], "num_channels", 3)
    only("multimodal_config", sections["multimodal"], "use_cls_token", True)
    width = agreed("hidden_size", 768)
    only("config", config, "hidden_size", width)
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    image, text = sections["image"], sections["text"]
    return FlavaConfig(
        width=width,
        num_heads=agreed("num_attention_heads", 12),
        mlp_width=agreed("intermediate_size", 3072),
        image_layers=image.get("num_hidden_layers", 12),
        text_layers=text.get("num_hidden_layers", 12),
        multimodal_layers=sections["multimodal"].get("num_hidden_layers", 6),
        image_size=_side(image.get("image_size", 224), "image_size"),
        patch_size=_side(image.get("patch_size", 16), "patch_size"),
        vocab_size=text.get("vocab_size", 30522),
        max_length=text.get("max_position_embeddings", 512),
        num_segments=text.get("type_vocab_size", 2),
        pad_id=text.get("pad_token_id", 0) or 0,
        num_codes=image.get("vocab_size", 8192),
        projection_width=config.get("projection_dim", 768),
        eps=agreed("layer_norm_eps", 1e-12),
        dropout=max(float(section.get(rate, 0.0)) for section in sections.values() for rate in rates),
    )


def config_to_hf(config: FlavaConfig, codebook: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our config as the config.json of FlavaForPreTraining.

    Args:
        codebook: its image_codebook_config; None = the folder holds no image codebook.
    """
    shared = {
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": config.eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "qkv_bias": True,
    }
    return {
        "architectures": ["FlavaForPreTraining"],
        "model_type": "flava",
        "hidden_size": config.width,
        "layer_norm_eps": config.eps,
        "projection_dim": config.projection_width,
        "init_codebook": codebook is not None,
        "image_config": {
            **shared,
            "model_type": "flava_image_model",
            "num_hidden_layers": config.image_layers,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": 3,
            "mask_token": True,
            "vocab_size": config.num_codes,
        },
        "text_config": {
            **shared,
            "model_type": "flava_text_model",
            "num_hidden_layers": config.text_layers,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_length,
            "type_vocab_size": config.num_segments,
            "pad_token_id": config.pad_id,
        },
        "multimodal_config": {
            **shared,
            "model_type": "flava_multimodal_model",
            "num_hidden_layers": config.multimodal_layers,
            "use_cls_token": True,
        },
        "image_codebook_config": {"model_type": "flava_image_codebook", **(codebook or {})},
    }


def _side(value: Any, field: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise TriviumError(f"config.json: image_config.{field} is {value}, only squares are supported")
    return int(sides.pop())


# ------------------------------------------------------------------------------------------ moving the tensors


def take(state: Mapping[str, Tensor], config: FlavaConfig, rename: Callable[[str], str]) -> State:
    """Tensors of theirs -> ours, every one accounted for. rename: Hugging Face's name -> the layout's."""
    read = {key: tensor for key, tensor in state.items()
            if not key.startswith("image_codebook.") and not _IGNORED.search(key)}  # fmt: skip
    there = (replace(place, theirs=tuple(map(rename, place.theirs))) for place in places(config))
    return moving.take(read, there, _shapes(config), "FLAVA", OPTIONAL)


def _shapes(config: FlavaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Flava(config).state_dict().items()}


# ---------------------------------------------------------------------------------------------------- a whole model


def build(config: FlavaConfig, state: Mapping[str, Tensor], seed: int = 0) -> tuple[Flava, list[str]]:
    """A model with these weights in float32; what they lack (OPTIONAL parts) is drawn from the seed, N(0, 0.02).

    Returns:
        The model, and the names of the parts that were drawn.
    """
    with torch.device("meta"):
        model = Flava(config)
    whole = {name: state[name].float() if name in state else _drawn(name, tensor.shape, seed)
             for name, tensor in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(whole, assign=True)
    return model, [part.rstrip(".") for part in OPTIONAL if any(n.startswith(part) and n not in state for n in whole)]


def _drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    if name == "logit_scale":
        return torch.full(shape, math.log(1 / 0.07))
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.empty(shape).normal_(0.0, 0.02, generator=generator)


# ----------------------------------------------------------------------------------------------------- from BERT


def text_from_bert(state: Mapping[str, Tensor], config: FlavaConfig) -> tuple[State, list[str]]:
    """What a BERT (Hugging Face layout) can give to FLAVA's text side: embeddings and the head of masked words.

    BERT's blocks normalise after each sublayer, FLAVA's before: the blocks do not carry over. Positions beyond
    `config.max_length` are cut off; both MLM heads, `mlm_head` and `mmm_text_head`, take BERT's where it has one. Of a
    wider BERT the embeddings alone are taken, along the principal axes of its words.

    Returns:
        A part of our state dict, and the names of BERT's tensors that were left out.

    Raises:
        TriviumError: no BERT, or a narrower one, or one of another vocabulary.
    """
    prefix = "bert." if any(key.startswith("bert.") for key in state) else ""
    embeddings = f"{prefix}embeddings"
    word = state.get(f"{embeddings}.word_embeddings.weight")
    if word is None:
        raise TriviumError(f"no tensor {embeddings}.word_embeddings.weight: this is no BERT in Hugging Face's layout")
    if len(word) != config.vocab_size or word.shape[1] < config.width:
        raise TriviumError(
            f"this BERT has {word.shape[0]} words of width {word.shape[1]}, the model {config.vocab_size} of width "
            f"{config.width}: choose a BERT of that width or a larger one, and its own vocabulary"
        )
    axes_DW = principal_axes(word, config.width) if word.shape[1] > config.width else None
    sources = {f"text.embeddings.{ours}.weight": f"{embeddings}.{theirs}_embeddings.weight"
               for ours, theirs in (("word", "word"), ("position", "position"), ("segment", "token_type"))}  # fmt: skip
    if axes_DW is None:
        for part in ("weight", "bias"):
            sources[f"text.embeddings.norm.{part}"] = f"{embeddings}.LayerNorm.{part}"
    if axes_DW is None and "cls.predictions.transform.dense.weight" in state:
        for head in ("mlm_head", "mmm_text_head"):
            for part in ("weight", "bias"):
                sources[f"{head}.transform.{part}"] = f"cls.predictions.transform.dense.{part}"
                sources[f"{head}.norm.{part}"] = f"cls.predictions.transform.LayerNorm.{part}"
            tied = "cls.predictions.decoder.weight"  # tied to the words: many files leave it out
            sources[f"{head}.decoder.weight"] = tied if tied in state else f"{embeddings}.word_embeddings.weight"
            sources[f"{head}.decoder.bias"] = "cls.predictions.bias"
    taken = {}
    expected = _shapes(config)
    for ours, theirs in sources.items():
        if theirs not in state:
            raise TriviumError(f"this BERT misses the tensor {theirs}")
        tensor = state[theirs]
        if ours == "text.embeddings.position.weight":
            tensor = tensor[: config.max_length]
        if axes_DW is not None:
            tensor = (tensor.float() - tensor.float().mean(0)) @ axes_DW
        if tuple(tensor.shape) != expected[ours]:
            raise TriviumError(
                f"{theirs} of this BERT has shape {list(tensor.shape)}, {list(expected[ours])} is needed"
            )
        taken[ours] = tensor.clone()
    used = set(sources.values()) | {"cls.predictions.decoder.bias"}
    return taken, sorted(key for key in state if key not in used and not _IGNORED.search(key))


def principal_axes(vectors_ND: Tensor, count: int) -> Tensor:
    """[D, count]: the directions along which vectors differ most, the first most of all."""
    centred_ND = vectors_ND.double() - vectors_ND.double().mean(0)
    return torch.linalg.eigh(centred_ND.T @ centred_ND).eigenvectors.flip(1)[:, :count].float()
