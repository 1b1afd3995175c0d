"""From a labelled sample to its part of a batch: one text or two, a picture, what the answer is to be.

B rows of a micro-batch, T text tokens, K classes, C channels, H height, W width of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.data.order import Draws
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform, padded
from trivium.data.views import Views
from trivium.errors import BadSample
from trivium.train.protocol import Batch, Images, Sample, Texts


class PreparedTask(NamedTuple):
    text: tuple[list[int], list[int]] | None  # ids and segments
    pixels_CHW: Tensor | None  # uint8
    sample: Sample


@dataclass
class TaskText:
    """The texts of a sample. segments: whether the model tells a first text from a second (see `encode_task`)."""

    tokenizer: Tokenizer
    max_length: int  # tokens, special ones among them; longer texts are cut
    segments: bool

    def prepare(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids, and the segment of each. Raises BadSample."""
        if not sample.get("text"):
            raise BadSample(sample["name"], "", "has no text")
        return self.tokenizer.encode_task(sample["text"], sample.get("second_text"), self.max_length, self.segments)


@dataclass
class TaskImage:
    """The picture of a sample: in training a random view, where `views` is given; else as the model is used."""

    transform: ImageTransform
    views: Views | None = None

    def prepare(self, sample: Sample, draws: Draws, train: bool) -> Tensor:
        """Raises BadSample, DecodeError."""
        if "image" not in sample:
            raise BadSample(sample["name"], "", "has no picture")
        if not train or self.views is None:
            return self.transform(sample["image"])
        picture_HWC = self.views.decode(sample["image"])
        height, width, _ = picture_HWC.shape
        view = self.views.draw(draws.generator("crop"), height, width)
        return torch.from_numpy(self.views.for_model(picture_HWC, view))


@dataclass
class TaskCollate:
    """Samples of one task.

    The targets are ``label`` (int64 [B]), ``value`` (float32 [B], as the model is to give it) or ``answers`` (float32
    [B, K]); none of a sample without a label.
    """

    texts: TaskText | None
    images: TaskImage | None
    num_classes: int
    center: float = 0.0  # of values
    scale: float = 1.0
    sort_by_length: bool = True  # inside a global batch, for less padding
    train: bool = True
    false_pairs: float = field(default=0.0, init=False)

    def prepare(self, sample: Sample, draws: Draws) -> PreparedTask:
        text = None if self.texts is None else self.texts.prepare(sample)
        pixels_CHW = None if self.images is None else self.images.prepare(sample, draws, self.train)
        kept = Sample(**{name: value for name, value in sample.items() if name != "image"})  # type: ignore[typeddict-item]
        return PreparedTask(text, pixels_CHW, kept)

    def batch(
        self,
        stream: str,
        prepared: Sequence[PreparedTask],
        rows_B: Tensor,
        places_B: Tensor,
        number: int,
        bad: Sequence[str],
    ) -> Batch:
        samples = [each.sample for each in prepared]
        images: tuple[Images, ...] = ()
        texts: tuple[Texts, ...] = ()
        if self.images is not None:
            pixels = [each.pixels_CHW for each in prepared if each.pixels_CHW is not None]
            images = (stacked(pixels, samples),)
        if self.texts is not None:
            ids_BT, mask_BT, segments_BT = self.texts.tokenizer.pad_task([each.text for each in prepared if each.text])
            texts = (Texts(ids_BT, mask_BT, _same(samples, "same_text"), segments_BT if self.texts.segments else None),)
        return Batch(stream, rows_B, places_B, images, texts, self._targets(samples), number, tuple(bad))

    def _targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        if all("label" in sample for sample in samples):
            return {"label": torch.tensor([sample["label"] for sample in samples])}
        if all("value" in sample for sample in samples):
            values_B = np.array([sample["value"] for sample in samples])
            return {"value": torch.from_numpy((values_B - self.center) / self.scale).float()}
        if all("answers" in sample for sample in samples):
            answers_BK = torch.zeros(len(samples), self.num_classes)
            for row, sample in enumerate(samples):
                for answer, score in sample["answers"].items():
                    answers_BK[row, answer] = score
            return {"answers": answers_BK}
        return {}


def stacked(pixels: Sequence[Tensor], samples: Sequence[Sample]) -> Images:
    """Pictures [C, H, W] of any sizes, the smaller ones padded, with the numbers of their samples."""
    pixels_BCHW, sizes_B2 = padded(pixels)
    return Images(pixels_BCHW, _same(samples, "same_image"), sizes_B2)


def _same(samples: Sequence[Sample], name: str) -> Tensor:
    return torch.tensor([sample[name] for sample in samples], dtype=torch.int64)  # type: ignore[literal-required]
