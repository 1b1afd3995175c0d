"""From a sample to its part of a batch: decode, crop, resize, mask; then many of them to one Batch.

``prepare`` runs once per sample, in a worker; every choice it makes comes from the ``Draws`` of the sample's place.
``batch`` stacks, and masks the texts, whose choices come from the same draws. With ``train=False``
nothing is cropped, flipped or recoloured; the loader then keys the draws by row instead of place, so that captions,
masks and with them validation losses repeat.

Legend: B rows of a micro-batch, T text tokens, N image patches, C channels, H height, W width of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trivium.data.codes import CodeCache, picture_digest
from trivium.data.decoded import Decoded
from trivium.data.masking import block_mask, mask_tokens
from trivium.data.order import Draws
from trivium.data.random_augment import RandomAugment
from trivium.data.tokenizer import UNREAD, Tokenizer
from trivium.data.transforms import color_jitter
from trivium.data.views import WHOLE, Views
from trivium.errors import BadSample, TriviumError
from trivium.train.protocol import Batch, Images, Sample, Texts

KEPT_CHARACTERS = 1 << 21  # of texts whose ids a worker keeps: 40,000 captions, some 15 MB


class PreparedImage(NamedTuple):
    pixels_CHW: np.ndarray  # uint8
    codebook_CHW: np.ndarray | None  # uint8, the image tokenizer's view where it wants another size
    mask_N: np.ndarray | None  # bool; None: no patch is ever masked
    codes_N: np.ndarray | None  # int64, where a cache knows them
    same: int


class PreparedText(NamedTuple):
    text: str
    ids: list[int]  # not to be written to
    draws: Draws  # of its mask
    same: int


@dataclass
class ImageInput:
    """The picture of a sample: its views, its block mask and, from a cache, its codes."""

    views: Views
    patch: int  # pixels on a side
    codes: CodeCache | None = None  # then the crops are the cache's own
    color_jitter: float = 0.0  # strength of random changes of colour, in training alone; cached codes do not follow
    changes: RandomAugment | None = None  # of shape and light, in training alone; then codes would not fit
    cache_bytes: int = 0  # memory of each worker for decoded pictures; changes the speed alone
    masked: bool = True  # False: no block mask, for a family that predicts no patches
    _decoded: Decoded = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.views.size % self.patch:
            raise TriviumError(
                f"a picture of {self.views.size} pixels cannot be cut into patches of {self.patch}:"
                " choose a size that is a multiple of the patch"
            )
        self._decoded = Decoded(self.cache_bytes)
        assert self.changes is None or not (self.masked or self.codes), "codes belong to patches at their own place"
        num_patches = (self.views.size // self.patch) ** 2
        if self.codes is not None and self.codes.num_codes_per_view != num_patches:
            raise TriviumError(
                f"the code cache {self.codes.path} has {self.codes.num_codes_per_view} codes a picture, but the model"
                f" has {num_patches} patches: build it with an image tokenizer of the same grid"
            )

    def prepare(self, sample: Sample, draws: Draws, train: bool) -> PreparedImage:
        """Raises BadSample, DecodeError."""
        if "image" not in sample:
            raise BadSample(sample["name"], "", "has no picture")
        data = sample["image"]
        digest = picture_digest(data) if self.codes is not None or self.cache_bytes else b""
        picture_HWC = self._decoded.get(digest, lambda: self.views.decode(data))
        height, width, _ = picture_HWC.shape
        codes_N = codebook_CHW = None
        view = WHOLE
        if self.codes is not None:
            number = 1 + int(draws.generator("view").random() * self.codes.crops) if train else 0
            view = self.views.numbered(digest, number, height, width)
            codes_N = self.codes.lookup(digest, number, sample["name"])
        else:
            if train:
                view = self.views.draw(draws.generator("crop"), height, width)
            if self.views.codebook_size is not None:
                codebook_CHW = self.views.for_codebook(picture_HWC, view)
        grid = self.views.size // self.patch
        mask_N = block_mask(draws.generator("patches"), grid, grid) if self.masked else None
        pixels_CHW = self.views.for_model(picture_HWC, view)
        if train and self.color_jitter:  # of both views by one draw: a code is asked for in the colours that are seen
            pixels_CHW = self._jittered(pixels_CHW, draws)
            codebook_CHW = None if codebook_CHW is None else self._jittered(codebook_CHW, draws)
        if train and self.changes is not None:
            pixels_HWC = self.changes(draws.generator("changes"), pixels_CHW.transpose(1, 2, 0))
            pixels_CHW = np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
        return PreparedImage(pixels_CHW, codebook_CHW, mask_N, codes_N, sample["same_image"])

    def _jittered(self, pixels_CHW: np.ndarray, draws: Draws) -> np.ndarray:
        pixels_HWC = color_jitter(draws.generator("color"), pixels_CHW.transpose(1, 2, 0), self.color_jitter)
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))

    def batch(self, prepared: Sequence[PreparedImage]) -> tuple[tuple[Images, ...], dict[str, Tensor]]:
        """The images of a Batch and its targets ``image_mask`` (bool [B, N]) and, from a cache, ``codes`` (int64)."""
        same_B = torch.tensor([image.same for image in prepared], dtype=torch.int64)
        images = [Images(_stack([image.pixels_CHW for image in prepared]), same_B)]
        targets = {}
        masks = [image.mask_N for image in prepared if image.mask_N is not None]
        if masks:
            targets["image_mask"] = _stack(masks)
        codebook = [image.codebook_CHW for image in prepared if image.codebook_CHW is not None]
        if codebook:
            images.append(Images(_stack(codebook), same_B))
        codes = [image.codes_N for image in prepared if image.codes_N is not None]
        if codes:
            targets["codes"] = _stack(codes)
        return tuple(images), targets


class Tokenized:
    """Ids of texts, kept like decoded pictures until KEPT_CHARACTERS of text are: to tokenize a caption again takes
    longer than all else that is done to it."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._free_characters = KEPT_CHARACTERS
        self._ids: dict[str, list[int]] = {}

    def __len__(self) -> int:
        """Texts that are kept."""
        return len(self._ids)

    def get(self, text: str) -> list[int]:
        """Its ids, not to be written to."""
        if (kept := self._ids.get(text)) is not None:
            return kept
        [ids] = self._tokenizer.encode([text], self._max_length)
        if self._free_characters >= len(text):
            self._ids[text] = ids
            self._free_characters -= len(text)
        return ids


