"""Figures of a fine-tuned model from its predictions, and the predictions as files.

N samples.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.data.answers import normalized
from trivium.data.labelled import UNSEEN, Row
from trivium.evaluate import vqa
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.metrics import METRICS, measured
from trivium.evaluate.results import Result, Results, mean_of
from trivium.manifest import write_whole


@dataclass(frozen=True)
class Predictions:
    """What a model says of the rows of one split that could be read."""

    rows: list[Row]
    chosen: np.ndarray  # [N]: the number of a class, or a number
    probability: np.ndarray  # [N], of the class that is chosen; of an answer, how right it is said to be
    probability_of_1: np.ndarray  # [N], of class 1
    labels: tuple[str, ...]  # of the classes; none of numbers
    bad: list[str]  # a sentence for each row that could not be read
    is_final: bool = True  # False: one of these may be readable another time

    @property
    def is_labelled(self) -> bool:
        return all(row.is_labelled for row in self.rows)

    def named(self) -> list[str | float]:
        """The name of the class of each row, or its number."""
        return [self.labels[n] if self.labels else float(n) for n in self.chosen]


def figure(metric: str, found: Predictions) -> float:
    """One metric, without an interval: what a run chooses its checkpoint by."""
    if found.rows[0].answers is not None:
        return float(np.mean(_vqa(found)))
    return METRICS[metric](*_columns(metric, found))


def result(metric: str, found: Predictions) -> Result:
    """One metric with its interval."""
    units = [f"{row.file}, {row.where}" for row in found.rows]
    # What is asked or said of one picture, or of one pair of them, stands and falls together.
    shown = [(row.image, row.second_image) for row in found.rows if row.image is not None]
    groups = [" and ".join(filter(None, each)) for each in shown] if len(shown) == len(units) else None
    if found.rows[0].answers is not None:
        return mean_of(_vqa(found), units, groups)
    return measured(metric, *_columns(metric, found), units, groups)


def chance(metric: str, found: Predictions) -> float | None:
    """What always giving the commonest class or answer comes to, of those that can be given; None where there is none,
    or it was not measured."""
    if found.rows[0].answers is not None:
        given = {normalized(label) for label in found.labels}
        truths = Counter(normalized(each) for row in found.rows for each in row.truths)
        if not (can_be := {answer: number for answer, number in truths.items() if answer in given}):
            return None
        commonest = max(can_be, key=can_be.__getitem__)
        return float(np.mean([vqa.score(commonest, row.truths) for row in found.rows]))
    labels = np.array([row.label for row in found.rows if row.label is not None], dtype=np.int64)
    if metric == "auroc":
        return 0.5
    if len(labels) < len(found.rows) or metric not in METRICS:
        return None
    commonest_class = np.bincount(labels[labels != UNSEEN], minlength=1).argmax()
    return float(METRICS[metric](np.full(len(labels), commonest_class), labels))


def told(metric: str, result: Result, chance: float | None) -> str:
    """A figure for a person."""
    sentence = (
        f"{metric.replace('_', ' ')} {result.value:.4f} [{result.low:.4f}, {result.high:.4f}] over {result.n:,} rows"
    )
    return sentence if chance is None else f"{sentence}, where the commonest answer gives {chance:.4f}"


def tell(found: Evaluation, title: str, split: str, metrics: Sequence[str], predictions: Predictions) -> Results:
    """Put the figures of one labelled split into an evaluation, with what guessing gives and a sentence each. Returns
    the figures by metric."""
    results = {metric: result(metric, predictions) for metric in metrics}
    for metric, each in results.items():
        name, guess = f"{title}.{split}.{metric}", chance(metric, predictions)
        found.results[name] = each
        if guess is not None:
            found.chance[name] = guess
        found.headline.append(f"{title}, {split}: {told(metric, each, guess)}.")
    return results


def _columns(metric: str, found: Predictions) -> tuple[np.ndarray, np.ndarray]:
    truths = [row.value if row.label is None else row.label for row in found.rows]
    return found.probability_of_1 if metric == "auroc" else found.chosen, np.array(truths)


def _vqa(found: Predictions) -> np.ndarray:
    """Accuracy of each answer."""
    pairs = zip(found.named(), found.rows, strict=True)
    return np.array([vqa.score(str(answer), row.truths) for answer, row in pairs])


# ---------------------------------------------------------------------------------------------------------- files


def write_predictions(found: Predictions, path: Path) -> None:
    """One JSON object a line: which row, what is predicted and how surely, and its label where it has one.

    Raises TriviumError where the folder cannot be written to.
    """
    lines = []
    for row, answer, probability in zip(found.rows, found.named(), found.probability, strict=True):
        line: dict[str, object] = {"row": row.key, "file": row.file, "prediction": answer}
        if found.labels:
            line["probability"] = round(float(probability), 6)
        if row.label is not None:
            line["label"] = row.truths[0] if row.label == UNSEEN else found.labels[row.label]
        if row.value is not None:
            line["label"] = row.value
        lines.append(json.dumps(line, ensure_ascii=False))
    write_whole(path, "".join(f"{line}\n" for line in lines))


def write_glue_submission(found: Predictions, path: Path, as_in_files: Sequence[str] | None) -> None:
    """``index TAB prediction``, as gluebenchmark.com takes it. as_in_files: the labels as the files have them."""
    told: Iterable[object] = found.named() if as_in_files is None else [as_in_files[n] for n in found.chosen]
    page = io.StringIO()
    writer = csv.writer(page, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", "prediction"])
    writer.writerows([row.key, answer] for row, answer in zip(found.rows, told, strict=True))
    write_whole(path, page.getvalue())


def write_vqa_submission(found: Predictions, path: Path) -> None:
    """``[{"question_id": 1, "answer": "yes"}, ...]``, as EvalAI takes it."""
    answers = zip(found.rows, found.named(), strict=True)
    write_whole(path, json.dumps([{"question_id": int(row.key), "answer": answer} for row, answer in answers]) + "\n")
