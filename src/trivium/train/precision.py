"""Precision is measured, not assumed.

On a processor without AMX or AVX512-BF16 a product in bfloat16 is emulated: measured on an AVX2 machine, 1 GFLOP/s
against 141 GFLOP/s in float32. With AMX the product is the faster one, and a step of a narrow model the slower one all
the same: at width 128 its casts and the backward of attention over 17 positions take twice the time of the whole step
in float32. So ``auto`` times a product in both and, where bfloat16 wins on a CPU, a step of the run itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.errors import TriviumError

Precision = Literal["auto", "fp32", "bf16"]
# With these in the environment a processor of a newer class works as one with AVX2 alone: what oneDNN, torch and MKL
# obey (the latter on Intel's; on AMD's its products are made with AVX2 anyway). Results then say so.
HELD_TO_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def measure_matmul(device: torch.device | str, seconds: float = 0.1) -> dict[str, float]:
    """GFLOP/s of a square product in float32 and bfloat16; about twice `seconds` in all. 0.0 where it cannot run."""
    return {
        name: _gigaflops(torch.device(device), dtype, seconds)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }


def ceiling(layout: Mapping[str, Any]) -> float | None:
    """FLOP/s of a square product on a GPU in the run's precision, what `mfu` is a share of; None on a CPU.

    layout: "device" and "precision" of the run.
    """
    if layout["device"] == "cpu":
        return None
    speed = measure_matmul(layout["device"])
    return 1e9 * speed["bfloat16" if layout["precision"] == "bf16" else "float32"]


def _gigaflops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Grow the product until one takes a millisecond, so that a fast device is not timed at launching kernels.

    A busy machine may take a millisecond for any product, so none below 512 counts, and the best of five does.
    """
    size = 512
    try:
        while True:
            left, right = torch.ones(2, size, size, device=device, dtype=dtype)
            _timed(left, right, device)  # warm-up: threads, kernels, caches
            once = _timed(left, right, device)
            if once > 1e-3 or size >= 8192:
                break
            size *= 2
    except RuntimeError:  # this device has no such product
        return 0.0
    times = [once]
    while len(times) < 5 or (sum(times) < seconds and len(times) < 50):
        times.append(_timed(left, right, device))
    return 2 * size**3 / min(times) / 1e9


def _timed(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> float:
    begin = time.perf_counter()
    (left @ right)[0, 0].item()  # item waits for the device
    return time.perf_counter() - begin


@cache
def choose(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What to train in: "auto" takes bfloat16 where its product is the faster."""
    if precision != "auto":
        return precision
    speed = measure_matmul(device)
    return "bf16" if speed["bfloat16"] > speed["float32"] else "fp32"


def faster(one_step: Callable[[Literal["fp32", "bf16"]], object]) -> Literal["fp32", "bf16"]:
    """The precision in which a step takes less time: the better of two, after one that is not counted.

    Where one of the first steps takes over five seconds the first of each must do.
    """

    def timed(precision: Literal["fp32", "bf16"]) -> float:
        begin = time.perf_counter()
        one_step(precision)
        return time.perf_counter() - begin

    fp32, bf16 = timed("fp32"), timed("bf16")
    if max(fp32, bf16) < 5:
        fp32, bf16 = min(timed("fp32"), timed("fp32")), min(timed("bf16"), timed("bf16"))
    return "bf16" if bf16 < fp32 else "fp32"


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> AbstractContextManager:
    """Context for forwards: products in bfloat16, weights, norms and losses in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def choose_device(name: str) -> torch.device:
    """ "auto" takes a CUDA GPU where there is one, else the CPU: Apple's GPU lacks the float64 that sums are kept in.
    Raises TriviumError where this machine lacks what was named."""
    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise TriviumError(f"--train.device {name} cannot be used here ({reason}): use auto or cpu") from error
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def cpu_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """ "AMX", "AVX512" or "AVX2", by the widest unit that the processor has; "other" where it cannot be told."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return "other"
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    known = {"amx_tile": "AMX", "avx512f": "AVX512", "avx2": "AVX2"}
    return next((name for flag, name in known.items() if flag in flags), "other")


def worked_as() -> dict[str, str]:
    """The class that the processor works as, and the one that it is ("held on") where the environment holds the
    libraries of torch to AVX2."""
    own = cpu_class()
    held = own != "AVX2" and all(os.environ.get(name) == value for name, value in HELD_TO_AVX2.items())
    return {"class": "AVX2", "held on": own} if held else {"class": own}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
