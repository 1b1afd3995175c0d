"""Training steps on a GPU: against the peer, against the speed of a matrix product, and without each trick.

    PYTHONPATH=src python benchmarks/gpu.py              # base size, under 10 minutes; needs torch and transformers
    PYTHONPATH=src python benchmarks/gpu.py --size tiny  # two minutes, on a CPU too: to see that it runs
    ... --rows 'flava/*/compiled' clip                   # only rows whose name begins so or fits
    ... --profile flava/multimodal/as_used/compiled      # where our step of that row spends its time

Same weights, batches, optimizer and precision (bf16 autocast) on both sides, whose losses agree to 1e-5 in float32, or
nothing is timed. Inputs: `as_used` and `equal`, see flava_step.py; text alone is running text of full length. Both
sides are timed in turns: eager; compiled, ours and the peer block by block; ours alone with more rows than the peer has
room for; and last the peer compiled as a whole.

MFU is useful FLOPs (trivium/methods/flops.py: the same for both sides) a second over those of the fastest matrix
product measured here. Memory is the peak of a forward and backward above weights, gradients and optimizer state. The
ladder takes one trick away at a time: its factor is the time without it over the time with all.

Rows go from the most to the least wanted, each in its time; all of them together may take longer than --minutes. What
does not fit, or fails, is named as not measured; results are written after each.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # what is imported below takes its share of the minutes

# ruff: noqa: E402
import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar
from unittest import mock

import albef_step
import clip_step
import flava_pair
import side_by_side
import torch
from gpu_report import Report, free_memory, line_of, print_table, sentence
from step_pair import Trick
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from trivium.train import precision
from trivium.train.budget import is_out_of_memory
from trivium.train.compilation import compile_blocks
from trivium.train.step import Context

# A family joins by a line here and its rows below: a module with Pair, ROWS (of each modality's step) and COMPARED.
FAMILIES: dict[str, ModuleType] = {"flava": flava_pair, "clip": clip_step, "albef": albef_step}

VARIANTS: dict[str, Context] = {
    "eager": lambda: torch.compiler.set_stance("force_eager"),
    "compiled": nullcontext,
    "ours alone": nullcontext,  # compiled
    "peer as a whole": nullcontext,
}
TURNS, STEPS = (3, 8) if torch.cuda.is_available() else (1, 2)  # turns of each side, and timed steps of a turn
FEW_ROWS = 4  # where there is no GPU to fill, and for comparing losses
LADDER = "ladder"  # stands in a row's name where a variant does

T = TypeVar("T")
Kind = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Row:
    """One section of the benchmark: a line of the table, or a ladder."""

    family: str
    modality: str
    inputs: str
    variant: str
    seconds: float  # at most

    @property
    def name(self) -> str:
        return f"{self.family}/{self.modality}/{self.inputs}/{self.variant}"

    def is_asked_for(self, patterns: list[str]) -> bool:
        return not patterns or any(fnmatchcase(self.name, each) or self.name.startswith(each) for each in patterns)


PLAN = (
    Row("flava", "multimodal", "as_used", "eager", 60),
    Row("flava", "multimodal", "as_used", "compiled", 130),
    Row("flava", "multimodal", "as_used", "ours alone", 45),
    Row("flava", "image", "as_used", "eager", 25),
    Row("flava", "text", "as_used", "eager", 25),
    Row("flava", "multimodal", "equal", LADDER, 30),
    Row("clip", "pairs", "as_used", "eager", 25),
    Row("albef", "pairs", "equal", "eager", 30),
    Row("flava", "image", "as_used", "compiled", 45),
    Row("flava", "text", "as_used", "compiled", 60),
    Row("clip", "pairs", "as_used", "compiled", 70),
    Row("albef", "pairs", "equal", "compiled", 90),
    Row("flava", "multimodal", "equal", "eager", 25),
    Row("flava", "multimodal", "equal", "compiled", 60),
    Row("flava", "image", "equal", LADDER, 30),
    Row("flava", "multimodal", "as_used", "peer as a whole", 240),
)


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


def in_turns(*steps: Callable[[], object], turns: int = TURNS) -> list[list[float]]:
    """Seconds of timed steps of each; in every turn one more goes before, which allocates."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(turns):
        for step, found in zip(steps, times, strict=True):
            free_memory()  # what the other side keeps cached is too much beside this one
            side_by_side.seconds(step)
            found += [side_by_side.seconds(step) for _ in range(STEPS)]
    return times


# ------------------------------------------------------------------------------------------------------ the figures


def matrix_products(report: Report, device: torch.device, dtype: torch.dtype) -> None:
    """Squares, and the products of a feed-forward at base size, forward and backward. Drawn numbers: zeros would need
    less power, and a GPU then runs faster."""
    shapes = [(side, side, side) for side in ((4096, 8192, 16384) if device.type == "cuda" else (256, 512))]
    if device.type == "cuda":
        tokens = 256 * 197
        shapes += [(tokens, 768, 3072), (tokens, 3072, 768), (3072, tokens, 768)]
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


