"""Initial weights as a pure function of (seed, parameter name).

Adding, removing or reordering modules leaves every other parameter's start as it was.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from trivium.train.protocol import hash64


@torch.no_grad()
def initialise(
    module: nn.Module,
    seed: int,
    std: float | Literal["fan in"] = 0.02,
    zeros: tuple[str, ...] = (),
    heads: tuple[str, ...] = (),
) -> None:
    """Draw every parameter of two or more dimensions from N(0, std); biases start at zero, and other one-dimensional
    ones (norms, the logit scale) stay as constructed.

    Embedding rows of padding stay zero. The class token, the mask token and the positions are drawn too: zeros under
    a LayerNorm of eps 1e-12 have a gradient of norm 1e5 at the first step, which silences everything else after
    clipping. `zeros` names parameters to start at zero all the same, as the published initialisation does. `heads`
    are patterns of parameters that are drawn with 0.02 whatever the std: a classifier that starts with small weights
    starts at the loss of a blind guess. "fan in": 1 / sqrt(numbers that one output is a sum of), as for DALL-E's
    convolutions.
    """
    padding = {
        f"{name}.weight": submodule.padding_idx
        for name, submodule in module.named_modules()
        if isinstance(submodule, nn.Embedding) and submodule.padding_idx is not None
    }
    for name, parameter in module.named_parameters():
        if name in zeros or (parameter.ndim == 1 and name.endswith("bias")):  # torch draws biases from its own state
            parameter.zero_()
        elif parameter.ndim >= 2 and parameter.numel():
            generator = torch.Generator().manual_seed(hash64(seed, name) % 2**63)
            of_all = 1 / math.sqrt(parameter[0].numel()) if std == "fan in" else std
            own_std = 0.02 if any(fnmatchcase(name, pattern) for pattern in heads) else of_all
            draw = torch.empty(parameter.shape).normal_(0.0, own_std, generator=generator)
            parameter.copy_(draw)
            if name in padding:
                parameter[padding[name]].zero_()
