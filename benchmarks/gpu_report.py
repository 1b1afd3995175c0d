"""What benchmarks/gpu.py found: sections that each have their time, and the table that is printed in the end."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from trivium.train import precision

FLOORS = {"ratio": 2.5, "mfu": 0.40}  # of the first row's inputs, on an H100 or H200


class TimeIsUp(BaseException):
    """Not an Exception: a compiler that catches those must not catch this."""


class Report:
    """What was measured. Sections follow each other, each in its own time, and what they found is written at once."""

    def __init__(self, minutes: float, write: Callable[[Report], None], started: float | None = None) -> None:
        self.ends = (time.monotonic() if started is None else started) + 60 * minutes
        self._write = write
        self.matmul: dict[str, float] = {}  # shape -> FLOP/s
        self.rows: dict[str, dict[str, Any]] = {}  # family/modality/inputs/variant -> figures
        self.ladder: dict[str, dict[str, float]] = {}  # family/modality -> trick -> factor
        self.not_measured: dict[str, str] = {}  # section -> why

    @property
    def ceiling(self) -> float | None:
        return max(self.matmul.values(), default=None)

    def section(self, name: str, seconds: float, measure: Callable[[], None]) -> bool:
        """Whether it was measured to its end; if not, what it found before stands in the report all the same."""
        seconds = min(seconds, self.ends - time.monotonic())
        print(f"{name} (at most {max(0.0, seconds):.0f} s)", flush=True)
        began = time.monotonic()
        try:
            if seconds <= 0:
                raise TimeIsUp("no time was left")
            with alarm(seconds):
                measure()
        except TimeIsUp as error:
            self.not_measured[name] = str(error)
        except Exception as error:
            self.not_measured[name] = sentence(error)
        if name in self.not_measured:
            print(f"  not measured: {self.not_measured[name]}", flush=True)
        else:
            print(f"  took {time.monotonic() - began:.1f} s", flush=True)
        free_memory()
        self._write(self)
        return name not in self.not_measured


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line_of(name: str, row: dict[str, Any]) -> str:
    def figure(key: str, factor: float = 1.0, digits: int = 1) -> str:
        return f"{row[key] * factor:.{digits}f}" if key in row else "-"

    rows, teraflops = row["rows"], row["flops"] / 1e12
    cells = [
        *(str(rows), figure("ours", 1e3), figure("peer", 1e3), figure("ratio", 1, 2)),
        *(f"{rows / row['ours']:.0f}", f"{teraflops / row['ours']:.4g}"),
        *(figure("ours_mfu", 100), figure("peer_mfu", 100)),
        *(figure("ours_bytes", 1e-6 / rows), figure("peer_bytes", 1e-6 / rows)),
    ]
    return f"{name:<46}" + "".join(f"{cell:>10}" for cell in cells)


HEADINGS = ("rows", "ours ms", "peer ms", "ratio", "ours /s", "TFLOP/s", "MFU %", "peer %", "MB/row", "peer MB")


def print_table(report: Report, device: torch.device, kind: str, floors: str) -> None:
    """floors: what the names of the rows begin with that stand beside these on a GPU."""
    on_gpu = device.type == "cuda"
    print()
    print(f"device: {torch.cuda.get_device_name(device) if on_gpu else precision.cpu_name()}, {kind} products")
    if not on_gpu:
        print("THE DEVICE IS A CPU: none of these figures says anything about a GPU")
    if report.ceiling is not None:
        print(f"fastest matrix product: {report.ceiling / 1e12:.4g} TFLOP/s")
    print(f"{'':<46}" + "".join(f"{heading:>10}" for heading in HEADINGS))
    for name, row in report.rows.items():
        print(line_of(name, row))
        if "peer_failed" in row:
            print(f"    peer failed: {row['peer_failed']}")
    for name, rungs in report.ladder.items():
        print(f"\ntime without / with, {name}")
        for trick, factor in rungs.items():
            print(f"  {trick:<50}{factor:>8.3f}")
    if on_gpu:
        print_floors(report, floors)
    for name, why in report.not_measured.items():
        print(f"not measured to its end: {name}: {why}")


def print_floors(report: Report, prefix: str) -> None:
    """Both figures of each row as its own: the setting with the best of one need not have the best of the other."""
    for name, row in report.rows.items():
        if name.startswith(prefix):
            ratio = f"{row['ratio']:.2f} times the peer" if "ratio" in row else "no peer"
            used = f"MFU {row['ours_mfu']:.1%}" if "ours_mfu" in row else "no MFU"
            print(f"{name}: {ratio} (floor {FLOORS['ratio']:g}), {used} (floor {FLOORS['mfu']:.0%})")
