"""What an encoder of any family gives, and the abilities that a model may have.

Whoever needs an ability asks with `isinstance(model, EncodesText)`: what a family cannot do, its class does not have.

B batch, C channels, H height, W width, L positions (N image tokens, T text tokens, or both), D width,
Q objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Encoded:
    """What an encoder made of a batch. Norm and projection are computed at first use: most passes need only one.

    states: [B, L, D] before the final norm: what `fuse` takes; [B, Q, D] where only Q positions were asked for.
    mask: bool [B, L], True = a real position; None = all real.
    pooled_at_B: int64, the position that stands for a whole row; None = the first, a class token.
    places: [B, L, D] what a decoder adds to the states where it looks for something (UniT); None: nothing.
    mean: no position stands for a whole row: the mean of the real ones does.
    """

    def __init__(
        self,
        states: Tensor,
        mask: Tensor | None,
        norm: nn.Module,
        projection: nn.Module | None,
        pooled_at_B: Tensor | None = None,
        places: Tensor | None = None,
        mean: bool = False,
    ) -> None:
        self.states = states
        self.mask = mask
        self.pooled_at_B = pooled_at_B
        self.places = places
        self.mean = mean
        self._norm = norm
        self._projection = projection

    @cached_property
    def tokens(self) -> Tensor:
        """[B, L, D] after the final norm, a class token first."""
        return self._norm(self.states)

    @cached_property
    def pooled(self) -> Tensor:
        """[B, D] after the final norm: the position that stands for the whole."""
        if self.mean:
            if self.mask is None:
                return self.tokens.mean(1)
            return (self.tokens * self.mask[:, :, None]).sum(1) / self.mask.sum(1, keepdim=True)
        if self.pooled_at_B is None:
            return self._norm(self.states[:, 0])
        return self._norm(self.states[torch.arange(len(self.states), device=self.states.device), self.pooled_at_B])

    @property
    def is_projected(self) -> bool:
        """Whether it has a place in the space that images and texts share: a fused pair has none."""
        return self._projection is not None

    @cached_property
    def projected(self) -> Tensor:
        """[B, D] of unit length, in the space that images and texts share. Only where `is_projected`."""
        assert self._projection is not None, "this has no place in a space that images and texts share"
        rows = self._projection(self.pooled)
        return nn.functional.normalize(rows.float() if rows.dtype == torch.bfloat16 else rows, dim=-1)

    def unprojected(self) -> Encoded:
        """The same without a place in the space that images and texts share."""
        return Encoded(self.states, self.mask, self._norm, None, self.pooled_at_B, self.places, self.mean)

    def settled(self) -> Encoded:
        """The same, with everything computed that would be at first use: for whoever then records a gradient."""
        _ = self.tokens, self.pooled
        if self.is_projected:
            _ = self.projected
        return self

    def repeated(self, rows: int) -> Encoded:
        """One row shown as many; as it is where there are as many already."""
        if len(self.states) == rows:
            return self
        marks = (None if t is None else t.expand(rows, *t.shape[1:]) for t in self._marks())
        return self._with(self.states.expand(rows, -1, -1), *marks)

    def taken(self, rows_R: Tensor) -> Encoded:
        """Those rows, int64 [R], in this order."""
        marks = (None if t is None else t.index_select(0, rows_R) for t in self._marks())
        return self._with(self.states.index_select(0, rows_R), *marks)

    def split(self, rows: int) -> list[Encoded]:
        """Parts of so many rows, the last one may have fewer. Norm and projection are computed for each."""
        parts = [[None] * -(-len(self.states) // rows) if mark is None else mark.split(rows) for mark in self._marks()]
        return [self._with(*of_part) for of_part in zip(self.states.split(rows), *parts, strict=True)]

    @staticmethod
    def joined(parts: list[Encoded]) -> Encoded:
        """Rows of several, one after the other, padded to the longest; then their mask says what is real."""
        if len(parts) == 1:
            return parts[0]
        states = [part.states for part in parts]
        masks, *marks = ([part._marks()[kind] for part in parts] for kind in range(3))
        if len({each.shape[1] for each in states}) > 1 or any(mask is not None for mask in masks):
            masks = [
                each.new_ones(each.shape[:2], dtype=torch.bool) if mask is None else mask
                for each, mask in zip(states, masks, strict=True)
            ]
        present = ([mark for mark in of_parts if mark is not None] for of_parts in (masks, *marks))
        return parts[0]._with(_padded(states), *(_padded(several) if several else None for several in present))

    def _marks(self) -> tuple[Tensor | None, ...]:
        return self.mask, self.pooled_at_B, self.places

    def _with(self, states: Tensor, mask: Tensor | None, pooled_at_B: Tensor | None, places: Tensor | None) -> Encoded:
        return Encoded(states, mask, self._norm, self._projection, pooled_at_B, places, self.mean)


def _padded(parts: list[Tensor]) -> Tensor:
    """The rows of all, with zeros behind those that are shorter than the longest."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    return pad_sequence([row for part in parts for row in part], batch_first=True)


