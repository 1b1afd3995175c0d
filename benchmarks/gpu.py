"""Training steps on a GPU: against the peer, against the speed of a matrix product, and without each trick.

    PYTHONPATH=src python benchmarks/gpu.py              # base size, under 10 minutes; needs torch and transformers
    PYTHONPATH=src python benchmarks/gpu.py --size tiny  # a minute, on a CPU too: to see that it runs

Same weights, batches, optimizer and precision (bf16 autocast) on both sides, whose losses agree to 1e-5 in float32, or
nothing is timed. Inputs: `as_used` and `equal`, see flava_step.py; text alone is running text of full length. Both
sides are timed in turns, eager and compiled: ours and the peer block by block, and last the peer as a whole.

MFU is useful FLOPs (trivium/methods/flava_flops.py: the same for both sides) a second over those of the fastest matrix
product measured here. Memory is the peak of a forward and backward above weights, gradients and optimizer state. The
ladder takes one trick away at a time: its factor is the time without it over the time with all.

Each section has its time. What does not fit, or fails, is named as not measured; results are written after each.
"""

from __future__ import annotations

import argparse
import gc
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Literal, TypeVar
from unittest import mock

import flava_pair
import side_by_side
import torch
from torch._dynamo.utils import counters

from trivium.train import precision
from trivium.train.budget import is_out_of_memory
from trivium.train.compilation import compile_blocks
from trivium.train.step import Context

# CLIP and ALBEF join by a line: a module with Pair, ROWS (of each modality's step) and WITHOUT (the ladder).
FAMILIES: dict[str, ModuleType] = {"flava": flava_pair}

VARIANTS: dict[str, Context] = {
    "eager": lambda: torch.compiler.set_stance("force_eager"),
    "compiled": nullcontext,
    "peer as a whole": nullcontext,
}
TURNS, STEPS = (3, 4) if torch.cuda.is_available() else (1, 2)  # turns of each side, and timed steps of a turn
FEW_ROWS = 4  # where there is no GPU to fill, and for comparing losses
FLOORS = {"ratio": 2.5, "mfu": 0.40}  # of the first modality as used, on an H100 or H200

T = TypeVar("T")
Kind = Literal["fp32", "bf16"]


class TimeIsUp(BaseException):
    """Not an Exception: a compiler that catches those must not catch this."""


class Report:
    """What was measured. Sections follow each other, each in its own time, and what they found is written at once."""

    def __init__(self, minutes: float, write: Callable[[Report], None]) -> None:
        self.ends = time.monotonic() + 60 * minutes
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


def with_fewer_rows(rows: int, measure: Callable[[int], T]) -> T:
    """What `measure` finds with so many rows, or with half as many as often as memory runs out."""
    while True:
        try:
            return measure(rows)
        except Exception as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        free_memory()  # the error is gone, and with it what its frames held
        print(f"  out of memory with {rows} rows: trying {rows // 2}", flush=True)
        rows //= 2


