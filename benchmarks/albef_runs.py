"""What the benchmarks of ALBEF share: its data, runs that are not repeated, and figures unit by unit.

A run's folder is named after what it is; one that has a results.json is done, one that was begun goes on. So every
script may be stopped and started, and several processes may take different cells of one table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.cli import main as trivium
from trivium.evaluate import outcomes
from trivium.evaluate.results import Result, mean_of

ENTAILMENT = "classification of a picture and a text"  # how `trivium finetune` calls tables of one's own
TINY_TUNING: dict[str, Any] = {  # a tiny model wants a larger rate than the published ones, and fewer rows of a step
    "optim.lr": 3e-4, "optim.warmup": 0.1, "optim.final": 0.05, "data.batch": 64,
}  # fmt: skip


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
        """A table of every so many of the training photographs, of whose captions a share is rotated among those that
        are drawn for it."""
        path = self.out / "data" / f"{name}.parquet"
        if not path.is_file():
            table = pa.concat_tables([pq.read_table(file) for file in self.train])
            table = table.select(["image", "file", "captions"]).take(np.arange(0, len(table), every))
            if noise:
                drawn = np.random.default_rng(seed).permutation(len(table))[: round(noise * len(table))]
                order = np.arange(len(table))
                order[drawn] = np.roll(drawn, 1)
                captions = table["captions"].take(order)
                table = table.set_column(table.schema.get_field_index("captions"), "captions", captions)
            write_beside(path, lambda beside: pq.write_table(table, beside, row_group_size=500))
        return path

    def entailment(self) -> dict[str, Path]:
        """Tables of hypotheses beside photographs: "test" holds a tenth of these, by md5 of their file's name, "dev"
        another."""
        folder = self.out / "data" / "entailment"
        paths = {split: folder / f"{split}.jsonl" for split in ("train", "dev", "test")}
        if paths["test"].is_file():
            return paths
        rows = pq.read_table(self.root / "flickr8k" / "entailment.parquet").to_pylist()
        wanted = {row["file"] for row in rows}
        lines: dict[str, list[str]] = {split: [] for split in paths}
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for file in self.train:
            for row in pq.read_table(file, columns=["file", "image"]).to_pylist():
                if row["file"] in wanted:
                    (folder / "pictures" / row["file"]).write_bytes(row["image"])
        for row in rows:
            tenth = int(hashlib.md5(row["file"].encode()).hexdigest(), 16) % 10
            entry = {"image": f"pictures/{row['file']}", "text": row["hypothesis"], "label": row["label"]}
            lines[{0: "test", 1: "dev"}.get(tenth, "train")].append(json.dumps(entry) + "\n")
        for split, path in paths.items():
            write_beside(path, lambda beside, split=split: beside.write_text("".join(lines[split])))
        return paths


def write_beside(path: Path, write: Any) -> None:
    """Whole or not at all: another process may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    write(beside)
    beside.replace(path)


def run(out: Path, words: Sequence[str], values: Mapping[str, Any], device: str) -> Path:
    """`trivium pretrain` or `trivium finetune`, unless it is done; one that was begun goes on."""
    if (out / "results.json").is_file():
        return out
    if (out / "config.json").is_file():
        command = [words[0], str(out), "--resume"]
    else:
        flags = [word for name, value in values.items() for word in (f"--{name}", *_told(value))]
        command = [*words, "--out", str(out), "--train.device", device, *flags]
    if code := trivium(command):
        raise SystemExit(code)
    if not (out / "results.json").is_file():
        raise SystemExit(f"{out} was stopped before its end: give the same command again")
    return out


def _told(value: Any) -> list[str]:
    return (
        [str(each) for each in value] if isinstance(value, list | tuple) else ["null" if value is None else str(value)]
    )


def units(out: Path, figures: Sequence[str]) -> dict[str, float]:
    """What each unit of a run gave, by its name: the mean over some figures of the same units."""
    found = outcomes.read(out / outcomes.NAME)
    several = [found[name] for name in figures]
    assert all(each.units == several[0].units for each in several), "figures of different units"
    return dict(zip(several[0].units, np.mean([each.values for each in several], axis=0).tolist(), strict=True))


def mean_over(seeds: Sequence[Mapping[str, float]]) -> Result:
    """Of the same units in runs of several seeds; the units are drawn again for the interval, and not the seeds."""
    names = sorted(seeds[0])
    return mean_of(np.mean([[each[name] for name in names] for each in seeds], axis=0))


def difference(mine: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> Result:
    """Mean of mine less the other, unit by unit, with its interval."""
    names = sorted(mine[0])
    one, two = (np.mean([[each[name] for name in names] for each in several], axis=0) for several in (mine, other))
    return mean_of(one - two)


def per_cent(result: Result | None) -> str:
    if result is None:
        return "–"
    return f"{100 * result.value:.1f} [{100 * (result.low or 0):.1f}, {100 * (result.high or 0):.1f}]"


def as_json(result: Result | None) -> dict[str, Any] | None:
    return None if result is None else result.as_json()
