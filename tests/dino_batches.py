"""The generated batches of a tiny DINO that the package itself compares layouts with."""

from __future__ import annotations

from tests.flava_batches import assert_close, gradients, split
from trivium.invariance.dino import TINY, dino_method, make_batch, random_dino

__all__ = ["TINY", "assert_close", "dino_method", "gradients", "make_batch", "random_dino", "split"]