class Bench:
    """The pairs of all families, made when first asked for, and what is measured of them."""

    def __init__(
        self, report: Report, size: str, device: torch.device, kind: Kind, backend: str, dynamic: bool | None = None
    ) -> None:
        self.report, self.size, self.device, self.kind = report, size, device, kind
        self.backend, self.dynamic = backend, dynamic
        self.pairs: dict[str, Any] = {}

    def pair(self, name: str) -> Any:
        """Made, compared and set to be compiled; None where that failed before."""
        if name not in self.pairs:
            self.report.section(f"{name}: losses", 60, partial(self._prepare, name))
            self.pairs.setdefault(name, None)
        return self.pairs[name]

    def _prepare(self, name: str) -> None:
        family = FAMILIES[name]
        pair = family.Pair(self.size, lambda: precision.autocast(self.device, self.kind), self.device)
        for modality in family.ROWS:
            for inputs in family.COMPARED:
                pair.same_losses(*pair.case(modality, FEW_ROWS, inputs))
        pair.ready(self.kind)
        for side in pair.blocks():
            compile_blocks(side, self.backend, self.dynamic)
        self.pairs[name] = pair

    def rows(self, row: Row) -> int:
        if self.device.type != "cuda":
            return FEW_ROWS
        rows: int = FAMILIES[row.family].ROWS[row.modality]
        rows *= 1 + (torch.cuda.get_device_properties(self.device).total_memory > 120e9)
        return 2 * rows if row.variant == "ours alone" else rows

    def measure(self, row: Row) -> None:
        pair = self.pair(row.family)
        if pair is None:
            self.report.not_measured[row.name] = f"{row.family}: losses were not compared"
        elif row.variant == LADDER:
            fewer = max(1, self.rows(row) // 2)  # a step without a trick may need more memory
            self.report.section(row.name, row.seconds, lambda: self.climb(row, pair, fewer))
        else:
            self.report.section(row.name, row.seconds, lambda: self.compare(row, pair))

    def compare(self, row: Row, pair: Any) -> None:
        """One line of the table."""
        if row.variant == "peer as a whole":
            pair.peer.compile(backend=self.backend)
        found = with_fewer_rows(self.rows(row), lambda rows: figures(pair, rows, row))
        for side in ("ours", "peer"):
            if side in found and self.report.ceiling is not None:
                found[f"{side}_mfu"] = found["flops"] / found[side] / self.report.ceiling
        self.report.rows[row.name] = found
        print("  " + line_of(row.name, found), flush=True)

    def climb(self, row: Row, pair: Any, rows: int) -> None:
        """The ladder: what an eager step takes without each trick, or with another kernel of attention."""

        def rung(rows: int, name: str, trick: Trick) -> dict[str, float]:
            whole = partial(pair.step, pair.case(row.modality, rows, trick.whole or row.inputs)[0])
            patched = partial(pair.step, pair.case(row.modality, rows, trick.inputs)[0])
            lacking = partial(side_by_side.under, trick.without, patched)
            with VARIANTS["eager"]():
                return side_by_side.ladder(whole, {name: lacking}, timed=partial(in_turns, turns=min(2, TURNS)))

        tricks: dict[str, Trick] = dict(FAMILIES[row.family].WITHOUT)
        tricks["products in bfloat16"] = Trick(lambda: mock.patch.object(pair, "autocast", nullcontext), row.inputs)
        if self.device.type == "cuda":
            tricks["the choice of attention, cuDNN first"] = Trick(cudnn_first, row.inputs)
        rungs = self.report.ladder.setdefault(f"{row.family}/{row.modality}", {})
        for name, trick in tricks.items():
            if trick.touches(row.modality) and (self.device.type == "cpu" or name != flava_pair.PADS):
                rungs |= with_fewer_rows(rows, partial(rung, name=name, trick=trick))


def cudnn_first() -> Any:
    """Attention by cuDNN where it can."""
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels, set_priority=True)


