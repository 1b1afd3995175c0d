"""What runs have in common that count epochs and choose one of their checkpoints by a figure on held-out rows."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trivium.errors import TriviumError
from trivium.manifest import verify_manifest, written_beside
from trivium.train import checkpoint
from trivium.train.optim import never_warm
from trivium.train.run import Run
from trivium.train.run_folder import RunFolder
from trivium.train.selection import Selection

Recipe = TypeVar("Recipe", bound=Any)  # with `data.batch`, `optim`, `train` and `epochs`


EVALUATIONS = 50  # in a run whose epochs are short
MANY_PASSES = 100


def steps_per_epoch(num_rows: int, batch: int) -> int:
    return max(1, math.ceil(num_rows / batch))


def with_steps(recipe: Recipe, num_rows: int) -> Recipe:
    """Epochs as steps, and one evaluation an epoch where nothing else is said, but no more than EVALUATIONS in a run;
    written down as the run's own values."""
    per_epoch = steps_per_epoch(num_rows, recipe.data.batch)
    steps = recipe.train.steps if recipe.epochs is None else math.ceil(recipe.epochs * per_epoch)
    if sentence := never_warm(recipe.optim, steps):
        raise TriviumError(sentence)
    every = recipe.train.evaluate_every or min(max(per_epoch, steps // EVALUATIONS), steps)
    return replace(recipe, train=replace(recipe.train, steps=steps, evaluate_every=every), epochs=None)


def many_passes(recipe: Recipe, num_rows: int) -> list[str]:
    """A sentence where the steps are far more than so few rows can use: published steps, or those of a batch that is
    larger than all rows, of which each is an epoch."""
    steps, batch = recipe.train.steps, recipe.data.batch
    passes = steps * batch / num_rows
    if passes <= MANY_PASSES:
        return []
    smaller = f"a smaller batch, such as --data.batch {num_rows}," if batch > num_rows else ""
    if smaller and steps <= MANY_PASSES:
        advice = f"{smaller} makes fewer of them"
    else:
        advice = f"--epochs 10{f' with {smaller}' if smaller else ''} counts these instead"
    return [f"{steps:,} steps of {batch} rows are {passes:,.0f} times through the {num_rows:,} training rows: {advice}"]


def keep_best(run: Run, out: Path) -> str:
    """Put the weights of the best checkpoint into the method, and its model folder at RUN/model. What there is to say
    of it."""
    assert run.select is not None
    folder = RunFolder(out)
    selection = Selection.of_log(folder.metrics, run.select)
    if selection.best_step is None:
        return "no evaluation gave a number to choose a checkpoint by: the last one is taken"
    best = checkpoint.folder_of(folder.checkpoints, selection.best_step)
    verify_manifest(best)
    checkpoint.restore(best, run.method, None)
    if (out / "model").is_dir():
        shutil.rmtree(out / "model")
    with written_beside(out / "model") as beside:
        shutil.copytree(best / "model", beside, dirs_exist_ok=True)
    return f"the checkpoint of step {selection.best_step} is kept: {selection}"
