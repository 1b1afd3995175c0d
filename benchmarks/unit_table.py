"""The comparison of the UniT paper (Table 3) in pocket form, on scenes and SST-2: one model a task, decoders of their
own, one decoder, and one decoder that starts from detection. A task gets as many updates in every column.

    python benchmarks/unit_table.py --data $TRIVIUM_DATA --out runs/unit-table

Runs one cell after another, each in a folder of its own inside --out; what is done stays, what was stopped goes on.
Several processes may share the work: --settings, --tasks and --seeds choose cells, --device cuda trains on a GPU. A
start from detection needs the run "single vg" of its seed first. With all cells there (or --table alone) it writes
results/unit_table.json and unit_table.md, with the paper's figures beside, and says which of its orderings hold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import seeds
import side_by_side

from trivium.cli import pretrain
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.evaluate import published
from trivium.evaluate.results import Result
from trivium.manifest import write_whole
from trivium.recipes.unit import UnitRecipe, unit

TASKS = {  # ours -> its figure in results.json, how the page names it, and the row of the paper's table
    "vg": ("VG detection.val.ap50", "boxes on scenes, mAP at IoU 0.5", "COCO detection"),
    "vqav2": ("VQAv2.dev.accuracy", "questions on scenes", "VQAv2"),
    "snli_ve": ("SNLI-VE.dev.accuracy", "statements on scenes", "SNLI-VE"),
    "sst2": ("SST-2.dev.accuracy", "SST-2", "SST-2"),
}
# Updates of a task for each 100 of --updates: boxes are found late, and only once they are can pictures be asked.
SHARES = {"vg": 200, "vqav2": 100, "snli_ve": 100, "sst2": 50}
SEEDS = (0, 1)
# With 32 statements an update they stay at chance in every column; three on a picture share its encoding.
BATCHES, TOGETHER = {"snli_ve": 96}, {"snli_ve": 3}
SETTINGS = {  # ours -> the paper's, as published.csv names it
    "single": "single-task models",
    "separate": "8 datasets, separate decoders",
    "shared": "8 datasets, shared decoder",
    "shared-init": "8 datasets, shared decoder, COCO init",
}
VERDICTS = {
    "better": "holds", "worse": "the other way round", "undecided": "cannot be told", "not all seeds": "not all seeds"
}  # fmt: skip
ORDERINGS = (  # (task, better, worse, as the paper finds it)
    ("vg", "single", "shared", "detection loses by joint training"),
    ("vg", "shared-init", "shared", "a start from detection wins it back"),
    ("vg", "shared", "separate", "one decoder detects better than several"),
    ("vqav2", "shared", "single", "questions gain by joint training"),
    ("snli_ve", "shared", "single", "statements gain by joint training"),
    ("sst2", "single", "shared", "language loses by joint training"),
)


TOTAL = "seconds.total"  # of a run, in its results


class Cell:
    """One run."""

    def __init__(self, setting: str, task: str | None, seed: int, out: Path) -> None:
        self.setting, self.task, self.seed, self.out = setting, task, seed, out

    @property
    def tasks(self) -> list[str]:
        return list(TASKS) if self.task is None else [self.task]

    @property
    def folder(self) -> Path:
        return self.out / "-".join([self.setting, *([] if self.task is None else [self.task]), f"seed{self.seed}"])

    @property
    def is_done(self) -> bool:
        return (self.folder / "results.json").is_file()

    @property
    def results(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = json.loads((self.folder / "results.json").read_text())["results"]
        return found

    def recipe(self, data: Path, updates: int, device: str, threads: int | None) -> UnitRecipe:
        """SHARES of `updates` for each task."""
        tiny = unit("tiny")
        shares = {name: SHARES[name] for name in self.tasks}
        tasks = {
            name: replace(
                task,
                ratio=float(shares.get(name, 0)),
                batch=BATCHES.get(name, task.batch),
                of_one_picture=TOGETHER.get(name, 1),
            )
            for name, task in tiny.tasks.items()
        }
        model = replace(tiny.model, decoder="separate" if self.setting == "separate" else "shared")
        start = Cell("single", "vg", self.seed, self.out).folder if self.setting == "shared-init" else None
        steps = updates * sum(shares.values()) // 100
        train = replace(tiny.train, steps=steps, seed=self.seed, device=device, threads=threads)
        return replace(
            tiny, model=model, tasks=tasks, train=train, init=None if start is None else str(start),
            data=replace(tiny.data, scenes=str(self.out / "scenes"), glue=str(data / "glue"), vocabulary="bert"),
        )  # fmt: skip

    def refuse_another(self, made: UnitRecipe) -> None:
        """Raises SystemExit where a run is there that has other settings."""
        settled = ("model.tasks", "model.vocab_size")  # by the data
        if (self.folder / "config.json").is_file() and not side_by_side.is_as(self.folder, made, *settled):
            sys.exit(f"{self.folder} is a run with other settings: give its command, or another --out")

    def run(self, data: Path, updates: int, device: str, threads: int | None) -> int:
        begun = time.perf_counter()
        if (self.folder / "config.json").is_file():
            return pretrain.resume_run(str(self.folder), None, {}, begun)
        if self.setting == "shared-init" and not Cell("single", "vg", self.seed, self.out).is_done:
            sys.exit(f"{self.folder.name} starts from single-vg-seed{self.seed}: run that first")
        made = self.recipe(data, updates, device, threads).with_absolute_paths()
        return pretrain.run(made.prepare("unit", {"size": "tiny"}), self.folder, begun)


def cells(settings: list[str], tasks: list[str], seeds: list[int], out: Path) -> list[Cell]:
    found = []
    for seed in seeds:
        for setting in settings:
            found += [Cell(setting, task, seed, out) for task in (tasks if setting == "single" else [None])]
    return found


class Figure(NamedTuple):
    """One cell's figure, with its interval over what was measured."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