def figures(pair: Any, rows: int, row: Row) -> dict[str, Any]:
    ours, theirs = pair.case(row.modality, rows, row.inputs)
    if torch.cuda.is_available():
        ours = ours.pin_memory()  # as the loader does
    cases = {"ours": ours, "peer": theirs}
    steps: dict[str, Callable[[], object]] = {"ours": partial(pair.step, ours), "peer": partial(pair.peer_step, theirs)}
    if row.variant == "ours alone":
        del steps["peer"]
    found: dict[str, Any] = {"rows": rows, "flops": pair.flops(ours)}
    with VARIANTS[row.variant]():
        for side in tuple(steps):
            try:
                found[f"{side}_first_step"] = side_by_side.seconds(steps[side])  # with what is compiled
                steps[side]()  # shapes that differ from it are compiled now
            except Exception as error:
                if is_out_of_memory(error) or side == "ours":
                    raise
                del steps[side]
                found["peer_failed"] = sentence(error)
        graphs = counters["stats"]["unique_graphs"]
        times = dict(zip(steps, in_turns(*steps.values()), strict=True))
        found["compiled_while_timed"] = counters["stats"]["unique_graphs"] - graphs
        memory = {side: pair.memory(cases[side]) for side in steps}
    if "peer" in times:
        return found | side_by_side.row(times["ours"], times["peer"], (memory["ours"], memory["peer"]))
    alone = {"ours": statistics.median(times["ours"]), "ours_min": min(times["ours"]), "rounds": len(times["ours"])}
    return found | alone | {"ours_bytes": memory["ours"]}


# ------------------------------------------------------------------------------------------------------ the profile


def profile(bench: Bench, row: Row) -> None:
    """Where our step of a row spends the device's time: kernels by their share, and how long the device waits."""
    pair = bench.pair(row.family)
    if pair is None:
        sys.exit("the losses of both sides could not be compared")
    ours = pair.case(row.modality, bench.rows(row), row.inputs)[0]
    if bench.device.type == "cuda":
        ours = ours.pin_memory()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with VARIANTS[row.variant]():
        for _ in range(3):
            pair.step(ours)
        wall = min(side_by_side.seconds(partial(pair.step, ours)) for _ in range(3))
        with torch.profiler.profile(activities=activities) as trace:
            side_by_side.seconds(partial(pair.step, ours))
    on_gpu = bench.device.type == "cuda"
    events = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in trace.key_averages()
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu and not event.is_user_annotation
    ]
    busy = sum(microseconds for _, microseconds, _ in events) / 1e6
    share = pair.flops(ours) / wall / bench.report.ceiling if bench.report.ceiling else 0.0
    print(f"{row.name}: {len(ours)} rows, {1e3 * wall:.1f} ms a step, MFU {share:.1%}, kernels {1e3 * busy:.1f} ms")
    for key, microseconds, count in sorted(events, key=lambda event: -event[1])[:45]:
        print(f"{microseconds / 1e3:>9.2f} ms {microseconds / 1e6 / busy:>6.1%} {count:>6}  {key[:150]}")
    if on_gpu:
        waits = [event for event in trace.key_averages() if "ynchronize" in event.key or "Memcpy" in event.key]
        for event in waits:
            print(f"{event.key}: {event.count} times, {event.self_cpu_time_total / 1e3:.2f} ms of the host")


# --------------------------------------------------------------------------------------------------------- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--minutes", type=float, default=9.5, help="of all sections together, imports included")
    parser.add_argument("--rows", nargs="*", default=[], help="which, by pattern or beginning of their names")
    parser.add_argument("--static", action="store_true", help="compile each size anew, instead of for all sizes")
    parser.add_argument("--profile", help="name of a row; nothing else is measured")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of gpu.json, or gpu_rows.json; without it base on a GPU alone is kept",
    )
    arguments = parser.parse_args()
    device = precision.choose_device("auto")
    kind: Kind = "bf16" if device.type == "cuda" else precision.choose("auto", device)
    backend = "eager" if arguments.size == "tiny" else "inductor"  # generating code takes minutes, tracing seconds
    command = f"python benchmarks/gpu.py --size {arguments.size} --minutes {arguments.minutes:g}"
    plan = [row for row in PLAN if row.is_asked_for(arguments.rows)]
    if not plan:
        parser.error(f"no such row; there are {', '.join(row.name for row in PLAN)}")

    def write(report: Report) -> None:
        if arguments.profile or (arguments.out is None and (arguments.size != "base" or device.type != "cuda")):
            return
        side_by_side.write(
            "gpu_rows" if arguments.rows else "gpu",  # a few rows leave the table of all as it is
            report.rows,
            command=" ".join([command, *(["--rows", *arguments.rows] if arguments.rows else [])]),
            folder=arguments.out or side_by_side.RESULTS,
            ladder=report.ladder,
            matmul=report.matmul,
            not_measured=report.not_measured,
            precision=kind,
            compiler=backend,
            sizes="one by one" if arguments.static else "varying",
        )

    report = Report(arguments.minutes, write, STARTED)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    report.section("matrix products", 30, lambda: matrix_products(report, device, dtype))
    bench = Bench(report, arguments.size, device, kind, backend, False if arguments.static else None)
    if arguments.profile:
        named = [row for row in PLAN if row.name == arguments.profile]
        if not named:
            parser.error(f"no row {arguments.profile}; there are {', '.join(row.name for row in PLAN)}")
        profile(bench, named[0])
        return
    for row in plan:
        bench.measure(row)
    print_table(report, device, kind, PLAN[0].name.removesuffix(PLAN[0].variant))
    if not report.rows:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
