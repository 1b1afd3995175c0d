"""Multi-crop: several random parts of one picture, each in colours of its own (Caron et al. 2020, and DINO).

Two global crops show much of the picture at the model's size, local ones a small part at a smaller size. Every choice
comes from the draws of the sample's place and the number of the crop, so another crop more shifts none of the others.

Where it differs from the published code: brightness, contrast, saturation and hue change in one linear map instead of
one after the other in a random order, and hue turns in the plane of chroma instead of in HSV.

B rows of a micro-batch, V crops, N patches of a global crop, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.data.codes import picture_digest
from trivium.data.decode import MAX_PIXELS, decode
from trivium.data.decoded import Decoded
from trivium.data.masking import block_mask
from trivium.data.order import Draws
from trivium.data.transforms import Recoloring, blurred, crop_and_resize, random_crop_box, recolored, solarised
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Batch, Images, Sample

NUM_GLOBAL = 2
MASKED_CROPS = 0.5  # of the global ones, share that has hidden patches at all (DINOv2)
MASKED_SHARE = (0.1, 0.5)  # of the patches of such a crop


@dataclass(frozen=True)
class MultiCrop:
    """Which crops, and how they are changed. The defaults are published (Caron et al. 2021, appendix, and their code).

    `blur` and `solarise` hold a probability for the first global crop, the second, and any local one.
    """

    global_size: int = 224  # pixels on a side
    local_size: int = 96
    num_local: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)  # share of the area
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip: float = 0.5  # probability of a mirrored crop
    jitter: float = 0.8  # probability of other colours: factors 1 ± each of the next three, and a turned hue
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # of the circle, to either side
    grey: float = 0.2  # probability of no colour
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_radius: tuple[float, float] = (0.1, 2.0)  # standard deviation, in pixels of the crop
    solarise: tuple[float, float, float] = (0.0, 0.2, 0.0)

    def sizes(self) -> list[int]:
        """Of every crop, the global ones first."""
        return [self.global_size] * NUM_GLOBAL + [self.local_size] * self.num_local

    def crop(self, picture_HWC: np.ndarray, draws: Draws, number: int) -> np.ndarray:
        """Crop `number` of a picture: uint8 [3, size, size]. 0 and 1 are the global ones."""
        rng = draws.generator(f"crop {number}")
        is_global, kind = number < NUM_GLOBAL, min(number, NUM_GLOBAL)
        scale = self.global_scale if is_global else self.local_scale
        height, width, _ = picture_HWC.shape
        box = random_crop_box(rng, height, width, scale)
        crop_CHW = crop_and_resize(picture_HWC, self.global_size if is_global else self.local_size, box)
        crop_HWC = crop_CHW.transpose(1, 2, 0)
        if rng.random() < self.flip:
            crop_HWC = crop_HWC[:, ::-1]
        change = self._recoloring(rng)
        if change != Recoloring():
            crop_HWC = recolored(crop_HWC, change)
        if rng.random() < self.blur[kind]:
            crop_HWC = blurred(np.ascontiguousarray(crop_HWC), rng.uniform(*self.blur_radius))
        if rng.random() < self.solarise[kind]:
            crop_HWC = solarised(crop_HWC)
        return np.ascontiguousarray(crop_HWC.transpose(2, 0, 1))

    def _recoloring(self, rng: np.random.Generator) -> Recoloring:
        jittered, grey = rng.random() < self.jitter, rng.random() < self.grey
        strengths = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        draws = rng.uniform(-1, 1, size=4) * strengths
        change = Recoloring()
        if jittered:
            brightness, contrast, saturation = (1 + draws[:3]).clip(min=0).tolist()
            change = Recoloring(brightness, contrast, saturation, 2 * pi * float(draws[3]))
        return replace(change, saturation=0.0) if grey else change


class PreparedCrops(NamedTuple):
    crops: list[np.ndarray]  # uint8 [3, size, size] each
    mask_2N: np.ndarray | None  # bool, hidden patches of the global crops
    same: int


@dataclass
class CropCollate:
    """Pictures alone, as crops: each an entry of the batch's `images`, in the order of `MultiCrop.sizes`.

    masked: with targets `patch_mask`, bool [B, 2, N], for iBOT.
    """

    crops: MultiCrop
    patch: int  # pixels on a side
    masked: bool = False
    max_pixels: int = MAX_PIXELS  # of a picture as stored: larger ones are refused from the header alone
    cache_bytes: int = 0  # memory of each worker for decoded pictures; changes the speed alone
    false_pairs: float = field(default=0.0, init=False)
    sort_by_length: bool = field(default=False, init=False)
    _decoded: Decoded = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, size in (("global", self.crops.global_size), ("local", self.crops.local_size)):
            if size % self.patch:
                raise TriviumError(
                    f"a {name} crop of {size} pixels cannot be cut into patches of {self.patch}: choose a size that is"
                    " a multiple of the patch"
                )
        self._decoded = Decoded(self.cache_bytes)

    def prepare(self, sample: Sample, draws: Draws) -> PreparedCrops:
        """Raises BadSample, DecodeError."""
        if "image" not in sample:
            raise BadSample(sample["name"], "", "has no picture")
        data = sample["image"]
        digest = picture_digest(data) if self.cache_bytes else b""
        picture_HWC = self._decoded.get(digest, lambda: decode(data, max_pixels=self.max_pixels))
        crops = [self.crops.crop(picture_HWC, draws, number) for number in range(len(self.crops.sizes()))]
        return PreparedCrops(crops, self._mask(draws) if self.masked else None, sample["same_image"])

    def _mask(self, draws: Draws) -> np.ndarray:
        grid = self.crops.global_size // self.patch
        masks = []
        for number in range(NUM_GLOBAL):
            rng = draws.generator(f"patches {number}")
            hides, share = rng.random() < MASKED_CROPS, rng.uniform(*MASKED_SHARE)
            num_masked = round(grid**2 * share) if hides else 0
            masks.append(block_mask(rng, grid, grid, num_masked))
        return np.stack(masks)

    def batch(
        self,
        stream: str,
        prepared: Sequence[PreparedCrops],
        rows_B: Tensor,
        places_B: Tensor,
        number: int,
        bad: Sequence[str],
    ) -> Batch:
        same_B = torch.tensor([each.same for each in prepared], dtype=torch.int64)
        images = tuple(
            Images(torch.from_numpy(np.stack(crops)), same_B)
            for crops in zip(*(each.crops for each in prepared), strict=True)
        )
        masks = [each.mask_2N for each in prepared if each.mask_2N is not None]
        targets = {"patch_mask": torch.from_numpy(np.stack(masks))} if masks else {}
        return Batch(stream, rows_B, places_B, images, (), targets, number, tuple(bad))
