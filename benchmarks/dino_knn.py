"""What DINO learns from the embedded drawings without a label, in ten minutes: neighbours against two floors.

    python benchmarks/dino_knn.py --out runs/dino-knn                       # three seeds: 35 minutes on two cores
    python benchmarks/dino_knn.py --out runs/dino-knn --minutes 1 --seeds 0  # to see that it runs

Each seed is one run of `trivium pretrain dino`, evaluated as every run is: drawings of the held-out style, put into
groups and subgroups by their 20 nearest drawings of the other styles; "other concepts" leaves the same thing in another
style out. Beside it the same network before training and 16 x 16 pixels, with the difference picture by picture and its
95 % interval. Then how evenly and how much of the object the heads look at, against random start. A run that stands in
the folder already is not repeated. Writes results/dino_knn.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import side_by_side

from trivium.cli.pretrain import run, with_budget
from trivium.evaluate import results
from trivium.evaluate.floors import FIGURES, FLOORS
from trivium.evaluate.results import Results
from trivium.recipes.dino import dino

FLOOR = "other_concepts.subgroup"  # what the others stand beside


def trained(folder: Path, seed: int, minutes: float) -> Results:
    if not (folder / "results.json").is_file():
        recipe = dino("tiny")
        recipe = replace(recipe, train=replace(recipe.train, minutes=minutes, seed=seed))
        run(with_budget(recipe.prepare("dino", {"size": "tiny"})), folder, time.perf_counter())
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


def sentence(found: dict[int, Results], floor: str, title: str) -> str:
    """Whether the floor is passed: at every seed the whole interval of the difference lies above 0."""
    margins = [each[f"above.{floor}.knn.{FLOOR}"] for each in found.values()]
    if all(margin.low is not None and margin.low > 0 for margin in margins):
        return f"Subgroup without the own concept: above {title} at every seed, by more than the interval."
    if all(margin.high is not None and margin.high < 0 for margin in margins):
        return f"Subgroup without the own concept: below {title} at every seed, by more than the interval."
    return f"Subgroup without the own concept: not told apart from {title} at every seed."


def attention(found: dict[int, Results]) -> str:
    """The best head, by its mean over the pictures, of each seed."""
    best = {}
    for prefix in ("", "random_start."):
        start = f"attention.jaccard.{prefix}head_"
        best[prefix] = [max(r.value for n, r in each.items() if n.startswith(start)) for each in found.values()]
    everywhere = statistics.mean(each["attention.jaccard.all"].value for each in found.values())
    return (
        f"Jaccard index of the best head with what is drawn: {statistics.mean(best['']):.3f}, before training"
        f" {statistics.mean(best['random_start.']):.3f}; looking everywhere gives {everywhere:.3f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each seed")
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
    if len(found) < 3 or arguments.minutes < 10:
        return  # a trial, not the committed table
    command = f"python benchmarks/dino_knn.py --out RUNS --minutes {arguments.minutes:g}"
    written = side_by_side.write("dino_knn", rows, command=command, minutes=arguments.minutes)
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


if __name__ == "__main__":
    main()
