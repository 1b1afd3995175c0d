"""kill -9 at 100 instants of a run of 200 steps, 40 of them inside a save: what comes out is what would have come out.

    python benchmarks/kill.py                          # two to five minutes on two cores
    python benchmarks/kill.py --kills 5 --sizes tiny   # to see that it runs: writes nothing
    python benchmarks/kill.py --kills 0                # SIGTERM, lost rank, saving; the kills in the file stay

Each kill is a run of its own (`tiny_run`: AdamW, a queue, an EMA teacher, dropout, two streams) in a process of its
own, and a second process that resumes it. Kills in time are spread evenly over the whole run; kills inside a save come
at named points: just before an operation of the save on the file system, such as `open checkpoint/model/config.json`
or `rename checkpoint`, which Python's audit hooks report. Nothing in the library knows that it is watched.

`resumed`: the second process ended well. `bit_equal`: besides, every file of the last checkpoint (weights, optimizer,
queue, teacher, position) and every line of metrics.jsonl are those of a run that was never killed.

`sigterm_seconds`: from SIGTERM to the end of the process, the step in hand and a whole save included, for FLAVA of
two sizes with 8 samples a step on the embedded drawings.

`lost_rank_seconds`: of two processes that train the tiny one together, from kill -9 of the second to the end of the
first, which says what happened. Nothing else ends it: torchrun, which would, is not there.

`saving`: seconds that a step waits for a save (the copy of weights and optimizer), and that the thread then takes to
write it; `longest_pause` is the longest that this process was kept from running meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import side_by_side
import tiny_run
import torch

from trivium.data.transforms import ImageTransform
from trivium.load import Bundle
from trivium.manifest import checkpoints_in, verify_manifest
from trivium.methods.flava import FlavaMethod, Pixels
from trivium.models.flava import Flava, FlavaConfig
from trivium.train import checkpoint, optim
from trivium.train.optim import Optim
from trivium.train.trainer import train

STEPS, SAVE_EVERY = 200, 20
WATCHED = {"open": "open", "os.mkdir": "make", "os.rename": "rename", "shutil.rmtree": "remove"}  # audit event -> verb
PATIENCE = 120.0  # seconds that a process may take


def whole_run(out: Path) -> None:
    """Begin the run in `out`, or resume the one that stands there."""
    with out.with_name(f"{out.name}.log").open("a") as log, redirect_stdout(log):
        recipe = tiny_run.with_train(steps=STEPS, save_every=SAVE_EVERY)
        train(tiny_run.make(recipe), out, resume=(out / "config.json").exists())


def warm_up(out: Path) -> None:
    """One step in this process: what torch imports at its first step is then there in every process forked from it."""
    train(tiny_run.make(tiny_run.with_train(steps=1)), out)


def started(action: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    """A forked process that runs an action."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    return process


