"""Heat maps over a picture, one for each word of a text and one for the whole, side by side in one image.

Each map is stretched to its own range, as published (ALBEF's notebook): what is shown is where a word is looked for,
not how strongly. H height, W width of a picture, n patches along a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from trivium.bundle import Bundle
from trivium.bundle.heat import Heat
from trivium.bundle.pictures import Picture
from trivium.data.decode import decode, rgb
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError

SIDE = 256  # pixels of a tile's longer side
PER_LINE = 5  # tiles
BLUR = 0.02  # standard deviation, as a share of the longer side
FADE = 0.7  # exponent: how fast the picture shows through where it is cold
GAP, LETTERS = 8, 15  # pixels
COLOURS = "jet"


def shown(picture: Picture, transform: ImageTransform) -> np.ndarray:
    """What a map lies over, uint8 [H, W, 3], its longer side SIDE: the whole picture in its own proportions where the
    model sees all of it, else the square that it sees. Raises TriviumError."""
    try:
        if isinstance(picture, str | Path):
            picture = Path(picture).read_bytes()
        if isinstance(picture, Image.Image):
            picture = rgb(picture)
        pixels_HWC = decode(picture) if isinstance(picture, bytes) else picture
        if transform.cuts:
            pixels_HWC = transform(pixels_HWC).permute(1, 2, 0).numpy()
    except (OSError, ValueError) as error:
        raise TriviumError(f"{picture!r:.80} cannot be read as a picture ({error})") from None
    height, width = pixels_HWC.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels_HWC)).resize(size, Image.Resampling.LANCZOS))


def overlay(picture_HWC: np.ndarray, heat_nn: Tensor) -> np.ndarray:
    """The picture under its heat: uint8 in, uint8 out. An even map leaves it as it is."""
    height, width = picture_HWC.shape[:2]
    small = Image.fromarray(_stretched(heat_nn.numpy().astype(np.float32)))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    as_bytes = Image.fromarray((255 * large).astype(np.uint8))  # Pillow blurs no float
    blurred_HW = np.asarray(as_bytes.filter(ImageFilter.GaussianBlur(BLUR * max(height, width))), np.float32)
    heat_HW = _stretched(blurred_HW)
    colours_HWC = matplotlib.colormaps[COLOURS](heat_HW)[..., :3] * 255
    weight_HW1 = (heat_HW**FADE)[..., None]
    return np.rint(weight_HW1 * colours_HWC + (1 - weight_HW1) * picture_HWC).astype(np.uint8)


def _stretched(heat: np.ndarray) -> np.ndarray:
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


def tiles(picture_HWC: np.ndarray, heat: Heat) -> list[tuple[np.ndarray, str]]:
    """The picture, the whole text, each word: (pixels, what stands below)."""
    of_words = [
        (overlay(picture_HWC, map_nn), word if bool(map_nn.any()) else f"{word}: nowhere")
        for map_nn, word in zip(heat.words_Wnn, heat.words, strict=True)
    ]
    return [(picture_HWC, ""), (overlay(picture_HWC, heat.text_nn), "the whole text"), *of_words]


def wall(lines: Sequence[tuple[str, Sequence[tuple[np.ndarray, str]]]]) -> Image.Image:
    """Several texts under each other: of each the text, and its tiles in lines of PER_LINE."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), LETTERS)
    row, head = SIDE + 2 * GAP + LETTERS, LETTERS + 2 * GAP
    width = GAP + (SIDE + GAP) * min(PER_LINE, max(len(each) for _, each in lines))
    height = sum(head + row * math.ceil(len(each) / PER_LINE) for _, each in lines)
    page = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(page), 0
    for text, each in lines:
        draw.text((GAP, top + GAP), _fitting(text, font, width - 2 * GAP), "black", font)
        top += head
        for number, (pixels_HWC, below) in enumerate(each):
            left, above = GAP + number % PER_LINE * (SIDE + GAP), top + number // PER_LINE * row
            page.paste(Image.fromarray(pixels_HWC), (left, above))
            draw.text((left, above + pixels_HWC.shape[0] + GAP // 2), _fitting(below, font, SIDE), "black", font)
        top += row * math.ceil(len(each) / PER_LINE)
    return page


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def heat_wall(bundle: Bundle, pairs: Sequence[tuple[Picture, str]], block: int | None = None) -> Image.Image:
    """Pictures with their texts. Raises TriviumError where the model cannot ground, or a picture cannot be read."""
    lines = []
    for picture, text in pairs:
        [heat] = bundle.ground(picture, text, block)
        lines.append((text, tiles(shown(picture, bundle.transform), heat)))
    return wall(lines)
