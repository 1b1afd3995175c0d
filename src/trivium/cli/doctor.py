"""``trivium doctor``: what the machine has and what to do."""

from __future__ import annotations

import dataclasses
import json as to_json
import sys


def doctor(*, json: bool = False) -> None:
    """Say what this machine has (torch, device, measured speed, memory, packages) and what to do about it.

    Args:
        json: print the same as JSON, for a program.
    """
    from trivium.doctor import EXTRAS, Report, examine

    report: Report = examine()
    if json:
        print(to_json.dumps(dataclasses.asdict(report), indent=2))
        return
    speed = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in report.gflops.items())
    memory = "unknown" if report.memory_gib is None else f"{report.memory_gib} GiB"
    if report.device_memory_gib is not None:
        memory += f", on the device {report.device_memory_gib} GiB"
    lines = [
        ("system", f"{report.system}, python {report.python}, torch {report.torch}"),
        ("processor", f"{report.cpu} ({report.cpu_class}), {report.cores} cores, {report.threads} threads"),
        ("device", report.device if report.device == "cpu" else f"{report.device}: {report.device_name}"),
        ("speed", f"{speed}; precision auto takes {report.precision}"),
        ("memory", memory),
        ("disk", f"{report.disk_free_gib} GiB free here"),
        ("torchvision", f"{report.torchvision} (not needed)" if report.torchvision == "absent" else report.torchvision),
        ("simplejpeg", "there" if report.simplejpeg else "missing"),
    ]
    lines += [
        (f"extra {extra}", f"{'there' if there else 'missing'}: {EXTRAS[extra][1]}")
        for extra, there in report.extras.items()
    ]
    if not sys.stdout.isatty():
        for name, value in lines:
            print(f"{name}: {value}")
        for sentence in report.advice:
            print(f"advice: {sentence}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in lines:
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    for sentence in report.advice:
        console.print(f"→ {sentence}", markup=False)