Figures = dict[int, Figure]  # by seed


def figures(seeds: list[int], out: Path) -> dict[str, dict[str, Figures]]:
    """task -> setting -> the figure of each seed whose run is done."""
    table: dict[str, dict[str, Figures]] = {task: {setting: {} for setting in SETTINGS} for task in TASKS}
    for cell in cells(list(SETTINGS), list(TASKS), seeds, out):
        if cell.is_done:
            results = cell.results
            for task in cell.tasks:
                entry = results[TASKS[task][0]]
                table[task][cell.setting][cell.seed] = Figure(entry["value"], entry["low"], entry["high"])
    return table


def seconds_of_runs(seeds: list[int], out: Path) -> dict[str, float]:
    """How long each run took, by the name of its folder, where its results say it: from the start of the command that
    ended it, measuring included."""
    done = {cell.folder.name: cell.results for cell in cells(list(SETTINGS), list(TASKS), seeds, out) if cell.is_done}
    return {name: results[TOTAL]["value"] for name, results in done.items() if TOTAL in results}


def majorities(seeds: list[int], out: Path) -> dict[str, float]:
    """What the commonest answer gives, of each task that has one."""
    found: dict[str, float] = {}
    for cell in cells(list(SETTINGS), list(TASKS), seeds, out):
        if cell.is_done:
            results = cell.results
            found |= {
                task: results[name]["value"] for task in cell.tasks if (name := f"{TASKS[task][0]}.majority") in results
            }
    return found


def papers(task: str, setting: str) -> str:
    """The paper's figure; a star where it was recalled and not read."""
    name = TASKS[task][2]
    for row in published.rows():
        if (row["system"], row["setting"], row["task"]) == ("UniT", SETTINGS[setting], name) and row["split"] in (
            "val2017", "val2017 images", "dev",
        ):  # fmt: skip
            return row["value"] + ("*" if row["confidence"] == "recalled" else "")
    return "–"


def orderings(table: dict[str, dict[str, Figures]], runs: int) -> dict[str, str]:
    """Of each sentence of ORDERINGS whether it holds: in every seed, and beyond what units and seeds leave to chance.

    runs: how many seeds there are to be.
    """
    said = {}
    for task, better, worse, sentence in ORDERINGS:
        mine, other = table[task][better], table[task][worse]
        both = sorted(mine.keys() & other.keys())
        if not both:
            said[sentence] = "not run"
            continue
        each = [mine[seed].value - other[seed].value for seed in both]
        mean = sum(each) / len(both)
        # Cells are measured on the same rows, and taken for independent: that makes it wider.
        of_units = math.hypot(*(figures[seed].half_width for figures in (mine, other) for seed in both)) / len(both)
        over = seeds.spread([[one.value for one in figures.values()] for figures in table[task].values()])
        gap = seeds.widened(Result(mean, mean - of_units, mean + of_units), over, len(both))
        verdict = VERDICTS[seeds.verdict(gap, each, runs)]
        said[sentence] = f"{verdict} ({100 * mean:+.1f} {seeds.brackets(gap)})"
    return said


