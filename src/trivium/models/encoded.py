"""What an encoder of any family gives, and the abilities that a model may have.

Whoever needs an ability asks with `isinstance(model, EncodesText)`: what a family cannot do, its class does not have.

B batch, C channels, H height, W width, L positions (N image tokens, T text tokens, or both), D width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Encoded:
    """What an encoder made of a batch. Norm and projection are computed at first use: most passes need only one.

    states: [B, L, D] before the final norm: what `fuse` takes; [B, Q, D] where only Q positions were asked for.
    mask: bool [B, L], True = a real position; None = all real.
    pooled_at_B: int64, the position that stands for a whole row; None = the first, a class token.
    """

    def __init__(
        self,
        states: Tensor,
        mask: Tensor | None,
        norm: nn.Module,
        projection: nn.Module | None,
        pooled_at_B: Tensor | None = None,
    ) -> None:
        self.states = states
        self.mask = mask
        self.pooled_at_B = pooled_at_B
        self._norm = norm
        self._projection = projection

    @cached_property
    def tokens(self) -> Tensor:
        """[B, L, D] after the final norm, a class token first."""
        return self._norm(self.states)

    @cached_property
    def pooled(self) -> Tensor:
        """[B, D] after the final norm: the position that stands for the whole."""
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
        mask, pooled_at_B = (None if t is None else t.expand(rows, *t.shape[1:]) for t in (self.mask, self.pooled_at_B))
        return Encoded(self.states.expand(rows, -1, -1), mask, self._norm, self._projection, pooled_at_B)

    def taken(self, rows_R: Tensor) -> Encoded:
        """Those rows, int64 [R], in this order."""
        mask, pooled_at = (None if t is None else t.index_select(0, rows_R) for t in (self.mask, self.pooled_at_B))
        return Encoded(self.states.index_select(0, rows_R), mask, self._norm, self._projection, pooled_at)

    def split(self, rows: int) -> list[Encoded]:
        """Parts of so many rows, the last one may have fewer. Norm and projection are computed for each."""
        marks = (self.mask, self.pooled_at_B)
        parts = [[None] * -(-len(self.states) // rows) if mark is None else mark.split(rows) for mark in marks]
        states = self.states.split(rows)
        return [Encoded(x, m, self._norm, self._projection, p) for x, m, p in zip(states, *parts, strict=True)]

    @staticmethod
    def joined(parts: list[Encoded]) -> Encoded:
        """Rows of several, one after the other; their positions must be as many."""
        if len(parts) == 1:
            return parts[0]
        masks = [part.mask for part in parts if part.mask is not None]
        pooled_at = [part.pooled_at_B for part in parts if part.pooled_at_B is not None]
        return Encoded(
            torch.cat([part.states for part in parts]),
            torch.cat(masks) if masks else None,
            parts[0]._norm,
            parts[0]._projection,
            torch.cat(pooled_at) if pooled_at else None,
        )


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
