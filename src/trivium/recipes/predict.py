"""What a model with a head for a task says of labelled rows, and how right it is.

B rows at once, N rows in all, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trivium.data.glue import GLUE
from trivium.data.labelled import LabelledRows, is_labelled, of_unseen_classes
from trivium.data.loader import read
from trivium.data.order import Draws
from trivium.data.task_collate import TaskCollate
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.evaluate import tasks as figures_of
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import mean_over
from trivium.evaluate.tasks import Predictions
from trivium.methods.finetune import FineTuning
from trivium.models.finetuned import Reads
from trivium.recipes.tasks import Task
from trivium.train.protocol import Batch, Method

FIRST_LOOKS = 100  # rows of a split whose pictures are looked for before the run


class NoneReadable(TriviumError):
    """No row of a split can be read."""

    def __init__(self, bad: list[str], is_final: bool) -> None:
        super().__init__(f"none of its rows can be read; the first: {bad[0] if bad else 'there is none'}")
        self.is_final = is_final  # False: one of them may be readable another time


def check_readable(split: str, rows: LabelledRows) -> None:
    """That one of the first pictures of a split is there, before hours are spent on what could not be measured. Raises
    TriviumError."""
    bad = []
    for number in range(min(FIRST_LOOKS, len(rows))):
        try:
            rows.picture(number)
            return
        except UnreadableNow:  # another time it may be
            return
        except BadSample as error:
            bad.append(error)
    if bad:
        raise TriviumError(f"{split}: none of its first {len(bad):,} rows can be read; the first: {bad[0]}")


def tell_held_out(
    found: Evaluation,
    task: Task,
    title: str,
    held_out: Mapping[str, LabelledRows],
    predicted: Callable[[LabelledRows], Predictions],
    folder: Path | None,
    say: Callable[[str], None],
) -> bool:
    """Put the figures of every split that has labels into an evaluation, under a title, and of the dev splits the one
    that papers print under the title alone: a mean where there are several (MNLI), but of Hateful Memes that of
    dev_unseen, the validation split of MMF.

    Args:
        title: of the task, as `title_of` has it.
        predicted: what the model says of the rows of a split; it may raise TriviumError.
        folder: where the predictions of every split are written; None: nowhere.

    Returns:
        Whether any row could be read.
    """
    found_any = False
    reported = []
    printed = tuple(name for name in held_out if name == "dev_unseen") or ("dev",)
    for name, rows in held_out.items():
        say(f"{title}: {name}, {len(rows):,} rows")
        try:
            predictions = predicted(rows)
        except TriviumError as error:  # the figures of the other splits are not lost for it
            found.not_applicable.append(f"{name}: {error}")
            found.is_final &= not isinstance(error, NoneReadable) or error.is_final
            continue
        found_any = True
        found.is_final &= predictions.is_final
        if bad := predictions.bad:
            found.not_applicable.append(
                f"{len(bad):,} of {len(rows):,} rows of {name}, which cannot be read; the first: {bad[0]}"
            )
        found.notes += of_unseen_classes(name, rows)
        written = ""
        if folder is not None:
            try:
                _write(task, name, predictions, folder)
                written = "; its predictions are written"
            except TriviumError as error:  # nor are those of this one
                found.not_applicable.append(f"{name}: what is said of each row is not written: {error}")
        if not is_labelled(rows):
            found.not_applicable.append(f"{name}: it has no labels{written}")
            continue
        results = figures_of.tell(found, title, name, task.metrics, predictions)
        if name.startswith(printed):
            reported.append(results[task.reported])
    if reported:
        found.results[title] = reported[0] if len(reported) == 1 else mean_over(reported)
    return found_any


def title_of(task: Task, reads: Reads) -> str:
    """What its figures stand under: where a head reads vectors of picture and text side by side, that is told."""
    return f"{task.title} (concatenated)" if reads == "concatenated" else task.title


def _write(task: Task, split: str, predictions: Predictions, folder: Path) -> None:
    figures_of.write_predictions(predictions, folder / f"{split}.jsonl")
    if task.name in GLUE and split.startswith("test"):
        files = GLUE[task.name]
        told = None if files.labels is None else list(files.labels)
        figures_of.write_glue_submission(predictions, folder / f"{files.folder}-{split}.tsv", told)
    if task.gives == "answers" and all(row.key.isdecimal() for row in predictions.rows):
        figures_of.write_vqa_submission(predictions, folder / f"{split}.json")


def predict(
    method: FineTuning, rows: LabelledRows, collate: TaskCollate, batch: int, labels: tuple[str, ...]
) -> Predictions:
    """What a fine-tuned model says of every row (see `predict_by`)."""

    def answers(batch: Batch) -> Tensor:
        return method.model.answers(method.outputs(batch))

    return predict_by(answers, method, rows, collate, batch, labels, method.model.config.gives != "number")


@torch.no_grad()
def predict_by(
    answers: Callable[[Batch], Tensor],
    method: Method,
    rows: LabelledRows,
    collate: TaskCollate,
    batch: int,
    labels: tuple[str, ...],
    is_class: bool = True,
    stream: str = "evaluation",
) -> Predictions:
    """What a method in eval mode says of every row, in the order of the rows; texts of like length go in together.

    answers: of a batch, [B, K]. stream: the name that batches bear. Raises NoneReadable.
    """
    was_training = method.training
    method.eval()
    collate = replace(collate, train=False)
    lengths = rows.lengths()
    order = np.arange(len(rows)) if lengths is None else np.argsort(np.asarray(lengths), kind="stable")
    at: list[int] = []
    bad: list[str] = []
    is_final = True
    columns: list[Tensor] = []
    for first in range(0, len(order), batch):
        prepared, several = [], []
        for number in order[first : first + batch].tolist():
            try:
                prepared.append(read(rows, collate, number, number, Draws(0, "evaluation", number)))
                several.append(number)
            except BadSample as error:
                bad.append(str(error))
                is_final &= not isinstance(error, UnreadableNow)
        if not prepared:
            continue
        at += several
        places = torch.tensor(several)
        answers_BK = answers(collate.batch(stream, prepared, places, places, 0, ())).double()
        if not is_class:
            columns.append(answers_BK.expand(-1, 3).cpu())
        else:
            probability_B, chosen_B = answers_BK.max(1)
            columns.append(torch.stack([chosen_B.double(), probability_B, answers_BK[:, 1]], dim=1).cpu())
    method.train(was_training)
    if not at:
        raise NoneReadable(bad, is_final)
    by_row = np.argsort(at)
    table = torch.cat(columns).numpy()[by_row]
    return Predictions(
        [rows.row(at[n]) for n in by_row],
        table[:, 0].astype(np.int64) if is_class else table[:, 0],
        table[:, 1],
        table[:, 2],
        labels,
        bad,
        is_final,
    )
