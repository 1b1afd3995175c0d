"""`trivium ablate`: FLAVA's columns of tables 4 and C.1, trained and measured here, in one table."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from trivium import locks
from trivium.cli.overrides import set_overrides
from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.evaluate.ablation import Measured, Table
    from trivium.recipes.ablation import AblationRun
    from trivium.recipes.stages import Stages
    from trivium.train.config import Config

STEPS, QUICK_STEPS = 750, 400  # updates on pairs
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
STAGES = ("text", "dino", "mim")
UNLEARNED = 0.9  # of the contrastive loss of a blind guess: above it next to nothing was learned
NOT_HERE = ("train.minutes", "train.seed", "init", "init_text", "init_image", "image_by")


def ablate(
    *,
    out: Path = Path("ablation"),
    size: Annotated[str | None, arg(metavar="tiny|small|base")] = None,
    steps: Annotated[int | None, arg(metavar="N")] = None,
    tower_steps: Annotated[int | None, arg(metavar="N")] = None,
    columns: Annotated[tuple[str, ...], arg(metavar="COLUMN ...")] = (),
    seeds: Annotated[tuple[int, ...], arg(metavar="SEED ...")] = (),
    quick: bool = False,
    table: bool = False,
    root: Annotated[Path | None, arg(name="data.root", metavar="DIR")] = None,
    device: Annotated[str | None, arg(metavar="auto|cpu|cuda")] = None,
    overrides: Mapping[str, Any] | None = None,
) -> int:
    """Train every column of the paper's ablation on the same pairs, measure each, and lay them side by side.

    Every flag of `trivium pretrain flava-stages` may be given too: --data.pairs for data of your own, --optim.lr,
    --dino.optim.lr. The same call goes on where it stopped; several at once, on one machine and folder, share the work.

    Args:
        out: the folder of all runs and of report.html, table.csv and table.json.
        size: of all models.
        steps: updates on pairs of every column; by default 750, with --quick 400.
        tower_steps: updates of the encoders that some columns start from; by default as many.
        columns: mim, mlm, contrastive_local, contrastive, mm, mm_init, joint, flava, flava_mim, clip; by default all.
        seeds: by default 0 1 2, with --quick 0.
        quick: one seed and few steps, for a first look.
        table: train nothing; make the table of all that is finished.
        root: a folder with GLUE in its official layout (SST-2, CoLA, RTE), for a linear probe on each. Runs that were
            finished without it are measured again.
        device: cpu, cuda, or auto for the fastest there is.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.
    """
    from trivium.evaluate import ablation_figures
    from trivium.evaluate.ablation import COLUMNS
    from trivium.recipes import ablation, limits
    from trivium.train.config import leaves

    for flag, asked in (("--columns", columns), ("--seeds", seeds), ("--data.root", root)):
        if table and asked:
            raise TriviumError(f"--table shows every run that is finished, as it was measured: leave out {flag}")
    given = dict(overrides or {})
    settings, tree = _settled(out, size, steps, tower_steps, quick, device, given)
    chosen = list(dict.fromkeys(columns or COLUMNS))
    ablation.check(tree, chosen)
    if root is not None and not root.is_dir():
        raise TriviumError(f"--data.root {root}: there is no such folder")
    if any(seed < 0 for seed in seeds):
        raise TriviumError(f"--seeds {min(seeds)}: a seed is 0 or more")
    kept = seeds or (QUICK_SEEDS if quick else SEEDS)
    runs = ablation.plan(tree, settings.arguments["size"], out, chosen, list(dict.fromkeys(kept)))
    if not table:
        for run in runs:  # a mistake is told before there is a folder that keeps it
            limits.check(leaves(run.recipe))
        if root is not None:
            ablation_figures.check_glue(root)
        for sentence in ablation.measured_on(tree.data, glue=root is not None):
            print(sentence, file=sys.stderr)
        _begin(out, settings, tree)
        if (code := _work(runs, out, settings, root)) is not None:
            return code
    return _table(out, tree)


# ------------------------------------------------------------------------------------------------- settings


def _settled(
    out: Path,
    size: str | None,
    steps: int | None,
    tower_steps: int | None,
    quick: bool,
    device: str | None,
    given: dict[str, Any],
) -> tuple[Config, Stages]:
    """The recipe of all runs, as the folder states it or as the flags do; raises TriviumError where they differ."""
    from trivium.recipes import RECIPES
    from trivium.train import config as configuration
    from trivium.train.run_folder import FREE

    for name in NOT_HERE:
        if name in given:
            raise TriviumError(
                f"--{name.replace('_', '-')} is not for the ablation: it states length, seeds and starts itself, with"
                " --steps, --tower-steps, --seeds and --columns"
            )
    for flag, number in (("--steps", steps), ("--tower-steps", tower_steps)):
        if number is not None and number < 1:
            raise TriviumError(f"{flag} {number}: these are updates, at least 1")
    stands = (out / "config.json").is_file()
    changes: dict[str, Any] = {}
    if not stands and steps is None:
        steps = QUICK_STEPS if quick else STEPS
    if steps is not None:
        changes["train.steps"] = str(steps)
        if tower_steps is None and not stands:
            tower_steps = steps
    if tower_steps is not None:
        changes |= {f"{stage}.train.steps": str(tower_steps) for stage in STAGES}
    if device is not None:
        given = {"train.device": device} | given
    for path, value in given.items():
        if path.startswith("train.") and path != "train.steps":
            changes |= {f"{stage}.{path}": value for stage in STAGES}
    changes |= given
    if not stands:
        arguments = {"size": size or "tiny"}
        changes = {f"{stage}train.keep_last": "1" for stage in ("", *(f"{stage}." for stage in STAGES))} | changes
        settings = configuration.Config("flava-stages", arguments)
        tree = set_overrides(configuration.build(settings, RECIPES), changes).with_absolute_paths()
        return configuration.Config("flava-stages", arguments, configuration.leaves(tree)), tree
    settings = configuration.load(out)
    if settings.recipe != "flava-stages" or (size is not None and settings.arguments != {"size": size}):
        raise TriviumError(f"{out} holds another ablation or another run: name another folder with --out")
    tree = set_overrides(configuration.build(settings, RECIPES), changes).with_absolute_paths()
    values = configuration.leaves(tree)
    for path, value in values.items():
        if value != settings.values.get(path) and not path.endswith(FREE):
            raise TriviumError(
                f"{out} was begun with {path} = {settings.values.get(path)}, not {value}: leave the flag out to go on,"
                " or name another folder with --out"
            )
    return settings, tree


def _begin(out: Path, settings: Config, tree: Stages) -> None:
    """The folder with its settings and what all runs share, made by the process that comes first."""
    from trivium.recipes import ablation
    from trivium.train import config as configuration

    (out / "locks").mkdir(parents=True, exist_ok=True)
    with _claimed(out, "shared", wait=True):
        if not (out / "config.json").is_file():
            configuration.save(settings, out / "config.json")
        ablation.share_parts(tree, out)


def _claimed(out: Path, name: str, wait: bool = False) -> AbstractContextManager[bool]:
    """Whether this process alone may do it now."""
    return locks.held(out / "locks" / name, wait=wait)


# ----------------------------------------------------------------------------------------------------- runs


def _done(out: Path, run: str, also: Collection[str] = ()) -> bool:
    """Whether it was measured for the table: `trivium evaluate RUN` writes other figures in their place. also: figures
    that it must have, since --data.root may be given later."""
    from trivium.evaluate import results

    path = out / run / "results.json"
    return path.is_file() and {"updates", *also} <= results.read(path).keys()


def _work(runs: Sequence[AblationRun], out: Path, settings: Config, root: Path | None) -> int | None:
    """Take run after run that nobody else has taken; the exit code of the one that was stopped, None where none was."""
    from trivium.evaluate.ablation_figures import GLUE_TASKS

    def done(run: AblationRun) -> bool:
        asked = root is not None and run.column is not None and "language" in run.column.abilities
        return _done(out, run.name, [f"glue.{task}" for task in GLUE_TASKS] if asked else ())

    while left := [run for run in runs if not done(run)]:
        taken, others = False, 0
        for run in left:
            if not all(_done(out, needed) for needed in run.needs):
                continue
            with _claimed(out, run.name) as mine:
                if not mine:
                    others += 1
                elif not done(run):
                    number = len(runs) - len(left) + 1
                    print(f"{run.name} ({number} of {len(runs)})", file=sys.stderr)
                    if (code := _run(run, out, settings, root)) is not None:
                        return code
                    taken = True
                    break
        if not taken:
            if others == len(left):
                print("the runs that are left are being done by others", file=sys.stderr)
                return None
            time.sleep(1)
    return None


def _run(run: AblationRun, out: Path, settings: Config, root: Path | None) -> int | None:
    """Train one and measure it. Its results.json is written last. The exit code where it was stopped, which is 0 of a
    saved SIGTERM; None where it is done."""
    from trivium import __version__
    from trivium.cli.pretrain import say, tell_of_warmup
    from trivium.evaluate import ablation_figures, results
    from trivium.evaluate.results import Result
    from trivium.recipes.ablation import measurable, total_updates
    from trivium.recipes.dino import PreparedDino
    from trivium.train import run_folder, trainer

    begun, folder = time.perf_counter(), out / run.name
    newest = run_folder.newest_sound(folder, say) if (folder / "config.json").is_file() else None
    prepared = run.recipe.prepare(run.recipe_name, settings.arguments, None if newest is None else newest / "model")
    updates = run.recipe.train.steps
    if run.column is not None:
        updates = total_updates(prepared.mixture_of(run.recipe.train), run.pair_updates)
        prepared = prepared.with_train(steps=updates)
    for sentence in prepared.notes:
        say(sentence)
    tell_of_warmup(prepared.run)
    prepared.run.evaluate = None
    resume = newest or (folder / "config.json").is_file()
    outcome = trainer.train(prepared.run, folder, resume=resume)
    if outcome.signal is not None:
        return outcome.exit_code
    found = {"updates": Result(updates)}
    measuring = time.perf_counter()
    if run.column is not None:
        assert prepared.bundle is not None and not isinstance(prepared, PreparedDino)
        found["updates.pairs"] = Result(run.pair_updates)
        data, sources = prepared.recipe.data, prepared.sources
        found |= ablation_figures.measure(
            prepared.bundle, measurable(run.column, data), prepared.bundle.false_pairs or 0.5,
            None if data.is_embedded else sources.validation_pairs, root, say,
        )  # fmt: skip
    ended = time.perf_counter()
    results.write(
        folder / "results.json",
        found,
        command=shlex.join(["trivium", *sys.argv[1:]]),
        version=__version__,
        machine=run_folder.machine(),
        seconds={"train": outcome.seconds, "evaluate": ended - measuring, "total": ended - begun},
    )
    return None


# ---------------------------------------------------------------------------------------------------- table


def _table(out: Path, tree: Stages) -> int:
    from trivium import __version__
    from trivium.evaluate import ablation, ablation_page
    from trivium.recipes.ablation import measured_on
    from trivium.train import run_folder

    found = ablation.table(_measured(out))
    machine = run_folder.machine()
    data = "the embedded drawings and texts" if tree.data.is_embedded else ", ".join(tree.data.pairs)
    settings = [
        f"Trained on: {data}. Every column: {tree.train.steps:,} updates on pairs in batches of {tree.data.batch};"
        f" towers: {tree.text.train.steps:,} updates of MLM, {tree.dino.train.steps:,} of DINO or"
        f" {tree.mim.train.steps:,} of MIM.",
        *measured_on(tree.data, glue=any(figure.name.startswith("glue.") for figure in found.figures)),
        *_unlearned(out, found, tree),
    ]
    page = ablation_page.write(
        out, found, command=shlex.join(["trivium", *sys.argv[1:]]), machine=machine, version=__version__,
        settings=settings,
    )  # fmt: skip
    for ordering in found.orderings:
        print(ordering.sentence())
    for sentence in found.missing:
        print(f"missing: {sentence}")
    print(f"table: {page}")
    return 0


def _unlearned(out: Path, found: Table, tree: Stages) -> list[str]:
    """A sentence where columns end near the contrastive loss of a blind guess: what is compared with them says that."""
    from trivium.evaluate.report import read_curves
    from trivium.objectives.contrastive import contrastive_chance

    blind = contrastive_chance(tree.data.batch, tree.objectives.contrastive_form == "sigmoid")
    columns = []
    for column in found.columns:
        names = [f"{run.column}-seed{run.seed}" for run in found.runs if run.column == column.name]
        curves = [read_curves(out / name / "metrics.jsonl").get("contrastive", []) for name in names]
        ends = [loss for curve in curves for _, loss in curve[-1:]]
        if ends and min(ends) > UNLEARNED * blind:
            columns.append(f"{column.title} ({min(ends):.2f} to {max(ends):.2f})")
    if not columns:
        return []
    return [
        "Learned next to nothing from pairs, by the contrastive loss at the end, where a blind guess has"
        f" {blind:.2f}: {'; '.join(columns)}. An ordering beside them says no more than that."
    ]


def _measured(out: Path) -> list[Measured]:
    """Every finished run of the folder, whoever made it. Raises TriviumError where a tower of one is not finished."""
    from trivium.evaluate import outcomes, results
    from trivium.evaluate.ablation import COLUMNS, Measured

    def seconds(name: str) -> float:
        return float(json.loads((out / name / "results.json").read_text(encoding="utf-8"))["seconds"]["train"])

    found = []
    for column in COLUMNS.values():
        for path in sorted(out.glob(f"{column.name}-seed*/results.json")):
            name, seed = path.parent.name, path.parent.name.rpartition("-seed")[2]
            if not _done(out, name):
                continue
            towers = [f"tower-{tower}-seed{seed}" for tower in column.starts_from]
            for tower in towers:
                if not _done(out, tower):
                    raise TriviumError(
                        f"{out / name} starts from {tower}, whose results.json is not beside it or is that of `trivium"
                        " evaluate`: put its folder there, or give the call without --table, which measures it again"
                    )
            figures = results.read(path)
            updates = [int(results.read(out / tower / "results.json")["updates"].value) for tower in towers]
            found.append(
                Measured(
                    column.name, int(seed), figures, outcomes.read(path.with_name(outcomes.NAME)),
                    int(figures["updates"].value), int(figures["updates.pairs"].value), sum(updates),
                    seconds(name) + sum(map(seconds, towers)),
                )
            )  # fmt: skip
    return found
