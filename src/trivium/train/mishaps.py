"""What may go wrong in a run, and what is then said: signals, lost processes, bad samples, gradients without end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from trivium.errors import TriviumError, lost_process
from trivium.manifest import write_whole
from trivium.train import distributed
from trivium.train.protocol import Batch, Mixture

T = TypeVar("T")


class _Stopped(BaseException):
    """A signal came in the midst of what need not be finished."""


class StopSignals:
    """Notes Ctrl-C and SIGTERM, so that the step in hand is finished and saved. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._may_leave = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where a signal came, which ends it at once. For what a resumed run does again:
        whoever stops a run does not wait for an evaluation as long as for a step."""
        try:
            self._may_leave = True
            return work() if self.received is None else None
        except _Stopped:
            return None
        finally:
            self._may_leave = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker of the loader: Ctrl-C is its parent's affair
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        doing = "leaving the evaluation" if self._may_leave else "finishing this step"
        os.write(2, f"\n{self.received.name}: {doing} and saving\n".encode())  # print may be interrupted
        if self._may_leave:
            self._may_leave = False  # once: what is cleaned up on the way out is not interrupted again
            raise _Stopped


@contextmanager
def lost_processes_told() -> Iterator[None]:
    """The end of a data worker or of another training process is a sentence, not a traceback."""
    try:
        yield
    except RuntimeError as error:
        failure = lost_process(error)
        if failure is None:
            raise
        raise failure from None


class Replaced:
    """Logs the samples that the loader replaced, and stops the run where they are more than `rate` of a `window` of
    samples, over all processes. `counts` are those of the window so far: a run that is resumed goes on counting."""

    def __init__(
        self, path: Path, window: int = 10_000, rate: float = 0.01, counts: Mapping[str, int] | None = None
    ) -> None:
        self.path, self.window, self.rate = path, window, rate
        counts = counts or {}
        self.seen, self.bad = counts.get("seen", 0), counts.get("bad", 0)

    @property
    def counts(self) -> dict[str, int]:
        return {"seen": self.seen, "bad": self.bad}

    def note(self, done: int, batches: Sequence[Batch]) -> None:
        """What was replaced in the batches of a step. All processes call it."""
        sentences = [(batch.stream, sentence) for batch in batches for sentence in batch.bad]
        counts = {"bad": torch.tensor(len(sentences)), "seen": torch.tensor(sum(map(len, batches)))}
        everywhere = distributed.sum_over_processes(counts)
        self.bad += int(everywhere["bad"])
        self.seen += int(everywhere["seen"])
        if everywhere["bad"]:
            # The first process writes for all: others may stand on machines that do not see the run folder.
            sentences = list(itertools.chain.from_iterable(distributed.everywhere(sentences)))
            if distributed.rank() == 0:
                self._write(done, sentences)
        if self.bad > self.rate * self.window:
            last = f", the last of them {sentences[-1][1]}" if sentences else ""
            raise TriviumError(
                f"{self.bad} of the last {self.seen} samples were bad (more than {self.rate * 100:g}% of {self.window})"
                f"{last}: see {self.path} and mend or remove them, or raise --train.bad-rate"
            )
        if self.seen >= self.window:
            self.seen = self.bad = 0

    def _write(self, done: int, sentences: Sequence[tuple[str, str]]) -> None:
        lines = [json.dumps({"step": done, "stream": stream, "sample": text}) + "\n" for stream, text in sentences]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def not_finite(path: Path, mixture: Mixture, steps: Sequence[int]) -> str:
    """Which samples to look at, of these steps of one stream: whole global batches, since what is not finite on one
    process is so on all. The sentence names the first ones, and `path`, a file that has a line for each."""
    named, samples, lines = [], [], []
    for step in steps:
        stream, first = mixture.stream_at(step), mixture.place_at(step)
        named.append(f"step {step + 1} with places {first} to {first + stream.batch - 1}")
        names = mixture.names_at(step)
        samples += names[:2]
        lines += [json.dumps({"step": step + 1, "stream": stream.name, "sample": name}) + "\n" for name in names]
    write_whole(path, "".join(lines))
    return (
        f"the gradient was not finite in three steps of stream {stream.name} in a row, {', '.join(named)}: lower"
        f" --optim.lr, or look at the {len(lines)} samples that {path} names, among them {'; '.join(samples)}"
    )
