"""A staged recipe: its stages one after the other, each a run of its own; those that are done are not repeated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.recipes.stages import Stages
    from trivium.train.config import Config


def run_stages(tree: Stages, settings: Config, out: Path, resume: bool = False) -> int:
    """Take every stage that is not done as far as it goes; the exit code of the one that stopped, or 0.

    The folder `out` holds a config.json of the whole and a run folder for each stage. A stage that was begun goes on
    with the settings that it was begun with.
    """
    from trivium.cli.pretrain import resume_run, run, say, with_budget
    from trivium.recipes import limits
    from trivium.recipes.stages import JOINT, remaining
    from trivium.train import config as configuration
    from trivium.train import distributed, run_folder

    if distributed.world() > 1:
        raise TriviumError(
            "the stages run one after the other on one process: on several, train each alone (trivium pretrain mlm,"
            " mim, then flava with --init-text and --init-image)"
        )
    plan = tree.plan(out.absolute())
    if not resume:
        if (out / "config.json").is_file():
            again = run_folder.to_resume(out)
            raise TriviumError(f"{out} holds a run already: continue it with `{again}`, or name another with --out")
        for stage in plan:
            with _in_own_flags(tree, stage.name):
                limits.check(configuration.leaves(stage.recipe))
    left = remaining(plan, out)
    for stage in plan:
        folder = out / stage.name
        if stage not in left:
            say(f"stage {stage.name}: done, in {folder}")
            continue
        say(f"stage {stage.name}, in {folder}")
        begun = time.perf_counter()
        if (folder / "config.json").is_file():
            code = resume_run(str(folder), None, {}, begun)
        else:
            with _in_own_flags(tree, stage.name):
                prepared = with_budget(stage.recipe.prepare(stage.recipe_name, settings.arguments))
            if not (out / "config.json").is_file():  # now that a mistake in the first stage would have been told
                out.mkdir(parents=True, exist_ok=True)
                configuration.save(replace(settings, values=configuration.leaves(tree)), out / "config.json")
            for sentence in prepared.notes:
                say(sentence)
            code = run(prepared, folder, begun)
        if code or remaining([stage], out):  # stopped by Ctrl-C, or saved and stopped by SIGTERM
            say(f"to go on with the stages: {run_folder.to_resume(out)}")
            return code
    print(f"the trained FLAVA is the run {out / JOINT}")
    return 0


@contextmanager
def _in_own_flags(tree: Stages, stage: str) -> Iterator[None]:
    """What the recipe of a stage complains of, in the flags of the whole."""
    try:
        yield
    except TriviumError as error:
        raise TriviumError(tree.in_own_flags(stage, str(error))) from None
