"""What DINO learns from the embedded drawings without a label, in its 1,600 steps: neighbours against two floors.

    python benchmarks/dino_knn.py --out runs/dino-knn                          # three seeds: half an hour on one core
    python benchmarks/dino_knn.py --out runs/dino-try --minutes 1 --seeds 0    # to see that it runs

Each seed is one run of `trivium pretrain dino`, evaluated as every run is: drawings of the held-out style, put into
groups and subgroups by their 20 nearest drawings of the other styles; "other concepts" leaves the same thing in another
style out. Beside it the same network before training and 16 x 16 pixels, with the difference picture by picture and its
95 % interval. Then how evenly and how much of the object the heads look at, against random start. A run that stands in
the folder is gone on with, or taken as it is when it is finished. Writes results/dino_knn.json and .md; exits 1 where
DINO is not above the network before training by more than the interval at every seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import side_by_side

from trivium.cli import main as trivium
from trivium.evaluate import results
from trivium.evaluate.floors import FIGURES, FLOORS
from trivium.evaluate.report import read_lines
from trivium.evaluate.results import Results
from trivium.recipes.dino import dino

COLLAPSE = ("student", "teacher_entropy", "prototypes_entropy", "feature_deviation")  # subjects of monitors
FLOOR = "other_concepts.subgroup"  # what the others stand beside


def trained(folder: Path, seed: int, minutes: float | None) -> Results:
    if not (folder / "results.json").is_file():
        words = ["pretrain", "dino", "--size", "tiny", "--train.seed", str(seed), "--out", str(folder)]
        if minutes is not None:
            words += ["--train.minutes", str(minutes)]
        if code := trivium(["pretrain", str(folder), "--resume"] if (folder / "config.json").is_file() else words):
            raise SystemExit(code)
    return results.read(folder / "results.json")


def table(found: dict[int, Results]) -> list[str]:
    """Means over seeds, and the interval of each difference at its worst seed."""
    lines = ["| figure | DINO | before training | pixels | above before training | above pixels |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for figure in FIGURES:
        cells = [_mean(found, f"knn.{figure}")] + [_mean(found, f"knn.{floor}.{figure}") for floor in FLOORS]
        lines.append(f"| {figure} | {' | '.join([*cells, *(_margin(found, floor, figure) for floor in FLOORS)])} |")
    return lines


def _mean(found: dict[int, Results], name: str) -> str:
    values = [each[name].value for each in found.values()]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _margin(found: dict[int, Results], floor: str, figure: str) -> str:
    worst = min((each[f"above.{floor}.knn.{figure}"] for each in found.values()), key=lambda result: result.value)
    return f"{worst.value:+.3f} [{worst.low:+.3f}, {worst.high:+.3f}]"


def passed(found: dict[int, Results], floor: str) -> bool:
    """Whether at every seed the whole interval of the difference lies above 0."""
    margins = [each[f"above.{floor}.knn.{FLOOR}"] for each in found.values()]
    return all(margin.low is not None and margin.low > 0 for margin in margins)


def sentence(found: dict[int, Results], floor: str, title: str) -> str:
    margins = [each[f"above.{floor}.knn.{FLOOR}"] for each in found.values()]
    if passed(found, floor):
        return f"Subgroup without the own concept: above {title} at every seed, by more than the interval."
    if all(margin.high is not None and margin.high < 0 for margin in margins):
        return f"Subgroup without the own concept: below {title} at every seed, by more than the interval."
    return f"Subgroup without the own concept: not told apart from {title} at every seed."


def attention(found: dict[int, Results]) -> str:
    """The best head, by its mean over the pictures, and the mean of all heads, over the seeds."""
    best: dict[str, list[float]] = {}
    mean: dict[str, list[float]] = {}
    for prefix in ("", "random_start."):
        start = f"attention.jaccard.{prefix}head_"
        heads = [[r.value for n, r in each.items() if n.startswith(start)] for each in found.values()]
        best[prefix], mean[prefix] = [max(each) for each in heads], [statistics.mean(each) for each in heads]
    everywhere = statistics.mean(each["attention.jaccard.all"].value for each in found.values())
    return (
        f"Jaccard index of the best head with what is drawn: {statistics.mean(best['']):.3f}, before training"
        f" {statistics.mean(best['random_start.']):.3f}; of all heads {statistics.mean(mean['']):.3f} and"
        f" {statistics.mean(mean['random_start.']):.3f}; looking everywhere gives {everywhere:.3f}."
    )


def collapse(folders: list[Path]) -> str:
    """What the runs' own monitors saw of it: the worst of the last figures, and whether any ever crossed its bound."""
    lines = [line for folder in folders for line in read_lines(folder / "monitors.jsonl")]
    seen = [line for line in lines if line["monitor"] in ("collapse", "health")]
    last = [line for line in seen if line["step"] == max(each["step"] for each in seen)]
    worst = {name: [line["value"] for line in last if line["subject"] == name] for name in COLLAPSE}
    crossed = sorted({line["subject"] for line in seen if line["crossed"]})
    told = f"told of {', '.join(crossed)}" if crossed else "no monitor crossed its bound at any seed"
    return (
        f"Collapse: {told}. At the end pictures take at least {min(worst['student']):.1f} directions (told at 1.2), the"
        f" teacher's entropy is at most {max(worst['teacher_entropy']):.2f} of ln K (0.98), that of all prototypes at"
        f" least {min(worst['prototypes_entropy']):.2f}, and features deviate by at least"
        f" {min(worst['feature_deviation']):.2f} of what independent ones would."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="of training for each seed, in place of the recipe's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    arguments = parser.parse_args()
    found = {seed: trained(arguments.out / f"seed-{seed}", seed, arguments.minutes) for seed in arguments.seeds}
    lines = table(found)
    said = [
        sentence(found, "random_start", "the network before training"), sentence(found, "pixels", "16 x 16 pixels"),
        attention(found),
    ]  # fmt: skip
    print("\n".join([*lines, "", *said]))
    rows: dict[str, dict[str, Any]] = {
        f"seed {seed}": {name: result.as_json() for name, result in each.items() if not name.startswith("seconds")}
        for seed, each in found.items()
    }
    folders = [arguments.out / f"seed-{seed}" for seed in found]
    if len(found) < 3 or not all(side_by_side.is_as(folder, dino("tiny"), "train.seed") for folder in folders):
        print("a trial: results/dino_knn.json and .md stay as they are", file=sys.stderr)
        return
    command = "python benchmarks/dino_knn.py --out RUNS"
    taken = [each["seconds.train"].value for each in found.values()]
    said.append(collapse(folders))
    said.append(f"Training took {min(taken) / 60:.1f} to {max(taken) / 60:.1f} minutes a seed.")
    written = side_by_side.write("dino_knn", rows, command=command, seconds_of_training=taken)
    page = [
        "# What DINO learns from drawings without labels",
        "",
        *lines,
        "",
        *said,
        "",
        "Made by",
        "",
        f"    {command}",
    ]
    written.with_suffix(".md").write_text("\n".join([*page, ""]), encoding="utf-8")
    if not passed(found, "random_start"):
        sys.exit("missed: not above the network before training at every seed")


if __name__ == "__main__":
    main()
