"""``trivium doctor``: what the machine has and what to do; and whether a step means the same at every layout."""

from __future__ import annotations

import dataclasses
import json as to_json
import sys


def doctor(*, json: bool = False, distributed: bool = False) -> int | None:
    """Say what this machine has (torch, device, measured speed, memory, packages) and what to do about it.

    Args:
        json: print the same as JSON, for a program.
        distributed: instead, compare a step on 1, 2 and 4 processes and at several micro-batches: every loss and every
            gradient must agree; about half a minute.

    Returns:
        1 where a layout deviates.
    """
    if distributed:
        return _compare_layouts(json)
    from trivium.doctor import EXTRAS, Report, examine

    report: Report = examine()
    if json:
        print(to_json.dumps(dataclasses.asdict(report), indent=2))
        return None
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
        return None
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
    return None


def _compare_layouts(json: bool) -> int:
    from trivium import invariance

    found = invariance.compare()
    if json:
        print(to_json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        print("processes  micro-batches  dropout  precision  worst deviation of the tensor's norm")
        for each in found:
            layout = each.layout
            print(
                f"{layout.processes:9}  {layout.micro_batches:13}  {layout.dropout:7g}  {layout.precision:9}"
                f"  {each.worst:.1e}{'' if each.within else ' TOO MUCH'}  {each.where}"
            )
        print(invariance.sentence(found))
    return 0 if all(each.within for each in found) else 1
