"""What a person and a program see of a run: a progress bar (or plain lines), metrics.jsonl, TensorBoard.

metrics.jsonl holds one JSON object a line. ``step`` counts done steps. Lines of training are means over the steps of
one stream since its last line:

    {"step": 20, "stream": "pairs", "steps": 10, "losses": {"mim": 6.9}, "stats": {}, "lr": 0.001, "grad_norm": 1.2,
     "samples_per_second": 110.0, "seconds": 12.5}

and lines of evaluation are ``{"step": 20, "results": {...}, "seconds": 13.0}``. ``seconds`` counts the time that the
run has taken so far, over all the processes that it was resumed in.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from trivium.errors import TriviumError
from trivium.train.protocol import Rows
from trivium.train.step import StepResult


class Log:
    """The log of one process. Only the first process writes and shows; the others make one with `quiet`."""

    def __init__(
        self,
        metrics: Path,
        *,
        first: int,
        total: int,
        seconds_before: float = 0.0,
        quiet: bool = False,
        tensorboard: bool = False,
        seconds_between_lines: float = 10.0,
        out: TextIO | None = None,
    ) -> None:
        """first, seconds_before: steps and time before this process began. total: steps of the whole run."""
        self.first, self.total, self.quiet = first, total, quiet
        self.out = out or sys.stdout
        self.started = time.perf_counter()
        self.seconds_before = seconds_before
        self._waiting: dict[str, list[tuple[StepResult, int, float]]] = defaultdict(list)  # by stream
        self._losses: dict[str, float] = {}  # the last seen of each, over all streams: what the bar shows
        self._speed = 0.0
        self._lr = 0.0
        self._seconds_between_lines = seconds_between_lines
        self._last_line = float("-inf")
        if quiet:
            return
        self._board = _tensorboard(metrics.parent / "tensorboard", first) if tensorboard else None
        self._file = metrics.open("ab", buffering=0)  # a line that did not fit is not tried again
        self._progress: Any = None
        if self.out.isatty():
            self._progress, self._task = _progress_bar(first, total, self.out)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.quiet:
            return
        with suppress(TriviumError) if error is not None else nullcontext():  # what came first is what is told
            self.flush()
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        self._file.close()

    def seconds(self) -> float:
        """What the run has taken so far, in all its processes one after the other."""
        return self.seconds_before + time.perf_counter() - self.started

    def say(self, sentence: str) -> None:
        """One line for the person who watches."""
        if self.quiet:
            return
        if self._progress is not None:
            self._progress.console.print(sentence, markup=False, highlight=False)
        else:
            print(sentence, file=self.out, flush=True)

    def step(self, done: int, stream: str, result: StepResult, *, lr: float, samples: int, seconds: float) -> None:
        """Take note of one step. done: steps done with this one; samples: of the global batch; seconds: it took."""
        # A loss that nothing in the batch was asked for has no mean: 0 would pull the curve down.
        asked = {name: loss for name, loss in result.losses.items() if result.counts.get(name, 1) > 0}
        result = replace(result, losses=asked, rows=Rows())  # rows of many steps would fill the memory
        self._waiting[stream].append((result, samples, seconds))
        self._done, self._lr = done, lr
        self._losses.update(result.losses)
        speed = samples / max(seconds, 1e-9)
        self._speed = 0.9 * self._speed + 0.1 * speed if self._speed else speed
        if not self.quiet:
            self._show(done)

    def flush(self) -> None:
        """Write the lines that wait: the mean over the steps since the last flush, one line for each stream."""
        for stream, steps in self._waiting.items():
            accepted = [result for result, _, _ in steps if result.accepted]
            line = {
                "stream": stream,
                "steps": len(steps),
                "losses": _means([result.losses for result in accepted]),
                "stats": _means([result.stats for result in accepted]),
                "lr": self._lr,
                "grad_norm": _mean([result.grad_norm for result in accepted]),
                "samples_per_second": sum(s for _, s, _ in steps) / max(1e-9, sum(t for _, _, t in steps)),
            }
            if skipped := len(steps) - len(accepted):
                line["skipped"] = skipped
            self._write(self._done, line)
        self._waiting.clear()

    def results(self, done: int, results: dict[str, Any]) -> None:
        """Write what an evaluation found after `done` steps."""
        self.flush()
        self._write(done, {"results": results})

    def _write(self, done: int, line: dict[str, Any]) -> None:
        if self.quiet:
            return
        line = {"step": done, **line, "seconds": round(self.seconds(), 3)}
        content = (json.dumps(line) + "\n").encode()
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise TriviumError(
                f"{self._file.name} cannot be written ({error.strerror}): free some space, then continue with --resume"
            ) from error
        if self._board is not None:
            stream = line.get("stream", "results")
            for name, value in _flat({k: v for k, v in line.items() if k not in ("step", "stream")}).items():
                self._board.add_scalar(f"{stream}/{name}", value, done)

    def _show(self, done: int) -> None:
        between = " " if self._progress is None else "\u00a0"  # a terminal wraps between losses, not inside
        losses = "  ".join(f"{name}{between}{value:.3f}" for name, value in self._losses.items())
        speed = f"{self._speed:.0f} samples/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, losses=losses, speed=speed)
            return
        now = time.perf_counter()
        if now - self._last_line >= self._seconds_between_lines or done == self.total:
            self._last_line = now
            left = (now - self.started) / (done - self.first) * (self.total - done)
            self.say(f"step {done}/{self.total}  {losses}  {speed}  {_clock(left)} left")


def _mean(values: list[float]) -> float | None:
    """None where there is nothing to average, or no number comes of it: JSON knows no NaN."""
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None


def _means(parts: list[dict[str, float]]) -> dict[str, float | None]:
    return {name: _mean([p[name] for p in parts if name in p]) for name in dict.fromkeys(n for p in parts for n in p)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _progress_bar(first: int, total: int, out: TextIO) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class TwoLines(Progress):
        """How far it is and what is left, and below it the losses: a terminal of 80 columns does not hold both."""

        def get_renderables(self) -> Iterable[Any]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                yield Text(task.fields["losses"])

    columns = (TextColumn("{task.fields[speed]}"), TimeRemainingColumn(elapsed_when_finished=True))
    progress = TwoLines(BarColumn(bar_width=20), MofNCompleteColumn(), *columns, console=Console(file=out))
    progress.start()
    return progress, progress.add_task("", total=total, completed=first, losses="", speed="")


def _tensorboard(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TriviumError(
            "TensorBoard is not installed: pip install 'trivium[track]', or leave out --train.tensorboard"
        ) from None
    return SummaryWriter(str(folder), purge_step=first + 1)