@runtime_checkable
class EncodesImage(Protocol):
    def encode_image(self, pixels_BCHW: Tensor) -> Encoded:
        """Normalised pixels, of any size that divides into patches."""
        ...


@runtime_checkable
class EncodesText(Protocol):
    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Encoded:
        """Token ids, int64; mask: bool, True = a real token."""
        ...


@runtime_checkable
class Fuses(Protocol):
    def fuse(self, image: Encoded, text: Encoded, rows: Any = None) -> Encoded:
        """Pictures and texts read together, row by row; a picture that stands alone is read with every text.

        rows: the positions that are needed, None = all.
        """
        ...


@runtime_checkable
class Answers(Protocol):
    def rank(self, fused: Encoded, answers_KT: Tensor, k: int, first_word_twice: bool = False) -> Tensor:
        """Log-likelihood [B, K] of the k likeliest answers of a list, given as tokens; -inf of the others."""
        ...

    def write(self, fused: Encoded, start: int, end: int, num: int, max_length: int) -> tuple[Tensor, Tensor]:
        """The `num` likeliest answers in any words, ids [B, num, L], and their log-likelihoods [B, num]."""
        ...


@runtime_checkable
class Matches(Fuses, Protocol):
    def match(self, fused: Encoded) -> Tensor:
        """Logits [B, 2] of "do not belong together" (0) and "belong together" (1)."""
        ...


@dataclass(frozen=True)
class Found:
    """Objects in pictures, Q candidates each; those that are none have a low score."""

    scores_BQ: Tensor  # probability of the class
    labels_BQ: Tensor  # int64
    boxes_BQ4: Tensor  # (left, top, right, bottom) as shares of the picture without padding
    attributes_BQ: Tensor | None = None  # int64, where the model has them
    attribute_scores_BQ: Tensor | None = None


@dataclass(frozen=True)
class Objects:
    """What was found in one picture, the surest first; Q candidates, of which those with a low score are none."""

    scores_Q: Tensor  # probability of the class
    labels_Q: Tensor  # int64
    boxes_Q4: Tensor  # (left, top, right, bottom) in pixels of the picture as it was given
    attributes_Q: Tensor | None = None  # int64

    def above(self, score: float) -> Objects:
        """Those with at least this score."""
        kept = self.scores_Q >= score
        attributes = None if self.attributes_Q is None else self.attributes_Q[kept]
        return Objects(self.scores_Q[kept], self.labels_Q[kept], self.boxes_Q4[kept], attributes)


@runtime_checkable
class Detects(Protocol):
    def detect(self, pixels_BCHW: Tensor, sizes_B2: Tensor | None = None, task: str | None = None) -> Found:
        """Objects in normalised pixels; sizes: (height, width) of each picture without padding."""
        ...
