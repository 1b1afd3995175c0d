"""What does joint training buy? FLAVA's six losses against the contrastive loss alone, in equal minutes.

    python benchmarks/joint_or_contrastive.py --minutes 7.5 --out runs/joint-or-contrastive

Same data, model size, batch, seed and schedule; the contrastive run spends all its steps on pairs and no step on a
masked pass, so it sees more pairs in the same time: it is given as long as the joint run has taken. Both are scored by
the demo's own evaluation; its matching head is untrained, so it has no figure for matching. Writes
results/joint_or_contrastive.json and the same as a page, joint_or_contrastive.md, which the demo's report links to.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import side_by_side

from trivium.cli.demo import demo_recipe
from trivium.cli.pretrain import run, with_budget
from trivium.evaluate import results
from trivium.recipes.flava import FlavaRecipe, Objectives

MATCHING = "itm.auroc"
TASKS = {
    "retrieval.style.text_to_image_r10": "text to image, R@10, unseen style",
    "retrieval.style.image_to_text_r10": "image to text, R@10, unseen style",
    "retrieval.concepts.text_to_image_r10": "text to image, R@10, unseen things",
    "retrieval.style.image_to_image_r1": "image to image, R@1, unseen style",
    "zero_shot.group": "zero-shot, 9 groups",
    "zero_shot.subgroup": "zero-shot, 98 subgroups",
    "knn.group": "nearest neighbours, 9 groups",
    "knn.subgroup": "nearest neighbours, 98 subgroups",
    "probe.group": "linear probe, 9 groups",
    "probe.subgroup": "linear probe, 98 subgroups",
    MATCHING: "true pair above false pair (AUROC)",
    "losses.mlm.final": "masked words, loss (lower is better)",
    "losses.mmm_text.final": "masked words beside the picture, loss",
    "losses.mim.final": "masked patches, loss",
}


def contrastive_only(recipe: FlavaRecipe) -> FlavaRecipe:
    """The same run with one loss: no masked pass, no batch of one modality, no false pair."""
    objectives = Objectives(mim=0.0, mlm=0.0, mmm_image=0.0, mmm_text=0.0, itm=0.0)
    data = replace(recipe.data, images_ratio=0.0, text_ratio=0.0, false_pairs=0.0)
    return replace(recipe, objectives=objectives, data=data)


def trained(recipe: FlavaRecipe, folder: Path) -> None:
    run(with_budget(recipe.prepare("flava", {"size": "tiny"})), folder, time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="of training: of the joint run asked for")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the two runs")
    parser.add_argument(
        "--joint", type=Path, help="a run folder of `trivium demo --minutes` with as many, as the joint run"
    )
    arguments = parser.parse_args()
    side_by_side.refuse_a_busy_machine()
    joint, alone = arguments.joint or arguments.out / "joint", arguments.out / "contrastive"
    if arguments.joint is None:
        trained(demo_recipe(arguments.minutes), joint)
    found = {"joint": results.read(joint / "results.json")}
    trained(contrastive_only(demo_recipe(found["joint"]["seconds.train"].value / 60)), alone)
    found["contrastive"] = results.read(alone / "results.json")
    del found["contrastive"][MATCHING]
    rows: dict[str, dict[str, Any]] = {}
    lines = ["| task | joint | contrastive only |", "|---|---|---|"]
    for task, title in TASKS.items():
        cells = []
        for name in found:
            result = found[name].get(task)
            rows.setdefault(task, {})[name] = None if result is None else vars(result)
            interval = "" if result is None or result.low is None else f" [{result.low:.3f}, {result.high:.3f}]"
            cells.append("–" if result is None else f"{result.value:.3f}{interval}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    seconds = {name: each["seconds.train"].value for name, each in found.items()}
    print("\n".join(lines))
    written = side_by_side.write("joint_or_contrastive", rows, minutes=arguments.minutes, seconds_of_training=seconds)
    written.with_suffix(".md").write_text(page(lines, rows, json.loads(written.read_text())), encoding="utf-8")


def page(table: list[str], rows: dict[str, dict[str, Any]], document: dict[str, Any]) -> str:
    """The table with the sentence that it supports: a difference counts where the two intervals do not overlap."""
    wins: dict[str, list[str]] = {"joint": [], "contrastive": []}
    for task, found in rows.items():
        joint, contrastive = found["joint"], found["contrastive"]
        if contrastive is None or joint["low"] is None:
            continue
        if joint["low"] > contrastive["high"]:
            wins["joint"].append(TASKS[task])
        elif contrastive["low"] > joint["high"]:
            wins["contrastive"].append(TASKS[task])
    machine, seconds = document["machine"], document["seconds_of_training"]
    sentences = [
        f"Joint training is ahead, beyond the 95 % intervals, in {_listed(wins['joint'])};",
        f"the contrastive loss alone in {_listed(wins['contrastive'])}; in the rest the intervals overlap.",
        "What has no figure on the right a contrastive model cannot do at all: tell a true pair from a false one with",
        "both in view, and fill in hidden words and patches.",
    ]
    return "\n".join(
        [
            "# What joint training buys",
            "",
            "FLAVA's six losses against the contrastive loss alone, which was given as long as these took"
            f" ({document['minutes']:g} minutes asked for), on the data of the demo. They trained for"
            f" {seconds['joint']:.0f} and {seconds['contrastive']:.0f} seconds.",
            "",
            *table,
            "",
            *sentences,
            "",
            f"On {machine['cpu']} ({machine['class']}, {machine['cores']} cores). Made by",
            "",
            f"    {document['command']}",
            "",
        ]
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none of these"


if __name__ == "__main__":
    main()
