"""What this machine has, what it lacks for Trivium, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

GIB = 2**30
EXTRAS = {  # extra -> (package that it brings, what it is for)
    "track": ("tensorboard", "curves of a run in TensorBoard"),
    "hub": ("huggingface_hub", "fetching published weights"),
    "remote": ("fsspec", "tar shards at an address"),
    "vision": ("h5py", "the files of Patch Camelyon"),
    "scale": ("ray", "packing data on a Ray cluster"),
}


@dataclass
class Report:
    python: str
    torch: str
    system: str
    cpu: str
    cpu_class: str  # "AMX", "AVX512", "AVX2" or "other"
    cores: int  # that this process may use
    threads: int  # that torch uses
    device: str
    device_name: str
    gflops: dict[str, float]  # of a matrix product, by precision
    precision: str  # what `auto` takes here
    memory_gib: float | None  # that this process may use
    device_memory_gib: float | None
    disk_free_gib: float  # where runs are written: the current folder
    torchvision: str  # "absent", "works", or the error of its import
    simplejpeg: bool
    extras: dict[str, bool]
    advice: list[str] = field(default_factory=list)  # one sentence each


def examine() -> Report:
    """Look at the machine; about three seconds, most of them spent on importing and timing."""
    import torch

    from trivium.train import precision
    from trivium.train.run_folder import machine

    device = precision.choose_device("auto")
    seen = machine()
    gflops = precision.measure_matmul(device)
    on_gpu = device.type == "cuda"
    report = Report(
        python=platform.python_version(),
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
        cpu=seen["cpu"],
        cpu_class=seen["class"],
        cores=seen["cores"],
        threads=seen["threads"],
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if on_gpu else seen["cpu"],
        gflops={name: round(value, 1) for name, value in gflops.items()},
        precision="bf16" if gflops["bfloat16"] > gflops["float32"] else "fp32",
        memory_gib=usable_memory(),
        device_memory_gib=round(torch.cuda.get_device_properties(device).total_memory / GIB, 1) if on_gpu else None,
        disk_free_gib=round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        torchvision=state_of_import("torchvision"),
        simplejpeg=util.find_spec("simplejpeg") is not None,
        extras={extra: util.find_spec(package) is not None for extra, (package, _) in EXTRAS.items()},
    )
    report.advice = advise(report)
    return report


def advise(report: Report) -> list[str]:
    """What to do, one sentence each, the most pressing first."""
    advice = []
    if report.torchvision not in ("absent", "works"):
        advice.append(
            f"torchvision is installed but does not import ({report.torchvision}); Trivium does not use it, but "
            "transformers then fails too: pip uninstall torchvision"
        )
    if report.disk_free_gib < 5:
        advice.append(f"only {report.disk_free_gib} GiB are free here: a checkpoint of a base model takes 4 GiB")
    if report.memory_gib is not None and report.memory_gib < 4:
        advice.append(f"{report.memory_gib} GiB of memory suffice for the size tiny alone, with a smaller --data.batch")
    if report.device == "cpu":
        if shutil.which("nvidia-smi") is not None:
            advice.append("there is an NVIDIA driver, but this torch does not see a GPU: install a CUDA build of torch")
        else:
            advice.append("there is no GPU: the size tiny trains here in minutes; small and base are for a GPU")
    if report.threads > report.cores:
        advice.append(
            f"torch uses {report.threads} threads on {report.cores} cores: set OMP_NUM_THREADS={report.cores}"
        )
    if report.gflops["bfloat16"] < report.gflops["float32"] / 4:
        advice.append("bf16 is emulated here and many times slower than fp32: leave the precision at auto")
    if not report.simplejpeg:
        advice.append("simplejpeg is missing, so JPEG decodes at half the speed: pip install simplejpeg")
    for extra, there in report.extras.items():
        if not there:
            advice.append(f"for {EXTRAS[extra][1]}: pip install 'trivium[{extra}]'")
    return advice


def state_of_import(module: str) -> str:
    """Import it in a process of its own, since a broken one leaves others broken behind it."""
    if util.find_spec(module) is None:
        return "absent"
    try:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "its import does not end"
    return "works" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashes"])[-1]


def usable_memory() -> float | None:
    """GiB of memory, or of the container's limit where that is smaller. None where it cannot be told."""
    sizes = []
    try:
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError, AttributeError):  # no such call here, no such file, or "max"
        pass
    return round(min(sizes) / GIB, 1) if sizes else None
