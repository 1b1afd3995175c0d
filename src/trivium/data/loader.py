"""The micro-batches of a run, read by worker processes, in an order that does not depend on how many there are.

A step's global batch is the run of places that begins at ``place_at(step)``. It is cut into micro-batches of equal
size, numbered over the whole of it; a process reads the numbers rank * k to (rank + 1) * k - 1. A worker is handed
(step, number) and needs nothing else, because every choice is a function of the seed and the place: workers hold no
state, and a run that resumes asks for the steps that are left.

A sample that cannot be read is replaced by another (by seed, stream, place and attempt), so a batch never shrinks.
"""

from __future__ import annotations

import dataclasses
import resource
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trivium.data.decode import DecodeError
from trivium.data.order import WINDOW, Draws, Order, keyed_generator, pair_rows, rotate_captions
from trivium.errors import BadSample, TriviumError, lost_process
from trivium.train.protocol import Batch, Sample, Source, Stream

MAX_ATTEMPTS = 20  # substitutes for one place, before the source as a whole is called unreadable
MAX_OPEN_FILES = 8192
PREFETCH = 4  # micro-batches that each worker keeps ready


class StreamCollate(Protocol):
    """What the loader asks of a stream's collate (see data/collate.py)."""

    false_pairs: float  # probability of a place to take part in the rotation of captions
    sort_by_length: bool  # inside a global batch

    def prepare(self, sample: Sample, draws: Draws) -> Any:
        """What of one sample is made for itself: its picture decoded and masked. Raises BadSample, DecodeError."""
        ...

    def batch(
        self, stream: str, prepared: Sequence[Any], rows_B: Tensor, places_B: Tensor, number: int, bad: Sequence[str]
    ) -> Batch: ...


class GlobalBatch(NamedTuple):
    """Which samples stand in the rows of one step's global batch. All int64 [G]."""

    places: np.ndarray
    image_rows: np.ndarray
    text_rows: np.ndarray


class StreamReader:
    """Reads any micro-batch of a stream. Lives in each worker."""

    def __init__(self, stream: Stream, seed: int, window: int = WINDOW) -> None:
        self.stream = stream
        self.collate: StreamCollate = stream.collate
        self.seed = seed
        mixed = window if stream.window is None else stream.window
        self.order = Order(len(stream.source), stream.source.blocks(), seed, stream.name, mixed)
        self.lengths: np.ndarray | None = None
        if self.collate.sort_by_length:
            lengths = stream.source.lengths()
            if lengths is None:
                raise TriviumError(
                    f"stream {stream.name!r} cannot be sorted by length: its source does not know the lengths of its"
                    " texts without reading them; turn sort_by_length off"
                )
            self.lengths = np.asarray(lengths)
        self._planned: tuple[int, GlobalBatch] | None = None

    def plan(self, first_place: int) -> GlobalBatch:
        """The global batch that begins at `first_place`; sorted by `Source.lengths` where the collate asks for it."""
        if self._planned is None or self._planned[0] != first_place:
            places = np.arange(first_place, first_place + self.stream.batch)
            image_rows, text_rows = pair_rows(places, self.order, self.collate.false_pairs, self.seed, self.stream.name)
            if self.lengths is not None:
                by_length = np.argsort(self.lengths[text_rows], kind="stable")
                places, image_rows, text_rows = places[by_length], image_rows[by_length], text_rows[by_length]
            self._planned = (first_place, GlobalBatch(places, image_rows, text_rows))
        return self._planned[1]

    def micro_batch(self, first_place: int, number: int) -> Batch:
        """Micro-batch `number` of the global batch that begins at `first_place`."""
        plan = self.plan(first_place)
        rows = range(number * self.stream.micro_batch, (number + 1) * self.stream.micro_batch)
        prepared: list[Any] = []
        bad: list[str] = []
        for row in rows:
            image_row, text_row = int(plan.image_rows[row]), int(plan.text_rows[row])
            prepared.append(self._read_or_replace(int(plan.places[row]), image_row, text_row, bad))
        rows_B = torch.arange(rows.start, rows.stop)
        places_B = torch.from_numpy(plan.places[rows.start : rows.stop].copy())
        return self.collate.batch(self.stream.name, prepared, rows_B, places_B, number, bad)

    def _read_or_replace(self, place: int, image_row: int, text_row: int, bad: list[str]) -> Any:
        draws = Draws(self.seed, self.stream.name, place)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return read(self.stream.source, self.collate, image_row, text_row, draws)
            except BadSample as error:
                bad.append(str(error))
                image_row = text_row = self.order.substitute(place, attempt)
        raise TriviumError(
            f"stream {self.stream.name!r}: {MAX_ATTEMPTS} samples in a row could not be read, the last of them"
            f" {bad[-1]}; check the data before training on it"
        )


def read(source: Source, collate: StreamCollate, image_row: int, text_row: int, draws: Draws) -> Any:
    """One prepared sample. Raises BadSample with the name of the sample, for whatever cause."""
    named = Sample(name=f"row {image_row}", same_image=image_row, same_text=text_row)
    sample: Sample = {**named, **source.read(image_row, text_row)}
    try:
        return collate.prepare(sample, draws)
    except DecodeError as error:
        raise BadSample(sample["name"], "", str(error)) from None


