"""The data of a run as a recipe states it, and the streams, tokenizer and codebook made from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trivium.data import embedded
from trivium.data.collate import ImageCollate, ImageInput, PairCollate, TextCollate, TextInput
from trivium.data.decode import DecodeError
from trivium.data.sources import open_source
from trivium.data.tokenizer import Tokenizer
from trivium.data.views import WHOLE, Views
from trivium.errors import BadSample, TriviumError
from trivium.load import load_image_tokenizer
from trivium.models.dvae import DVae
from trivium.models.flava import FlavaConfig
from trivium.models.patch_codebook import PatchCodebook
from trivium.train.protocol import Source, Stream, hash64

TEXTS_FOR_VOCABULARY = 200_000
PICTURES_FOR_CODEBOOK = 4_000


@dataclass(frozen=True)
class Data:
    """Where samples come from and what is done to each. With no path at all: the embedded drawings and texts."""

    pairs: tuple[str, ...] = ()  # captioned pictures: CSV, TSV, JSONL, Parquet, tar shards, or a folder
    images: tuple[str, ...] = ()  # pictures alone
    text: tuple[str, ...] = ()  # text alone: one line a sample
    validation: tuple[str, ...] = ()  # captioned pictures that are never trained on: losses and retrieval
    image_column: str | None = None  # in tables; None: found by its usual names
    text_column: str | None = None
    schedule: Literal["ratio", "round-robin"] = "ratio"
    pairs_ratio: float = 0.70  # share of the steps (FLAVA supplement A.2)
    images_ratio: float = 0.15
    text_ratio: float = 0.15
    batch: int = 128  # samples of one step, over all processes
    max_length: int = 64  # tokens of a caption or text, [CLS] and [SEP] among them
    false_pairs: float = 0.1  # share of the pairs whose captions are rotated, for the matching loss
    whole_words: bool = False  # mask whole words instead of word pieces
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the area that a random crop shows
    flip: float = 0.0  # probability of a mirrored picture
    color_jitter: float = 0.0  # strength of random changes of brightness, contrast, saturation and hue
    vocabulary: str = "learned"  # "learned" from this text, "bert", or the path of a tokenizer.json
    image_tokenizer: str = "patches"  # "patches": k-means on this data; or the path of a codebook's weights
    cache_megabytes: int = 256  # of decoded pictures, in each worker

    @property
    def is_embedded(self) -> bool:
        return not (self.pairs or self.images or self.text)


@dataclass(frozen=True)
class Sources:
    pairs: Source | None
    images: Source | None
    text: Source | None
    validation_pairs: Source | None
    validation_images: Source | None
    validation_text: Source | None


def open_sources(data: Data) -> Sources:
    """Open what the recipe names. Raises TriviumError with the file and what to do."""
    if data.is_embedded:
        return Sources(
            *(embedded.pairs("train"), embedded.images("train"), embedded.text("train")),
            *(embedded.pairs("val"), embedded.images("val"), embedded.text("val")),
        )

    def opened(kind: Literal["pairs", "images", "text"], paths: tuple[str, ...]) -> Source | None:
        if not paths:
            return None
        return open_source(kind, paths, image_column=data.image_column, text_column=data.text_column)

    validation = opened("pairs", data.validation)
    return Sources(
        *(opened("pairs", data.pairs), opened("images", data.images), opened("text", data.text)),
        *(validation, validation, validation),
    )


def make_tokenizer(data: Data, sources: Sources, vocab_size: int) -> Tokenizer:
    """The text tokenizer of a run; a learned one is a function of the text alone."""
    if data.vocabulary == "bert":
        return Tokenizer.wordpiece(embedded.bert_vocabulary())
    if data.vocabulary != "learned":
        return Tokenizer.from_file(Path(data.vocabulary))
    texts = embedded.corpus() if data.is_embedded else _texts(sources)
    return Tokenizer.train(texts, vocab_size)


def _texts(sources: Sources) -> Iterator[str]:
    """Up to a stated number of texts of each source, evenly spread."""
    found = False
    for source in (sources.pairs, sources.text):
        for row in _spread(source, TEXTS_FOR_VOCABULARY):
            try:
                sample = source.read(row, row) if source is not None else {}
            except BadSample:
                continue  # the loader reports it when its place comes
            found = True
            yield from sample.get("texts") or [sample["text"]]
    if not found:
        raise TriviumError(
            "there is no text to learn a vocabulary from: give --data.pairs or --data.text, or --data.vocabulary bert"
        )


def _spread(source: Source | None, limit: int) -> list[int]:
    rows = 0 if source is None else len(source)
    return (np.arange(min(rows, limit)) * rows // max(1, min(rows, limit))).tolist()


def make_image_tokenizer(
    data: Data, sources: Sources, views: Views, config: FlavaConfig, seed: int
) -> PatchCodebook | DVae:
    """What gives masked patches their targets: k-means on patches of this run's own pictures, or a trained dVAE.

    Raises TriviumError where there is no picture to learn from.
    """
    if data.image_tokenizer != "patches":
        return load_image_tokenizer(data.image_tokenizer)
    pictures = []
    for source in (sources.pairs, sources.images):
        for row in _spread(source, PICTURES_FOR_CODEBOOK // 2):
            try:
                sample = source.read(row, row) if source is not None else {}
                pictures.append(views.for_model(views.decode(sample["image"]), WHOLE))
            except (BadSample, DecodeError):
                continue  # the loader reports it when its place comes
    if not pictures:
        raise TriviumError("there is no picture to learn an image codebook from: give --data.pairs or --data.images")
    pixels_BCHW: Tensor = torch.from_numpy(np.stack(pictures))
    return PatchCodebook.fit(
        pixels_BCHW, config.num_codes, config.patch_size, seed=hash64(seed, "patch codebook") % 2**63
    )


def make_streams(data: Data, sources: Sources, views: Views, patch: int, tokenizer: Tokenizer) -> list[Stream]:
    """FLAVA's three streams, those whose data is there. Micro-batches are whole batches until the trainer says so."""
    image = ImageInput(views, patch, color_jitter=data.color_jitter, cache_bytes=data.cache_megabytes << 20)
    text = TextInput(tokenizer, data.max_length, whole_words=data.whole_words)
    members = (
        ("pairs", sources.pairs, PairCollate(image, text, data.false_pairs), data.pairs_ratio),
        ("images", sources.images, ImageCollate(image), data.images_ratio),
        ("text", sources.text, TextCollate(text), data.text_ratio),
    )
    return [
        Stream(name, source, collate, data.batch, data.batch, ratio)
        for name, source, collate, ratio in members
        if source is not None
    ]


def validation_streams(
    data: Data, sources: Sources, views: Views, patch: int, tokenizer: Tokenizer
) -> list[tuple[str, Source, PairCollate | ImageCollate | TextCollate]]:
    """The same streams over held-out rows, without augmentation and with fixed masks."""
    image = ImageInput(replace(views, crop_scale=(1.0, 1.0), flip=0.0), patch)
    text = TextInput(tokenizer, data.max_length, whole_words=data.whole_words)
    members = (
        ("pairs", sources.validation_pairs, PairCollate(image, text, data.false_pairs, train=False)),
        ("images", sources.validation_images, ImageCollate(image, train=False)),
        ("text", sources.validation_text, TextCollate(text, train=False)),
    )
    return [(name, source, collate) for name, source, collate in members if source is not None]
