"""Budgets of time and memory, turned into numbers of the recipe once, before a run begins.

``--train.minutes 8`` becomes a number of steps and ``--train.micro-batch auto`` a number of rows; the recipe writes
both into config.json, so that repeating or resuming the run does not measure again.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trivium.errors import TriviumError
from trivium.train import distributed


class OutOfMemory(TriviumError):
    """Memory ran out in a step; the sentence names the dial."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def memory_dial_named(doing: str, rows: int) -> Iterator[None]:
    """Running out of memory inside becomes OutOfMemory. doing: what with so many `rows` at once, for its sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory in {doing} with {rows} samples at once: use --train.micro-batch {max(1, rows // 2)} (the"
            " batch stays the same), or --train.micro-batch auto"
        ) from error


def largest_micro_batch(try_one: Callable[[int], None], batch: int, processes: int = 1) -> int:
    """What ``--train.micro-batch auto`` means: a process's share of the batch, then about half as many rows, until
    `try_one` has room on all of them.

    Only divisors of the batch are tried, of those the ones whose micro-batches the processes can share.
    try_one: takes a step with so many rows at once, see ``trainer.try_streams``.
    """

    def at_most(limit: int) -> int:
        shared = (rows for rows in range(limit, 0, -1) if batch % rows == 0 and batch // rows % processes == 0)
        return next(shared, 1)  # a batch that they cannot share at all is refused by the mixture, in its own words

    rows = at_most(max(1, batch // processes))
    while True:
        try:
            try_one(rows)
            return rows
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                raise TriviumError("out of memory with a single sample at once: use a smaller --size") from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = at_most(rows // 2)


def calibrate(one_step: Callable[[int], None], stream_at: Callable[[int], str], minutes: float) -> int:
    """How many steps fit into the minutes, from timing a few: about 3 % of the budget, at least 4 steps.

    The first step of each stream is not counted (it allocates and compiles), nor is a stream that was drawn once. The
    others are weighted by how often they are drawn, so that a few steps of the rare ones do not mislead. Every process
    gets the same answer.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    step, timed = 0, 0.0
    while distributed.any_process(step < 4 or timed < 0.03 * 60 * minutes):
        begin = time.perf_counter()
        one_step(step)
        seconds[stream_at(step)].append(time.perf_counter() - begin)
        timed = sum(sum(times[1:]) for times in seconds.values())
        step += 1
    counted = {stream: times[1:] for stream, times in seconds.items() if len(times) > 1} or seconds
    typical = {stream: statistics.median(times) for stream, times in counted.items()}
    drawn = Counter(stream_at(step) for step in range(1000))
    known = {stream: count for stream, count in drawn.items() if stream in typical}
    mean = torch.tensor(sum(typical[stream] * count for stream, count in known.items()) / sum(known.values()))
    mean = distributed.sum_over_processes({"seconds": mean})["seconds"] / distributed.world()
    return max(1, int(60 * minutes / mean.item()))
