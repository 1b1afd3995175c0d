"""Tiny ALBEF on real data: the embedded pairs, Flickr8k's photographs, and entailment between them and sentences.

    python benchmarks/albef_real.py --data.root DATA --out runs/albef-real

    embedded      pretrained on the embedded drawings, measured as `trivium evaluate` measures
    flickr8k      pretrained on Flickr8k's training photographs, scored zero-shot on dev (R@10, median rank), by cosine
                  and re-ranked; then fine-tuned on retrieval and scored again
    entailment    fine-tuned on the triples of its photographs, those with md5(file) % 10 = 0 held out; beside it the
                  same from the hypothesis alone, and the commonest answer

Runs that are done are not repeated. Writes results/albef_real.json and .md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import side_by_side
from albef_runs import ENTAILMENT, TINY_TUNING, Photographs, as_json, run

from trivium.evaluate import results
from trivium.evaluate.results import Result

PARTS = ("embedded", "flickr8k", "entailment")
HYPOTHESIS = "text classification"  # of the sentence without its photograph
SHOWN = {
    "embedded": ["retrieval.style.text_to_image_r10", "retrieval.style.image_to_text_r10",
                 "retrieval.style.text_to_image_reranked_r10", "retrieval.style.image_to_text_reranked_r10",
                 "zero_shot.group", "itm.accuracy"],
    "flickr8k": [f"retrieval.pairs.{way}{order}_{figure}" for way in ("text_to_image", "image_to_text")
                 for order in ("", "_reranked") for figure in ("r10", "median_rank")],
    "flickr8k fine-tuned": [f"retrieval.dev.{way}{order}_{figure}" for way in ("ir", "tr")
                            for order in ("", "_reranked") for figure in ("r10", "median_rank")],
    "entailment": [f"{ENTAILMENT}.test.accuracy"],
    "entailment, hypothesis alone": [f"{HYPOTHESIS}.test.accuracy"],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=2000, help="of each pretraining")
    parser.add_argument("--tuning-steps", type=int, default=400, help="of each fine-tuning")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    photographs, runs = Photographs(given.root, given.out), {}

    def pretrained(name: str, **values: Any) -> Path:
        named = {key.replace("__", "."): value for key, value in values.items()}
        settings = {"size": "tiny", "train.steps": given.steps, "train.save-every": 200, **named}
        return run(given.out / name, ["pretrain", "albef"], settings, given.device)

    def tuned(name: str, task: str, init: Path, values: dict[str, Any]) -> Path:
        settings = {"init": init, **TINY_TUNING, "epochs": None, "train.steps": given.tuning_steps, **values}
        return run(given.out / name, ["finetune", task], settings, given.device)

    if "embedded" in given.parts:
        runs["embedded"] = pretrained("embedded")
    if "flickr8k" in given.parts or "entailment" in given.parts:
        train = photographs.train
        runs["flickr8k"] = pretrained(
            "flickr8k", data__pairs=train, data__validation=photographs.dev, data__text_column="captions",
            data__vocabulary="bert",
        )  # fmt: skip
    if "flickr8k" in given.parts:
        pairs = {"data.train": photographs.train, "data.dev": photographs.dev, "data.text-column": "captions"}
        runs["flickr8k fine-tuned"] = tuned("flickr8k-retrieval", "retrieval", runs["flickr8k"], pairs)
    if "entailment" in given.parts:
        tables: dict[str, Any] = {f"data.{split}": [path] for split, path in photographs.entailment().items()}
        head = {"head.activation": "relu", "head.dropout": 0.0, "distillation.alpha": 0.4, "distillation.ramp": 0.0}
        start = runs["flickr8k"]
        runs["entailment"] = tuned("entailment", "image_text_classification", start, tables | head)
        name = "entailment, hypothesis alone"
        runs[name] = tuned("entailment-hypothesis", "text_classification", start, tables | head)
    sum_up(runs, given.out, given.steps, given.tuning_steps)


def sum_up(runs: dict[str, Path], out: Path, steps: int, tuning_steps: int) -> None:
    lines = [
        "# Tiny ALBEF on real data",
        "",
        f"{steps:,} updates of pretraining, {tuning_steps:,} of fine-tuning; 95 % intervals over the units of each.",
        "",
        "| run | figure | value | over |",
        "|---|---|---|---|",
    ]
    numbers: dict[str, Any] = {}
    for name, folder in runs.items():
        found = results.read(folder / "results.json")
        for figure in SHOWN[name]:
            result: Result | None = found.get(figure)
            numbers.setdefault(name, {})[figure] = as_json(result)
            if result is not None:
                interval = "" if result.low is None else f" [{result.low:.4g}, {result.high:.4g}]"
                lines.append(f"| {name} | `{figure}` | {result.value:.4g}{interval} | {result.n or 0:,} |")
    command = f"python benchmarks/albef_real.py --data.root DATA --out {out.name} --steps {steps}"
    command += f" --tuning-steps {tuning_steps}"
    print("\n".join(lines))
    written = side_by_side.write("albef_real", numbers, command=command)
    written.with_suffix(".md").write_text("\n".join([*lines, "", f"    {command}", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
