"""Tiny ALBEF on real data: the embedded pairs, Flickr8k's photographs, and entailment between them and sentences.

    python benchmarks/albef_real.py --data.root DATA --out runs/albef-real

    embedded      pretrained on the embedded drawings, measured as `trivium evaluate` measures
    flickr8k      pretrained on Flickr8k's training photographs, scored zero-shot on dev (R@10, median rank), by cosine
                  and re-ranked; then fine-tuned on retrieval and scored again
    entailment    fine-tuned on the triples of its photographs, those with md5(file) % 10 = 0 held out, from pretraining
                  too; beside it the same with grey pictures, the difference, and the commonest answer

Runs that are done are not repeated, and all that are done are summed up. Writes results/albef_real.json and .md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
from albef_runs import (
    ENTAILMENT,
    NO_QUEUE,
    Photographs,
    always_the_commonest,
    as_json,
    difference,
    run,
    tiny_tuning,
    units,
)

from trivium.evaluate import results
from trivium.evaluate.results import Result
from trivium.train import config

PARTS = ("embedded", "flickr8k", "entailment")
ACCURACY = f"{ENTAILMENT}.test.accuracy"
WHOLE, BLIND = "entailment", "entailment, hypothesis alone"
FOLDERS = {  # below OUT
    "embedded": "embedded", "flickr8k": "flickr8k", "flickr8k fine-tuned": "flickr8k-retrieval", WHOLE: "entailment",
    BLIND: "entailment-hypothesis",
}  # fmt: skip
SHOWN = {
    "embedded": ["retrieval.style.text_to_image_r10", "retrieval.style.image_to_text_r10",
                 "retrieval.style.text_to_image_reranked_r10", "retrieval.style.image_to_text_reranked_r10",
                 "zero_shot.group", "itm.accuracy"],
    "flickr8k": [f"retrieval.pairs.{way}{order}_{figure}" for way in ("text_to_image", "image_to_text")
                 for order in ("", "_reranked") for figure in ("r10", "median_rank")]
                + ["losses.mlm.final", "losses.mlm.chance"],
    "flickr8k fine-tuned": [f"retrieval.dev.{way}{order}_{figure}" for way in ("ir", "tr")
                            for order in ("", "_reranked") for figure in ("r10", "median_rank")],
    WHOLE: [ACCURACY],
    BLIND: [ACCURACY],
}  # fmt: skip
RECALL = "mean of R@1, 5 and 10 both ways, re-ranked"  # before and after fine-tuning
WAYS = {
    "flickr8k": ("retrieval.pairs.image_to_text", "retrieval.pairs.text_to_image"),
    "flickr8k fine-tuned": ("retrieval.dev.tr", "retrieval.dev.ir"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=2000, help="of each pretraining")
    parser.add_argument("--tuning-steps", type=int, default=400, help="of each fine-tuning")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch; by default as torch finds best")
    given = parser.parse_args()
    photographs = Photographs(given.root, given.out)

    def pretrained(name: str, values: dict[str, Any]) -> Path:
        settings = {"size": "tiny", "train.steps": given.steps, "train.save-every": 200, "train.keep-last": 1, **values}
        return run(given.out / FOLDERS[name], ["pretrain", "albef"], settings, given.device, given.threads)

    def tuned(name: str, task: str, values: dict[str, Any]) -> Path:
        settings = {**tiny_tuning(given.tuning_steps), **values}
        return run(given.out / FOLDERS[name], ["finetune", task], settings, given.device, given.threads)

    if "embedded" in given.parts:
        pretrained("embedded", {})
    if "flickr8k" in given.parts or "entailment" in given.parts:
        train = photographs.written("pairs")
        pairs = {"data.pairs": [train], "data.validation": photographs.dev, "data.text-column": "captions",
                 "data.vocabulary": photographs.vocabulary()}  # fmt: skip
        start = pretrained("flickr8k", pairs)
        if "flickr8k" in given.parts:
            pairs = {"data.train": [train], "data.dev": photographs.dev, "data.text-column": "captions"}
            tuned("flickr8k fine-tuned", "retrieval", {"init": start, **pairs, **NO_QUEUE})
        if "entailment" in given.parts:
            tables: dict[str, Any] = {f"data.{split}": [path] for split, path in photographs.entailment().items()}
            head = {"head.activation": "relu", "head.dropout": 0.0, "distillation.alpha": 0.4}
            for name, blank in ((WHOLE, "false"), (BLIND, "true")):
                values = {"init": start, **tables, **head, "data.blank-pictures": blank}
                tuned(name, "image_text_classification", values)
    sum_up(photographs, given.steps, given.tuning_steps)


def beside(photographs: Photographs) -> dict[str, Result]:
    """What the photographs add to the hypotheses, and the answer that is commonest in training."""
    whole, blind = (units(photographs.out / FOLDERS[name], [ACCURACY]) for name in (WHOLE, BLIND))
    commonest, always = always_the_commonest(photographs.judged(), "test")
    return {
        f"{WHOLE}, less hypothesis alone": difference([whole], [blind]),
        f"{WHOLE}, always {commonest}": always,
    }


def recall(found: results.Results, ways: tuple[str, str]) -> Result:
    """What fine-tuning can choose its checkpoint by. Without an interval: its units are pictures and captions."""
    return Result(float(np.mean([found[f"{way}_reranked_r{cutoff}"].value for way in ways for cutoff in (1, 5, 10)])))


def sum_up(photographs: Photographs, steps: int, tuning_steps: int) -> None:
    """All that is done, as a page and as numbers."""
    out = photographs.out
    lines = [
        "# Tiny ALBEF on real data",
        "",
        f"{steps:,} updates of pretraining, {tuning_steps:,} of fine-tuning, one seed; 95 % intervals over the pictures"
        " of each. At this size there is no queue: the contrastive loss and its soft labels are"
        " over the batch.",
        "",
        "| run | figure | value | over |",
        "|---|---|---|---|",
    ]
    done = {}
    for name, folder in FOLDERS.items():
        if (out / folder / "results.json").is_file():
            made, asked = config.load(out / folder), steps if name in PARTS[:2] else tuning_steps
            if made.values["train.steps"] != asked:
                print(f"left out: {folder}, which has {made.values['train.steps']:,} updates and not {asked:,}")
            else:
                done[name] = folder
    rows: list[tuple[str, str, Result | None]] = []
    for name, folder in done.items():
        found = results.read(out / folder / "results.json")
        rows += [(name, figure, found.get(figure)) for figure in SHOWN[name]]
        if name in WAYS:
            rows.append((name, RECALL, recall(found, WAYS[name])))
    if WHOLE in done and BLIND in done:
        rows += [(name, ACCURACY, result) for name, result in beside(photographs).items()]
    numbers: dict[str, Any] = {}
    for name, figure, result in rows:
        numbers.setdefault(name, {})[figure] = as_json(result)
        if result is None:
            lines.append(f"| {name} | `{figure}` | – | – |")
            continue
        over = "–" if result.n is None else f"{result.n:,}"
        interval = "" if result.low is None else f" [{result.low:.4g}, {result.high:.4g}]"
        lines.append(f"| {name} | `{figure}` | {result.value:.4g}{interval} | {over} |")
    command = f"python benchmarks/albef_real.py --data.root DATA --out {out.name} --steps {steps}"
    command += f" --tuning-steps {tuning_steps}"
    print("\n".join(lines))
    written = side_by_side.write("albef_real", numbers, command=command)
    written.with_suffix(".md").write_text("\n".join([*lines, "", f"    {command}", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
