"""AdamW as a recipe describes it: named groups, a schedule that is a pure function of the step, state by name.

A parameter's name is its name in the method ("model.image_encoder.blocks.3.attention.qkv.weight"). Patterns are those
of ``fnmatch`` ("image_encoder.*"); the leading "model." of the student may be left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trivium.errors import TriviumError
from trivium.train import distributed

# What decay towards zero only harms, although it may have more than one dimension. 0-D and 1-D tensors (biases,
# norms, logit scale) are not decayed either.
UNDECAYED = ("*bias", "*norm*", "*position*", "*class_token*", "*mask_token*", "*logit_scale*", "*temperature*")


@dataclass(frozen=True)
class Group:
    """Parameters with a rate, a decay or a start of their own. The last group that matches a parameter counts."""

    pattern: str
    rate: float = 1.0  # times the learning rate
    weight_decay: float | None = None  # of vectors too, where no pattern of no_decay spares them; None: as everywhere
    freeze_until: int = 0  # steps during which they stay as they are (DINO's last layer)


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_final: float | None = None  # cosine from weight_decay to this value (DINO); None: constant
    warmup: float = 0.05  # steps; below 1: share of all steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.0  # learning rate at the end, as a factor of lr
    clip: Literal["none", "global", "per_tensor"] = "global"
    clip_norm: float = 1.0
    layer_decay: float = 1.0  # factor on the rate for each block below the top of its tower (BEiT, section 3.1)
    no_decay: tuple[str, ...] = UNDECAYED
    decay_vectors: bool = False  # decay 0-D and 1-D tensors too, where no pattern of no_decay spares them
    freeze: tuple[str, ...] = ()  # never trained
    groups: tuple[Group, ...] = ()


def warmup_steps(optim: Optim, total: int) -> int:
    return round(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup)


def never_warm(optim: Optim, total: int) -> str | None:
    """A sentence where the warm-up is not shorter than the run of `total` steps; None where it is."""
    if warmup_steps(optim, total) < total:
        return None
    return (
        f"a warm-up of {optim.warmup:g} steps leaves nothing of a run of {total}: give --optim.warmup a share, such as"
        " 0.06"
    )


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """Factor on ``lr`` at a step (0 is the first): linear warm-up that reaches 1, then the schedule down to `final`."""
    warmup = warmup_steps(optim, total)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if optim.schedule == "constant":
        return 1.0
    remaining = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optim.final + (1 - optim.final) * remaining


def decay_factor(optim: Optim, step: int, total: int) -> float:
    """Factor on the weight decay at a step (DINO, Caron et al. 2021, appendix: cosine from 0.04 to 0.4)."""
    if optim.weight_decay_final is None or not optim.weight_decay:
        return 1.0
    end = optim.weight_decay_final / optim.weight_decay
    return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, step / max(1, total)))) / 2


def build(method: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over what the method trains, in named groups; frozen parameters get ``requires_grad = False``.

    Parameters that already want no gradient (a teacher, an image tokenizer) are left out.

    Raises:
        TriviumError: a pattern of `freeze` or `groups` that matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in method.named_parameters()]
    for pattern in (*optim.freeze, *(group.pattern for group in optim.groups)):
        if not any(_matches(name, [pattern]) for name in names):
            raise TriviumError(f'no parameter is called "{pattern}": the first are {", ".join(names[:3])}')
    depths = _depths(names)
    groups: dict[tuple[float, float, int], dict[str, Any]] = {}
    for name, parameter in method.named_parameters():
        if _matches(name, optim.freeze):
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        own = next((group for group in reversed(optim.groups) if _matches(name, [group.pattern])), Group(name))
        rate = own.rate * optim.layer_decay ** _blocks_above(name, depths)
        decay = own.weight_decay
        if decay is None:
            decay = optim.weight_decay if parameter.ndim > 1 or optim.decay_vectors else 0.0
        if _matches(name, optim.no_decay):
            decay = 0.0
        key = (rate, decay, own.freeze_until)
        if key not in groups:
            title = f"rate {rate:g}, decay {decay:g}" + (f", from step {own.freeze_until}" if own.freeze_until else "")
            groups[key] = {"name": title, "params": [], "lr": optim.lr * rate, "weight_decay": decay}
            groups[key] |= {"full_lr": optim.lr * rate, "full_decay": decay, "freeze_until": own.freeze_until}
        groups[key]["params"].append(parameter)
    if not groups:
        raise TriviumError("optim.freeze leaves no parameter to train: narrow its patterns")
    devices = {parameter.device.type for group in groups.values() for parameter in group["params"]}
    return torch.optim.AdamW(
        list(groups.values()), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=devices <= {"cpu", "cuda"}
    )


def set_step(optimizer: torch.optim.Optimizer, optim: Optim, step: int, total: int) -> float:
    """Give every group its rate, its decay and its frozenness at this step. Returns the common learning rate."""
    rate, decay = learning_rate(optim, step, total), decay_factor(optim, step, total)
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * rate
        group["weight_decay"] = group["full_decay"] * decay
        if group["freeze_until"]:
            for parameter in group["params"]:  # without a gradient AdamW skips them, moments and decay included
                parameter.requires_grad_(step >= group["freeze_until"])
    return optim.lr * rate


# ---------------------------------------------------------------------------------------------- names and depth


def _matches(name: str, patterns: Iterable[str]) -> bool:
    short = name.removeprefix("model.")
    return any(fnmatchcase(name, pattern) or fnmatchcase(short, pattern) for pattern in patterns)


_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)\.")  # "model.text_encoder.blocks" and "3"
_HEAD = re.compile(r"(^|\.)(\w+_)?heads?(\.|$)")
# What the first block reads is made of these: a ResNet's begins with its stem, CLIP's blocks with a norm of their own.
_INPUT = re.compile(
    r"(^|\.)(\w*embed\w*|patch\w*|position\w*|(\w+_)?(class|cls|mask|task)_tokens?|pre_norm|stem)(\.|$)"
)


def _depths(names: list[str]) -> dict[str, int]:
    """Number of blocks of each stack that is no part of a head: {"model.text_encoder.blocks": 12}."""
    depths: dict[str, int] = {}
    for match in filter(None, map(_BLOCK.match, names)):
        if not _HEAD.search(match["stack"]):
            depths[match["stack"]] = max(depths.get(match["stack"], 0), int(match["number"]) + 1)
    return depths


def _blocks_above(name: str, depths: dict[str, int]) -> int:
    """How far below the top of its tower a parameter stands: 0 for heads and final norms, 1 for the last block,
    depth + 1 for what the first block reads. Its tower is the stack of blocks whose path has most in common with its
    own, and of several the nearest."""
    match = _BLOCK.match(name)
    if match and match["stack"] in depths:
        return depths[match["stack"]] - int(match["number"])
    if not depths or _HEAD.search(name) or not _INPUT.search(name):
        return 0
    stack = max(depths, key=lambda stack: (_parts_in_common(name, stack), -stack.count("."), depths[stack]))
    return depths[stack] + 1


def _parts_in_common(left: str, right: str) -> int:
    """How many words two paths begin with alike: "text_tokens" has one in common with "text.blocks"."""
    pairs = zip(re.split(r"[._]", left), re.split(r"[._]", right), strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), 0)


# ------------------------------------------------------------------------------------------------ state by name


def state_by_name(optimizer: torch.optim.Optimizer, method: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as {"exp_avg/model.blocks.0.weight": tensor}: no index, so groups may be cut anew."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in method.named_parameters()}
    return {
        f"{kind}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if value is not None
    }


def load_state_by_name(optimizer: torch.optim.Optimizer, method: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_by_name` gave. A parameter without saved state starts without.

    Raises:
        TriviumError: state of a parameter that this optimizer does not train, or of another shape.
    """
    parameters = dict(method.named_parameters())
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {parameter: number for number, parameter in enumerate(trained)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in index:
            raise TriviumError(f"the saved optimizer holds {name}, which this run does not train: was it frozen since?")
        if value.ndim and value.shape != parameter.shape:
            raise TriviumError(f"the saved {kind} of {name} has shape {list(value.shape)}, not {list(parameter.shape)}")
        if value.ndim:  # with the strides of the parameter (channels last): fused kernels walk both alike
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(distributed.part_like(parameter, value))
        state.setdefault(index[parameter], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
