"""What a UniT begins with: a random start, a trained UniT, a BERT for its text encoder.

Q queries, D width of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.errors import TriviumError
from trivium.models.unit import Unit
from trivium.train.initial import initialise
from trivium.train.protocol import hash64

TEXT = 0.3  # factor on the weights of the text encoder beside its words, so that its blocks begin by changing little
# Factors on the weights of queries and keys, so that attention begins by looking at many places: with places four times
# as strong as published it would begin, and stay, at one of ten. Cross-attention is to look near its query though.
SELF_ATTENTION, CROSS_ATTENTION = 0.35, 0.6
QUERY_NOISE = 0.3  # deviation of a query beside its place
ANCHOR_SIDE = 0.3  # of a query's first box, as a share of the picture's
CORRECTION = 0.1  # factor on the weights that correct it, so that boxes begin as their anchors


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
def spread_queries(model: Unit, task: str, seed: int) -> None:
    """Queries of detection, spread over the picture: each attends what is near it and begins with a box there.

    Without it each begins anywhere and is given any object, so that for hundreds of steps or for good, as the seed will
    have it, none learns anything but the frequencies.
    """
    queries: Any = model.queries[task]
    head: Any = model.heads[task]
    centre_Q2 = _grid(len(queries.weight))
    noise_QD = QUERY_NOISE * _drawn(queries.weight, seed, f"queries.{task}.weight")
    queries.weight.copy_(model.places_of(centre_Q2) + noise_QD)
    head.anchors.copy_(torch.cat([centre_Q2, torch.full_like(centre_Q2, ANCHOR_SIDE)], dim=1).logit())
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


def from_unit(model: Unit, start: Bundle, path: str, seed: int) -> list[str]:
    """Give the model what fits of a trained one; a decoder of its own for one task fills a shared one, as the paper's
    start from detection does (section 4.2). Queries of another task of detection are spread as its decoder sees
    places."""
    state = dict(start.model.state_dict())
    decoders = sorted({name.split(".")[1] for name in state if name.startswith("decoders.")})
    if model.config.decoder == "shared" and "shared" not in decoders and len(decoders) == 1:
        old = f"decoders.{decoders[0]}."
        state = {f"decoders.shared.{n.removeprefix(old)}" if n.startswith(old) else n: t for n, t in state.items()}
    if model.config.decoder == "separate" and decoders == ["shared"]:
        of_start: Any = start.model.config
        shared = {name: tensor for name, tensor in state.items() if name.startswith("decoders.shared.")}
        for task in of_start.tasks:
            state |= {name.replace("shared", task.name, 1): tensor for name, tensor in shared.items()}
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise TriviumError(f"{path} has no tensor that fits this model: give a run of the same --size")
    model.load_state_dict(fitting, strict=False)
    for task in model.config.tasks:
        if model.config.anchored and task.kind == "detection" and f"queries.{task.name}.weight" not in fitting:
            spread_queries(model, task.name, seed)
    new = sorted({".".join(name.split(".")[:2]) for name in own.keys() - fitting.keys()})
    notes = [f"{len(fitting):,} of {len(own):,} tensors start as {path} has them"]
    return notes + ([f"new are {', '.join(new)}"] if new else [])


def from_bert(model: Unit, text: Bundle, path: str) -> str:
    """Give the text encoder what a BERT has for it. Raises TriviumError where no task reads text."""
    if model.text is None:
        raise TriviumError(f"--init-text {path}: none of these tasks reads a text: leave it out")
    own, state = model.text.state_dict(), text.model.state_dict()
    model.text.load_state_dict({name: state[name] for name in own})
    return f"the text encoder starts as {path} has it, with its shape and its vocabulary"
