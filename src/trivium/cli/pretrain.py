"""`trivium pretrain`: a recipe, some leaves of its own, a run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from trivium.cli.overrides import set_overrides
from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.recipes.prepared import Prepared
    from trivium.train.config import Config
    from trivium.train.run import Run


def pretrain(
    recipe: str,
    *,
    size: Annotated[str | None, arg(metavar="SIZE")] = None,
    out: Path | None = None,
    init: Annotated[str | None, arg(metavar="PATH")] = None,
    config: Path | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> int:
    """Train a model from a recipe. Every field of the recipe is a flag, such as --optim.lr 3e-4, --data.pairs a.csv
    or --train.minutes 8: `trivium pretrain flava --help` lists them all, with --size those of that size.

    Args:
        recipe: "flava", "flava-stages" (its encoders alone, then all of it), "mlm", "mim" or "dino" (one encoder),
            "clip", "albef", "unit", "dvae" (an image tokenizer), or a function of your own: my_run.py:shop. With
            --resume a run too.
        size: the recipe's one dial, such as tiny, small or base.
        out: the run folder; by default runs/RECIPE-SIZE-DATE.
        init: a model folder, run folder or foreign checkpoint to start from.
        config: a config.json, or a run folder, whose values count where no flag says otherwise.
        resume: continue the run in --out from its newest sound checkpoint, to the same weights as if never stopped.
        overrides: leaves by their dotted path, such as {"optim.lr": "3e-4"}.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    begun = time.perf_counter()
    from trivium.recipes import RECIPES
    from trivium.train import config as configuration
    from trivium.train import distributed

    distributed.start()
    changes = dict(overrides or {})
    if init is not None:
        changes["init"] = init
    if size is not None and (resume or config is not None):
        raise TriviumError("--size is stated by the config of the run already: leave it out")
    if resume:
        if config is not None:
            raise TriviumError("--resume takes the config of its run folder: leave out --config")
        return resume_run(recipe, out, changes, begun)
    if config is not None:
        settings = _stated(config, recipe)
    else:
        arguments = {} if size is None else {"size": size}
        settings = configuration.Config(configuration.with_absolute_file(recipe), arguments)
        settings = configuration.with_defaults(settings, RECIPES)
    named = "-".join([Path(recipe).stem, *_size_of(settings), f"{now():%Y%m%d-%H%M%S}"])
    return begin(settings, changes, out or Path("runs") / named, begun)


def begin(settings: Config, changes: Mapping[str, Any], out: Path, begun: float) -> int:
    """Begin a run of any recipe with these leaves changed. begun: as `run` takes it."""
    from trivium.cli.fields import is_settled
    from trivium.cli.stages import run_stages
    from trivium.recipes import RECIPES
    from trivium.recipes.prepared import Recipe
    from trivium.recipes.stages import Stages
    from trivium.train import config as configuration
    from trivium.train import run_folder

    tree = configuration.build(settings, RECIPES)
    for path in changes:
        if is_settled(path, tree):
            raise TriviumError(f"--{path.replace('_', '-')} is not for anybody to set: it follows from the data")
    tree = set_overrides(tree, changes).with_absolute_paths()
    if isinstance(tree, Stages):
        return run_stages(tree, settings, out)
    run_folder.refuse_a_run(out)
    if isinstance(tree, Recipe):  # UniT's batches are those of the tasks that it will find
        tree.refuse_uneven_shares()
    say(f"preparing data and model for {out}")
    prepared = tree.prepare(settings.recipe, settings.arguments)
    for sentence in prepared.notes:
        say(sentence)
    return run(with_budget(prepared), out, begun)


def _size_of(settings: Config) -> list[str]:
    return [str(settings.arguments["size"])] if "size" in settings.arguments else []


def say(sentence: str) -> None:
    """One line for the person who watches, from the first process alone."""
    from trivium.train import distributed

    if distributed.rank() == 0:
        print(sentence, file=sys.stderr)


def now() -> datetime:
    """The first process's clock: all processes name one folder."""
    import torch

    from trivium.train import distributed

    mine = torch.tensor(time.time() if distributed.rank() == 0 else 0.0, dtype=torch.float64)
    return datetime.fromtimestamp(distributed.sum_over_processes({"now": mine})["now"].item())


def _stated(config: Path, recipe: str) -> Config:
    """What a config.json, or the one in a run folder, says; it must be of this recipe."""
    from trivium.train import config as configuration

    settings = configuration.load(config)
    if configuration.with_absolute_file(settings.recipe) != configuration.with_absolute_file(recipe):
        raise TriviumError(f"{config} is a config of the recipe {settings.recipe}, not of {recipe}")
    return settings


