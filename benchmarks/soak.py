"""20,000 steps of a run in miniature: does memory grow, does a file stay open?

    python benchmarks/soak.py                 # a quarter of an hour on two cores

`tiny_run` with the loader's own worker, a log and a checkpoint every 500 steps. Every 1,000 steps, long after the last
save, the resident memory of the training process and the number of its open files are read. Growth is counted from
step 2,000, when everything has been used once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import side_by_side
import tiny_run

from trivium.train.trainer import train

EVERY, WARM = 1000, 2000  # steps


def soak(steps: int, out: Path, every: int = EVERY, warm: int = WARM) -> dict[str, float | list[int]]:
    """Train so many steps. Memory in bytes, read every `every` steps; growth is counted from step `warm`."""
    recipe = tiny_run.with_train(steps=steps, save_every=every // 2, log_every=every // 10)
    run = tiny_run.make(recipe, tiny_run.real_mixture(workers=1, sound=True))
    memory: list[int] = []
    files: list[int] = []

    def read(step: int) -> None:
        if (step + 1) % every == 0:  # the save of this step comes after it
            memory.append(side_by_side.status("VmRSS"))
            files.append(len(os.listdir("/proc/self/fd")))

    run.method.before_accept = read  # type: ignore[assignment]
    begun = time.perf_counter()
    if train(run, out).done < steps:
        raise SystemExit("the run was stopped before its last step: nothing is written")
    first = warm // every - 1
    return {
        "steps": steps,
        "memory_growth": memory[-1] / memory[first] - 1,
        "files_more": max(files[first:]) - files[first],
        "seconds": round(time.perf_counter() - begun, 1),
        "memory": memory,
        "files": files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        results = soak(arguments.steps, Path(out))
    print(results)
    side_by_side.write("soak", results)


if __name__ == "__main__":
    main()
