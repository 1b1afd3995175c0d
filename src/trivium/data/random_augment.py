"""Random changes of shape and light that leave colours alone, since captions name them (ALBEF, appendix, public code).

RandAugment (Cubuk et al. 2020) without its changes of colour: `number` changes are drawn with replacement, each of them
is made with probability 1/2, all at one level of 10. Easy to get wrong: brightness only rises (by 1.36 at level 7);
a shift is in pixels, whatever the size of the picture; what comes in at an edge is grey.

Where it differs from the public code: sharpening is clipped, where it wraps around there (a pixel above 255 turns
black); what is turned or sheared is interpolated by Pillow, not OpenCV, which rounds places to 1/32 of a pixel. The
draws are a function of the sample's place.

H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trivium.errors import TriviumError

HIGHEST_LEVEL = 10
MADE = 0.5  # probability of a change that was drawn
GREY = 128
SHEAR, SHIFT, TURN = 0.3, 10.0, 30.0  # at the highest level: share of the other side, pixels, degrees
_SOFT = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # what sharpening leads away from


@dataclass(frozen=True)
class RandomAugment:
    """Which changes are made of a picture. The defaults are the published ones."""

    number: int = 2
    level: int = 7

    def __post_init__(self) -> None:
        if self.number < 0:
            raise TriviumError(f"{self.number} random changes of a picture: there are 0 or more")
        if not 0 <= self.level <= HIGHEST_LEVEL:
            raise TriviumError(f"random changes at level {self.level}: it lies between 0 and {HIGHEST_LEVEL}")

    def __call__(self, rng: np.random.Generator, image_HWC: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] in and out."""
        for drawn in rng.integers(len(CHANGES), size=self.number):
            made, sign = rng.random() < MADE, 1 if rng.random() < 0.5 else -1
            if made:
                image_HWC = CHANGES[drawn](image_HWC, self.level / HIGHEST_LEVEL, sign)
        return image_HWC


def autocontrast(image_HWC: np.ndarray) -> np.ndarray:
    """Each channel stretched so that its darkest value is 0 and its brightest 255."""

    def stretched(channel_HW: np.ndarray) -> np.ndarray:
        low, high = int(channel_HW.min()), int(channel_HW.max())
        if high <= low:
            return channel_HW
        scale = 255 / (high - low)
        return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)[channel_HW]

    return _by_channel(image_HWC, stretched)


def equalised(image_HWC: np.ndarray) -> np.ndarray:
    """Each channel with its values spread so that all are about as frequent."""

    def spread(channel_HW: np.ndarray) -> np.ndarray:
        count = np.bincount(channel_HW.ravel(), minlength=256)
        step = int(count[count > 0][:-1].sum()) // 255
        if step == 0:
            return channel_HW
        before = np.concatenate([[step // 2], count[:-1]]).cumsum()
        return (before // step).clip(0, 255).astype(np.uint8)[channel_HW]

    return _by_channel(image_HWC, spread)


def brightened(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    return (np.arange(256, dtype=np.float32) * np.float32(factor)).clip(0, 255).astype(np.uint8)[image_HWC]


def sharpened(image_HWC: np.ndarray, factor: float) -> np.ndarray:
    """Away from (above 1) or towards (below 1) a soft picture; the outermost pixels stay as they are."""
    image = image_HWC.astype(np.float32)
    height, width, _ = image.shape
    if height < 3 or width < 3:
        return image_HWC
    soft = sum(
        _SOFT[row, column] * image[row : height - 2 + row, column : width - 2 + column]
        for row in range(3)
        for column in range(3)
    )
    soft = np.rint(soft)
    image[1:-1, 1:-1] = soft + np.float32(factor) * (image[1:-1, 1:-1] - soft)
    return image.clip(0, 255).astype(np.uint8)


def moved(image_HWC: np.ndarray, inverse: tuple[float, float, float, float, float, float]) -> np.ndarray:
    """An affine map: the pixel in column x and row y becomes what stands at (a x + b y + c, d x + e y + f), bilinear.

    inverse: a to f. Places outside the picture are grey, and it runs into them over one pixel, as OpenCV has it.
    """
    a, b, c, d, e, f = inverse
    height, width, _ = image_HWC.shape
    framed = np.full((height + 2, width + 2, 3), GREY, np.uint8)
    framed[1:-1, 1:-1] = image_HWC
    # Pillow counts from the edge of a pixel, not from its middle; and the frame shifts everything by one.
    data = (a, b, c + 1.5 - 0.5 * (a + b), d, e, f + 1.5 - 0.5 * (d + e))
    grey = (GREY,) * 3
    warped = Image.fromarray(framed).transform(
        (width, height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=grey
    )
    return np.asarray(warped)


def turned(image_HWC: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise about the middle."""
    height, width, _ = image_HWC.shape
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return moved(image_HWC, (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y))


def _by_channel(image_HWC: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([change(image_HWC[..., channel]) for channel in range(3)], axis=-1)


# Picture, share of the highest level, direction -> picture.
CHANGES: tuple[Callable[[np.ndarray, float, int], np.ndarray], ...] = (
    lambda image, _, __: image,
    lambda image, _, __: autocontrast(image),
    lambda image, _, __: equalised(image),
    lambda image, share, _: brightened(image, 1.8 * share + 0.1),
    lambda image, share, _: sharpened(image, 1.8 * share + 0.1),
    lambda image, share, sign: moved(image, (1, -sign * SHEAR * share, 0, 0, 1, 0)),
    lambda image, share, sign: moved(image, (1, 0, 0, -sign * SHEAR * share, 1, 0)),
    lambda image, share, sign: moved(image, (1, 0, sign * SHIFT * share, 0, 1, 0)),
    lambda image, share, sign: moved(image, (1, 0, 0, 0, 1, sign * SHIFT * share)),
    lambda image, share, sign: turned(image, sign * TURN * share),
)
