"""The discrete VAE's weights in the layouts of DALL-E, Hugging Face (FlavaImageCodebook) and torchmultimodal.

DALL-E            blocks.group_1.block_2.res_path.conv_3.w
torchmultimodal   the same under image_codebook.encoder.
Hugging Face      blocks.group_1.group.block_2.res_path.path.conv_3.weight, under image_codebook. in a FLAVA
ours              groups.0.1.convs.2.weight, under encoder. or decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from trivium.convert.weights import State, listed
from trivium.errors import TriviumError
from trivium.models.dvae import DVae, DVaeConfig

PREFIXES = ("image_codebook.encoder.", "image_codebook.", "encoder.")
_BLOCK = re.compile(r"blocks\.group_(\d+)\.(?:group\.)?block_(\d+)\.(?:id_path|res_path\.(?:path\.)?conv_(\d))\.(\w+)")
_END = re.compile(r"blocks\.(input|output\.conv)\.(\w+)")
_PARTS = {"w": "weight", "b": "bias", "weight": "weight", "bias": "bias"}


def codebook_of(state: Mapping[str, Tensor]) -> State:
    """The keys of an image codebook, without whatever prefix they stand under; {} where there is none."""
    for prefix in PREFIXES:
        if any(key.startswith(f"{prefix}blocks.") for key in state):
            return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    return {key: state[key] for key in state if key.startswith("blocks.")}


def from_dalle(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor] | None = None) -> DVae:
    """Weights under `blocks.`, DALL-E's or Hugging Face's names -> our tokenizer. Sizes are read from the shapes.

    Raises:
        TriviumError: missing, unexpected or wrongly shaped tensors (the first five and how many).
    """
    parts = {"encoder": _ours(encoder, "encoder")}
    config = _config(parts["encoder"], "encoder")
    if decoder is not None:
        parts["decoder"] = _ours(decoder, "decoder")
        read = _config(parts["decoder"], "decoder")
        sizes = ("width", "num_groups", "blocks_per_group", "num_codes")
        different = [name for name in sizes if getattr(read, name) != getattr(config, name)]
        if different:
            raise TriviumError(f"encoder and decoder of this image tokenizer differ in {', '.join(different)}")
        config = read
    model = DVae(config)
    given = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    expected = model.state_dict()
    missing, left = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or left:
        found = [listed("misses", [_theirs(name) for name in missing]),
                 listed("has unexpected", [_theirs(name) for name in left])]  # fmt: skip
        raise TriviumError(f"this image tokenizer {' and '.join(part for part in found if part)}")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise TriviumError(
                f"{_theirs(name)} of this image tokenizer has shape {list(tensor.shape)} where "
                f"{list(expected[name].shape)} is needed"
            )
    model.load_state_dict(given)
    return model.frozen()


def to_dalle(model: DVae, part: str = "encoder") -> State:
    """The tensors of the encoder or the decoder under DALL-E's names."""
    module = model.encoder if part == "encoder" else model.decoder
    assert module is not None
    return {_theirs(f"{part}.{name}"): tensor for name, tensor in module.state_dict().items()}


def to_hf(model: DVae) -> tuple[State, dict[str, Any]]:
    """The encoder under the names of FlavaImageCodebook, and its config.

    Raises:
        TriviumError: that class has four groups of blocks and reads three channels, whatever its config says.
    """
    config = model.config
    if config.num_groups != 4:
        raise TriviumError(
            f"an image codebook of {config.num_groups} groups has no place in Hugging Face's layout: 4 do"
        )
    named = {}
    for name, tensor in to_dalle(model).items():
        name = re.sub(r"(group_\d+)\.", r"\1.group.", name).replace("res_path.", "res_path.path.")
        named[re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))] = tensor
    fields = {"num_groups": 4, "num_blocks_per_group": config.blocks_per_group}
    return named, {**fields, "hidden_size": config.width, "vocab_size": config.num_codes}


def _ours(state: Mapping[str, Tensor], part: str) -> State:
    named: State = {}
    for key, tensor in state.items():
        block, end = _BLOCK.fullmatch(key), _END.fullmatch(key)
        match = block or end
        if match is None or match[match.lastindex or 0] not in _PARTS:
            raise TriviumError(
                f"this image tokenizer has an unexpected tensor ({key}): the {part} of a DALL-E is needed"
            )
        if block:
            layer = f"convs.{int(block[3]) - 1}" if block[3] else "shortcut"
            name = f"groups.{int(block[1]) - 1}.{int(block[2]) - 1}.{layer}.{_PARTS[block[4]]}"
        else:
            assert end is not None
            name = f"{'stem' if end[1] == 'input' else 'head'}.{_PARTS[end[2]]}"
        named[name] = tensor
    return named


def _theirs(name: str) -> str:
    name = name.split(".", 1)[1]
    ends = {"stem": "input", "head": "output.conv"}
    layer, kind = name.rsplit(".", 1)
    short = {"weight": "w", "bias": "b"}[kind]
    if layer in ends:
        return f"blocks.{ends[layer]}.{short}"
    _, group, block, *rest = layer.split(".")
    path = "id_path" if rest == ["shortcut"] else f"res_path.conv_{int(rest[1]) + 1}"
    return f"blocks.group_{int(group) + 1}.block_{int(block) + 1}.{path}.{short}"


def _config(state: State, part: str) -> DVaeConfig:
    for name in ("stem.weight", "head.weight"):
        if name not in state or state[name].ndim != 4:
            raise TriviumError(f"this image tokenizer misses the tensor {_theirs(f'{part}.{name}')}")
    stem, head = state["stem.weight"], state["head.weight"]
    if (part == "encoder") != (stem.shape[-1] == 7):
        other = "decoder" if part == "encoder" else "encoder"
        raise TriviumError(
            f"these are the weights of DALL-E's {other} where the {part} is needed: codes come from the encoder, "
            "pictures from the decoder"
        )
    numbers = [(int(name.split(".")[1]), int(name.split(".")[2])) for name in state if name.startswith("groups.")]
    groups, blocks = (1 + max((pair[n] for pair in numbers), default=0) for n in (0, 1))
    sizes = DVaeConfig(num_groups=groups, blocks_per_group=blocks)
    if part == "encoder":
        return replace(sizes, width=stem.shape[0], num_codes=head.shape[0])
    return replace(sizes, width=head.shape[1], num_codes=stem.shape[1], code_width=stem.shape[0], decoder=True)
