"""The run folder: config.json, passport.json, metrics.jsonl, skipped.jsonl, monitors.jsonl, and checkpoints/ below.

The passport says what made the run: the configuration's digest, versions, machine, command and date, and one more
entry for each time that it was resumed. One run at a time works in a folder: it holds .lock.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trivium import locks
from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, newest_checkpoint, verify_manifest, write_whole
from trivium.train import checkpoint, config, distributed, precision
from trivium.train.config import Config

# Options that a resumed run may change: they alter what is seen or kept, not what is learned.
FREE = (
    *("train.device", "train.workers", "train.threads", "train.compile", "train.tensorboard"),
    *("train.save_every", "train.keep_last", "train.keep_every", "train.log_every", "train.evaluate_every"),
    *("train.monitor_every", "train.bad_rate"),
    "train.shard",
)


class RunFolder:
    """Paths inside a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.monitors = path / "monitors.jsonl"
        self.not_finite = path / "not_finite.jsonl"  # where a run was stopped for its gradients
        self.passport = path / "passport.json"
        self.checkpoints = path / "checkpoints"


def refuse_a_run(path: Path) -> None:
    """Raises TriviumError where a run stands in a folder already; ask before anything costly is begun."""
    folder = RunFolder(path)
    if checkpoints_in(folder.checkpoints) or (folder.metrics.exists() and folder.metrics.stat().st_size):
        raise TriviumError(
            f"{path} holds a run already: continue it with `{to_resume(path)}`, or name another folder with --out"
        )


def to_resume(path: Path) -> str:
    """The command that continues a run, whichever verb began it."""
    return shlex.join(["trivium", "pretrain", str(path), "--resume"])


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """While the block lasts, no other run works in this run folder. All processes of this one call it. The folder is
    made where there is none, and goes again where nothing came into it.

    Raises:
        TriviumError: another is at work there.
    """
    lock = path / ".lock"

    def leave() -> None:
        with suppress(OSError):
            if [entry.name for entry in path.iterdir()] == [lock.name]:
                lock.unlink()
                path.rmdir()

    def claim() -> None:
        with suppress(OSError):  # `create` tells of it
            path.mkdir(parents=True, exist_ok=True)
        if claimed.enter_context(locks.held(lock)):
            claimed.callback(leave)
        else:
            raise TriviumError(
                f"{path}: another process is at work on this run: wait for its end, or stop it, and then continue it"
                f" with `{to_resume(path)}`"
            )

    with ExitStack() as claimed:
        distributed.first_process_does(claim)
        yield


def create(path: Path, settings: Config) -> RunFolder:
    """Begin a run in a folder where none stands, or one that ended before it logged or saved anything.

    Raises:
        TriviumError: a run stands there already.
    """
    refuse_a_run(path)
    folder = RunFolder(path)
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        _write_json(folder.passport, {"config_sha256": settings.digest(), **circumstances(), "resumed": []})
        for log in (folder.metrics, folder.skipped, folder.monitors):
            log.write_bytes(b"")
        config.save(settings, path / "config.json")  # last: a folder with a config is a run
    except OSError as error:
        raise TriviumError(f"{path} cannot be made a run folder ({error.strerror}): name another with --out") from error
    return folder


def reopen(path: Path, settings: Config) -> RunFolder:
    """Open the folder of a run that is to be resumed with the same configuration. Options that its config does not name
    are of a later version: they have their defaults from here on, and those of the start no longer act.

    Raises:
        TriviumError: no run stands there, or it was started with other values.
    """
    if not (path / "config.json").is_file():
        raise TriviumError(f"{path} holds no run to resume: leave out --resume to begin one")
    before = config.load(path)
    changed = [
        name for name in sorted(before.values) if name not in FREE and before.values[name] != settings.values.get(name)
    ]
    if changed:
        name = changed[0]
        more = f" (and {len(changed) - 1} more differ)" if len(changed) > 1 else ""
        raise TriviumError(
            f"{path} was started with {name} = {before.values.get(name)}, not {settings.values.get(name)}{more}: "
            "resume it as it was, or begin a new run with --init from its checkpoint"
        )
    return RunFolder(path)


def newest_sound(path: Path, say: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint of a run; None where it ended before its first. All processes call it: the first one
    chooses, since others may see a folder of their own, or what a network still remembers of it.

    Args:
        say: gets a sentence about each damaged one that was passed over.

    Raises:
        TriviumError: there are checkpoints, and every one is damaged; or a process does not find the one chosen.
    """
    folder = RunFolder(path)

    def choose() -> int | None:
        found = newest_checkpoint(folder.checkpoints, say)
        if found is None and checkpoints_in(folder.checkpoints):
            raise TriviumError(
                f"{folder.checkpoints}: every checkpoint is damaged; use another copy, or begin a new run in another"
                " folder"
            )
        return None if found is None else checkpoint.step_of(found)

    def check() -> None:
        if chosen is None or distributed.rank() == 0:
            return
        try:
            verify_manifest(chosen)
        except TriviumError as error:
            raise TriviumError(
                f"the checkpoint that the first process goes on from is not sound here ({error}); put the run folder"
                " where all processes see the same files"
            ) from None

    step = distributed.chosen_by_first(choose)
    chosen = None if step is None else checkpoint.folder_of(folder.checkpoints, step)
    distributed.all_do(check)
    return chosen


def rewind(folder: RunFolder, step: int) -> None:
    """Before resuming after `step` done steps: forget the lines of later steps and remove half-written checkpoints.

    Results of that very step are forgotten too: the trainer evaluates again, since a kill may have come before.
    """
    checkpoint.remove_leftovers(folder.checkpoints)
    for path in (folder.metrics, folder.skipped, folder.monitors):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _belongs_before(line, step)]
        write_whole(path, "".join(line + "\n" for line in kept))
    try:
        passport = json.loads(folder.passport.read_text(encoding="utf-8"))
        passport["resumed"].append({"step": step, **circumstances()})
    except (OSError, ValueError, KeyError, TypeError):
        raise TriviumError(f"{folder.passport}: damaged or missing; put it back or begin a new run") from None
    _write_json(folder.passport, passport)


def _belongs_before(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return entry["step"] < step or (entry["step"] == step and "results" not in entry)
    except (ValueError, KeyError, TypeError):  # a kill cut the line short, or it is damaged
        return False


def circumstances() -> dict[str, Any]:
    """What a run was made with: versions, machine, command, date."""
    return {"versions": versions(), "machine": machine(), "command": shlex.join(sys.argv), "date": _now()}


def versions() -> dict[str, str]:
    from trivium import __version__

    packages = {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")}
    return {"trivium": __version__, "python": platform.python_version(), **packages}


def machine() -> dict[str, Any]:
    """cpu, its class ("AMX", "AVX512", "AVX2"; precision.worked_as), cores that this process may use, threads, GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": precision.cpu_name(),
        **precision.worked_as(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": platform.system(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
