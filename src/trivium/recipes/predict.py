"""What a model with a head for a task says of labelled rows.

B rows at once, N rows in all, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trivium.data.labelled import LabelledRows
from trivium.data.loader import read
from trivium.data.order import Draws
from trivium.data.task_collate import TaskCollate
from trivium.errors import BadSample, TriviumError
from trivium.evaluate.tasks import Predictions
from trivium.methods.finetune import FineTuning
from trivium.train.protocol import Batch, Method


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

    answers: of a batch, [B, K]. stream: the name that batches bear. Raises TriviumError where no row can be read.
    """
    was_training = method.training
    method.eval()
    collate = replace(collate, train=False)
    lengths = rows.lengths()
    order = np.arange(len(rows)) if lengths is None else np.argsort(np.asarray(lengths), kind="stable")
    at: list[int] = []
    bad: list[str] = []
    columns: list[Tensor] = []
    for first in range(0, len(order), batch):
        prepared, several = [], []
        for number in order[first : first + batch].tolist():
            try:
                prepared.append(read(rows, collate, number, number, Draws(0, "evaluation", number)))
                several.append(number)
            except BadSample as error:
                bad.append(str(error))
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
        raise TriviumError(f"none of its rows can be read; the first: {bad[0] if bad else 'there is none'}")
    by_row = np.argsort(at)
    table = torch.cat(columns).numpy()[by_row]
    return Predictions(
        [rows.row(at[n]) for n in by_row],
        table[:, 0].astype(np.int64) if is_class else table[:, 0],
        table[:, 1],
        table[:, 2],
        labels,
        bad,
    )
