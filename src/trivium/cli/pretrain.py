"""`trivium pretrain`: a recipe, some leaves of its own, a run folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from trivium.errors import TriviumError
from trivium.recipes import RECIPES
from trivium.recipes.finish import finish
from trivium.recipes.flava import Prepared
from trivium.train import checkpoint, config, trainer
from trivium.train.budget import largest_micro_batch


def pretrain(
    recipe: str,
    *,
    size: str | None = None,
    out: Path | None = None,
    init: str | None = None,
    config_file: Path | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> int:
    """Train a model from a recipe.

    Args:
        recipe: "flava", or a function of your own: my_run.py:shop. With --resume it may be a run folder.
        size: the recipe's one dial, such as tiny, small or base.
        out: the run folder; by default runs/RECIPE-SIZE-DATE.
        init: a model folder, run folder or foreign checkpoint to start from.
        config_file: a config.json whose values are set before `overrides`.
        resume: continue the run in `out` from its newest valid checkpoint.
        overrides: leaves by their dotted path, such as {"optim.lr": "3e-4"}.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    changes = dict(overrides or {})
    if init is not None:
        changes["init"] = init
    if resume:
        return _resume(out, changes)
    settings = config.Config(recipe, {} if size is None else {"size": size}, {})
    if config_file is not None:
        stated = config.load(config_file)
        if stated.recipe != recipe:
            raise TriviumError(f"{config_file} is a config of the recipe {stated.recipe}, not of {recipe}")
        settings = stated
    tree = config.set_leaves(config.build(settings, RECIPES), changes)
    out = out or Path("runs") / f"{Path(recipe).stem}-{size or 'default'}-{datetime.now():%Y%m%d-%H%M%S}"
    print(f"preparing data and model for {out}", file=sys.stderr)
    prepared = tree.prepare(settings.recipe, settings.arguments)
    return run(with_budget(prepared), out)


def _resume(out: Path | None, changes: Mapping[str, Any]) -> int:
    if out is None:
        raise TriviumError("--resume needs the run folder: --out RUN")
    settings = config.load(out / "config.json")
    tree = config.set_leaves(config.build(settings, RECIPES), changes)
    newest = checkpoint.newest(out / "checkpoints", lambda sentence: print(sentence, file=sys.stderr))
    prepared = tree.prepare(settings.recipe, settings.arguments, None if newest is None else newest / "model")
    return run(prepared, out, resume=True)


def with_budget(prepared: Prepared) -> Prepared:
    """Settle what depends on this machine, once and before the run, and write it down as the run's own values:
    the largest micro-batch that fits ("auto"), and how many steps fit into a time budget."""
    settings = prepared.recipe.train
    if settings.micro_batch == "auto":
        batch = prepared.recipe.data.batch
        rows = largest_micro_batch(lambda rows: trainer.try_streams(prepared.with_train(micro_batch=rows).run), batch)
        prepared = prepared.with_train(micro_batch=rows)
        print(f"micro-batches of {rows} of {batch} samples fit into memory", file=sys.stderr)
    if settings.minutes is not None:
        steps = trainer.steps_in(prepared.run, settings.minutes)
        prepared = prepared.with_train(steps=steps, minutes=None)
        print(f"{settings.minutes:g} minutes are about {steps} steps on this machine", file=sys.stderr)
    return prepared


def run(prepared: Prepared, out: Path, *, resume: bool = False) -> int:
    """Train, then evaluate the result and write results.json and report.html into the run folder."""
    outcome = trainer.train(prepared.run, out, resume=resume)
    if outcome.signal is not None:
        return outcome.exit_code
    report = finish(prepared, out)
    print(f"report: {report}")
    return 0
