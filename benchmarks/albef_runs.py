"""What the benchmarks of ALBEF share: its data, runs that are not repeated, and figures unit by unit.

A run's folder is named after what it is; one that has a results.json is done, one that was begun goes on, and one that
was made with other settings is refused. So every script may be stopped and started, and several processes may take
different cells of one table: whoever needs what another is making waits for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import seeds

from trivium.cli import main as trivium
from trivium.cli.overrides import set_overrides, split_overrides
from trivium.data.answers import normalized
from trivium.data.labelled import Splits
from trivium.data.labelled_tables import Columns, read_tables
from trivium.data.tokenizer import Tokenizer
from trivium.evaluate import outcomes, vqa
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.results import Result, mean_of
from trivium.recipes import RECIPES
from trivium.train import config, run_folder

ENTAILMENT = "classification of a picture and a text"  # how `trivium finetune` calls tables of one's own
NUM_WORDS = 4096  # of a vocabulary; BERT's would be nine tenths of a tiny model


def tiny_tuning(steps: int) -> dict[str, Any]:
    """Settings of each fine-tuning of a tiny model, which wants a larger rate than the published ones, fewer rows of a
    step, and a teacher that keeps up within so few steps. The last checkpoint counts: what is measured chooses none."""
    return {
        "optim.lr": 3e-4, "optim.warmup": 0.1, "optim.final": 0.05, "data.batch": 64, "distillation.ramp": 0.2,
        "distillation.reach": 0.1, "epochs": None, "train.steps": steps, "train.patience": None,
        "train.evaluate-every": steps, "train.save-every": 200, "train.keep-last": 1,
    }  # fmt: skip


# Beside these in retrieval: pretraining at this size has none either. At such a rate the keys of a queue are told by
# their age, which drives cosines apart: from a start of 300 updates R@10 of Flickr8k's texts came to 2.2 in place of
# 4.0. From one of 2,000 it made no difference.
NO_QUEUE: dict[str, Any] = {"objectives.queue": 0}


def tenth(file: str) -> int:
    """0 to 9, by md5 of a picture's file name. Those of 0 are held out everywhere, from pretraining too."""
    return int(hashlib.md5(file.encode()).hexdigest(), 16) % 10


@dataclass(frozen=True)
class Photographs:
    """Flickr8k below DATA/flickr8k, and what is written of it below OUT/data."""

    root: Path
    out: Path

    @property
    def train(self) -> list[Path]:
        return sorted((self.root / "flickr8k").glob("train-*.parquet"))

    @property
    def dev(self) -> list[Path]:
        return sorted((self.root / "flickr8k").glob("dev-*.parquet"))

    def written(self, name: str, every: int = 1, noise: float = 0.0, seed: int = 0) -> Path:
        """A table of every so many of the training photographs but for those that entailment is measured on, whose
        captions are its premises. Of the captions a share is rotated among those that are drawn for it."""
        path = self.out / "data" / f"{name}.parquet"
        if not path.is_file():
            table = pa.concat_tables([pq.read_table(file) for file in self.train])
            kept = [row for row, file in enumerate(table["file"].to_pylist()) if tenth(file)]
            table = table.select(["image", "file", "captions"]).take(kept[::every])
            if noise:
                drawn = np.random.default_rng(seed).permutation(len(table))[: round(noise * len(table))]
                order = np.arange(len(table))
                order[drawn] = np.roll(drawn, 1)
                captions = table["captions"].take(order)
                table = table.set_column(table.schema.get_field_index("captions"), "captions", captions)
            write_beside(path, lambda beside: pq.write_table(table, beside, row_group_size=500))
        return path

    def vocabulary(self, *tables: Path) -> Path:
        """A tokenizer.json, learned once from the captions of all training photographs and of JSONL tables."""
        path = self.out / "data" / "tokenizer.json"
        if not path.is_file():
            captions = pq.read_table(self.written("pairs"), columns=["captions"])["captions"].to_pylist()
            captions += [json.loads(line)["captions"] for table in tables for line in table.read_text().splitlines()]
            tokenizer = Tokenizer.train([text for several in captions for text in several], NUM_WORDS)
            write_beside(path, lambda beside: beside.write_text(tokenizer.to_json(), encoding="utf-8"))
        return path

    def entailment(self) -> dict[str, Path]:
        """Tables of hypotheses beside photographs: "test" holds a tenth of these, by md5 of their file's name, "dev"
        another."""
        folder = self.out / "data" / "entailment"
        paths = {split: folder / f"{split}.jsonl" for split in ("train", "dev", "test")}
        with alone(folder):
            if not paths["test"].is_file():
                self._write_entailment(folder, paths)
        return paths

    def judged(self) -> Splits:
        """The rows of these tables."""
        train, dev, test = ([str(self.entailment()[split])] for split in ("train", "dev", "test"))
        return read_tables(train, dev, test, Columns(), kind="pairs", regression=False, held_out_share=0.0)

    def _write_entailment(self, folder: Path, paths: dict[str, Path]) -> None:
        rows = pq.read_table(self.root / "flickr8k" / "entailment.parquet").to_pylist()
        wanted = {row["file"] for row in rows}
        lines: dict[str, list[str]] = {split: [] for split in paths}
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for file in self.train:
            for row in pq.read_table(file, columns=["file", "image"]).to_pylist():
                if row["file"] in wanted:
                    (folder / "pictures" / row["file"]).write_bytes(row["image"])
        for row in rows:
            entry = {"image": f"pictures/{row['file']}", "text": row["hypothesis"], "label": row["label"]}
            lines[{0: "test", 1: "dev"}.get(tenth(row["file"]), "train")].append(json.dumps(entry) + "\n")
        for split, path in paths.items():
            write_beside(path, lambda beside, split=split: beside.write_text("".join(lines[split])))


