"""The data of a run as a recipe states it, and the streams, tokenizer and codebook made from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from trivium.data import embedded
from trivium.data.codes import CodeCache
from trivium.data.collate import ImageCollate, ImageInput, PairCollate, TextCollate, TextInput
from trivium.data.decode import DecodeError
from trivium.data.files import TEXT_LIMIT, RowSource, words_within
from trivium.data.random_augment import RandomAugment
from trivium.data.sources import Concat, open_source
from trivium.data.tokenizer import Tokenizer
from trivium.data.views import WHOLE, Views
from trivium.errors import BadSample, TriviumError
from trivium.hub import is_id
from trivium.load import load_image_tokenizer
from trivium.models.flava import FlavaConfig
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.models.patch_codebook import PatchCodebook
from trivium.recipes import limits
from trivium.train import distributed
from trivium.train.protocol import Source, Stream, hash64
from trivium.train.run import Train

TEXTS_FOR_VOCABULARY = 200_000
PICTURES_FOR_CODEBOOK = 4_000


@dataclass(frozen=True)
class PairData:
    """Where captioned pictures come from and what is done to each. With no path at all: the embedded drawings."""

    pairs: tuple[
        str, ...
    ] = ()  # captioned pictures: CSV, TSV, JSONL, Parquet, tar shards (addresses too), a folder, a .list
    validation: tuple[str, ...] = ()  # captioned pictures that are never trained on: losses and retrieval
    image_column: str | None = None  # in tables; None: found by its usual names
    text_column: str | None = None
    batch: int = 128  # samples of one step, over all processes
    image_size: int | None = None  # side of the pictures in pixels; None: the model's own. Others interpolate positions
    max_length: int = 64  # tokens of a caption, those of its start and its end among them
    sort_by_length: bool = False  # texts inside a batch, so that micro-batches are padded less
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the area that a random crop shows
    flip: float = 0.0  # probability of a mirrored picture
    scaled_decode: bool = False  # decode large JPEGs at a fraction of their size: faster, not quite the same pixels
    color_jitter: float = 0.0  # strength of random changes of brightness, contrast and saturation
    vocabulary: str = (
        "learned"  # "learned" from this text, "bert", the path of a tokenizer.json or of CLIP's byte pairs
    )
    cache_megabytes: int = 256  # of decoded pictures, in each worker

    @property
    def is_embedded(self) -> bool:
        return not self.pairs

    @property
    def length_alone(self) -> int:
        """Tokens of a text that stands alone."""
        return self.max_length

    def lengths(self) -> dict[str, int]:
        """Tokens of the texts that the model is given, by the flag that says it."""
        return {"--data.max-length": self.max_length}

    def views(self, model_size: int) -> Views:
        """Which part of a picture is seen, and at which size: the model's, unless the data says another."""
        return Views(
            self.image_size or model_size,
            crop_scale=self.crop_scale,
            flip=self.flip,
            scaled_decode=self.scaled_decode,
        )

    def with_absolute_paths(self) -> Self:
        """The same for whoever stands in another folder."""
        return replace(
            self,
            pairs=tuple(map(absolute, self.pairs)),
            validation=tuple(map(absolute, self.validation)),
            vocabulary=self.vocabulary if self.vocabulary in ("learned", "bert") else absolute(self.vocabulary),
        )


