"""A codebook of patches found by k-means: the image tokenizer that needs no training run.

One code is the nearest of K mean patches, in squared pixel distance. It serves where minutes count: targets for
masked image modelling that can be drawn again as pictures.

B batch, C channels, H height, W width, N patches of a picture (row-major), K codes, P side of a patch in pixels,
M patches, E = 3 * P * P numbers of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 16384  # patches compared with the centres in one matrix product
PATCHES_KEPT = 200_000  # of those that `fit` is given; drawn evenly
PATCHES_PER_CODE = 64  # that the iterations of `fit` look at; the last one looks at all


class PatchCodebook(nn.Module):
    """An image tokenizer whose code covers P x P pixels of its own view of a picture."""

    kind = "patch_codebook"
    centres: Tensor  # [K, E], pixels in [0, 1], in the order of [3, P, P]

    def __init__(self, num_codes: int, patch_size: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.stride = patch_size
        self.register_buffer("centres", torch.zeros(num_codes, 3 * patch_size * patch_size))

    def config_dict(self) -> dict[str, Any]:
        return {"num_codes": self.num_codes, "patch_size": self.stride}

    def input_size(self, picture_size: int, patch_size: int) -> int:
        """Side of the tokenizer's view, so that one code covers one patch of the model's."""
        return picture_size // patch_size * self.stride

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1], H and W multiples of P -> codes int64 [B, N], row-major."""
        codes, _ = _nearest(patches_of(pixels_BCHW.to(self.centres.dtype), self.stride), self.centres)
        return codes.view(len(pixels_BCHW), -1)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """Codes [B, N] of square pictures, or [B, h, w] -> pixels in [0, 1], [B, 3, H, W]."""
        if codes_BN.ndim == 2:
            side = math.isqrt(codes_BN.shape[1])
            assert side**2 == codes_BN.shape[1], f"{codes_BN.shape[1]} codes make no square: pass [B, h, w]"
            codes_BN = codes_BN.view(-1, side, side)
        B, h, w = codes_BN.shape
        P = self.stride
        patches = self.centres[codes_BN].view(B, h, w, 3, P, P)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, h * P, w * P)

    @classmethod
    @torch.no_grad()
    def fit(
        cls, pixels: Tensor | Iterable[Tensor], num_codes: int, patch_size: int, iterations: int = 10, seed: int = 0
    ) -> PatchCodebook:
        """Find the centres: k-means++ seeds (Arthur and Vassilvitskii 2007), then Lloyd's iterations.

        The iterations look at PATCHES_PER_CODE patches for each code, a last one at all that were kept. A centre
        that no patch is nearest to moves to the patch that is farthest from its own. Equal for equal arguments.

        Args:
            pixels: uint8 pictures [B, 3, H, W], or batches of such; sides are multiples of the patch.
            iterations: on the smaller set, before the last.
        """
        generator = torch.Generator().manual_seed(seed)
        batches = [pixels] if isinstance(pixels, Tensor) else pixels
        patches_ME = _kept([patches_of(batch_BCHW, patch_size) for batch_BCHW in batches], generator)
        assert len(patches_ME) >= num_codes, f"{num_codes} codes need as many patches, {len(patches_ME)} were given"
        some_ME = patches_ME[: PATCHES_PER_CODE * num_codes]
        centres_KE = _seeds(some_ME[: max(4096, 4 * num_codes)], num_codes, generator)
        for _ in range(iterations):
            centres_KE = _moved(some_ME, centres_KE)
        codebook = cls(num_codes, patch_size)
        codebook.centres.copy_(_moved(patches_ME, centres_KE))
        return codebook


def patches_of(pixels_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> patches [B * N, E], row-major, each in the order of [3, P, P]."""
    B, C, H, W = pixels_BCHW.shape
    P = patch_size
    assert H % P == 0 and W % P == 0, f"a picture of {H}x{W} does not divide into {P}-pixel patches"
    patches = pixels_BCHW.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, C * P * P)


def _kept(parts: list[Tensor], generator: torch.Generator) -> Tensor:
    """At most PATCHES_KEPT patches, drawn without replacement, in random order; float in [0, 1]."""
    patches_ME = torch.cat(parts)
    chosen = torch.randperm(len(patches_ME), generator=generator)[:PATCHES_KEPT]
    return patches_ME[chosen].float() / 255


def _seeds(patches_ME: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Patches far from each other: each is drawn with probability proportional to its squared distance so far."""
    squared_M = patches_ME.square().sum(1)
    chosen = [int(torch.randint(len(patches_ME), (1,), generator=generator))]
    distance_M = torch.full_like(squared_M, math.inf)
    while len(chosen) < num_codes:
        newest = patches_ME[chosen[-1]]
        to_newest = squared_M - 2 * (patches_ME @ newest) + newest.square().sum()
        distance_M = torch.minimum(distance_M, to_newest.clamp_min_(0))
        distance_M[chosen[-1]] = 0
        # When all distinct patches are taken, the rest is drawn at random.
        weights = distance_M if distance_M.sum() > 0 else torch.ones_like(distance_M)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return patches_ME[chosen]


def _moved(patches_ME: Tensor, centres_KE: Tensor) -> Tensor:
    """One of Lloyd's iterations: every centre moves to the mean of its patches."""
    codes_M, distance_M = _nearest(patches_ME, centres_KE)
    counts_K = torch.bincount(codes_M, minlength=len(centres_KE))
    means_KE = torch.zeros_like(centres_KE).index_add_(0, codes_M, patches_ME) / counts_K.clamp_min(1)[:, None]
    dead = (counts_K == 0).nonzero()[:, 0]
    means_KE[dead] = patches_ME[distance_M.topk(len(dead)).indices]
    return means_KE


def _nearest(patches_ME: Tensor, centres_KE: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each patch, int64 [M], and the squared distance to it, [M]."""
    half_K = centres_KE.square().sum(1) / 2
    # |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c), and |x|^2 is the same for all centres.
    nearest = [torch.addmm(half_K, part, centres_KE.t(), alpha=-1).min(1) for part in patches_ME.split(ROWS_AT_ONCE)]
    distance_M = patches_ME.square().sum(1) + 2 * torch.cat([part.values for part in nearest])
    return torch.cat([part.indices for part in nearest]), distance_M
