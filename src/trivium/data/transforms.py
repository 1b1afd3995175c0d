"""Decoded pictures to the pixels that a model sees: crop boxes, resizing, the evaluation transform, normalisation.

Pixels stay uint8 until they are on the device, where ``normalize`` makes them numbers around 0.

Legend: B pictures, C channels, H height, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from trivium.data.decode import decode, rgb
from trivium.errors import TriviumError

Triple = tuple[float, float, float]
CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)  # what FLAVA, too, normalises with
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)  # DINO's, DeiT's and most of timm's
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

Filter = Literal["bilinear", "bicubic", "lanczos", "box"]
RESAMPLING = {name: Image.Resampling[name.upper()] for name in get_args(Filter)}
Crop = Literal["squash", "center", "shortest"]

# Changes brightness and the like in the space of luma and two chromas (ITU-R BT.601), whose axis of grey is the first.
_YIQ_FROM_RGB = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_RGB_FROM_YIQ = np.linalg.inv(_YIQ_FROM_RGB)


class CropBox(NamedTuple):
    """A part of a picture, in its pixels."""

    left: float
    top: float
    width: float
    height: float


def random_crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> CropBox:
    """A box with a random share of the area (`scale`) and a random width / height (`ratio`, uniform in its logarithm).

    The "Inception crop" (Szegedy et al. 2015) in the form of torchvision's RandomResizedCrop: ten tries, then the
    largest centred box within `ratio`.
    """
    smallest, log_lowest = scale[0], math.log(ratio[0])
    range_of_scale, range_of_log = scale[1] - smallest, math.log(ratio[1]) - log_lowest
    draw = rng.random  # a square picture at 0.9 to 1 of its area takes five tries, and `uniform` ten times as long
    for _ in range(10):
        area = height * width * (smallest + range_of_scale * draw())
        aspect = math.exp(log_lowest + range_of_log * draw())
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return CropBox(left, top, box_width, box_height)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return CropBox((width - box_width) // 2, (height - box_height) // 2, box_width, box_height)


def resize(
    image_HWC: np.ndarray, size: int | tuple[int, int], box: CropBox | None = None, filter: str = "bicubic"
) -> np.ndarray:
    """uint8 [H, W, 3], or the part of it in `box`, at `size` (a side, or height and width), antialiased. uint8."""
    height, width = (size, size) if isinstance(size, int) else size
    corners = None if box is None else (box.left, box.top, box.left + box.width, box.top + box.height)
    return np.asarray(Image.fromarray(image_HWC).resize((width, height), RESAMPLING[filter], box=corners))


def crop_and_resize(
    image_HWC: np.ndarray, size: int, box: CropBox | None = None, filter: Filter = "bicubic"
) -> np.ndarray:
    """The part of a picture in `box` (whole pixels), antialiased: uint8 [H, W, 3] to uint8 [3, size, size].

    The crop comes first: unlike in `resize`, nothing outside the box is looked at. Bicubic and bilinear are torch's,
    three times as fast as Pillow's and within 2 of 255 of it, save on hard edges that are enlarged: each clips what
    overshoots between its two passes, and Pillow takes them in either order.
    """
    if box is not None:
        left, top, width, height = map(int, box)
        image_HWC = image_HWC[top : top + height, left : left + width]
    if image_HWC.shape[:2] == (size, size):
        return np.ascontiguousarray(image_HWC.transpose(2, 0, 1))
    if filter not in ("bilinear", "bicubic"):
        return np.ascontiguousarray(resize(image_HWC, size, filter=filter).transpose(2, 0, 1))
    image_1CHW = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1)[None]  # a copy: torch wants to be able to write
    return F.interpolate(image_1CHW, (size, size), mode=filter, antialias=True)[0].contiguous().numpy()


def shortest_size(height: int, width: int, short: int, longest: int | None) -> tuple[int, int]:
    """(height, width) with `short` pixels on the shorter side, or as many as leave the longer side within `longest`:
    DETR's rule, which UniT takes over (its readers of VQA round a cap down instead, a pixel at most)."""
    low, high = min(height, width), max(height, width)
    if longest is not None and high / low * short > longest:
        short = round(longest * low / high)
        if short == 0:  # a strip, which would keep its length with one pixel on the shorter side
            return (longest, 1) if width < height else (1, longest)
    if low == short:
        return height, width
    return (int(short * height / width), short) if width < height else (short, int(short * width / height))


