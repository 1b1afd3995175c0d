"""The views that a model and an image tokenizer get of one picture: which crop, flipped or not, at which size.

Both views of a picture show the same crop, so that each code belongs to the patch at its place.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trivium.data.decode import MAX_PIXELS, decode
from trivium.data.order import keyed_generator
from trivium.data.transforms import CropBox, Filter, crop_and_resize, random_crop_box


@dataclass(frozen=True)
class View:
    """Which part of a picture is shown. box: None = all of it."""

    box: CropBox | None = None
    flip: bool = False


WHOLE = View()


@dataclass(frozen=True)
class Views:
    """How views are drawn and rendered. The defaults are FLAVA's: crops of 90 to 100 % of the area, no flip."""

    size: int  # of the model's view, in pixels: square, the aspect ratio is not kept
    filter: Filter = "bicubic"
    codebook_size: int | None = None  # of the image tokenizer's view (Lanczos); None = it looks at the model's view
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height; (1, 1): squares, as `_square_in` draws them
    flip: float = 0.0  # probability of a mirrored view
    max_pixels: int = MAX_PIXELS  # of a picture as stored: larger ones are refused from the header alone
    scaled_decode: bool = False  # large JPEGs at a half, quarter or eighth of their size: faster, other pixels

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 [H, W, 3]; with `scaled_decode` as small as no crop needs to be enlarged. Raises DecodeError."""
        return decode(data, max_pixels=self.max_pixels, min_side=self.min_side)

    @property
    def min_side(self) -> int | None:
        """What a decoded picture keeps of its shorter side, so that its smallest crop is as large as the view."""
        if not self.scaled_decode or not self.crop_scale[0]:
            return None
        narrowest = min(self.crop_ratio[0], 1 / self.crop_ratio[1])
        return math.ceil(max(self.size, self.codebook_size or 0) / math.sqrt(self.crop_scale[0] * narrowest))

    def draw(self, rng: np.random.Generator, height: int, width: int) -> View:
        """A random view of a picture of height x width pixels."""
        flip = bool(rng.random() < self.flip)
        if self.crop_scale == (1.0, 1.0):
            return View(None, flip)
        if self.crop_ratio == (1.0, 1.0):
            return View(_square_in(rng, height, width, self.crop_scale), flip)
        return View(random_crop_box(rng, height, width, self.crop_scale, self.crop_ratio), flip)

    def numbered(self, digest: bytes, number: int, height: int, width: int) -> View:
        """View `number` of the picture with this sha256: 0 is the whole picture, the others are drawn once for ever."""
        if number == 0:
            return WHOLE
        return self.draw(keyed_generator("view", digest.hex(), number), height, width)

    def for_model(self, picture_HWC: np.ndarray, view: View) -> np.ndarray:
        """uint8 [3, size, size]."""
        return _render(picture_HWC, view, self.size, self.filter)

    def for_codebook(self, picture_HWC: np.ndarray, view: View) -> np.ndarray:
        """What the image tokenizer is to look at: uint8 [3, codebook_size, codebook_size]."""
        if self.codebook_size is None:
            return self.for_model(picture_HWC, view)
        return _render(picture_HWC, view, self.codebook_size, "lanczos")

    def codebook_settings(self) -> dict[str, Any]:
        """All that decides which pixels the image tokenizer sees: part of the key of a code cache."""
        settings = asdict(self)
        if self.codebook_size is not None:
            settings |= {"size": self.codebook_size, "filter": "lanczos"}
        del settings["codebook_size"], settings["max_pixels"], settings["scaled_decode"]
        return settings if self.min_side is None else settings | {"min_side": self.min_side}


def _square_in(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> CropBox:
    """A square with a share (`scale`) of a random square of the shorter side (Ramesh et al. 2021, listing 1): of the
    whole area, most shares of a long picture are those of no square in it."""
    side = min(height, width)
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    box = random_crop_box(rng, side, side, scale, (1.0, 1.0))
    return box._replace(left=left + box.left, top=top + box.top)


def _render(picture_HWC: np.ndarray, view: View, size: int, filter: Filter) -> np.ndarray:
    pixels_CHW = crop_and_resize(picture_HWC, size, view.box, filter)
    return np.ascontiguousarray(pixels_CHW[:, :, ::-1]) if view.flip else pixels_CHW
