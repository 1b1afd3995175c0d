"""What a model makes of many pictures or texts, computed once and kept in memory.

B rows, D width, L positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from trivium.load import Bundle

BATCH = 256


@dataclass(frozen=True)
class ImageFeatures:
    """Three readings of each picture, float32 [B, D] on CPU."""

    class_token: Tensor  # after the final norm
    projected: Tensor  # in the space that images and texts share
    mean_of_patches: Tensor  # after the final norm, without the class token

    def __getitem__(self, rows: Tensor | slice) -> ImageFeatures:
        return ImageFeatures(self.class_token[rows], self.projected[rows], self.mean_of_patches[rows])


READINGS = ("class_token", "projected", "mean_of_patches")


@torch.inference_mode()
def of_pictures(bundle: Bundle, pictures: Sequence[np.ndarray]) -> ImageFeatures:
    """pictures: uint8 [H, W, 3] each."""
    parts: dict[str, list[Tensor]] = {name: [] for name in READINGS}
    for first in range(0, len(pictures), BATCH):
        encoded = bundle.encode_image(list(pictures[first : first + BATCH]))
        parts["class_token"].append(encoded.pooled)
        parts["projected"].append(encoded.projected)
        parts["mean_of_patches"].append(encoded.tokens[:, 1:].mean(dim=1))
    return ImageFeatures(**{name: torch.cat(found).float().cpu() for name, found in parts.items()})


@torch.inference_mode()
def projected(bundle: Bundle, pixels: Iterable[Tensor]) -> Tensor:
    """In the space that images and texts share, float32 [B, D] on CPU.

    pixels: uint8 [3, H, W] each, from the bundle's transform; taken a few at a time, and not kept. At least one.
    """
    rest, parts = iter(pixels), []
    while several := list(islice(rest, BATCH)):
        parts.append(bundle.encode_image(torch.stack(several)).projected.float().cpu())
    return torch.cat(parts)


@torch.inference_mode()
def of_texts(bundle: Bundle, texts: Sequence[str]) -> Tensor:
    """In the space that images and texts share, float32 [B, D] on CPU. Sorted by length inside: less padding."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = []
    for first in range(0, len(order), BATCH):
        parts.append(bundle.encode_text([texts[index] for index in order[first : first + BATCH]]).projected)
    sorted_BD = torch.cat(parts).float().cpu()
    return sorted_BD[torch.tensor(order).argsort()]


@torch.inference_mode()
def of_pixels(pictures: Sequence[np.ndarray], side: int = 16) -> Tensor:
    """Pictures averaged down to side x side pixels, float32 [B, 3 * side * side]: the floor that a model must beat.

    Height and width must be multiples of `side`.
    """
    parts = []
    for picture_HWC in pictures:
        H, W, C = picture_HWC.shape
        boxes = picture_HWC.reshape(side, H // side, side, W // side, C).astype(np.float32)
        parts.append(torch.from_numpy(boxes.mean(axis=(1, 3)).ravel()))
    return torch.stack(parts)
