"""What a UniT begins with: a random start, a trained UniT, a BERT for its text encoder.

Q queries, D width of the decoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.errors import TriviumError
from trivium.models.unit import Unit, UnitConfig
from trivium.train.initial import initialise
from trivium.train.protocol import hash64

TEXT = 0.3  # factor on the weights of the text encoder beside its words, so that its blocks begin by changing little
# Factors on the weights of queries and keys, so that attention begins by looking at many places: with places four times
# as strong as published it would begin, and stay, at one of ten. Cross-attention is to look near its query though.
SELF_ATTENTION, CROSS_ATTENTION = 0.35, 0.6
QUERY_NOISE = 0.3  # deviation of a query beside its place
ANCHOR_SIDE = 0.3  # of a query's first box, as a share of the picture's
CORRECTION = 0.1  # factor on the weights that correct it, so that boxes begin as their anchors
BACKBONE = "image.backbone"
FROZEN = "the norms of this backbone are frozen, so its weights must come from a DETR or a UniT with the same backbone"
# What is one part of a model; beside these, each module with tensors of its own.
WHOLE = re.compile(r"(image\.backbone|.*\.blocks\.\d+|heads\.[^.]+\.[^.]+)(\.|$)")
NAMELESS = (".boxes", ".anchors")  # parts of a head that are the same whatever its classes are
COMPUTING = {  # what parts compute beside their shapes
    BACKBONE: ("backbone_eps", "dilated"),
    "image.blocks.": ("num_heads", "eps", "residual"),
    "decoders.": ("num_heads", "eps"),
    "text.": ("text_heads", "text_eps"),
}


@torch.no_grad()
def at_random(model: Unit, seed: int) -> None:
    """Weights at the scale of their inputs, smaller ones in the text encoder; queries and task tokens of N(0, 1), as
    published; with anchors attention that looks at many places, and a decoder that looks where they are."""
    initialise(model, seed, std="fan in")
    for name, parameter in model.named_parameters():
        if name.startswith("queries.") or "task_tokens" in name:
            parameter.mul_(math.sqrt(parameter.shape[1]))
        elif name.startswith("text.") and parameter.ndim > 1 and not name.endswith("word.weight"):
            parameter.mul_(TEXT)
    if not model.config.anchored:
        return
    for task in model.config.tasks:
        if task.kind == "detection":
            spread_queries(model, task.name, seed)
    decoders: Mapping[str, Any] = dict(model.decoders.items())
    image: Any = model.image
    for block in (*image.blocks, *(block for decoder in decoders.values() for block in decoder.blocks)):
        width = block.attention.qkv.in_features
        block.attention.qkv.weight[: 2 * width] *= SELF_ATTENTION
    for name, decoder in decoders.items():
        for block in decoder.blocks:
            query, key, _ = block.cross_attention.qkv.weight.chunk(3)
            key.copy_(query)  # so that what lies near is alike
            block.cross_attention.qkv.weight[: 2 * model.config.width] *= CROSS_ATTENTION
        # The first self-attention reads zeros. Were its output zero too, the norm after it would multiply gradients by
        # 1 / sqrt(eps), and clipping would silence all others.
        bias = decoder.blocks[0].attention.out.bias
        bias.copy_(_drawn(bias, seed, f"decoders.{name}.blocks.0.attention.out.bias"))


@torch.no_grad()
def spread_queries(model: Unit, task: str, seed: int, corrects: bool = False) -> None:
    """Queries of detection, spread over the picture: each attends what is near it and begins with a box there.

    corrects: the head has learned to correct boxes, from whatever box they begin, and is left as it is.

    Without it each begins anywhere and is given any object, so that for hundreds of steps or for good, as the seed will
    have it, none learns anything but the frequencies.
    """
    queries: Any = model.queries[task]
    head: Any = model.heads[task]
    centre_Q2 = _grid(len(queries.weight))
    noise_QD = QUERY_NOISE * _drawn(queries.weight, seed, f"queries.{task}.weight")
    queries.weight.copy_(model.places_of(centre_Q2) + noise_QD)
    head.anchors.copy_(torch.cat([centre_Q2, torch.full_like(centre_Q2, ANCHOR_SIDE)], dim=1).logit())
    if corrects:
        return
    last = head.boxes[-1].weight
    last.copy_(_drawn(last, seed, f"heads.{task}.boxes.weight") * CORRECTION / math.sqrt(last.shape[1]))


def _drawn(like: Tensor, seed: int, name: str) -> Tensor:
    """N(0, 1), of a generator of its own."""
    return torch.empty_like(like).normal_(generator=torch.Generator().manual_seed(hash64(seed, name) % 2**63))


def _grid(count: int) -> Tensor:
    """[count, 2]: (x, y) of points that are spread evenly over a picture, as shares of it."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    number = torch.arange(count)
    return torch.stack([(number % columns + 0.5) / columns, (number // columns + 0.5) / rows], dim=1)


def from_unit(
    model: Unit, start: Bundle, path: str, seed: int, labels_of: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Give the model what fits of a trained one, part by part; a decoder of its own for one task fills a shared one, as
    the paper's start from detection does (section 4.2). Of a DETR it is the backbone alone (section 4). Queries of
    another task of detection are spread as its decoder sees places.

    Args:
        labels_of: names of the classes that the model is for, as `Bundle` has them. What tells others apart is not
            taken; a start that names none is believed to have these.

    Returns: sentences on what was taken.

    Raises TriviumError where neither a backbone nor a block fits, or where what fits was trained to compute another
    thing.
    """
    state = dict(start.model.state_dict())
    decoders = sorted({name.split(".")[1] for name in state if name.startswith("decoders.")})
    if model.config.decoder == "shared" and "shared" not in decoders and len(decoders) == 1:
        old = f"decoders.{decoders[0]}."
        state = {f"decoders.shared.{n.removeprefix(old)}" if n.startswith(old) else n: t for n, t in state.items()}
    of_start: Any = start.model.config
    if model.config.decoder == "separate" and decoders == ["shared"]:
        shared = {name: tensor for name, tensor in state.items() if name.startswith("decoders.shared.")}
        for task in of_start.tasks:
            state |= {name.replace("shared", task.name, 1): tensor for name, tensor in shared.items()}
    own, theirs = _parts(model.state_dict()), _parts(state)
    taken = {part: theirs[part] for part in own if part in theirs and _shapes(own[part]) == _shapes(theirs[part])}
    notes = []
    if _is_detr(of_start) and not _is_detr(model.config):
        taken = {part: tensors for part, tensors in taken.items() if part == BACKBONE}
        notes.append(f"{path} is a DETR: its backbone alone is taken, as in the paper")
    if not any(part == BACKBONE or ".blocks." in part for part in taken):
        raise TriviumError(f"{path} has no backbone and no block that fits this model: give a run of the same --size")
    if model.config.backbone_norm == "frozen" and BACKBONE not in taken:
        raise TriviumError(f"{FROZEN}, and {path} has another: name one with --init")
    _check_same(model.config, of_start, taken, path)
    known = start.labels_of or {}
    for name, names in (labels_of or {}).items():
        if name in known and list(known[name]) != list(names):
            taken = {part: t for part, t in taken.items() if part.endswith(NAMELESS) or not _is_of(part, name)}
            notes.append(f"{path} knows other labels of {name}: what tells them apart starts anew")
    fitting = {name: tensor for tensors in taken.values() for name, tensor in tensors.items()}
    model.load_state_dict(fitting, strict=False)
    for task in model.config.tasks:
        if model.config.anchored and task.kind == "detection" and f"queries.{task.name}.weight" not in fitting:
            head: Any = model.heads[task.name]
            last = f"heads.{task.name}.boxes.{len(head.boxes) - 1}.weight"
            spread_queries(model, task.name, seed, corrects=last in fitting)
    count = sum(map(len, own.values()))
    new = sorted({".".join(part.split(".")[:2]) for part in own.keys() - taken.keys()})
    notes.append(f"{len(fitting):,} of {count:,} tensors start as {path} has them")
    return notes + ([f"new are {', '.join(new)}"] if new else [])


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part, which is taken whole or not at all: half of it would compute nothing that was
    learned. Tokens that belong to no task are no part."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in ((n, t) for n, t in state.items() if not n.endswith("task_tokens.spare")):
        match = WHOLE.match(name)
        found.setdefault(match[1] if match else name.rpartition(".")[0], {})[name] = tensor
    return found


def _shapes(part: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in part.items()}


def _is_detr(config: UnitConfig) -> bool:
    return not config.num_task_tokens and not config.residual


def _is_of(part: str, labels: str) -> bool:
    """Whether a part is of the head that gives these labels."""
    return f"{part}.".startswith(f"heads.{labels}.")


def _check_same(own: UnitConfig, theirs: UnitConfig, taken: Iterable[str], path: str) -> None:
    """Raises TriviumError where weights that are taken would compute another thing, though all shapes agree."""
    for begins, fields in COMPUTING.items():
        for field in fields if any(part.startswith(begins) for part in taken) else ():
            was, is_now = (str(getattr(config, field)).lower() for config in (theirs, own))
            if was != is_now:
                flag = f"--model.{field.replace('_', '-')}"
                raise TriviumError(f"{path} has {flag} {was} and this model {is_now}: give the former")


def from_bert(model: Unit, text: Bundle, path: str) -> str:
    """Give the text encoder what a BERT has for it. Raises TriviumError where no task reads text."""
    if model.text is None:
        raise TriviumError(f"--init-text {path}: none of these tasks reads a text: leave it out")
    own, state = model.text.state_dict(), text.model.state_dict()
    model.text.load_state_dict({name: state[name] for name in own})
    return f"the text encoder starts as {path} has it, with its shape and its vocabulary"
