"""Which stream each step draws from: by ratio (FLAVA: 0.70 pairs, 0.15 images, 0.15 text) or round-robin.

The ratio form is a stratified draw. Independent draws per step have the right shares on average only: a demo of 30
steps would miss a stream of 15 % in one run of 130, and two runs of equal length would differ in what they saw. So
steps come in cycles of 20: the cycle's 20 points (m + offset) / 20, with one random offset for each cycle, are dealt
to its steps in random order, and a stream owns an interval of [0, 1) as long as its ratio. Every single step still
falls on a stream with exactly its ratio's probability, and no cycle is off by a whole step; and since the steps of a
stream in a cycle can be counted without dealing them, the place of any step is a sum over cycles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from trivium.data.loader import StreamReader, micro_batches, name_of
from trivium.data.order import WINDOW, keyed_generator
from trivium.errors import TriviumError
from trivium.train.protocol import Batch, Stream, hash64, uniform64

CYCLE = 20  # steps; 0.70, 0.15 and 0.15 of it are whole numbers


def refuse_uneven_shares(whose: str, batch: int, micro_batch: int, world: int) -> None:
    """Raises TriviumError where so many processes cannot share a global batch, or its micro-batches, evenly.

    whose: what the sentence begins with.
    """
    if batch % world:
        raise TriviumError(
            f"{whose}: {world} processes cannot share a global batch of {batch} evenly: choose a batch that they"
            " divide, or another number of them"
        )
    number, rest = divmod(batch, micro_batch)
    if number % world and not rest:
        raise TriviumError(
            f"{whose}: {world} processes cannot share {number} micro-batches ({batch} rows, {micro_batch} each) evenly:"
            f" give a smaller one, such as --train.micro-batch {math.gcd(batch // world, micro_batch)}"
        )


class StreamMixture:
    """Implements ``train.protocol.Mixture`` over streams that are read at random access.

    Streams of ratio 0 are dropped, the ratios of the others taken relative to their sum. workers: processes that
    read the data, beside each training process; 0 = it reads itself. window: see ``Order``.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        seed: int,
        schedule: Literal["ratio", "round-robin"] = "ratio",
        workers: int = 0,
        window: int = WINDOW,
    ) -> None:
        for stream in streams:
            if stream.ratio < 0:
                raise TriviumError(f"stream {stream.name!r} has ratio {stream.ratio}: ratios are 0 or more")
            if stream.micro_batch < 1 or stream.batch < 1 or stream.batch % stream.micro_batch:
                raise TriviumError(
                    f"stream {stream.name!r}: a global batch of {stream.batch} cannot be cut into micro-batches of"
                    f" {stream.micro_batch}: choose a micro-batch that divides it"
                )
        self.streams = [stream for stream in streams if stream.ratio > 0]
        if not self.streams:
            raise TriviumError("the mixture has no stream with a ratio above 0: give at least one")
        names = [stream.name for stream in self.streams]
        if len(set(names)) < len(names):
            raise TriviumError(f"two streams of the mixture share a name ({', '.join(names)}): give each its own")
        self.seed = seed
        self.schedule = schedule
        self.workers = workers
        self.readers = {stream.name: StreamReader(stream, seed, window) for stream in self.streams}
        ratios = np.array([stream.ratio for stream in self.streams])
        self._upper = np.cumsum(ratios / ratios.sum())[:-1]  # where each stream's interval of [0, 1) ends
        self._steps_before = np.zeros((1, len(self.streams)), dtype=np.int64)  # [cycle, stream], grown as needed

    def stream_at(self, step: int) -> Stream:
        """The stream that this step draws from."""
        return self.streams[self._number_at(step)]

    def place_at(self, step: int) -> int:
        """Place of the first row of this step's global batch: its batch size times the stream's earlier steps."""
        number = self._number_at(step)
        if self.schedule == "round-robin":
            earlier = step // len(self.streams)
        else:
            cycle, position = divmod(step, CYCLE)
            earlier = int(self._counts_before(cycle)[number] + np.sum(self._dealt(cycle)[:position] == number))
        return self.streams[number].batch * earlier

    def names_at(self, step: int) -> list[str]:
        """How messages name each sample of this step's global batch. Reads all of them."""
        stream = self.stream_at(step)
        plan = self.readers[stream.name].plan(self.place_at(step))
        rows = zip(plan.image_rows.tolist(), plan.text_rows.tolist(), strict=True)
        return [name_of(stream.source, image_row, text_row) for image_row, text_row in rows]

    def loader(self, step: int, rank: int, world: int, stop: int, pinned: bool = False) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step in [step, stop), in order; `pinned` for a run on a GPU.

        Raises TriviumError where the processes cannot share the micro-batches of a stream evenly, and later where
        data cannot be read (see data/loader.py).
        """
        for stream in self.streams:
            refuse_uneven_shares(f"stream {stream.name!r}", stream.batch, stream.micro_batch, world)
        return self._loader(step, rank, world, stop, pinned)

    def _loader(self, step: int, rank: int, world: int, stop: int, pinned: bool) -> Iterator[list[Batch]]:
        def share(stream: Stream) -> int:
            return stream.batch // stream.micro_batch // world

        def numbers() -> Iterator[tuple[str, int, int]]:
            for each in range(step, stop):
                stream, first_place = self.stream_at(each), self.place_at(each)
                for number in range(rank * share(stream), (rank + 1) * share(stream)):
                    yield stream.name, first_place, number

        batches = micro_batches(self.readers, numbers, self.workers, pinned)
        for each in range(step, stop):
            yield [next(batches) for _ in range(share(self.stream_at(each)))]

    # ---------------------------------------------------------------------------------------- the schedule

    def _number_at(self, step: int) -> int:
        if self.schedule == "round-robin":
            return step % len(self.streams)
        cycle, position = divmod(step, CYCLE)
        return int(self._dealt(cycle)[position])

    def _points(self, cycles: np.ndarray) -> np.ndarray:
        """The points of some cycles, rising, as numbers of streams: int64 [cycles, CYCLE]."""
        offset = uniform64(hash64(self.seed, "mixture offset"), cycles)
        return np.searchsorted(self._upper, (np.arange(CYCLE) + offset[:, None]) / CYCLE, side="right")

    def _dealt(self, cycle: int) -> np.ndarray:
        """The streams of a cycle's steps, in order of step: int64 [CYCLE]."""
        dealt = np.argsort(keyed_generator(self.seed, "mixture order", cycle).random(CYCLE))
        return self._points(np.array([cycle]))[0][dealt]

    def _counts_before(self, cycle: int) -> np.ndarray:
        """How many steps each stream had in all cycles before this one: int64 [streams]."""
        known = len(self._steps_before) - 1  # cycles that are counted
        if cycle > known:
            offset = uniform64(hash64(self.seed, "mixture offset"), np.arange(known, max(cycle, 2 * known, 1024)))
            below = [np.zeros(len(offset), dtype=np.int64)]  # points below each bound
            for bound in self._upper:
                points = np.floor(CYCLE * bound - offset).astype(np.int64).clip(1, CYCLE) - 1  # not yet all of them
                for _ in range(3):  # rounding decides as it does in `_points`
                    points += (points + offset) / CYCLE < bound
                below.append(points)
            counts = np.diff([*below, np.full(len(offset), CYCLE)], axis=0).T
            total = self._steps_before[-1] + np.cumsum(counts, axis=0)
            self._steps_before = np.concatenate([self._steps_before, total])
        return self._steps_before[cycle]
