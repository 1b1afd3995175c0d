"""Masked patches filled in: what the model thinks stands behind the mask, made visible by the codes' own decoder.

Of each: the original, what the model sees, its guess from the picture alone, its guess with the name beside the
picture, and the true codes decoded, the best that this image tokenizer could show.
B pictures, N patches, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.bundle import Bundle
from trivium.data.transforms import normalize
from trivium.data.views import WHOLE, Views

GREY = 190


@dataclass(frozen=True)
class Reconstruction:
    """Pictures uint8 [H, W, 3] of one sample."""

    name: str
    original: np.ndarray
    masked: np.ndarray
    from_picture: np.ndarray  # predicted codes where masked, true codes elsewhere, decoded
    with_name: np.ndarray  # the same by the head that also reads the name
    true_codes: np.ndarray
    right: int  # of the masked codes, guessed from the picture alone
    num_masked: int


def block(grid: int, seed: int) -> Tensor:
    """One rectangle that hides about a third of the patches: easier to judge by eye than scattered blocks."""
    rng = np.random.default_rng(seed)
    side = max(1, round(grid * 0.6))
    top, left = rng.integers(0, grid - side + 1, size=2)
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask.flatten()


@torch.inference_mode()
def reconstruct(bundle: Bundle, pictures: Sequence[np.ndarray], names: Sequence[str]) -> list[Reconstruction]:
    """Fill in one hidden rectangle of each picture (uint8 [H, W, 3]); [] where nothing can be decoded.

    Args:
        bundle: a FLAVA with its image transform and its image tokenizer, which may be None.
    """
    model: Any = bundle.model
    if bundle.image_tokenizer is None or not hasattr(model, "mim_head") or not len(pictures):
        return []
    device = next(model.parameters()).device
    tokenizer: Any = bundle.image_tokenizer.to(device)
    grid = bundle.transform.size // model.config.patch_size
    N, side = grid**2, grid * tokenizer.stride
    transform = bundle.transform
    views = Views(transform.size, transform.filter, codebook_size=None if side == transform.size else side)
    seen_BCHW = _stacked([views.for_model(picture, WHOLE) for picture in pictures]).to(device)
    codes_BN = tokenizer.encode(_stacked([views.for_codebook(picture, WHOLE) for picture in pictures]).to(device) / 255)
    if tokenizer.decode(codes_BN[:1]) is None:
        return []
    masked_BN = torch.stack([block(grid, seed) for seed in range(len(pictures))]).to(device)

    image = model.encode_image(normalize(seen_BCHW, transform.mean, transform.std), masked_BN)
    alone_BN = torch.where(masked_BN, model.mim_head(image.tokens[:, 1:]).argmax(-1), codes_BN)
    fused = model.fuse(image, bundle.encode_text(list(names)))
    named_BN = torch.where(masked_BN, model.mmm_image_head(fused.tokens[:, 2 : 2 + N]).argmax(-1), codes_BN)

    hidden_B1HW = F.interpolate(masked_BN.view(-1, 1, grid, grid).float(), size=transform.size).bool()

    def shown(codes: Tensor) -> list[np.ndarray]:
        decoded_BCHW = F.interpolate(tokenizer.decode(codes), size=transform.size)
        return _pictures((decoded_BCHW.clamp(0, 1) * 255).round().to(torch.uint8))

    right_B = ((alone_BN == codes_BN) & masked_BN).sum(1).tolist()
    columns = zip(
        names, _pictures(seen_BCHW), _pictures(seen_BCHW.masked_fill(hidden_B1HW, GREY)), shown(alone_BN),
        shown(named_BN), shown(codes_BN), right_B, masked_BN.sum(1).tolist(), strict=True,
    )  # fmt: skip
    return [Reconstruction(*column) for column in columns]


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))


def _pictures(pixels_BCHW: Tensor) -> list[np.ndarray]:
    return list(pixels_BCHW.permute(0, 2, 3, 1).cpu().numpy())