@dataclass
class TextInput:
    """The text of a sample: its tokens and its token mask."""

    tokenizer: Tokenizer
    max_length: int  # tokens, [CLS] and [SEP] among them; longer texts are cut
    probability: float | None = 0.15  # of a token to be selected; None: no mask, for a family that predicts no words
    whole_words: bool = False  # select all pieces of a word or none
    _tokenized: Tokenized = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._tokenized = Tokenized(self.tokenizer, self.max_length)

    def prepare(self, sample: Sample, draws: Draws) -> PreparedText:
        """Raises BadSample."""
        captions = sample["texts"] if sample.get("texts") else [sample["text"]] if "text" in sample else []
        if not captions:
            raise BadSample(sample["name"], "", "has no text")
        chosen = int(draws.generator("caption").random() * len(captions)) if len(captions) > 1 else 0
        ids = self._tokenized.get(captions[chosen])
        if self.tokenizer.is_bare(ids):
            raise BadSample(sample["name"], "", f"its text {UNREAD}")
        return PreparedText(captions[chosen], ids, draws, sample["same_text"])

    def batch(self, prepared: Sequence[PreparedText]) -> tuple[Texts, dict[str, Tensor]]:
        """The texts of a Batch, unmasked, padded to its longest; targets ``masked_ids`` and ``selected`` [B, T].

        They are masked all at once."""
        sequences = [text.ids for text in prepared]
        ids_BT, mask_BT = self.tokenizer.pad(sequences)
        texts = Texts(ids_BT, mask_BT, torch.tensor([text.same for text in prepared], dtype=torch.int64))
        if self.probability is None:
            return texts, {}
        uniform = [
            text.draws.generator("tokens").random((3, len(ids))) for text, ids in zip(prepared, sequences, strict=True)
        ]
        masked_ids, selected = mask_tokens(
            np.concatenate(uniform, axis=1),
            ids_BT[mask_BT].numpy(),
            self.tokenizer.special_ids,
            self.tokenizer.vocab_size,
            self.tokenizer.mask_id,
            self.probability,
            np.asarray(self.tokenizer.continues) if self.whole_words else None,
        )
        masked_ids_BT, selected_BT = ids_BT.clone(), torch.zeros_like(mask_BT)
        masked_ids_BT[mask_BT], selected_BT[mask_BT] = torch.from_numpy(masked_ids), torch.from_numpy(selected)
        return texts, {"masked_ids": masked_ids_BT, "selected": selected_BT}


@dataclass
class PairCollate:
    """Captioned pictures. Beyond the targets of both parts: ``matched`` (bool [B]), False in a false pair.

    A caption that was rotated onto another picture of its own concept still matches it.
    """

    images: ImageInput
    texts: TextInput
    false_pairs: float = 0.0  # probability of a place to take part in the rotation of captions
    sort_by_length: bool = False  # inside a global batch, for less padding
    train: bool = True

    def prepare(self, sample: Sample, draws: Draws) -> tuple[PreparedImage, PreparedText]:
        return self.images.prepare(sample, draws, self.train), self.texts.prepare(sample, draws)

    def batch(
        self,
        stream: str,
        prepared: Sequence[tuple[PreparedImage, PreparedText]],
        rows_B: Tensor,
        places_B: Tensor,
        number: int,
        bad: Sequence[str],
    ) -> Batch:
        images, image_targets = self.images.batch([image for image, _ in prepared])
        texts, text_targets = self.texts.batch([text for _, text in prepared])
        targets = image_targets | text_targets | {"matched": images[0].same_B == texts.same_B}
        return Batch(stream, rows_B, places_B, images, (texts,), targets, number, tuple(bad))


@dataclass
class ImageCollate:
    """Pictures alone."""

    images: ImageInput
    false_pairs: float = field(default=0.0, init=False)
    sort_by_length: bool = field(default=False, init=False)
    train: bool = True

    def prepare(self, sample: Sample, draws: Draws) -> PreparedImage:
        return self.images.prepare(sample, draws, self.train)

    def batch(
        self,
        stream: str,
        prepared: Sequence[PreparedImage],
        rows_B: Tensor,
        places_B: Tensor,
        number: int,
        bad: Sequence[str],
    ) -> Batch:
        images, targets = self.images.batch(prepared)
        return Batch(stream, rows_B, places_B, images, (), targets, number, tuple(bad))


@dataclass
class TextCollate:
    """Texts alone."""

    texts: TextInput
    false_pairs: float = field(default=0.0, init=False)
    sort_by_length: bool = False
    train: bool = True

    def prepare(self, sample: Sample, draws: Draws) -> PreparedText:
        return self.texts.prepare(sample, draws)

    def batch(
        self,
        stream: str,
        prepared: Sequence[PreparedText],
        rows_B: Tensor,
        places_B: Tensor,
        number: int,
        bad: Sequence[str],
    ) -> Batch:
        texts, targets = self.texts.batch(prepared)
        return Batch(stream, rows_B, places_B, (), (texts,), targets, number, tuple(bad))


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