def write_beside(path: Path, write: Any) -> None:
    """Whole or not at all: another process may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(beside)
    beside.replace(path)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process makes meanwhile what is to stand at `path`: it waits, and then finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(out: Path, words: Sequence[str], values: Mapping[str, Any], device: str, threads: int | None) -> Path:
    """`trivium pretrain` or `trivium finetune`, unless it is done; one that was begun goes on.

    Raises SystemExit where the run that is there was made with other values.
    """
    flags, machine = _flags(values), _flags({"train.device": device, "train.threads": threads})
    with alone(out):
        command = [*words, "--out", str(out), *flags, *machine]
        if (out / "config.json").is_file():
            _refuse_another(out, words, split_overrides(flags))
            command = [words[0], str(out), "--resume", *machine]
        if (out / "results.json").is_file():
            return out
        if code := trivium(command):
            raise SystemExit(code)
    if not (out / "results.json").is_file():
        raise SystemExit(f"{out} was stopped before its end: give the same command again")
    return out


def _flags(values: Mapping[str, Any]) -> list[str]:
    several = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    return [
        word
        for name, each in several.items()
        for word in (f"--{name}", *("null" if value is None else str(value) for value in each))
    ]


def _refuse_another(out: Path, words: Sequence[str], changes: dict[str, list[str]]) -> None:
    """How fast a run is made, and how often it is saved, may differ (run_folder.FREE). Minutes were settled when it
    began, and it has its steps in their place: whoever gives minutes names the folder after them."""
    recipe, arguments = words[1], {name: changes.pop(name)[0] for name in ("size",) if name in changes}
    if words[0] == "finetune":
        recipe, arguments = words[0], {"task": words[1]}
    asked = config.Config(recipe, arguments)
    values = config.leaves(set_overrides(config.build(asked, RECIPES), changes).with_absolute_paths())
    there = config.load(out)
    if (there.recipe, there.arguments) != (recipe, arguments):
        raise SystemExit(f"{out} is a run of {there.recipe} {there.arguments}, not {arguments}: name another --out")
    settled = ["train.minutes"] if there.values.get("train.minutes") is None else []
    for name in changes.keys() - {*run_folder.FREE, *settled}:
        if there.values.get(name) != values[name]:
            raise SystemExit(
                f"{out} was made with {name} = {there.values.get(name)}, not {values[name]}: give the command that it"
                " was made with, or name another --out"
            )


def units(out: Path, figures: Sequence[str]) -> Outcomes:
    """What each unit of a run gave: the mean over some figures of the same units."""
    found = outcomes.read(out / outcomes.NAME)
    several = [found[name] for name in figures]
    assert all(each.units == several[0].units for each in several), "figures of different units"
    return replace(several[0], values=np.mean([each.values for each in several], axis=0))


def always_the_commonest(splits: Splits, split: str) -> tuple[str, Result]:
    """The class or answer that is commonest in training, and what always giving it comes to on a held-out split."""
    classes = Counter(row.label for row in splits.train.good() if row.label is not None)
    rows = list(splits.held_out[split].good())
    if classes:
        [(label, _)] = classes.most_common(1)
        name, right = splits.labels[label], [float(row.label == label) for row in rows]
    else:
        answers = Counter(normalized(truth) for row in splits.train.good() for truth in row.truths)
        [(name, _)] = answers.most_common(1)
        right = [vqa.score(name, row.truths) for row in rows]
    return name, mean_of(np.array(right), groups=[f"{row.image} and {row.second_image}" for row in rows])


def mean_over(several: Sequence[Outcomes]) -> Result:
    """Of the same units in runs of several seeds; the units are drawn again for the interval, and not the seeds."""
    assert all(each.units == several[0].units for each in several), "runs of different units"
    return mean_of(np.mean([each.values for each in several], axis=0), groups=several[0].groups)


def difference(mine: Sequence[Outcomes], other: Sequence[Outcomes]) -> Result:
    """Mean of mine less the other, unit by unit, with its interval over the units."""
    assert all(each.units == mine[0].units for each in (*mine, *other)), "runs of different units"
    one, two = (np.mean([each.values for each in several], axis=0) for several in (mine, other))
    return mean_of(one - two, groups=mine[0].groups)


def spread(cells: Iterable[Sequence[Outcomes]]) -> seeds.Spread:
    """Of the seeds of cells that are beside each other in a table."""
    return seeds.spread([[float(each.values.mean()) for each in several] for several in cells])


def compared(
    mine: Sequence[Outcomes], other: Sequence[Outcomes], over: seeds.Spread, runs: int
) -> tuple[Result, str, list[float]]:
    """Mine less the other with its interval over units and seeds, the verdict (see `seeds`), each seed's difference.

    runs: how many seeds there are to be.
    """
    each = [difference([a], [b]).value for a, b in zip(mine, other, strict=True)]
    gap = seeds.widened(difference(mine, other), over, len(each))
    return gap, seeds.verdict(gap, each, runs), each


def per_cent(result: Result | None) -> str:
    if result is None:
        return "–"
    return f"{100 * result.value:.1f} {seeds.brackets(result)}"


def as_json(result: Result | None) -> dict[str, Any] | None:
    return None if result is None else result.as_json()