def page(
    table: dict[str, dict[str, Figures]], commonest: dict[str, float], command: str, updates: int, runs: int
) -> str:
    each = ", ".join(f"{task} {updates * share // 100:,}" for task, share in SHARES.items())
    lines = [
        "# UniT's comparison in pocket form",
        "",
        f"A tiny UniT on scenes and SST-2; updates of each task, in every column: {each}; an update has",
        f"32 rows, of statements {BATCHES['snli_ve']}, {TOGETHER['snli_ve']} on a picture. A start from detection",
        "comes on top of them. The seeds' figures in per cent, and in brackets the paper's with 150,000 and 500,000",
        "updates on COCO (its mAP over IoU 0.5 to 0.95, so not to be set beside ours), VQAv2, SNLI-VE and SST-2. A",
        "star: recalled, not read in the paper.",
        "",
        "| | commonest answer | " + " | ".join(SETTINGS) + " |",
        "|---" * (2 + len(SETTINGS)) + "|",
    ]
    for task, (_, title, _) in TASKS.items():
        shown = [f"{100 * commonest[task]:.1f}" if task in commonest else "–"]
        for setting in SETTINGS:
            ours = ", ".join(f"{100 * one.value:.1f}" for _, one in sorted(table[task][setting].items())) or "–"
            shown.append(f"{ours} ({papers(task, setting)})")
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "Orderings of the paper, with the difference and its 95 % interval over what was measured and seeds:",
        "",
    ]
    said = orderings(table, runs)
    lines += [f"- {sentence} ({better} above {worse}): {said[sentence]}" for _, better, worse, sentence in ORDERINGS]
    return "\n".join([*lines, "", f"    {command}", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds glue/SST-2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=400, help="of questions; boxes get twice as many, SST-2 half")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of the setting single")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--scenes", type=int, default=6000, help="to train on")
    parser.add_argument("--measured", type=int, default=1000, help="scenes to measure on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch; 1 where several processes share the work")
    parser.add_argument("--table", action="store_true", help="only write the table of what is done")
    arguments = parser.parse_args()
    out = arguments.out
    chosen = arguments.data, arguments.updates, arguments.device, arguments.threads
    of_table = sorted({*SEEDS, *arguments.seeds})  # whichever of them this process makes
    every = cells(list(SETTINGS), list(TASKS), of_table, out)
    for cell in every:
        cell.refuse_another(cell.recipe(*chosen).with_absolute_paths())
    if not arguments.table:
        formats = ("vg", "vqa", "snli-ve")
        for split, count in (("train", arguments.scenes), ("new-scenes", arguments.measured)):
            write_scenes(Scenes(split, count), out / "scenes", formats)  # type: ignore[arg-type]
        for cell in cells(arguments.settings, arguments.tasks, arguments.seeds, out):
            if not cell.is_done and ((code := cell.run(*chosen)) or not cell.is_done):  # it was stopped
                return code or 1
    missing = [cell.folder.name for cell in every if not cell.is_done]
    if missing and not arguments.table:
        print(f"still to run: {', '.join(missing)}", file=sys.stderr)
        return 0
    table = figures(of_table, out)
    command = "python benchmarks/unit_table.py --data $TRIVIUM_DATA --out runs/unit-table"
    for flag in ("updates", "scenes", "measured", "threads"):
        if (value := getattr(arguments, flag)) != parser.get_default(flag):
            command += f" --{flag} {value}"
    commonest = majorities(of_table, out)
    told = {
        task: {name: {seed: one._asdict() for seed, one in each.items()} for name, each in row.items()}
        for task, row in table.items()
    }
    side_by_side.write(
        "unit_table", told, command=command, updates=arguments.updates, commonest_answer=commonest,
        orderings=orderings(table, len(of_table)), missing=missing,
        seconds=seconds_of_runs(of_table, out),
    )  # fmt: skip
    write_whole(
        side_by_side.RESULTS / "unit_table.md", page(table, commonest, command, arguments.updates, len(of_table))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