@dataclass(frozen=True)
class Data(PairData):
    """The same for three streams. With no path at all: the embedded drawings and texts."""

    images: tuple[str, ...] = ()  # pictures alone
    text: tuple[str, ...] = ()  # text alone: one line a sample, long ones in windows that text_length holds
    text_length: int | None = None  # tokens of a text alone; None: max_length
    schedule: Literal["ratio", "round-robin"] = "ratio"
    pairs_ratio: float = 0.70  # share of the steps (FLAVA supplement A.2)
    images_ratio: float = 0.15
    text_ratio: float = 0.15
    false_pairs: float = 0.1  # share of the pairs whose captions are rotated, for the matching loss
    mask_probability: float = 0.15  # of a token to be masked in training; held-out text is always measured at 0.15
    whole_words: bool = False  # mask whole words instead of word pieces
    image_tokenizer: str = "patches"  # "patches": k-means on this data; or the path of a codebook's weights
    image_tokenizer_precision: Literal["fp32", "bf16"] = "fp32"  # of a dVAE; bf16: faster, not all codes exact
    codes: str | None = None  # of the image tokenizer, cached by `trivium data codes`: training then never runs it
    split_pairs: bool = False  # the streams of pictures and of text are those of the pairs, taken apart

    @property
    def is_embedded(self) -> bool:
        return not (self.pairs or self.images or self.text)

    @property
    def length_alone(self) -> int:
        return self.text_length or self.max_length

    def lengths(self) -> dict[str, int]:
        # A held-out caption stands alone too, where masked words are measured.
        alone = self.text or self.validation or self.split_pairs or self.is_embedded
        return super().lengths() | ({"--data.text-length": self.length_alone} if alone else {})

    def with_absolute_paths(self) -> Self:
        return replace(
            super().with_absolute_paths(),
            images=tuple(map(absolute, self.images)),
            text=tuple(map(absolute, self.text)),
            image_tokenizer="patches" if self.image_tokenizer == "patches" else absolute(self.image_tokenizer),
            codes=None if self.codes is None else absolute(self.codes),
        )


def absolute(path: str) -> str:
    """A path as it reads from any folder; an address (https://...) or an id of a hub as it is."""
    return path if "://" in path or is_id(path) else str(Path(path).absolute())


@dataclass(frozen=True)
class Sources:
    pairs: Source | None
    images: Source | None
    text: Source | None
    validation_pairs: Source | None
    validation_images: Source | None
    validation_text: Source | None


@dataclass(frozen=True)
class Inputs:
    """What a run reads, without its model: what the data doctor examines."""

    sources: Sources
    train: Sequence[Stream]  # one with captions and pictures is named "pairs"
    held_out: Sequence[Stream] = ()
    tokenizer: Tokenizer | None = None  # None: no text is read, where there is any
    queue: int | None = None  # rows of the momentum queue; None: the recipe has none


@runtime_checkable
class HasInputs(Protocol):
    """A recipe whose data can be examined before a run."""

    train: Train

    def inputs(self) -> Inputs:
        """Open the data and make the tokenizer as a run does. Raises TriviumError as a run does."""


def open_sources(data: PairData) -> Sources:
    """Open what the recipe names. Raises TriviumError with the file and what to do."""
    streams = ("pairs", "images", "text") if isinstance(data, Data) else ("pairs",)
    if isinstance(data, Data) and data.split_pairs:
        if data.images or data.text:
            raise TriviumError(
                "--data.split-pairs takes pictures and text from the pairs: leave out --data.images and --data.text"
            )
        paired = open_sources(replace(data, split_pairs=False))
        held_out = paired.validation_pairs
        return Sources(paired.pairs, paired.pairs, paired.pairs, held_out, held_out, held_out)
    if data.is_embedded:
        if data.validation:
            flags = "--data.pairs, --data.images or --data.text" if isinstance(data, Data) else "--data.pairs"
            raise TriviumError(f"--data.validation holds pairs out of data of your own: give {flags} too")
        known = {"pairs": embedded.pairs, "images": embedded.images, "text": embedded.text}
        return Sources(
            *(known[name](split) if name in streams else None for split in ("train", "val") for name in known)
        )

    def opened(kind: Literal["pairs", "images", "text"], paths: tuple[str, ...]) -> Source | None:
        if not paths:
            return None
        window = words_within(data.length_alone)
        return open_source(kind, paths, image_column=data.image_column, text_column=data.text_column, window=window)

    validation = opened("pairs", data.validation)
    if not isinstance(data, Data):
        return Sources(opened("pairs", data.pairs), None, None, validation, None, None)
    return Sources(
        *(opened("pairs", data.pairs), opened("images", data.images), opened("text", data.text)),
        *(validation, validation, validation),
    )


