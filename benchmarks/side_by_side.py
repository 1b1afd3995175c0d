"""How every benchmark here measures: ours and the peer interleaved, A B A B, on an idle machine."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trivium.manifest import write_whole
from trivium.train import config, precision, run_folder

RESULTS = Path(__file__).parent / "results"


def refuse_a_busy_machine(limit: float = 1.0) -> None:
    """A busy neighbour costs a factor of 4 to 6 here: better no figure than a wrong one."""
    load = os.getloadavg()[0]
    print(f"load average {load:.2f}", file=sys.stderr)
    if load > limit:
        sys.exit(f"the machine is busy (load average {load:.2f} > {limit:g}): wait, or stop what runs")


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int | None = None
) -> tuple[list[float], list[float]]:
    """Seconds of each, A B A B after one warm-up: 5 rounds, or 3 where a round takes over 30 seconds."""
    warm = seconds(ours) + seconds(peer)
    rounds = rounds or (3 if warm > 30 else 5)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        times[0].append(seconds(ours))
        times[1].append(seconds(peer))
    return times


TWO_ROUNDS = partial(interleaved, rounds=2)


def ladder(
    whole: Callable[[], object],
    without: Mapping[str, Callable[[], object]],
    of: Callable[[list[float]], float] = statistics.median,
    timed: Callable[[Callable[[], object], Callable[[], object]], Sequence[list[float]]] = TWO_ROUNDS,
) -> dict[str, float]:
    """Factor of each trick: the time without it over the time with all; `of` what `timed` finds of both in turns."""
    rungs = {}
    for trick, lacking in without.items():
        times = timed(whole, lacking)
        rungs[trick] = round(of(times[1]) / of(times[0]), 3)
        print(f"  {trick}: {rungs[trick]}", flush=True)
    return rungs


def under(patch: Callable[[], AbstractContextManager], function: Callable[[], object]) -> None:
    """Call a function while a patch holds, such as one that takes a trick away."""
    with patch():
        function()


class Apart:
    """Something that is built and used in a process of its own, whose memory is its alone; one call after the other.

        ours = Apart(Ours, "base")      # Ours("base"), over there
        ours("step", 3)                 # its step(3); what that returns, or raises

    For sides whose allocators are told different things, or one of which would leave memory for the other to find.
    """

    def __init__(self, build: Callable[..., object], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, build, arguments), daemon=True)
        self._process.start()
        there.close()
        self._answer()

    def __call__(self, name: str, *arguments: Any) -> Any:
        self._here.send((name, arguments))
        return self._answer()

    def end(self) -> None:
        self._here.close()
        self._process.join()

    def _answer(self) -> Any:
        answer = self._here.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(connection: Any, build: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        built: Any = build(*arguments)
        connection.send(None)
    except BaseException as error:
        connection.send(error)
        raise
    while True:
        try:
            name, given = connection.recv()
        except EOFError:
            return
        try:
            connection.send(getattr(built, name)(*given))
        except BaseException as error:
            connection.send(error)
            raise


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that a call needs at its worst, above what is resident before it (Linux; on CUDA torch's own count)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before, but is resident still, would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def is_as(run: Path, recipe: object, *but: str) -> bool:
    """Whether a run that is there was trained as the recipe says, but for some fields; how samples are read is free."""
    values, ours = config.load(run).values, config.leaves(recipe)
    return all(values.get(path) == value for path, value in ours.items() if path not in (*run_folder.FREE, *but))


def row(ours: list[float], peer: list[float], memory: tuple[int, int] | None = None) -> dict[str, Any]:
    """One case of a results file: medians and their ratio, and `least`, that of the fastest: what disturbs a step makes
    it slower, never faster."""
    result: dict[str, Any] = {
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "ratio": statistics.median(peer) / statistics.median(ours),
        "ours_min": min(ours),
        "peer_min": min(peer),
        "least": min(peer) / min(ours),
        "rounds": len(ours),
    }
    if memory is not None:
        result |= {"memory_ratio": memory[0] / memory[1], "ours_bytes": memory[0], "peer_bytes": memory[1]}
    return result


def held_to_avx2() -> bool:
    """Whether a newer processor works as one with AVX2 alone. Raises SystemExit where it is held by half."""
    held = [name for name in precision.HELD_TO_AVX2 if name in os.environ]
    if any(os.environ[name] != precision.HELD_TO_AVX2[name] for name in held) or len(held) not in (
        0,
        len(precision.HELD_TO_AVX2),
    ):
        wanted = " ".join(f"{name}={value}" for name, value in precision.HELD_TO_AVX2.items())
        sys.exit(f"{', '.join(held)} alone, or with other values, makes figures of no class: set {wanted}, or none")
    return "held on" in precision.worked_as()


def typed() -> str:
    """The command of this process, with what the environment holds it to."""
    held = [f"{name}={value}" for name, value in precision.HELD_TO_AVX2.items()] if held_to_avx2() else []
    return " ".join([*held, "python", *sys.argv])


def of_this_class(name: str) -> str:
    """The results file of a step on this class of processor: NAME with AMX, NAME_avx512, NAME_avx2."""
    kind = _class()["class"]
    return name if kind == "AMX" else f"{name}_{kind.lower()}"


def _class() -> dict[str, str]:
    """What the processor works as, and what it is where it is held to less. Raises SystemExit as held_to_avx2."""
    held_to_avx2()
    return precision.worked_as()


def _machine() -> dict[str, Any]:
    return {
        "cpu": precision.cpu_name(),
        **_class(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _versions() -> dict[str, str]:
    return {peer: version(peer) for peer in ("torch", "transformers", "scikit-learn")}


def beside_what_is_there(
    name: str,
    results: dict[str, Any],
    ladder: dict[str, Any],
    *,
    command: str | None = None,
    folder: Path | None = None,
    **same: Any,
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """New cases, and a new ladder where there is one, among those of a results file that this machine measured alike;
    and the commands of all. command: as `write` takes it. same: what else the file must say."""
    command, path = command or typed(), (folder or RESULTS) / f"{name}.json"
    there = json.loads(path.read_text()) if path.is_file() else {}
    if there | {"machine": _machine(), "versions": _versions()} | same != there:
        return results, ladder, command
    old_ladder = there.get("ladder", {})
    if results.keys() >= there["results"].keys() and (ladder or not old_ladder):
        return results, ladder, command  # nothing of what was there is left
    commands = [each for each in there["command"].split(" && ") if each != command]
    return there["results"] | results, ladder or old_ladder, " && ".join([*commands, command])


def write(
    name: str, results: dict[str, Any], *, command: str | None = None, folder: Path | None = None, **more: Any
) -> Path:
    """results/NAME.json with machine, versions and command; `command` where what was typed names this machine's own
    folders. folder: another than results. Whole or not at all: a benchmark that writes as it goes may be cut off at any
    time."""
    document = {
        "machine": _machine(),
        "versions": _versions(),
        "command": command or typed(),
        "results": results,
        **more,
    }
    path = (folder or RESULTS) / f"{name}.json"
    write_whole(path, json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    return path