@dataclass(frozen=True)
class Recoloring:
    """A change of colour; each of the first three is a factor. hue: in radians, around the axis of grey."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def recolored(image_HWC: np.ndarray, change: Recoloring) -> np.ndarray:
    """All of a change as one linear map of the colours, so that flat drawings stay flat; clipped once. uint8 in, uint8
    out. Contrast is taken about the mean luma of the picture."""
    turn = change.saturation * np.array(
        [[math.cos(change.hue), -math.sin(change.hue)], [math.sin(change.hue), math.cos(change.hue)]]
    )
    yiq = np.eye(3)
    yiq[1:, 1:] = turn
    matrix = change.brightness * change.contrast * (_RGB_FROM_YIQ @ yiq @ _YIQ_FROM_RGB)
    mean_luma = change.brightness * float(image_HWC.reshape(-1, 3).mean(axis=0) @ _YIQ_FROM_RGB[0])
    jittered_HWC = image_HWC @ matrix.T.astype(np.float32) + np.float32((1 - change.contrast) * mean_luma)
    return np.rint(jittered_HWC).clip(0, 255).astype(np.uint8)


def color_jitter(rng: np.random.Generator, image_HWC: np.ndarray, strength: float) -> np.ndarray:
    """Brightness, contrast and saturation times 1 ± `strength`, as BEiT's pictures; the hue stays."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, size=3).clip(min=0)
    return recolored(image_HWC, Recoloring(brightness, contrast, saturation))


