"""UniT's losses on held-out rows, task by task, each beside its chance where it has one.

B rows, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from trivium.data.detection import Detection
from trivium.data.labelled import LabelledRows, is_labelled
from trivium.data.loader import evaluation_batches
from trivium.errors import TriviumError
from trivium.evaluate import losses
from trivium.methods.unit import UnitMethod
from trivium.recipes.prepared import Losses
from trivium.recipes.unit_tasks import Opened
from trivium.train import step
from trivium.train.protocol import Batch, Key

MOST_ROWS = 1000  # of each task


def on_held_out(
    method: UnitMethod,
    tasks: list[Opened],
    collates: Mapping[str, Any],
    rows_at_once: Callable[[int], int],
    rows: int | None,
    say: Callable[[str], None],
) -> tuple[Losses, list[str]]:
    """Of each task that has labelled held-out rows, on its first such split; and a sentence on the rows of each that
    cannot be read. rows: at most so many, evenly spread."""
    found: Losses = {}
    bad: list[str] = []
    for task in tasks:
        splits: dict[str, Any] = dict(task.data.held_out)
        name = next((n for n, of in splits.items() if isinstance(task.data, Detection) or is_labelled(of)), None)
        if name is None:
            continue
        source = splits[name].of_known_classes() if isinstance(splits[name], LabelledRows) else splits[name]
        say(f"{task.title}: losses on {name}")
        seen: list[Batch] = []
        collate = replace(collates[task.name], train=False)
        samples = min(len(source), MOST_ROWS, MOST_ROWS if rows is None else rows)
        batches = evaluation_batches(source, collate, rows_at_once(task.given.batch), samples, task.name)
        try:
            measured = step.measure(method, ([batch] for batch in _watched(batches, seen)), Key(0, task.name, 0))
        except TriviumError as error:  # the losses of the other tasks are not lost for it
            bad.append(f"losses of {task.title}, {name}: {error}")
            continue
        chance = _chance(method, task, seen)
        found |= {loss: (value, chance.get(loss)) for loss, value in measured.items()}
        if left_out := [each for batch in seen for each in batch.bad]:
            bad.append(
                f"{task.title}, {name}: {len(left_out):,} rows that the losses leave out; the first: {left_out[0]}"
            )
    return found, bad


def _watched(batches: Iterator[Batch], seen: list[Batch]) -> Iterator[Batch]:
    """The same, and what is kept of each: all but its pictures and texts."""
    for batch in batches:
        seen.append(replace(batch, images=(), texts=()))
        yield batch


def _chance(method: UnitMethod, task: Opened, seen: list[Batch]) -> dict[str, float]:
    """Of a guess from how often each label occurs. Boxes have none."""
    if isinstance(task.data, Detection):
        name = f"{task.name}.class"
        return {name: _of_classes(method, task.name, seen)} if method.weights[name] else {}
    target = torch.cat([batch.targets[method.targets[task.name]] for batch in seen])
    if method.targets[task.name] == "label":
        return {task.name: losses.chance(target, len(task.data.labels))}
    return {task.name: sum(losses.binary_entropy(share) for share in target.double().mean(0).tolist())}


def _of_classes(method: UnitMethod, name: str, seen: list[Batch]) -> float:
    """Of queries that all say the same, in every layer: the entropy of what they are to say, by its weight."""
    task = method.model.task(name)
    weight_K = torch.zeros(task.num_labels + 1, dtype=torch.float64)
    whole = 0.0
    for batch in seen:
        weight_K[:-1] += torch.bincount(method.objects(batch, task).label_M, minlength=task.num_labels)
        whole += float(method.counts(batch)[f"{name}.class"])
    weight_K[-1] = max(0.0, whole - float(weight_K.sum()))  # what is left are queries that are to find nothing
    shares = [share for share in (weight_K / weight_K.sum()).tolist() if share > 0]
    return -method.model.config.decoder_layers * sum(share * math.log(share) for share in shares)
