"""An encoded picture to RGB pixels, whatever it is stored as. The bytes may come from anybody.

Easy to get wrong: a picture that lies on its side carries its rotation in EXIF, which a fast JPEG decoder ignores;
Pillow clips 16-bit greys at 255 instead of scaling them; what lies under a transparent pixel is arbitrary, so it is
put on white before anything is averaged; a header may claim 50,000 x 50,000 pixels in a file of 100 bytes.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # Pillow stands in: the same pixels, more slowly
    simplejpeg = None

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 64_000_000  # of one picture, where nothing else is said
ORIENTATION = 0x0112  # the EXIF tag of the rotation; 1 = upright

# `warnings.catch_warnings` changes the whole process, so one thread at a time; never held across a fork.
_one_at_a_time = threading.Lock()
os.register_at_fork(
    before=_one_at_a_time.acquire, after_in_parent=_one_at_a_time.release, after_in_child=_one_at_a_time.release
)


class DecodeError(ValueError):
    """These bytes are no usable picture. The text says why; the file's name is known to the caller alone."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None) -> np.ndarray:
    """The first picture in `data`: uint8 [H, W, 3] RGB, upright, on white where it is transparent.

    Takes PNG, JPEG, WebP, GIF, BMP, TIFF and PPM; grey, palette, alpha, CMYK, 16 bits a channel. Raises DecodeError.

    Args:
        max_pixels: H * W as stored, checked against the header, before any pixel is decoded.
        min_side: decode a JPEG at a half, a quarter or an eighth of its size where its shorter side keeps this many
            pixels. libjpeg leaves out the high frequencies (a scaled inverse cosine transform) and with them the work.
    """
    pixels_HWC = _decode_plain_jpeg(data, max_pixels, min_side)
    if pixels_HWC is not None and not (b"Exif\0" in data or b"tiff:Orientation" in data):
        return pixels_HWC
    with _opened(data, max_pixels) as picture:
        if pixels_HWC is None:
            reduction = _reduction(picture.height, picture.width, min_side)
            if reduction > 1 and picture.format == "JPEG":
                picture.draft(None, (picture.width // reduction, picture.height // reduction))
            pixels_HWC = np.array(_to_rgb(picture))
        return _upright(pixels_HWC, _orientation(picture))


def rgb(picture: Image.Image) -> np.ndarray:
    """A Pillow picture under the same rules: uint8 [H, W, 3], upright, on white where it is transparent.
    Raises DecodeError."""
    return _upright(np.array(_to_rgb(picture)), _orientation(picture))


def picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) as the header of `data` has them, before any rotation. Raises DecodeError."""
    with _opened(data, max_pixels=2**62) as picture:
        return picture.height, picture.width


def _reduction(height: int, width: int, min_side: int | None) -> int:
    """By what to divide the sides of a JPEG. Other fractions than these exist, and take as long as the whole."""
    if min_side is None:
        return 1
    return next((by for by in (8, 4, 2) if min(height, width) // by >= min_side), 1)


def _decode_plain_jpeg(data: bytes, max_pixels: int, min_side: int | None) -> np.ndarray | None:
    """None: not ours, or libjpeg complains; then Pillow decides, so that the decoder at hand decides nothing."""
    if simplejpeg is None or data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_size(height, width, max_pixels)
        reduction = _reduction(height, width, min_side)
        return simplejpeg.decode_jpeg(
            data, "RGB", min_height=height // reduction, min_width=width // reduction, min_factor=reduction
        )
    except DecodeError:
        raise
    except ValueError:
        return None


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DecodeError(f"its header claims {width:,} x {height:,} pixels, more than the {max_pixels:,} allowed")


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Pillow's lazy picture. Whatever Pillow raises inside becomes DecodeError, whatever it warns of stays inside."""
    if not data:
        raise DecodeError("it has zero bytes")
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check_size(picture.height, picture.width, max_pixels)
                yield picture
        except DecodeError:
            raise
        except Image.DecompressionBombError:
            raise DecodeError(f"its header claims more pixels than the {max_pixels:,} allowed") from None
        except Image.UnidentifiedImageError:
            raise DecodeError(f"it is no picture in a format we read ({', '.join(FORMATS)})") from None
        except Exception as error:  # over hostile bytes its readers raise nearly every type there is
            raise DecodeError(f"it is damaged: {error or type(error).__name__}") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise DecodeError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits a channel")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey_HW = np.asarray(picture).astype(np.int64)
        if grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise DecodeError("its pixels do not fit into 16 bits; save it with 8 or 16 bits a channel")
        picture = Image.fromarray(((grey_HW * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF in a good picture: it stays as it is
        return 1


def _upright(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the rotation or mirroring that the EXIF tag names (EXIF 2.3, section 4.6.4 A)."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return np.ascontiguousarray(pixels_HWC)
