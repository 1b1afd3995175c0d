"""Sequences of a padded batch without their pads, one after the other.

Norms, linear maps and activations know nothing of neighbours, so they take the real positions alone; attention gets the
batch with zeros for those that were left out, which nobody may attend, and what it gives there is dropped. Of captions
a third and more of a padded batch are pads.

Sequences of several lengths may also come in runs, each of one length, and then nothing is padded.

B batch, L positions, N positions that are taken of all samples, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORTH_IT = 1 / 8  # share of pads from which on leaving them out saves more than taking apart and putting together costs
# Some pads are taken along, so that their number is a multiple of a power of two, about this part of all positions: for
# each number that it has not met a library of matrix products makes a program anew, which takes longer than it saves.
COARSE = 16


@dataclass(frozen=True)
class Packing:
    """Where the real positions lie, and a few pads beside them."""

    mask_BL: Tensor  # bool, True = real
    index_N: Tensor  # int64, of B * L: all real positions in order, then pads

    @classmethod
    def of(cls, mask: Tensor | None) -> Packing | None:
        """None where there is little to leave out, and on a GPU, which would have to be waited for to know how much.

        mask: bool [B, L], True = a real position. One that says more, [B, L, L], is not packed.
        """
        if mask is None or mask.ndim != 2 or mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        real = int(mask.sum())
        coarse = 1 << max(4, (mask.numel() // COARSE).bit_length() - 1)
        taken = -(-real // coarse) * coarse
        if taken >= (1 - WORTH_IT) * mask.numel():
            return None
        return cls(mask, mask.flatten().argsort(descending=True, stable=True)[:taken])

    def pack(self, x_BLD: Tensor) -> Tensor:
        """[N, D]."""
        return x_BLD.flatten(0, 1).index_select(0, self.index_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        """[B, L, D], zeros where nothing was taken."""
        padded = x_ND.new_zeros(self.mask_BL.numel(), x_ND.shape[1]).index_copy_(0, self.index_N, x_ND)
        return padded.unflatten(0, self.mask_BL.shape)


@dataclass(frozen=True)
class Runs:
    """Sequences of several lengths in runs of one length each, one after the other: [N, D]. shapes: of each run, how
    many sequences and how many positions."""

    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, states: Sequence[Tensor]) -> Runs:
        """states: [n, L, D] of each run."""
        return cls(tuple((len(x_BLD), x_BLD.shape[1]) for x_BLD in states))

    def pack(self, states: Sequence[Tensor]) -> Tensor:
        """[n or 1, L, D] of each run, where 1 is for all of it -> [N, D]."""
        rows = zip(states, self.shapes, strict=True)
        return torch.cat([x_BLD.expand(number, -1, -1).flatten(0, 1) for x_BLD, (number, _) in rows])

    def unpack(self, x_ND: Tensor) -> list[Tensor]:
        """[n, L, D] of each run."""
        parts = x_ND.split([number * length for number, length in self.shapes])
        return [x.unflatten(0, shape) for x, shape in zip(parts, self.shapes, strict=True)]