def resume_run(recipe: str, out: Path | None, changes: Mapping[str, Any], begun: float) -> int:
    """`recipe` is that of the run in `out`; or, where `out` is None, the run folder itself."""
    if out is None and not (Path(recipe) / "config.json").is_file():
        raise TriviumError("--resume needs the run folder: trivium pretrain RUN --resume")
    from trivium.cli.stages import run_stages
    from trivium.recipes import RECIPES
    from trivium.recipes.prepared import Recipe
    from trivium.recipes.stages import Stages
    from trivium.train import config as configuration
    from trivium.train import run_folder

    settings = configuration.load(Path(recipe)) if out is None else _stated(out, recipe)
    out = out or Path(recipe)
    stated = configuration.build(settings, RECIPES)
    later = configuration.leaves(stated).keys() - settings.values.keys() - set(run_folder.FREE)
    if refused := sorted(later & changes.keys()):
        raise TriviumError(f"{out} was begun by a version that had no {refused[0]}: begin a new run to change it")
    if later:
        say(f"begun by a version that had no {', '.join(sorted(later))}: the default counts from here on")
    tree = set_overrides(stated, changes)
    if isinstance(tree, Stages):
        if changes:
            raise TriviumError(
                f"stages that are resumed keep their settings: resume one of them alone, such as {out / 'text'}, to"
                f" change --{next(iter(changes)).replace('_', '-')}"
            )
        return run_stages(tree, settings, out, resume=True)
    if tree.train.minutes != stated.train.minutes:
        raise TriviumError(
            f"the steps of {out} are settled, {stated.train.steps}: leave out --train.minutes, or begin a new run with"
            f" --init {out}"
        )
    if isinstance(tree, Recipe):
        tree.refuse_uneven_shares()
    with run_folder.alone_in(out):  # from here on: another would remove the checkpoint that is found
        newest = run_folder.newest_sound(out, say)
        prepared = tree.prepare(settings.recipe, settings.arguments, None if newest is None else newest / "model")
        return run(prepared, out, begun, resume=newest or True)


def with_budget(prepared: Prepared) -> Prepared:
    """Settle what depends on this machine, once and before the run, and write it down as the run's own values:
    the largest micro-batch that fits ("auto"), and how many steps fit into a time budget.

    Raises:
        TriviumError: patience where nothing is chosen, a warm-up as long as a run that chooses, too little memory.
    """
    from trivium.train import distributed, trainer
    from trivium.train.budget import largest_micro_batch

    settings = prepared.recipe.train
    if settings.patience is not None and prepared.run.select is None:
        raise TriviumError(
            f"--train.patience {settings.patience}: this recipe chooses no checkpoint by a figure, so that there is no"
            " better one to wait for; leave it out"
        )
    if settings.micro_batch == "auto":
        batch = max(stream.batch for stream in prepared.mixture_of(settings).streams)
        rows = largest_micro_batch(
            lambda rows: trainer.try_streams(prepared.with_train(micro_batch=rows).run), batch, distributed.world()
        )
        prepared = prepared.with_train(micro_batch=rows)
        say(f"micro-batches of {rows} of {batch} samples fit into memory")
    if settings.minutes is not None:
        steps = trainer.steps_in(prepared.run, settings.minutes)
        prepared = prepared.with_train(steps=steps, minutes=None)
        say(f"{settings.minutes:g} minutes are about {steps} steps on this machine")
    tell_of_warmup(prepared.run)
    return prepared


def tell_of_warmup(run: Run) -> None:
    """Say it where the warm-up takes the whole run; of one that chooses among its checkpoints it is refused."""
    from trivium.train import optim

    if sentence := optim.never_warm(run.optim, run.train.steps):
        if run.select is not None:
            raise TriviumError(sentence)
        say(f"{sentence}, or its learning rate rises to the end")


def run(prepared: Prepared, out: Path, begun: float, *, resume: bool | Path = False) -> int:
    """Train, then evaluate the result and write results.json and report.html into the run folder.

    begun: what time.perf_counter() said when the command began. resume: as `trainer.train` takes it.
    """
    from trivium.recipes import finish
    from trivium.train import distributed, run_folder, trainer

    try:
        with run_folder.alone_in(out):
            outcome = trainer.train(prepared.run, out, resume=resume)
            if outcome.signal is not None or distributed.rank() > 0:
                return outcome.exit_code
            distributed.stop()  # the others are done: what follows is this process's alone
            if chosen := prepared.settle(out):
                say(chosen)
            final = (outcome.results or {}).get("losses")
            found, losses = finish.evaluate(prepared, say, final)
            found.notes += finish.replaced(out)
            page = finish.write(
                out,
                found,
                losses,
                bundle=prepared.bundle,
                prepared=prepared,
                run=out,
                seconds={"train": outcome.seconds, "total": time.perf_counter() - begun},
                model_path=str(out),
                title=f"{', '.join([Path(prepared.name).name, *_size_of(prepared.run.config)])}: what it learned",
            )
    finally:
        distributed.stop()
    for sentence in finish.summary(found):
        print(sentence)
    print(f"report: {page}")
    return 0
