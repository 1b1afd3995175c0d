"""What stands between the two linear maps of a feed-forward, by name: the function and its gradient.

The gradients are written out because the backward pass of a block computes them from the input alone (see
transformer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

QUICK = 1.702  # the slope that makes x sigmoid(1.702 x) resemble GELU (Hendrycks & Gimpel 2016, section 2)


@dataclass(frozen=True)
class Activation:
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # gradient of the output, input -> gradient of the input


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), by way of SiLU: one kernel forward and one backward instead of three and five."""
    return F.silu(x * QUICK).mul_(1 / QUICK)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad, x * QUICK)  # the slope within and the one outside cancel


ACTIVATIONS = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),  # exact (erf)
    "quick_gelu": Activation(quick_gelu, _quick_gelu_backward),  # CLIP's own weights
}