def ended(process: multiprocessing.process.BaseProcess) -> int:
    """Wait for a process; its exit code, negative where a signal ended it."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise SystemExit(f"a run did not end within {PATIENCE:g} s")
    return process.exitcode


# ------------------------------------------------------------------------------------------- points inside a save


def watch_saves(out: Path, note: Callable[[int, str], None]) -> None:
    """From now on this process calls `note(step, operation)` before each operation of a save on the file system."""
    checkpoints = str(out / "checkpoints")
    saving = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal saving
        if event not in WATCHED or not str(arguments[0]).startswith(f"{checkpoints}/"):
            return
        name, _, inner = str(arguments[0])[len(checkpoints) + 1 :].partition("/")
        step = int(name.rpartition("-")[2])
        if event == "os.mkdir" and not inner:
            saving = step  # what follows belongs to this save, the removal of an older checkpoint too
        whose = "checkpoint" if step == saving else "older checkpoint"
        note(saving, f"{WATCHED[event]} {whose}{'/' if inner else ''}{inner}")

    sys.addaudithook(hook)


def points_of_a_save(out: Path, step: int) -> list[str]:
    """The operations of the save after `step` steps, in order. A run is made in `out` to learn them."""
    found = out.with_name(f"{out.name}.points")

    def action() -> None:
        def note(saving: int, operation: str) -> None:
            if saving == step:
                os.write(file, f"{operation}\n".encode())

        file = os.open(found, os.O_WRONLY | os.O_CREAT)
        watch_saves(out, note)
        whole_run(out)

    assert ended(started(action)) == 0
    return found.read_text().splitlines()


def kill_in_save(out: Path, step: int, number: int) -> None:
    """Run until just before operation `number` of the save after `step` steps."""

    def action() -> None:
        seen = 0

        def note(saving: int, operation: str) -> None:
            nonlocal seen
            if saving == step:
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        watch_saves(out, note)
        whole_run(out)

    assert ended(started(action)) == -signal.SIGKILL


def kill_after(out: Path, seconds: float) -> None:
    """Kill a run after so many seconds; a bit earlier, in a new run, where it was done by then."""
    for attempt in range(100):
        process = started(lambda: whole_run(out))
        time.sleep(seconds * 0.95**attempt)
        process.kill()
        if ended(process) == -signal.SIGKILL:
            return
        out.rename(out.with_name(f"{out.name}-done-{attempt}"))
    raise SystemExit("every run was done before it could be killed")


# ------------------------------------------------------------------------------------------------- what came out


def result_of(out: Path) -> dict[str, Any]:
    """Digest of every file of the last checkpoint, and the log; without the seconds that it all took."""
    last = checkpoint.folder_of(out / "checkpoints", STEPS)
    verify_manifest(last)
    files = json.loads((last / "manifest.json").read_text())["files"]
    state = json.loads((last / "training" / "state.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    digests = {name: entry["sha256"] for name, entry in files.items() if name != "training/state.json"}
    timed = ("seconds", "samples_per_second")
    return {
        **digests,
        "position": {name: value for name, value in state.items() if name not in timed},
        "metrics": [{name: value for name, value in line.items() if name not in timed} for line in lines],
    }


def survives(out: Path, straight: dict[str, Any]) -> tuple[bool, bool]:
    """Resume a killed run. Returns: whether it ended well, and whether all is equal to the bit."""
    if ended(started(lambda: whole_run(out))) != 0:
        return False, False
    return True, result_of(out) == straight


def kill_many(folder: Path, kills: int) -> tuple[dict[str, int], list[str]]:
    """The figures, and the named points at which runs were killed."""
    warm_up(folder / "warm")
    begun = time.perf_counter()
    assert ended(started(lambda: whole_run(folder / "straight"))) == 0
    lasts = time.perf_counter() - begun
    straight = result_of(folder / "straight")
    points = points_of_a_save(folder / "watched", STEPS // 2)
    assert result_of(folder / "watched") == straight
    named = 2 * kills // 5
    numbers = [round(n * (len(points) - 1) / max(1, named - 1)) for n in range(named)]  # the first and the last too
    draws = random.Random(0)
    figures = {"kills": 0, "inside_save": 0, "resumed": 0, "bit_equal": 0}
    for kill in range(kills):
        out = folder / str(kill)
        if kill < named:
            step = SAVE_EVERY * draws.randrange(3, STEPS // SAVE_EVERY)  # the first two remove no older checkpoint
            kill_in_save(out, step, numbers[kill])
        else:
            kill_after(out, lasts * (kill - named + draws.random()) / (kills - named))
        figures["kills"] += 1
        figures["inside_save"] += kill < named or any((out / "checkpoints").glob(".tmp-*"))
        resumed, equal = survives(out, straight)
        figures["resumed"] += resumed
        figures["bit_equal"] += equal
        print(f"{kill + 1}/{kills}", figures, file=sys.stderr)
    return figures, [points[number] for number in numbers]


# ------------------------------------------------------------------------------------------------------- SIGTERM


def stopped(size: str, folder: Path) -> dict[str, float]:
    """Train a FLAVA with 8 samples a step, send SIGTERM after its first steps, and see how long it takes to end."""
    out = folder / size
    command = _command(size, out, 8)
    with out.with_name(f"{size}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        lines = _first_steps(out, process, log.name)
        process.terminate()
        begun = time.perf_counter()
        code = process.wait()
        seconds = time.perf_counter() - begun
    last = checkpoints_in(out / "checkpoints")[-1]
    verify_manifest(last)
    assert code == 0, Path(log.name).read_text()
    written = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    a_step = 8 / statistics.median(json.loads(line)["samples_per_second"] for line in lines)
    return {"seconds": round(seconds, 2), "seconds_of_a_step": round(a_step, 2), "gigabytes": round(written / 1e9, 3)}


def _command(size: str, out: Path, micro_batch: int) -> list[str]:
    command = [sys.executable, "-m", "trivium", "pretrain", "flava", "--size", size, "--out", str(out)]
    command += ["--data.batch", "8", "--train.micro-batch", str(micro_batch), "--data.vocabulary", "learned"]
    command += ["--validate", "0", "--train.steps", "100000", "--train.log-every", "1"]
    return [*command, "--model.num-codes", "64"]  # to learn the 8,192 of base by k-means takes minutes


def _first_steps(out: Path, process: subprocess.Popen[bytes], log: str) -> list[str]:
    """Wait for four lines of metrics, and return them."""
    while len(lines := _lines(out / "metrics.jsonl")) < 4:
        if process.poll() is not None:
            raise SystemExit(f"training ended with {process.returncode}: {Path(log).read_text()}")
        time.sleep(0.05)
    return lines


# ---------------------------------------------------------------------------------------------------- a lost rank


def lost_rank(size: str, folder: Path) -> float:
    """Two processes train a FLAVA; kill the second after its first steps, and see how long the first goes on."""
    out = folder / f"{size}-two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    with ExitStack() as logs:
        both = []
        for rank in range(2):
            log = logs.enter_context(out.with_name(f"{out.name}-{rank}.log").open("w"))
            environment = os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            both.append(subprocess.Popen(_command(size, out, 4), stdout=log, stderr=log, env=environment))
        first, second = both
        said = out.with_name(f"{out.name}-0.log")
        try:
            _first_steps(out, first, str(said))
            second.kill()
            begun = time.perf_counter()
            code = first.wait(PATIENCE)
            seconds = time.perf_counter() - begun
        finally:
            for process in both:
                process.kill()
                process.wait()
    assert code == 2 and "another process of this run ended" in said.read_text(), said.read_text()
    return round(seconds, 2)


# --------------------------------------------------------------------------------------------------------- a save


def a_save(size: str, folder: Path) -> dict[str, float]:
    """Save a FLAVA of this size with the state of its optimizer, as the trainer does."""
    transform = ImageTransform()
    method = FlavaMethod(Flava(FlavaConfig.of_size(size)), None, Pixels(transform.mean, transform.std))
    optimizer = optim.build(method, Optim())
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    bundle = Bundle("flava", method.model, None, transform)
    longest_pause, written = 0.0, threading.Event()

    def write(taken: checkpoint.Snapshot) -> None:
        checkpoint.write(folder / f"{size}-checkpoints", taken, bundle.save)
        written.set()

    with checkpoint.Saving() as saving:
        begun = time.perf_counter()
        taken = checkpoint.snapshot(1, method, optimizer, {})
        copied = last = time.perf_counter()
        saving.begin(lambda: write(taken))
        while not (written.is_set() or saving.failed):
            time.sleep(0.001)
            now = time.perf_counter()
            longest_pause, last = max(longest_pause, now - last), now
        saving.finish()
    return {
        "copy": round(copied - begun, 3),
        "write": round(last - copied, 3),
        "longest_pause": round(longest_pause, 3),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="0: those that the file holds already stay in it")
    parser.add_argument("--sizes", nargs="*", default=["tiny", "base"], help="of FLAVA, stopped by SIGTERM and saved")
    arguments = parser.parse_args()
    file = side_by_side.RESULTS / "kill.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    results, points = before.get("results", {}), before.get("points", [])
    commands = before.get("commands", {})  # what each part of the file was made by
    command = side_by_side.typed()
    more = {
        name: before.get(name, {}) for name in ("sigterm_seconds", "sigterm_details", "lost_rank_seconds", "saving")
    }

    def write() -> None:
        if not 0 < arguments.kills < 100:
            side_by_side.write("kill", results, commands=commands, points=points, **more)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.kills:
            begun = time.perf_counter()
            figures, points = kill_many(folder, arguments.kills)
            results = {**figures, "seconds": round(time.perf_counter() - begun, 1)}
            commands["kills"] = command
            print(results)
            write()
        for size in arguments.sizes:
            more["sigterm_details"][size] = stopped(size, folder)
            more["sigterm_seconds"][size] = more["sigterm_details"][size]["seconds"]
            if size == "tiny":  # two of base do not fit every machine
                more["lost_rank_seconds"][size] = lost_rank(size, folder)
                print(f"  the end of a process is told after {more['lost_rank_seconds'][size]} s")
            more["saving"][size] = a_save(size, folder)
            commands[size] = command
            print(size, more["sigterm_details"][size], more["saving"][size])
            write()


if __name__ == "__main__":
    main()
