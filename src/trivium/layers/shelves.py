"""Small feature maps of several sizes side by side in few larger ones, for convolutions of stride 1 on a processor.

However small a map is, each call makes weights ready and writes their whole gradient. Between two maps there are as
many zeros as the convolution looks beyond a border, so that each gives what it gives alone; what comes out there is
dropped. A map is copied to its place, which is worth it where there are few positions beside the channels.

n maps of a run, C channels, h, w height and width of its maps, H, W those of all side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# With AMX in bfloat16 and 512 channels three maps of 16 x 22 take 22 us a position, forward and backward, and one of
# 16 x 24 takes 34: so much for a call. Both grow with the square of the channels.
CALL = 192  # positions that are rather computed in vain than a call more is made
POSITIONS = (
    2  # of a map for each channel, at most: its copies grow with the channels, what a call costs with their square
)


def in_shelves(convolve: Callable[[Tensor], Tensor], maps: Sequence[Tensor], gap: int) -> list[Tensor]:
    """What a convolution gives of each run of maps, [n, C, h, w].

    Args:
        convolve: [B, C, H, W] -> as many positions.
        gap: how far it looks beyond a border.
    """
    found: dict[int, Tensor] = {}
    for shelf in shelves([(len(x), *x.shape[2:]) for x in maps], maps[0].shape[1], gap):
        of_shelf = [maps[number] for number in shelf]
        if len(shelf) == 1:
            outs = [convolve(of_shelf[0])]
        else:
            outs = _taken_apart(convolve(_side_by_side(of_shelf, gap)), of_shelf, gap)
        found |= zip(shelf, outs, strict=True)
    return [found[number] for number in range(len(maps))]


def shelves(runs: Sequence[tuple[int, int, int]], channels: int, gap: int) -> list[list[int]]:
    """Which runs stand side by side, the tallest first. runs: (n, h, w) of each."""
    small = [number for number, (_, h, w) in enumerate(runs) if h * w <= POSITIONS * channels]
    found = [[number] for number in range(len(runs)) if number not in small]
    shelf: list[int] = []
    height = in_vain = 0
    for number in sorted(small, key=lambda number: -runs[number][1]):
        count, h, w = runs[number]
        more = count * (height * (w + gap) - h * w)
        if shelf and in_vain + more <= CALL * len(shelf):
            shelf.append(number)
            in_vain += more
        else:
            shelf, height, in_vain = [number], h, count * h * gap
            found.append(shelf)
    return found


def _side_by_side(maps: Sequence[Tensor], gap: int) -> Tensor:
    """[1, C, H, W], in memory channels last."""
    height = maps[0].shape[2]
    padded = [F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, gap, 0, height - x.shape[2])) for x in maps]  # [n, H, w + gap, C]
    return torch.cat([x.transpose(0, 1).flatten(1, 2) for x in padded], dim=1)[None].permute(0, 3, 1, 2)


def _taken_apart(x_1CHW: Tensor, maps: Sequence[Tensor], gap: int) -> list[Tensor]:
    """[n, C, h, w] of each."""
    parts = x_1CHW[0].permute(1, 2, 0).split([len(x) * (x.shape[3] + gap) for x in maps], dim=1)
    return [
        part.unflatten(1, (len(x), -1))[: x.shape[2], :, : x.shape[3]].permute(1, 3, 0, 2)
        for part, x in zip(parts, maps, strict=True)
    ]