def make_tokenizer(data: PairData, sources: Sources, vocab_size: int) -> Tokenizer:
    """The text tokenizer of a run; a learned one is a function of the text alone."""
    if data.vocabulary == "bert" or not (sources.pairs or sources.text):  # pictures alone: no word is read
        return Tokenizer.wordpiece(embedded.bert_vocabulary())
    if data.vocabulary != "learned":
        return Tokenizer.from_file(Path(data.vocabulary))
    texts = embedded.corpus() if data.is_embedded else _texts(sources)
    return Tokenizer.train(texts, vocab_size)


def _texts(sources: Sources) -> Iterator[str]:
    """Up to a stated number of texts of each source, evenly spread. No picture is read for them."""
    found, worst = False, ""
    for source in (sources.pairs, sources.text):
        for part in parts_of(source):
            assert source is not None
            for row in spread(part, -(-TEXTS_FOR_VOCABULARY * len(part) // len(source))):
                try:
                    texts = captions_of(part, row)
                except BadSample as error:  # the loader reports it when its place comes
                    worst = f"; the last that was tried: {error}"
                    continue
                found = True
                yield from texts
    if not found:
        raise TriviumError(
            "there is no text to learn a vocabulary from: give --data.pairs or --data.text, or --data.vocabulary bert"
            + worst
        )


def captions_of(source: Source, row: int) -> list[str]:
    """All texts of a row, each up to TEXT_LIMIT; no picture is read for them where that can be. Raises BadSample."""
    if isinstance(source, RowSource):
        return [text[:TEXT_LIMIT] for text in source.captions(row)]
    sample = source.read(row, row)
    return sample.get("texts") or [sample["text"]]


def parts_of(source: Source | None) -> list[Source]:
    """The sources that one is joined from."""
    return source.sources if isinstance(source, Concat) else [] if source is None else [source]


def spread(source: Source | None, limit: int) -> list[int]:
    """At most so many of its rows, evenly spread."""
    rows = 0 if source is None else len(source)
    return (np.arange(min(rows, limit)) * rows // max(1, min(rows, limit))).tolist()


def make_image_tokenizer(data: Data, sources: Sources, views: Views, config: FlavaConfig, seed: int) -> ImageTokenizer:
    """What gives masked patches their targets: k-means on patches of this run's own pictures, or a trained dVAE.

    Raises TriviumError where there is no picture to learn from.
    """
    if data.image_tokenizer != "patches":
        return load_image_tokenizer(data.image_tokenizer)
    [centres_KE] = distributed.from_first(lambda: [_learn_centres(sources, views, config, seed)])
    codebook = PatchCodebook(len(centres_KE), config.patch_size)
    codebook.centres.copy_(centres_KE)
    return codebook


def _learn_centres(sources: Sources, views: Views, config: FlavaConfig, seed: int) -> Tensor:
    pictures, worst = [], ""
    for source in (sources.pairs, sources.images):
        for row in spread(source, PICTURES_FOR_CODEBOOK // 2):
            try:
                sample = source.read(row, row) if source is not None else {}
                pictures.append(views.for_model(views.decode(sample["image"]), WHOLE))
            except BadSample as error:  # the loader reports it when its place comes
                worst = str(error)
            except DecodeError as error:
                worst = f"{sample.get('name', 'a picture')}: {error}"
    if not pictures:
        last = f"; the last that was tried: {worst}" if worst else ""
        raise TriviumError(
            f"there is no picture to learn an image codebook from: give --data.pairs or --data.images{last}"
        )
    pixels_BCHW: Tensor = torch.from_numpy(np.stack(pictures))
    num_patches = len(pictures) * (views.size // config.patch_size) ** 2
    num_codes = min(config.num_codes, num_patches)  # a handful of pictures has fewer patches than codes
    key = hash64(seed, "patch codebook") % 2**63
    return PatchCodebook.fit(pixels_BCHW, num_codes, config.patch_size, seed=key).centres


def all_pictures(sources: Sources) -> Source:
    """Every picture of a run, those of validation too, as one source. Raises TriviumError where there is none."""
    members = (sources.pairs, sources.images, sources.validation_pairs, sources.validation_images)
    found = {id(source): source for source in members if source is not None}
    if not found:
        raise TriviumError("there is no picture to make codes of: give --data.pairs or --data.images")
    return Concat(list(found.values()))


def make_streams(
    data: Data,
    sources: Sources,
    views: Views,
    patch: int,
    tokenizer: Tokenizer,
    codes: CodeCache | None,
    names: Collection[str],
    train: bool = True,
) -> list[Stream]:
    """Those of FLAVA's three streams that are in `names` and have data. Micro-batches are whole batches until the
    trainer says so.

    Args:
        train: False for the same streams over held-out rows, without augmentation and with fixed masks.

    Raises:
        TriviumError: there is nothing to train on.
    """
    image = ImageInput(views, patch, codes)
    text = TextInput(tokenizer, data.max_length, whole_words=data.whole_words)
    pairs, images, texts = sources.validation_pairs, sources.validation_images, sources.validation_text
    if train:
        image = replace(image, color_jitter=data.color_jitter, cache_bytes=data.cache_megabytes << 20)
        text = replace(text, probability=data.mask_probability)
        pairs, images, texts = sources.pairs, sources.images, sources.text
    alone = replace(text, max_length=data.length_alone)
    by_length = data.sort_by_length and train
    members = (
        ("pairs", pairs, PairCollate(image, text, data.false_pairs, by_length, train), data.pairs_ratio),
        ("images", images, ImageCollate(image, train), data.images_ratio),
        ("text", texts, TextCollate(alone, by_length, train), data.text_ratio),
    )
    streams = [
        Stream(name, source, collate, data.batch, data.batch, ratio)
        for name, source, collate, ratio in members
        if source is not None and name in names
    ]
    if train and not streams:
        flags = " or ".join(f"--data.{name}" for name in names)
        raise TriviumError(f"no data feeds a loss whose weight is above 0: give {flags}, or weight another loss")
    return streams


def make_pairs(
    data: PairData,
    sources: Sources,
    views: Views,
    patch: int,
    tokenizer: Tokenizer,
    train: bool = True,
    masked_words: float | None = None,
    whole_words: bool = False,
    changes: RandomAugment | None = None,
) -> list[Stream]:
    """The stream of captioned pictures without masked patches and without false pairs; none, where there are none.

    Args:
        train: False for the same stream over held-out rows, without augmentation.
        masked_words: probability of a token to be masked; None: no word is predicted.
        changes: of shape and light, in training.
    """
    source = sources.pairs if train else sources.validation_pairs
    if source is None:
        return []
    image = ImageInput(views, patch, masked=False)
    if train:
        image = replace(image, color_jitter=data.color_jitter, changes=changes, cache_bytes=data.cache_megabytes << 20)
    text = TextInput(tokenizer, data.max_length, masked_words, whole_words)
    collate = PairCollate(image, text, sort_by_length=data.sort_by_length and train, train=train)
    return [Stream("pairs", source, collate, data.batch, data.batch)]


def check_shapes(data: PairData, image_size: int, patch: int, max_length: int) -> None:
    """Raises TriviumError where pictures do not divide into the model's patches or texts do not fit its positions."""
    for flag, size in (("--model.image-size", image_size), ("--data.image-size", data.image_size)):
        if size is not None:
            limits.check_patches(size, patch, flag)
    for flag, length in data.lengths().items():
        if length > max_length:
            raise TriviumError(
                f"texts of {length} tokens do not fit a model of {max_length} positions: lower {flag} or raise"
                " --model.max-length"
            )