def blurred(image_HWC: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur with this standard deviation in pixels, as Pillow approximates it. uint8 in, uint8 out."""
    return np.asarray(Image.fromarray(image_HWC).filter(ImageFilter.GaussianBlur(radius)))


def solarised(image_HWC: np.ndarray) -> np.ndarray:
    """Values from 128 on are inverted, as Pillow does it. uint8 in, uint8 out."""
    return np.where(image_HWC >= 128, 255 - image_HWC, image_HWC)


def padded(pixels: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pictures [C, H, W] of any sizes as one tensor, zeros below and to the right of the smaller ones; and (height,
    width) of each, int64 [B, 2], where any differ."""
    if len({picture.shape for picture in pixels}) == 1:
        return torch.stack(list(pixels)), None
    sizes_B2 = torch.tensor([picture.shape[1:] for picture in pixels])
    height, width = sizes_B2.amax(0).tolist()
    pixels_BCHW = pixels[0].new_zeros(len(pixels), len(pixels[0]), height, width)
    for row, picture in enumerate(pixels):
        pixels_BCHW[row, :, : picture.shape[1], : picture.shape[2]] = picture
    return pixels_BCHW, sizes_B2


def normalize(
    pixels_BCHW: Tensor, mean: Triple = CLIP_MEAN, std: Triple = CLIP_STD, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(pixels / 255 - mean) / std by channel, on the device where the uint8 pixels are."""
    mean_C11 = torch.tensor(mean, device=pixels_BCHW.device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=pixels_BCHW.device).view(-1, 1, 1)
    return ((pixels_BCHW.float() / 255 - mean_C11) / std_C11).to(dtype)


@dataclass(frozen=True)
class ImageTransform:
    """How a picture is prepared for a trained model; ``preprocessor.json`` of a model folder holds these fields."""

    size: int = 224  # pixels on a side
    filter: Filter = "bicubic"
    mean: Triple = CLIP_MEAN  # of pixels in [0, 1]; for `normalize`
    std: Triple = CLIP_STD
    # Both sides to size, whatever the aspect (FLAVA); "center": the short side, then the middle; "shortest": the short
    # side, and the picture stays whole (UniT).
    crop: Crop = "squash"
    longest: int | None = None  # pixels of the longer side at most, with "shortest"
    # What the short side (with "squash": both) is brought to before the middle is cut out, as in most published
    # evaluations: 256 for a size of 224. None: size itself; never with "shortest".
    resize: int | None = None

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise TriviumError(f"the size of an image transform must be a whole number of pixels, not {self.size!r}")
        if self.filter not in get_args(Filter):
            raise TriviumError(f"no filter {self.filter!r} for an image transform: use {', '.join(get_args(Filter))}")
        if self.crop not in get_args(Crop):
            raise TriviumError(f"no crop {self.crop!r} for an image transform: use {', '.join(get_args(Crop))}")
        if self.longest is not None and (type(self.longest) is not int or self.longest < self.size):
            raise TriviumError(
                f"the longest side of an image transform must be {self.size} or more, not {self.longest!r}"
            )
        if self.resize is not None and (
            type(self.resize) is not int or self.resize < self.size or self.crop == "shortest"
        ):
            raise TriviumError(
                f"the resize of an image transform must be {self.size} or more, not {self.resize!r}, and left out where"
                " the crop is 'shortest'"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or [isinstance(value, int | float) for value in values] != [True] * 3:
                raise TriviumError(f"the {name} of an image transform must be three numbers, not {values!r}")
        if not all(value > 0 for value in self.std):
            raise TriviumError(f"the std of an image transform must be above 0, not {self.std!r}")

    def __call__(self, picture: bytes | np.ndarray | Image.Image) -> Tensor:
        """uint8 [3, size, size] of an encoded picture, uint8 [H, W, 3] or a Pillow picture; with "shortest" [3, H, W].
        Raises DecodeError."""
        image_HWC = self.decoded(picture)
        height, width, _ = image_HWC.shape
        side, short = self.resize or self.size, min(height, width)
        if self.crop == "center":
            new = side * height // short, side * width // short
        else:
            new = shortest_size(height, width, side, self.longest) if self.crop == "shortest" else (side, side)
        if (height, width) != new:
            image_HWC = resize(image_HWC, new, filter=self.filter)
        if self.cuts:
            top, left = (new[0] - self.size) // 2, (new[1] - self.size) // 2
            image_HWC = image_HWC[top : top + self.size, left : left + self.size]
        return torch.from_numpy(np.array(image_HWC.transpose(2, 0, 1), order="C"))

    @property
    def cuts(self) -> bool:
        """Whether margins of a picture are cut away: where not, the model sees the whole of it."""
        return self.crop == "center" or self.resize is not None

    def at(self, size: int) -> ImageTransform:
        """The same at another size, which is as large a part of a picture."""
        return replace(self, size=size, resize=None if self.resize is None else self.resize * size // self.size)

    def decoded(self, picture: bytes | np.ndarray | Image.Image) -> np.ndarray:
        """The whole of it, uint8 [H, W, 3]. Raises DecodeError."""
        if isinstance(picture, Image.Image):
            return rgb(picture)
        return decode(picture) if isinstance(picture, bytes) else picture

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ImageTransform:
        """Raises TriviumError for what is no JSON, a field that does not exist, or a value that cannot be."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise TriviumError(f"the image transform (preprocessor.json) is no JSON: {error}") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or (unknown := sorted(values.keys() - set(known))):
            named = f"has a field {unknown[0]!r}" if isinstance(values, dict) else "is no JSON object"
            raise TriviumError(f"the image transform (preprocessor.json) {named}; its fields are {', '.join(known)}")
        for name in ("mean", "std"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)