def in_turns(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of timed steps of each; in every turn one more goes before, which allocates."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            free_memory()  # what the other side keeps cached is too much beside this one
            side_by_side.seconds(step)
            times[name] += [side_by_side.seconds(step) for _ in range(STEPS)]
    return times


# ------------------------------------------------------------------------------------------------------ the figures


def matrix_products(report: Report, device: torch.device, dtype: torch.dtype) -> None:
    """Squares, and the first feed-forward product of a step at base size. Drawn numbers: zeros would need less power,
    and a GPU then runs faster."""
    shapes = [(side, side, side) for side in ((4096, 8192, 16384) if device.type == "cuda" else (256, 512))]
    if device.type == "cuda":
        shapes.append((192 * 197, 768, 3072))
    for m, k, n in shapes:
        left = torch.randn(m, k, device=device, dtype=dtype)
        right = torch.randn(k, n, device=device, dtype=dtype)
        out = left @ right

        def ten(left: torch.Tensor = left, right: torch.Tensor = right, out: torch.Tensor = out) -> None:
            for _ in range(10):
                torch.mm(left, right, out=out)

        side_by_side.seconds(ten)
        best = min(side_by_side.seconds(ten) for _ in range(5))
        report.matmul[f"{m} x {k} x {n}"] = 10 * 2 * m * k * n / best
    print("  " + ", ".join(f"{name}: {rate / 1e12:.4g} TFLOP/s" for name, rate in report.matmul.items()), flush=True)


def same_losses(pair: Any, family: ModuleType) -> None:
    for modality in family.ROWS:
        for inputs in ("equal", "online"):
            pair.same_losses(*pair.case(modality, FEW_ROWS, inputs))


def compare(report: Report, name: str, pair: Any, rows: int, modality: str, inputs: str, variant: str) -> None:
    """One row of the table, under family/modality/inputs/variant."""
    row = with_fewer_rows(rows, lambda rows: figures(pair, rows, modality, inputs, variant))
    for side in ("ours", "peer"):
        if side in row and report.ceiling is not None:
            row[f"{side}_mfu"] = row["flops"] / row[side] / report.ceiling
    report.rows[f"{name}/{modality}/{inputs}/{variant}"] = row
    print("  " + line(f"{name}/{modality}/{inputs}/{variant}", row), flush=True)


def figures(pair: Any, rows: int, modality: str, inputs: str, variant: str) -> dict[str, Any]:
    ours, theirs = pair.case(modality, rows, inputs)
    cases = {"ours": ours, "peer": theirs}
    steps: dict[str, Callable[[], object]] = {"ours": partial(pair.step, ours), "peer": partial(pair.peer_step, theirs)}
    row: dict[str, Any] = {"rows": rows, "flops": pair.flops(ours)}
    with VARIANTS[variant]():
        for side in tuple(steps):
            try:
                row[f"{side}_first_step"] = side_by_side.seconds(steps[side])  # with what is compiled
                steps[side]()  # shapes that differ from it are compiled now
            except Exception as error:
                if is_out_of_memory(error) or side == "ours":
                    raise
                del steps[side]
                row["peer_failed"] = sentence(error)
        graphs = counters["stats"]["unique_graphs"]
        times = in_turns(steps)
        row["compiled_while_timed"] = counters["stats"]["unique_graphs"] - graphs
        memory = {side: pair.memory(cases[side]) for side in steps}
    if "peer" in times:
        return row | side_by_side.row(times["ours"], times["peer"], (memory["ours"], memory["peer"]))
    alone = {"ours": statistics.median(times["ours"]), "ours_min": min(times["ours"]), "rounds": len(times["ours"])}
    return row | alone | {"ours_bytes": memory["ours"]}


def climb(report: Report, name: str, pair: Any, family: ModuleType, rows: int, modality: str) -> None:
    """The ladder: what the eager step takes without each trick, and the compiled one without compiling."""
    eager = VARIANTS["eager"]

    def factor(rows: int, usual: Context, without: Context, inputs: str) -> float:
        step = partial(pair.step, pair.case(modality, rows, "equal")[0])
        other = partial(pair.step, pair.case(modality, rows, inputs)[0])

        def step_without() -> None:
            with without():
                other()

        with usual():
            times = in_turns({"with": step, "without": step_without})
        return statistics.median(times["without"]) / statistics.median(times["with"])

    tricks = {trick: (eager, without, inputs) for trick, (without, inputs) in family.WITHOUT.items()}
    tricks["products in bfloat16"] = (eager, lambda: mock.patch.object(pair, "autocast", nullcontext), "equal")
    tricks["blocks compiled"] = (VARIANTS["compiled"], eager, "equal")
    rungs = report.ladder.setdefault(f"{name}/{modality}", {})
    for trick, (usual, without, inputs) in tricks.items():
        rungs[trick] = with_fewer_rows(rows, partial(factor, usual=usual, without=without, inputs=inputs))
        print(f"  {trick}: {rungs[trick]:.3f}", flush=True)


# -------------------------------------------------------------------------------------------------------- the table


def line(name: str, row: dict[str, Any]) -> str:
    def figure(key: str, factor: float = 1.0, digits: int = 1) -> str:
        return f"{row[key] * factor:.{digits}f}" if key in row else "-"

    rows, teraflops = row["rows"], row["flops"] / 1e12
    cells = [
        *(str(rows), figure("ours", 1e3), figure("peer", 1e3), figure("ratio", 1, 2)),
        *(f"{rows / row['ours']:.0f}", f"{teraflops / row['ours']:.4g}"),
        *(figure("ours_mfu", 100), figure("peer_mfu", 100)),
        *(figure("ours_bytes", 1e-6 / rows), figure("peer_bytes", 1e-6 / rows)),
    ]
    return f"{name:<42}" + "".join(f"{cell:>10}" for cell in cells)


HEADINGS = ("rows", "ours ms", "peer ms", "ratio", "ours /s", "TFLOP/s", "MFU %", "peer %", "MB/row", "peer MB")


def print_table(report: Report, device: torch.device, kind: str) -> None:
    on_gpu = device.type == "cuda"
    print()
    print(f"device: {torch.cuda.get_device_name(device) if on_gpu else precision.cpu_name()}, {kind} products")
    if not on_gpu:
        print("THE DEVICE IS A CPU: none of these figures says anything about a GPU")
    if report.ceiling is not None:
        print(f"fastest matrix product: {report.ceiling / 1e12:.4g} TFLOP/s")
    print(f"{'':<42}" + "".join(f"{heading:>10}" for heading in HEADINGS))
    for name, row in report.rows.items():
        print(line(name, row))
        if "peer_failed" in row:
            print(f"    peer failed: {row['peer_failed']}")
    for name, rungs in report.ladder.items():
        print(f"\ntime without / with, {name}")
        for trick, factor in rungs.items():
            print(f"  {trick:<50}{factor:>8.3f}")
    if on_gpu:
        for name, family in FAMILIES.items():
            print_floors(report, f"{name}/{next(iter(family.ROWS))}/as_used/")
    for name, why in report.not_measured.items():
        print(f"not measured to its end: {name}: {why}")


def print_floors(report: Report, prefix: str) -> None:
    found = {name.removeprefix(prefix): row for name, row in report.rows.items() if name.startswith(prefix)}
    for variant, row in found.items():
        if "ratio" in row:
            print(f"{prefix}{variant}: {row['ratio']:.2f} times the peer (floor {FLOORS['ratio']:g})")
    utilisations = [row["ours_mfu"] for row in found.values() if "ours_mfu" in row]
    if utilisations:
        print(f"{prefix}: MFU {max(utilisations):.1%} at best (floor {FLOORS['mfu']:.0%})")


# --------------------------------------------------------------------------------------------------------- the run


def measure_family(report: Report, name: str, size: str, device: torch.device, kind: Kind, backend: str) -> None:
    family = FAMILIES[name]
    made: list[Any] = []

    def prepare() -> None:
        made.append(family.Pair(size, lambda: precision.autocast(device, kind), device))
        same_losses(made[0], family)

    modalities = list(family.ROWS)
    rows = {modality: family.ROWS[modality] if device.type == "cuda" else FEW_ROWS for modality in modalities}
    if not report.section(f"{name}: losses", 60, prepare):
        return
    (pair,) = made
    for side in pair.blocks():
        compile_blocks(side, backend)

    def one(modality: str, inputs: str, variant: str, seconds: float) -> None:
        title = f"{name}: {modality}, {inputs}, {variant}"
        report.section(title, seconds, lambda: compare(report, name, pair, rows[modality], modality, inputs, variant))

    for number, modality in enumerate(modalities):
        one(modality, "as_used", "eager", 45)
        one(modality, "as_used", "compiled", 70 if number else 130)
    one(modalities[0], "equal", "eager", 40)
    one(modalities[0], "equal", "compiled", 60)
    for modality in modalities[:2]:  # half the rows: a step without a trick may need more memory
        fewer = max(1, rows[modality] // 2)
        title = f"{name}: ladder, {modality}"
        report.section(title, 60, partial(climb, report, name, pair, family, fewer, modality))
    pair.peer.compile(backend=backend)
    one(modalities[0], "as_used", "peer as a whole", 240)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--minutes", type=float, default=9.0, help="of all sections together")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; without it base on a GPU alone is kept")
    arguments = parser.parse_args()
    device = precision.choose_device("auto")
    kind: Kind = "bf16" if device.type == "cuda" else precision.choose("auto", device)
    backend = "eager" if arguments.size == "tiny" else "inductor"  # generating code takes minutes, tracing seconds
    command = f"python benchmarks/gpu.py --size {arguments.size} --minutes {arguments.minutes:g}"

    def write(report: Report) -> None:
        if arguments.out is None and (arguments.size != "base" or device.type != "cuda"):
            return
        side_by_side.write(
            "gpu",
            report.rows,
            command=command,
            folder=arguments.out or side_by_side.RESULTS,
            ladder=report.ladder,
            matmul=report.matmul,
            not_measured=report.not_measured,
            precision=kind,
            compiler=backend,
        )

    report = Report(arguments.minutes, write)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    report.section("matrix products", 30, lambda: matrix_products(report, device, dtype))
    for name in FAMILIES:
        measure_family(report, name, arguments.size, device, kind, backend)
    print_table(report, device, kind)
    if not report.rows:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
