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

from trivium.bundle import Bundle

BATCH = 256


@dataclass(frozen=True)
class ImageFeatures:
    """Readings of each picture, float32 [B, D] on CPU."""

    class_token: Tensor  # after the final norm; of a model that has none (UniT) the mean of the patches
    mean_of_patches: Tensor  # after the final norm, without the class token
    projected: Tensor | None  # in the space that images and texts share; None: the model has none

    def readings(self) -> dict[str, Tensor]:
        """By name; the one that stands for the picture in a search first."""
        projected = {} if self.projected is None else {"projected": self.projected}
        return {**projected, "class_token": self.class_token, "mean_of_patches": self.mean_of_patches}

    def __getitem__(self, rows: Tensor | slice) -> ImageFeatures:
        projected = None if self.projected is None else self.projected[rows]
        return ImageFeatures(self.class_token[rows], self.mean_of_patches[rows], projected)


@torch.inference_mode()
def of_pictures(bundle: Bundle, pictures: Sequence[np.ndarray]) -> ImageFeatures:
    """pictures: uint8 [H, W, 3] each."""
    parts: dict[str, list[Tensor]] = {"class_token": [], "mean_of_patches": [], "projected": []}
    for first in range(0, len(pictures), BATCH):
        encoded = bundle.encode_image(list(pictures[first : first + BATCH]))
        parts["class_token"].append(encoded.pooled)
        parts["mean_of_patches"].append(encoded.pooled if encoded.mean else encoded.tokens[:, 1:].mean(dim=1))
        if encoded.is_projected:
            parts["projected"].append(encoded.projected)
    found = {name: torch.cat(several).float().cpu() if several else None for name, several in parts.items()}
    return ImageFeatures(**found)  # type: ignore[arg-type]  # of a model without a shared space `projected` alone is None


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
