"""GLUE (Wang et al. 2019) in its official layout: DIR/SST-2/train.tsv, dev.tsv and, where it is there, test.tsv.

Easy to get wrong: a quote is a plain character; CoLA has a header in its test file alone; the label of MNLI stands in
the last column, which is another one in train and in dev; lines end at line feeds alone, for sentences hold other
characters that count as line breaks elsewhere; a score of STS-B lies between 0 and 5.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.data.labelled import LabelledRows, Row, Splits
from trivium.errors import BadSample, TriviumError

NLI2 = {"entailment": "entailment", "not_entailment": "not_entailment"}
NLI3 = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}


@dataclass(frozen=True)
class GlueFiles:
    """Where things stand in the files of one task. Columns are counted from 0; -1 is the last."""

    folder: str
    texts: tuple[int, ...]  # one column, or two of a pair
    test_texts: tuple[int, ...]
    label: int
    labels: Mapping[str, str] | None  # as the file has it -> its name, in order of the classes; None: a number
    header: bool = True  # of train and dev
    dev: tuple[str, ...] = ("dev",)
    scale: float = 1.0  # the highest number, by which it is divided for the model; the lowest is 0


GLUE = {
    "cola": GlueFiles("CoLA", (3,), (1,), 1, {"0": "unacceptable", "1": "acceptable"}, header=False),
    "sst2": GlueFiles("SST-2", (0,), (1,), 1, {"0": "negative", "1": "positive"}),
    "mrpc": GlueFiles("MRPC", (3, 4), (3, 4), 0, {"0": "not_equivalent", "1": "equivalent"}),
    "stsb": GlueFiles("STS-B", (7, 8), (7, 8), 9, None, scale=5.0),
    "qqp": GlueFiles("QQP", (3, 4), (1, 2), 5, {"0": "not_duplicate", "1": "duplicate"}),
    "mnli": GlueFiles("MNLI", (8, 9), (8, 9), -1, NLI3, dev=("dev_matched", "dev_mismatched")),
    "qnli": GlueFiles("QNLI", (1, 2), (1, 2), 3, NLI2),
    "rte": GlueFiles("RTE", (1, 2), (1, 2), 3, NLI2),
}


def read_glue(task: str, root: str) -> Splits:
    """One task below `root` (or in it). A test file is read without labels. Raises TriviumError."""
    files = GLUE[task]
    folder = next((path for path in (os.path.join(root, files.folder), root) if _has(path, "train")), None)
    if folder is None:
        raise TriviumError(
            f"{root} holds no {files.folder}/train.tsv: give the folder that holds the tasks of GLUE as their owners"
            f" publish them (gluebenchmark.com), each with train.tsv and {files.dev[0]}.tsv"
        )
    labels = () if files.labels is None else tuple(files.labels.values())
    held_out = {name: _read(files, folder, name) for name in files.dev}
    tests = [name.replace("dev", "test") for name in files.dev]
    held_out |= {name: _read(files, folder, name) for name in tests if _has(folder, name)}
    return Splits(_read(files, folder, "train"), held_out, labels, scale=files.scale)


def _has(folder: str, split: str) -> bool:
    return os.path.isfile(os.path.join(folder, f"{split}.tsv"))


def _read(files: GlueFiles, folder: str, split: str) -> LabelledRows:
    path, is_test = os.path.join(folder, f"{split}.tsv"), split.startswith("test")
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            lines = [line.rstrip("\r\n").split("\t") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise TriviumError(f"{path} cannot be read ({error}): get it again") from None
    if not lines:
        raise TriviumError(f"{path} is empty: get it again")
    header = files.header or is_test
    num_fields = len(lines[0])
    needed = 1 + max(files.test_texts if is_test else (*files.texts, files.label))
    if num_fields < needed:
        raise TriviumError(
            f"{path} has {num_fields} columns where {files.folder} has {needed} or more: is it of another task?"
        )
    rows = [
        _row(files, path, number, cells, num_fields, is_test)
        for number, cells in enumerate(lines[header:], start=1 + header)
        if cells != [""]
    ]
    return LabelledRows(rows, "text")


def _row(files: GlueFiles, path: str, number: int, cells: list[str], num_fields: int, is_test: bool) -> Row | BadSample:
    where = f"line {number}"
    if len(cells) != num_fields:
        return BadSample(path, where, f"it has {len(cells)} fields where the first line has {num_fields}")
    texts = [cells[column].strip() for column in (files.test_texts if is_test else files.texts)]
    if not all(texts):
        return BadSample(path, where, "its text is empty")
    key = cells[0] if is_test else str(number)  # what a submission names its rows by
    target: dict[str, Any] = {}
    if not is_test:
        given = cells[files.label].strip()
        if files.labels is None:
            try:
                score = float(given)
            except ValueError:
                score = math.nan
            if not 0 <= score <= files.scale:
                return BadSample(path, where, f'its score "{given}" is no number from 0 to {files.scale:g}')
            target["value"] = score
        elif given not in files.labels:
            return BadSample(path, where, f'its label "{given}" is none of {", ".join(files.labels)}')
        else:
            target["label"] = list(files.labels).index(given)
    return Row(path, where, key, texts[0], texts[1] if len(texts) == 2 else None, **target)
