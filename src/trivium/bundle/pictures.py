"""What is taken for a picture, and how one becomes the pixels that a model reads.

B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from trivium.data.transforms import ImageTransform, normalize
from trivium.errors import TriviumError

Picture = str | Path | bytes | Image.Image | np.ndarray
Pictures = Picture | Sequence[Picture] | Tensor


def listed(pictures: Pictures) -> Sequence[Picture] | Tensor:
    """One picture as a list of one, several as they are."""
    return [pictures] if isinstance(pictures, str | Path | bytes | Image.Image | np.ndarray) else pictures


def read_picture(picture: Picture | Tensor, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of one picture: of its bytes, a Pillow picture or an array."""
    if isinstance(picture, str | Path):
        try:
            return read(Path(picture).read_bytes())
        except (OSError, ValueError) as error:
            raise TriviumError(f"{picture}: cannot be read as a picture ({error}): leave it out") from None
    if isinstance(picture, np.ndarray) and not (picture.dtype == np.uint8 and picture.shape[2:] == (3,)):
        raise TriviumError(f"an array is uint8 [H, W, 3], this one {picture.dtype} {list(picture.shape)}")
    if not isinstance(picture, bytes | np.ndarray | Image.Image):
        raise TriviumError(f"a picture is a path, bytes, a Pillow picture or an array, not {type(picture).__name__}")
    try:
        return read(picture)
    except ValueError as error:
        raise TriviumError(f"a picture cannot be decoded ({error}): leave it out") from None


def check_sides(pictures: Tensor, patch: int) -> None:
    """Raises TriviumError where a tensor holds no pictures that can be cut into patches of this side."""
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise TriviumError(f"a tensor of pictures is [B, 3, H, W], this one {list(pictures.shape)}")
    height, width = pictures.shape[2:]
    if height % patch or width % patch:
        raise TriviumError(
            f"pictures of {height} x {width} pixels cannot be cut into patches of {patch}: resize them to multiples of"
            " it"
        )


def normalised(pixels_BCHW: Tensor, transform: ImageTransform, weight: Tensor) -> Tensor:
    """As a model reads them, where this weight of it is and in its precision: of uint8, or of float in [0, 1]."""
    pixels_BCHW = pixels_BCHW.to(weight.device)
    if pixels_BCHW.is_floating_point():
        if not 0 <= float(pixels_BCHW.min()) <= float(pixels_BCHW.max()) <= 1:
            raise TriviumError("float pixels must lie in [0, 1]: divide by 255, and do not normalise them")
        pixels_BCHW = pixels_BCHW * 255
    return normalize(pixels_BCHW, transform.mean, transform.std, weight.dtype)
