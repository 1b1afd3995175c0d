"""Pictures with boxes to a batch: DETR's augmentation, pictures of different sizes, boxes flat with the row of each.

B rows of a micro-batch, M boxes of all its pictures, A places for attributes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.data.decode import MAX_PIXELS, DecodeError, decode
from trivium.data.order import Draws
from trivium.data.task_collate import stacked
from trivium.data.transforms import ImageTransform, Recoloring, recolored, resize, shortest_size
from trivium.errors import BadSample
from trivium.train.protocol import Batch, Sample


@dataclass(frozen=True)
class Augmentation:
    """DETR's, in this order: mirror; half of the time cut a part out of a smaller copy; resize. Then, if asked for,
    other colours."""

    flip: float = 0.5  # probability
    shorts: tuple[int, ...] = tuple(range(480, 801, 32))  # pixels of the shorter side, one of which is drawn
    crop: float = 0.5  # probability
    before_crop: tuple[int, ...] = (400, 500, 600)  # pixels of the shorter side, likewise, of what is cropped
    crop_sides: tuple[int, int] = (384, 600)  # of a crop, each drawn for itself
    # Brightness, contrast and saturation times 1 ± this. Hues are not turned, since attributes name them; but orange is
    # told from brown by its brightness, so at 0.3 one named hue in eight becomes another's.
    jitter: float = 0.0

    def __call__(
        self, rng: np.random.Generator, image_HWC: np.ndarray, boxes_M4: np.ndarray, longest: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """boxes_M4: (left, top, right, bottom) in pixels; afterwards those of the new picture, which may have no area
        left. Raises DecodeError, as `resized`."""
        if rng.random() < self.flip:
            width = image_HWC.shape[1]
            image_HWC = image_HWC[:, ::-1]
            boxes_M4 = np.stack(
                [width - boxes_M4[:, 2], boxes_M4[:, 1], width - boxes_M4[:, 0], boxes_M4[:, 3]], axis=1
            )
        if rng.random() < self.crop:
            image_HWC, boxes_M4 = resized(image_HWC, boxes_M4, _one(rng, self.before_crop), None)
            image_HWC, boxes_M4 = self._cropped(rng, image_HWC, boxes_M4)
        image_HWC, boxes_M4 = resized(image_HWC, boxes_M4, _one(rng, self.shorts), longest)
        if self.jitter:
            brightness, contrast, saturation = rng.uniform(1 - self.jitter, 1 + self.jitter, size=3).clip(min=0)
            image_HWC = recolored(image_HWC, Recoloring(brightness, contrast, saturation))
        return image_HWC, boxes_M4

    def _cropped(
        self, rng: np.random.Generator, image_HWC: np.ndarray, boxes_M4: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        low, high = self.crop_sides
        # Width first, as DETR draws them.
        width, height = (
            int(rng.integers(min(low, side), min(high, side) + 1)) for side in image_HWC.shape[1::-1]
        )  # fmt: skip
        top, left = (
            int(rng.integers(side - new + 1)) for side, new in zip(image_HWC.shape, (height, width), strict=False)
        )
        boxes_M4 = (boxes_M4 - [left, top, left, top]).clip(0, [width, height, width, height])
        return image_HWC[top : top + height, left : left + width], boxes_M4


def resized(
    image_HWC: np.ndarray, boxes_M4: np.ndarray, short: int, longest: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Picture and boxes with so many pixels on the shorter side (see `transforms.shortest_size`). Raises DecodeError
    where that makes too large a picture, as of one of 1 x 10,000 pixels without a longest side."""
    height, width, _ = image_HWC.shape
    new = shortest_size(height, width, short, longest)
    if new[0] * new[1] > MAX_PIXELS:
        raise DecodeError(
            f"its {width:,} x {height:,} pixels would become {new[1]:,} x {new[0]:,} with {short} on the shorter side,"
            f" more than the {MAX_PIXELS:,} allowed"
        )
    if new != (height, width):
        image_HWC = resize(np.ascontiguousarray(image_HWC), new, filter="bilinear")
    return image_HWC, boxes_M4 * np.array([new[1] / width, new[0] / height] * 2)


def _one(rng: np.random.Generator, choices: Sequence[int]) -> int:
    return choices[int(rng.integers(len(choices)))]


class PreparedPicture(NamedTuple):
    pixels_CHW: Tensor  # uint8
    boxes_M4: np.ndarray  # (centre x, centre y, width, height) as shares of the picture
    kept_M: np.ndarray  # bool, of the sample's boxes
    sample: Sample


@dataclass
class DetectionCollate:
    """Pictures with boxes.

    Targets, flat over all pictures: ``box`` (float32 [M, 4], centre and size as shares of the picture without padding),
    ``box_class`` (int64 [M]), ``box_row`` (int64 [M]: the row in this micro-batch) and, where there are some,
    ``box_attributes`` (int64 [M, A], -1 where there is none).
    """

    transform: ImageTransform
    augmentation: Augmentation
    train: bool = True
    false_pairs: float = field(default=0.0, init=False)
    sort_by_length: bool = field(default=True, init=False)  # by shape, inside a global batch, for less padding

    def prepare(self, sample: Sample, draws: Draws) -> PreparedPicture:
        """Raises BadSample, DecodeError."""
        image_HWC, boxes_M4 = decode(sample["image"]), sample["boxes"].astype(np.float64)
        if (stated := sample["size"]) != image_HWC.shape[:2]:
            height, width, _ = image_HWC.shape
            raise BadSample(
                sample["name"],
                "",
                f"its picture has {width} x {height} pixels, not {stated[1]} x {stated[0]} as stated",
            )
        longest = self.transform.longest
        if self.train:
            image_HWC, boxes_M4 = self.augmentation(draws.generator("augmentation"), image_HWC, boxes_M4, longest)
        else:
            image_HWC, boxes_M4 = resized(image_HWC, boxes_M4, self.transform.size, longest)
        kept_M = np.all(boxes_M4[:, 2:] > boxes_M4[:, :2], axis=1)
        height, width, _ = image_HWC.shape
        shares_M4 = boxes_M4[kept_M] / [width, height, width, height]
        centred_M4 = np.concatenate(
            [(shares_M4[:, :2] + shares_M4[:, 2:]) / 2, shares_M4[:, 2:] - shares_M4[:, :2]], axis=1
        )
        pixels_CHW = torch.from_numpy(np.array(image_HWC.transpose(2, 0, 1), order="C"))
        return PreparedPicture(pixels_CHW, centred_M4, kept_M, sample)

    def batch(
        self,
        stream: str,
        prepared: Sequence[PreparedPicture],
        rows_B: Tensor,
        places_B: Tensor,
        number: int,
        bad: Sequence[str],
    ) -> Batch:
        images = stacked([each.pixels_CHW for each in prepared], [each.sample for each in prepared])
        columns = {
            "box": torch.from_numpy(np.concatenate([each.boxes_M4 for each in prepared])).float(),
            "box_class": torch.from_numpy(np.concatenate([each.sample["classes"][each.kept_M] for each in prepared])),
            "box_row": torch.repeat_interleave(torch.tensor([len(each.boxes_M4) for each in prepared])),
        }
        if all("attributes" in each.sample for each in prepared):
            attributes = np.concatenate([each.sample["attributes"][each.kept_M] for each in prepared])
            columns["box_attributes"] = torch.from_numpy(attributes)
        return Batch(stream, rows_B, places_B, (images,), (), columns, number, tuple(bad))
