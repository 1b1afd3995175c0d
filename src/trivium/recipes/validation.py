"""Losses on held-out samples, in the middle of a run and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from trivium.data.loader import evaluation_batches
from trivium.train import step as train_step
from trivium.train.budget import memory_dial_named
from trivium.train.protocol import Batch, Key, Method, Stream

Validation = dict[str, list[Batch]]  # stream -> held-out batches


def of_streams(streams: Iterable[Stream], batch: int, samples: int, notes: list[str]) -> Validation:
    """Up to `samples` held-out samples of each stream, in batches; 0: none. notes: gets a sentence for each bad one."""
    held_out = {
        stream.name: list(evaluation_batches(stream.source, stream.collate, batch, samples, stream.name))
        for stream in streams
        if samples
    }
    notes += [f"validation: {bad}" for batches in held_out.values() for batch in batches for bad in batch.bad]
    return held_out


def losses(method: Method, validation: Validation, seed: int, micro_batch: int) -> dict[str, float]:
    """Mean of each loss over the held-out samples, in eval mode with fixed masks.

    Contrastive rows see their whole batch, whatever the micro-batch. Raises OutOfMemory.
    """
    found: dict[str, float] = {}
    for stream, batches in validation.items():
        pieces = (micro_batches(batch, micro_batch) for batch in batches)
        with memory_dial_named(f"validation on stream {stream}", micro_batch):
            found |= train_step.measure(method, pieces, Key(seed, stream, 0))
    return found


def measures(validation: Validation, seed: int, micro_batch: int) -> Callable[[Method], dict[str, Any]]:
    """What a trainer calls: the losses of a method."""
    return lambda method: {"losses": losses(method, validation, seed, micro_batch)}


def micro_batches(batch: Batch, rows: int) -> list[Batch]:
    """A batch in pieces of `rows` rows."""
    firsts = enumerate(range(0, len(batch), rows))
    return [batch.part(first, min(first + rows, len(batch)), number) for number, first in firsts]


def all_pieces(validation: Validation, rows: int) -> Iterator[Batch]:
    """Every held-out batch, in pieces of `rows` rows."""
    return (piece for batches in validation.values() for batch in batches for piece in micro_batches(batch, rows))


def columns(batches: Sequence[Batch], scope: str, num_ranks: int) -> float:
    """Columns that a row of the contrastive loss has: those of its batch, or with scope "local" of its rank alone.

    The last batch may be smaller; each pair counts in its own, so it is the mean of the logarithms, weighted by pairs.
    """
    sizes = [len(batch) for batch in batches]
    if not sizes:
        return 1.0
    mean_size = math.exp(sum(size * math.log(size) for size in sizes) / sum(sizes))
    return max(1.0, mean_size / num_ranks) if scope == "local" else mean_size
