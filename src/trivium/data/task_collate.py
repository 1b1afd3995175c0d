"""From a labelled sample to its part of a batch: one text or two, a picture, what the answer is to be.

B rows of a micro-batch, T text tokens, K classes, A answers of a row, C channels, H height, W width of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.data.labelled import LabelledRows
from trivium.data.order import Draws
from trivium.data.random_augment import RandomAugment
from trivium.data.tokenizer import ANSWER_TOKENS, UNREAD, Tokenizer
from trivium.data.transforms import ImageTransform, padded
from trivium.data.views import Views
from trivium.errors import BadSample
from trivium.train.protocol import Batch, Images, Sample, Texts


class PreparedTask(NamedTuple):
    text: tuple[list[int], list[int]] | None  # ids and segments
    pixels_CHW: Tensor | None  # uint8
    sample: Sample
    second_CHW: Tensor | None = None  # of a second picture


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
        second = sample.get("second_text")
        ids, segments = self.tokenizer.encode_task(sample["text"], second, self.max_length, self.segments)
        if self.tokenizer.is_bare(ids):
            raise BadSample(sample["name"], "", f"its text {UNREAD}")
        return ids, segments


@dataclass
class TaskImage:
    """The picture of a sample: in training a random view, where `views` is given; else as the model is used.

    blank: a grey one stands in its place, for what a model knows without it.
    """

    transform: ImageTransform
    views: Views | None = None
    blank: bool = False
    changes: RandomAugment | None = None  # of the random view

    def prepare(self, sample: Sample, draws: Draws, train: bool) -> Tensor:
        """Raises BadSample, DecodeError."""
        if "image" not in sample:
            raise BadSample(sample["name"], "", "has no picture")
        return self._view(sample["image"], draws, "crop", train)

    def prepare_second(self, sample: Sample, draws: Draws, train: bool) -> Tensor | None:
        """Of the second picture, where there is one. Raises DecodeError."""
        return self._view(sample["second_image"], draws, "second crop", train) if "second_image" in sample else None

    def _view(self, picture: bytes, draws: Draws, name: str, train: bool) -> Tensor:
        if self.blank:
            return torch.full((3, self.transform.size, self.transform.size), 128, dtype=torch.uint8)
        if not train or self.views is None:
            return self.transform(picture)
        picture_HWC = self.views.decode(picture)
        height, width, _ = picture_HWC.shape
        view = self.views.draw(draws.generator(name), height, width)
        pixels_CHW = self.views.for_model(picture_HWC, view)
        if self.changes is not None:
            pixels_HWC = self.changes(draws.generator(f"{name} changes"), pixels_CHW.transpose(1, 2, 0))
            pixels_CHW = np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
        return torch.from_numpy(pixels_CHW)


@dataclass
class TaskCollate:
    """Samples of one task.

    The targets are ``label`` (int64 [B]), ``value`` (float32 [B], as the model is to give it) or ``answers`` (float32
    [B, K]); with `writes` ``answer_ids`` (int64 [B, A, T], [CLS] to [SEP] and pads) and ``answer_weight`` (float32 [B,
    A], 0 where a row has fewer answers). None of a sample without a label.
    """

    texts: TaskText | None
    images: TaskImage | None
    num_classes: int
    center: float = 0.0  # of values
    scale: float = 1.0
    sort_by_length: bool = True  # inside a global batch, for less padding
    writes: Tokenizer | None = None  # answers are given as texts, in this vocabulary
    answer_length: int = ANSWER_TOKENS  # tokens of an answer, special ones among them; longer ones are cut
    train: bool = True
    false_pairs: float = field(default=0.0, init=False)

    def prepare(self, sample: Sample, draws: Draws) -> PreparedTask:
        text = None if self.texts is None else self.texts.prepare(sample)
        pixels_CHW = None if self.images is None else self.images.prepare(sample, draws, self.train)
        second_CHW = None if self.images is None else self.images.prepare_second(sample, draws, self.train)
        kept = {name: value for name, value in sample.items() if name not in ("image", "second_image")}
        return PreparedTask(text, pixels_CHW, Sample(**kept), second_CHW)  # type: ignore[typeddict-item]

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
            seconds = [each.second_CHW for each in prepared if each.second_CHW is not None]
            images = tuple(stacked(some, samples) for some in (pixels, seconds) if some)
        if self.texts is not None:
            ids_BT, mask_BT, segments_BT = self.texts.tokenizer.pad_task([each.text for each in prepared if each.text])
            texts = (Texts(ids_BT, mask_BT, _same(samples, "same_text"), segments_BT if self.texts.segments else None),)
        return Batch(stream, rows_B, places_B, images, texts, self._targets(samples), number, tuple(bad))

    def _targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        if self.writes is not None:
            return self._written(samples)
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

    def encoded_answers(self, answers: Sequence[str]) -> Tensor:
        """int64 [R, T], [CLS] to [SEP] and pads. Of a collate that `writes`."""
        assert self.writes is not None
        return self.writes.pad(self.writes.encode(answers, self.answer_length))[0]

    def cut(self, rows: LabelledRows) -> list[str]:
        """A sentence on texts, or pairs of texts, and one on answers, that are longer than what is read of them."""
        if self.texts is None:
            return []
        good = [(f"{row.file} ({row.where})", row) for row in rows.good()]
        if any(row.second_text is not None for _, row in good):
            limit, encode = self.texts.max_length, self.texts.tokenizer.encode_task
            read = [encode(row.text or "", row.second_text, limit + 1, self.texts.segments)[0] for _, row in good]
            found = _longer("pairs of texts", limit, [name for name, _ in good], map(len, read))
        else:
            texts = [(name, row.text or "") for name, row in good]
            found = cut("texts", self.texts.tokenizer, self.texts.max_length, texts)
        if self.writes is not None:
            answers = [(name, answer) for name, row in good for answer in sorted(set(row.truths))]
            found += cut("answers", self.writes, self.answer_length, answers)
        return found

    def _written(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        assert self.writes is not None
        given = [list(sample.get("written", {}).items()) for sample in samples]
        if not all(given):
            return {}
        ids_RT = self.encoded_answers([text for each in given for text, _ in each])
        most = max(map(len, given))
        ids_BAT = torch.full((len(samples), most, ids_RT.shape[1]), self.writes.pad_id)
        weight_BA = torch.zeros(len(samples), most)
        for row, (each, ids_AT) in enumerate(zip(given, ids_RT.split(list(map(len, given))), strict=True)):
            ids_BAT[row, : len(each)] = ids_AT
            weight_BA[row, : len(each)] = torch.tensor([weight for _, weight in each])
        return {"answer_ids": ids_BAT, "answer_weight": weight_BA}


def cut(kind: str, tokenizer: Tokenizer, limit: int, texts: Sequence[tuple[str, str]]) -> list[str]:
    """A sentence on texts of more tokens than the limit, where there are any.

    Args:
        kind: what they are, in the plural.
        texts: each with its name in front: file and place.
    """
    lengths = map(len, tokenizer.encode([text for _, text in texts], limit + 1))
    return _longer(kind, limit, [name for name, _ in texts], lengths)


def _longer(kind: str, limit: int, names: Sequence[str], lengths: Iterable[int]) -> list[str]:
    longer = [name for name, length in zip(names, lengths, strict=True) if length > limit]
    if not longer:
        return []
    return [f"{len(longer):,} {kind} have more than {limit} tokens and are cut there; the first: {longer[0]}"]


def stacked(pixels: Sequence[Tensor], samples: Sequence[Sample]) -> Images:
    """Pictures [C, H, W] of any sizes, the smaller ones padded, with the numbers of their samples."""
    pixels_BCHW, sizes_B2 = padded(pixels)
    return Images(pixels_BCHW, _same(samples, "same_image"), sizes_B2)


def _same(samples: Sequence[Sample], name: str) -> Tensor:
    return torch.tensor([sample[name] for sample in samples], dtype=torch.int64)  # type: ignore[literal-required]
