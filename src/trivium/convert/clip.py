"""CLIP's weights in the layouts of OpenAI, open_clip and Hugging Face transformers, in and out.

OpenAI          visual.transformer.resblocks.3.attn.in_proj_weight, transformer.resblocks.3.mlp.c_fc.bias
open_clip       the same names; a model of its class CustomTextCLIP has its text tower under text.
Hugging Face    vision_model.encoder.layers.3.self_attn.q_proj.weight, text_model.encoder.layers.3.mlp.fc1.bias

What differs beside names:

* Hugging Face keeps queries, keys and values apart, the others one matrix with the rows of q, k, v in that order, as
  we do;
* the two projections are applied from the right by OpenAI (x @ proj), so they stand transposed there;
* their patch projection is a convolution [D, 3, P, P], ours the same numbers as [D, 3 * P * P];
* their logit scale has no dimension, their class token one, ours one and three;
* OpenAI's and open_clip's weights say neither the number of heads nor the activation (see `config_from_shapes`).

D width, P side of a patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trivium.convert import places as moving
from trivium.convert.places import Place, pair
from trivium.convert.weights import State
from trivium.errors import TriviumError
from trivium.models.clip import ActivationName, Clip, ClipConfig

HEAD_WIDTH = 64  # of every published model of these layouts whose config does not say otherwise
# Counting numbers, masks that can be made again, and sizes that OpenAI's archives hold beside the weights.
_IGNORED = re.compile(r"(^|\.)(position_ids|attn_mask|input_resolution|context_length|vocab_size)$")
_OTHER_TOWERS = {
    "visual.trunk.": "a tower of timm",
    "visual.layer1.": "a ResNet",
    "visual.attnpool.": "attention pooling",
    "text.transformer.": "a text tower of another library",
}
_LEGACY_END = 2  # the eos_token_id with which Hugging Face pools at the largest id


# --------------------------------------------------------------------------------------------------- both tables


def places_openai(config: ClipConfig) -> Iterator[Place]:
    """The whole table for OpenAI's and open_clip's names."""
    P, width = config.patch_size, config.image_width
    yield Place("logit_scale", ("logit_scale",), shape=())
    yield Place("image_projection.weight", ("visual.proj",), "transposed")
    yield Place("text_projection.weight", ("text_projection",), "transposed")
    yield Place("image.class_token", ("visual.class_embedding",), shape=(width,))
    yield Place("image.positions", ("visual.positional_embedding",), shape=(1 + config.grid**2, width))
    yield Place("image.patches.projection.weight", ("visual.conv1.weight",), shape=(width, 3, P, P))
    yield Place("text.embeddings.word.weight", ("token_embedding.weight",))
    yield Place("text.embeddings.position.weight", ("positional_embedding",))
    yield from pair("image.pre_norm", "visual.ln_pre")
    yield from pair("image.norm", "visual.ln_post")
    yield from pair("text.norm", "ln_final")
    for tower, theirs, num_layers in (("image", "visual.", config.image_layers), ("text", "", config.text_layers)):
        for n in range(num_layers):
            block, there = f"{tower}.encoder.blocks.{n}", f"{theirs}transformer.resblocks.{n}"
            yield from pair(f"{block}.attention_norm", f"{there}.ln_1")
            for part in ("weight", "bias"):
                yield Place(f"{block}.attention.qkv.{part}", (f"{there}.attn.in_proj_{part}",))
            yield from pair(f"{block}.attention.out", f"{there}.attn.out_proj")
            yield from pair(f"{block}.mlp_norm", f"{there}.ln_2")
            yield from pair(f"{block}.mlp_in", f"{there}.mlp.c_fc")
            yield from pair(f"{block}.mlp_out", f"{there}.mlp.c_proj")


def places_hf(config: ClipConfig) -> Iterator[Place]:
    """The whole table for the names of CLIPModel."""
    P, width = config.patch_size, config.image_width
    image, text = "vision_model", "text_model"
    yield Place("logit_scale", ("logit_scale",), shape=())
    yield Place("image_projection.weight", ("visual_projection.weight",))
    yield Place("text_projection.weight", ("text_projection.weight",))
    yield Place("image.class_token", (f"{image}.embeddings.class_embedding",), shape=(width,))
    positions = f"{image}.embeddings.position_embedding.weight"
    yield Place("image.positions", (positions,), shape=(1 + config.grid**2, width))
    patches = f"{image}.embeddings.patch_embedding.weight"
    yield Place("image.patches.projection.weight", (patches,), shape=(width, 3, P, P))
    yield Place("text.embeddings.word.weight", (f"{text}.embeddings.token_embedding.weight",))
    yield Place("text.embeddings.position.weight", (f"{text}.embeddings.position_embedding.weight",))
    yield from pair("image.pre_norm", f"{image}.pre_layrnorm")  # so spelt there
    yield from pair("image.norm", f"{image}.post_layernorm")
    yield from pair("text.norm", f"{text}.final_layer_norm")
    for tower, theirs, num_layers in (("image", image, config.image_layers), ("text", text, config.text_layers)):
        for n in range(num_layers):
            block, there = f"{tower}.encoder.blocks.{n}", f"{theirs}.encoder.layers.{n}"
            yield from pair(f"{block}.attention_norm", f"{there}.layer_norm1")
            for part in ("weight", "bias"):
                pieces = tuple(f"{there}.self_attn.{piece}_proj.{part}" for piece in "qkv")
                yield Place(f"{block}.attention.qkv.{part}", pieces, "stacked")
            yield from pair(f"{block}.attention.out", f"{there}.self_attn.out_proj")
            yield from pair(f"{block}.mlp_norm", f"{there}.layer_norm2")
            yield from pair(f"{block}.mlp_in", f"{there}.mlp.fc1")
            yield from pair(f"{block}.mlp_out", f"{there}.mlp.fc2")


# ------------------------------------------------------------------------------------- Hugging Face transformers


def from_hf(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ClipConfig, State]:
    """Weights of a CLIPModel and its config.json -> ours.

    Raises:
        TriviumError: another family or an unsupported variant (names what differs); missing, unexpected or wrongly
            shaped tensors (the first five and how many).
    """
    ours = config_from_hf(config)
    return ours, _take(state, places_hf(ours), ours)


def to_hf(state: Mapping[str, Tensor], config: ClipConfig) -> State:
    """Our weights under the names of CLIPModel. Tensors may be views."""
    return moving.give(state, places_hf(config))


def config_from_hf(config: Mapping[str, Any]) -> ClipConfig:
    """The config.json of a CLIPModel -> ours. Absent fields have the library's defaults (ViT-B/32).

    Raises:
        TriviumError: another family, or a variant that this model does not have; the sentence names the field.
    """
    family = config.get("model_type", "clip")
    if family != "clip":
        raise TriviumError(f'config.json says model_type "{family}" where "clip" is needed: give a CLIP checkpoint')
    image, text = ({**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}
                   for name in ("vision", "text"))  # fmt: skip

    def agreed(field: str, default: Any) -> Any:
        values = (image.get(field, default), text.get(field, default))
        if values[0] != values[1]:
            raise TriviumError(
                f"config.json: {field} must be one for both towers of CLIP, but is {values[0]} for pictures and"
                f" {values[1]} for text"
            )
        return values[0]

    activation = agreed("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise TriviumError(f"config.json: hidden_act is {activation!r}, only 'quick_gelu' and 'gelu' are supported")
    if image.get("num_channels", 3) != 3:
        raise TriviumError(f"config.json: vision_config.num_channels is {image['num_channels']}, only 3 is supported")
    end_id = text.get("eos_token_id", 49407)
    if not isinstance(end_id, int):
        raise TriviumError(f"config.json: text_config.eos_token_id is {end_id!r}, one number is needed")
    return ClipConfig(
        image_width=image.get("hidden_size", 768),
        image_layers=image.get("num_hidden_layers", 12),
        image_heads=image.get("num_attention_heads", 12),
        image_mlp_width=image.get("intermediate_size", 3072),
        text_width=text.get("hidden_size", 512),
        text_layers=text.get("num_hidden_layers", 12),
        text_heads=text.get("num_attention_heads", 8),
        text_mlp_width=text.get("intermediate_size", 2048),
        image_size=_side(image.get("image_size", 224), "vision_config.image_size"),
        patch_size=_side(image.get("patch_size", 32), "vision_config.patch_size"),
        vocab_size=text.get("vocab_size", 49408),
        max_length=text.get("max_position_embeddings", 77),
        end_id=None if end_id == _LEGACY_END else end_id,
        projection_width=config.get("projection_dim", 512),
        activation=activation,
        eps=agreed("layer_norm_eps", 1e-5),
        dropout=float(agreed("attention_dropout", 0.0)),
    )


def config_to_hf(config: ClipConfig) -> dict[str, Any]:
    """Our config as the config.json of a CLIPModel.

    Raises:
        TriviumError: it has no place for it.
    """
    if config.end_id == _LEGACY_END:
        raise TriviumError(
            f"texts of this model end with id {_LEGACY_END}, which Hugging Face's CLIP takes to mean the largest id:"
            " it has no place there"
        )
    shared = {
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
        "attention_dropout": config.dropout,
        "projection_dim": config.projection_width,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_width,
        "logit_scale_init_value": math.log(config.start_logit_scale),
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": config.image_width,
            "num_hidden_layers": config.image_layers,
            "num_attention_heads": config.image_heads,
            "intermediate_size": config.image_mlp_width,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": 3,
        },
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "intermediate_size": config.text_mlp_width,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_length,
            "eos_token_id": _LEGACY_END if config.end_id is None else config.end_id,
            # Read by nobody here; the library's default, of the published vocabulary, has no place in a smaller one.
            "bos_token_id": 49406 if config.vocab_size == 49408 else None,
        },
    }


# --------------------------------------------------------------------------------------------- OpenAI and open_clip


def from_openai(
    state: Mapping[str, Tensor], activation: ActivationName, config: Mapping[str, Any]
) -> tuple[ClipConfig, State]:
    """A state dict in OpenAI's or open_clip's names -> ours. Sizes are read from the shapes.

    Args:
        activation: "quick_gelu" or "gelu", where `config` does not say.
        config: what lies beside: open_clip_config.json, the config.json of a CLIPModel, or {}.

    Raises:
        TriviumError: no CLIP of two transformers, an unsupported variant (names what differs); missing, unexpected or
            wrongly shaped tensors (the first five and how many).
    """
    if "text.token_embedding.weight" in state:  # CustomTextCLIP
        state = {key.removeprefix("text."): tensor for key, tensor in state.items()}
    ours = config_from_shapes(state, activation)
    if "model_cfg" in config:
        ours = _with_open_clip_config(ours, config["model_cfg"])
    elif "text_config" in config:
        theirs = config_from_hf(config)
        ours = replace(ours, image_heads=theirs.image_heads, text_heads=theirs.text_heads, eps=theirs.eps,
                       activation=theirs.activation)  # fmt: skip
    return ours, _take(state, places_openai(ours), ours)


def to_openai(state: Mapping[str, Tensor], config: ClipConfig) -> State:
    """Our weights under OpenAI's names, which are open_clip's too. Tensors may be views.

    Raises:
        TriviumError: these layouts pool a text at its largest id, and this model does not.
    """
    if config.end_id not in (None, config.vocab_size - 1):
        raise TriviumError(
            f"texts of this model end with id {config.end_id} of {config.vocab_size}, and this layout knows no end but"
            " the largest id: write Hugging Face's, which states it"
        )
    return moving.give(state, places_openai(config))


def config_from_shapes(state: Mapping[str, Tensor], activation: ActivationName) -> ClipConfig:
    """Sizes of a CLIP in OpenAI's names. Heads are 64 wide, since no tensor tells.

    Raises:
        TriviumError: its towers are no such transformers.
    """
    for mark, what in _OTHER_TOWERS.items():
        if any(key.startswith(mark) for key in state):
            raise TriviumError(f"this CLIP has {what} ({mark}...), and only its plain vision transformer is supported")

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state or state[name].ndim != dimensions:
            raise TriviumError(f"no tensor {name} of {dimensions} dimensions: this is no CLIP in OpenAI's layout")
        return tuple(state[name].shape)

    def layers(prefix: str) -> int:
        numbers = [re.match(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.", key) for key in state]
        return 1 + max((int(match[1]) for match in numbers if match), default=-1)

    def heads(width: int) -> int:
        if width % HEAD_WIDTH:
            raise TriviumError(
                f"the number of attention heads is not in the file and width {width} is no multiple of {HEAD_WIDTH}:"
                " put the open_clip_config.json of the model beside the weights"
            )
        return width // HEAD_WIDTH

    image_width, _, patch_size, _ = shape("visual.conv1.weight", 4)
    vocab_size, text_width = shape("token_embedding.weight", 2)
    return ClipConfig(
        image_width=image_width,
        image_layers=layers("visual."),
        image_heads=heads(image_width),
        image_mlp_width=shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        text_width=text_width,
        text_layers=layers(""),
        text_heads=heads(text_width),
        text_mlp_width=shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        image_size=math.isqrt(shape("visual.positional_embedding", 2)[0] - 1) * patch_size,
        patch_size=patch_size,
        vocab_size=vocab_size,
        max_length=shape("positional_embedding", 2)[0],
        end_id=None,
        projection_width=shape("visual.proj", 2)[1],
        activation=activation,
    )


def config_to_open_clip(config: ClipConfig) -> dict[str, Any]:
    """Our config as an open_clip_config.json."""
    image_head, text_head = config.image_width // config.image_heads, config.text_width // config.text_heads
    return {
        "model_cfg": {
            "embed_dim": config.projection_width,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": config.image_size,
                "layers": config.image_layers,
                "width": config.image_width,
                "head_width": image_head,
                "mlp_ratio": config.image_mlp_width / config.image_width,
                "patch_size": config.patch_size,
            },
            "text_cfg": {
                "context_length": config.max_length,
                "vocab_size": config.vocab_size,
                "width": config.text_width,
                "heads": config.text_width // text_head,
                "layers": config.text_layers,
                "mlp_ratio": config.text_mlp_width / config.text_width,
            },
        },
    }


# What of an open_clip config is read from the shapes instead; other fields change what is computed.
_SIZES = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "context_length", "vocab_size",
          "heads", "patch_dropout", "output_tokens"}  # fmt: skip
_DEFAULTS = {"pool_type": ("tok", "argmax"), "proj_type": ("linear",), "pos_embed_type": ("learnable",)}


def _with_open_clip_config(config: ClipConfig, model: Mapping[str, Any]) -> ClipConfig:
    image, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    for name, section in (("vision_cfg", image), ("text_cfg", text)):
        for field, value in section.items():
            if value and field not in _SIZES and value not in _DEFAULTS.get(field, ()):
                raise TriviumError(f"open_clip_config.json: {name}.{field} is {value!r}, which is not supported")
    return replace(
        config,
        image_heads=config.image_width // image.get("head_width", HEAD_WIDTH),
        text_heads=text.get("heads", config.text_heads),
        activation="quick_gelu" if model.get("quick_gelu", False) else "gelu",
    )


# ------------------------------------------------------------------------------------------------- a whole model


def build(config: ClipConfig, state: Mapping[str, Tensor]) -> Clip:
    """A model with these weights in float32."""
    with torch.device("meta"):
        model = Clip(config)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model


def _take(state: Mapping[str, Tensor], places: Iterator[Place], config: ClipConfig) -> State:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Clip(config).state_dict().items()}
    return moving.take({key: state[key] for key in state if not _IGNORED.search(key)}, places, shapes, "CLIP")


def _side(value: Any, field: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise TriviumError(f"config.json: {field} is {value}, only squares are supported")
    return int(sides.pop())