def name_of(source: Source, image_row: int, text_row: int) -> str:
    """How messages name a sample, whether it can be read or not."""
    try:
        return source.read(image_row, text_row).get("name", f"row {image_row}")
    except BadSample as error:
        return str(error)


# ------------------------------------------------------------------------------------------------- workers


class _MicroBatches(Dataset[Any]):
    """Micro-batches by (first place, number, stream). A user's mistake comes back as a value: raised in the worker it
    would reach the user wrapped in a traceback."""

    def __init__(self, readers: dict[str, StreamReader]) -> None:
        self.readers = readers

    def __getitem__(self, at: tuple[str, int, int]) -> Batch | TriviumError:
        stream, first_place, number = at
        try:
            return self.readers[stream].micro_batch(first_place, number)
        except TriviumError as error:
            return error


class _Index(torch.utils.data.Sampler[Any]):
    """Hands out what `numbers` makes, lazily: a run may have more steps than fit a list."""

    def __init__(self, numbers: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[Any]:
        return iter(self.numbers())


def _leave_stopping_to_the_trainer(worker: int) -> None:
    """Ctrl-C, and the SIGTERM that a scheduler sends to a whole process group, reach workers too: a worker that died of
    it would break the step that the trainer still wants to finish and save. It ends workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def micro_batches(
    readers: dict[str, StreamReader],
    numbers: Callable[[], Iterable[tuple[str, int, int]]],
    workers: int,
    pinned: bool = False,
) -> Iterator[Batch]:
    """The micro-batches (stream, first place, number) in the order given, read by `workers` processes (0 = this one).

    pinned: with pictures where a GPU copies them from while it computes.
    Raises TriviumError where a worker found a user's mistake, or ended (killed, out of memory).
    """
    if workers:
        _allow_open_files()
    loader = DataLoader(
        _MicroBatches(readers),
        sampler=_Index(numbers),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pinned,
        worker_init_fn=_leave_stopping_to_the_trainer,
        generator=torch.Generator(),  # else it would draw from torch's global one
    )
    try:
        for batch in loader:
            if isinstance(batch, TriviumError):
                raise batch
            yield batch
    except RuntimeError as error:
        failure = lost_process(error)
        if failure is None:
            raise
        raise failure from None


def _allow_open_files() -> None:
    """Each tensor from a worker is an open file until it is freed, and 1024, the usual limit, is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# ---------------------------------------------------------------------------------------------- evaluation


MOST_PASSES = 8  # over held-out rows that are few


def evaluation_batches(
    source: Source, collate: StreamCollate, batch: int, samples: int | None = None, stream: str = "evaluation"
) -> Iterator[Batch]:
    """Batches for validation, the same at every call: all rows, or `samples` of them evenly spread.

    Rows are shuffled once, as in training: a file lists like beside like, and a batch of neighbours would be harder
    to tell apart than any that training draws. Every choice is keyed by the row and the pass, so masks and losses
    repeat; give a collate with ``train=False``. Where there are fewer rows than `samples`, they are gone through again
    under other masks and captions, at most 8 times: a few hundred captions mask so few words that their loss and the
    entropy of their labels say little. False pairs are drawn inside each batch, as many as the collate's rate says.
    The last batch of a pass may be smaller. An unreadable sample is left out, since a substitute would count twice,
    and named in ``bad``, of the next batch or the last one where its own holds nothing else. Raises TriviumError where
    none is left.
    """
    num_rows = len(source) if samples is None else min(samples, len(source))
    num_passes = 1 if samples is None else min(MOST_PASSES, samples // max(num_rows, 1))
    rows = np.arange(num_rows) * len(source) // max(num_rows, 1)
    rows = keyed_generator(stream, "evaluation").permutation(rows)
    bad: list[str] = []  # not yet named
    ready: Batch | None = None  # waits for the sentences that may come after the last batch
    starts = [(each, start) for each in range(num_passes) for start in range(0, num_rows, batch)]
    for number, (each, start) in enumerate(starts):
        image_rows = rows[start : start + batch]
        text_rows = rotate_captions(image_rows, image_rows, collate.false_pairs, each, stream, exact=True)
        prepared, places = [], []
        for image_row, text_row in zip(image_rows.tolist(), text_rows.tolist(), strict=True):
            try:
                prepared.append(read(source, collate, image_row, text_row, Draws(each, stream, image_row)))
                places.append(image_row)
            except BadSample as error:
                if not each:  # later passes would only say it again
                    bad.append(str(error))
        if prepared:
            if ready is not None:
                yield ready
            ready = collate.batch(stream, prepared, torch.arange(len(places)), torch.tensor(places), number, bad)
            bad = []
    if ready is None:
        raise TriviumError(f"no sample of {stream!r} could be read: check the data")
    yield dataclasses.replace(ready, bad=(*ready.bad, *bad))
