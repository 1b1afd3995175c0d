"""The generated batches of a tiny FLAVA that the package itself compares layouts with, and how tests compare."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.invariance import split
from trivium.invariance.flava import TINY, flava_method, make_batch, random_flava

__all__ = ["STREAMS", "TINY", "assert_close", "flava_method", "gradients", "make_batch", "random_flava", "split"]

STREAMS = ("pairs", "images", "text")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Those that exist, by name."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(
    mine: dict[str, Tensor], reference: dict[str, Tensor], of_largest: float, floor: float = 1e-300
) -> None:
    """Same names, and every value within `of_largest` of the reference tensor's largest value."""
    assert set(mine) == set(reference), set(mine) ^ set(reference)
    for name, expected in reference.items():
        bound = of_largest * max(float(expected.abs().max()), floor)
        error = float((mine[name] - expected).abs().max())
        assert error <= bound, f"{name}: differs by {error:.3g}, allowed {bound:.3g}"
