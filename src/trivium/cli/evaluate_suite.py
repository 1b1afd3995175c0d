"""`trivium evaluate --suite`: a model on the tasks of a paper."""

from __future__ import annotations

import difflib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivium.cli import suite_runs
from trivium.cli.embed import open_model
from trivium.cli.finetune import SEEDS
from trivium.errors import TriviumError
from trivium.evaluate import results, suite, suite_report, tuned_runs
from trivium.evaluate.feature_store import make_cache_root
from trivium.evaluate.paper_tasks import SUITES, PaperTask
from trivium.evaluate.task_runs import HAS_FIGURES, SuiteRun
from trivium.evaluate.tuned_runs import TunedRun
from trivium.recipes.own_head import open_own
from trivium.recipes.tasks import TASKS
from trivium.train import config as configuration
from trivium.train import run_folder
from trivium.train.config import Config


def evaluate_suite(
    path: Path,
    name: str | None,
    chosen: Sequence[str],
    root: Path | None,
    fine_tuned: Sequence[Path],
    rows: int | None,
    block: int | None,
    image_size: int | None,
    out: Path,
    device: str,
    begun: float,
    *,
    fine_tune: bool = False,
    ranked: int | None = None,
    first_word_twice: bool = False,
) -> int:
    """Measure a model on tasks and write the report.

    Returns:
        The exit code: 0; 2 where some data is there and cannot be read or learned from, 1 where a task failed by a
        mistake of ours; the other tasks are measured and reported all the same. Of a fine-tuning that a signal stopped
        its own.
    """
    tasks = tasks_of(name, chosen)
    if rows is not None and rows < 1:
        raise TriviumError(f"--rows {rows}: it must be at least 1")
    if block is not None and not any(task.kind == "grounding" for task in tasks):
        raise TriviumError("--block is of grounding alone: name RefCOCO+ with --task")
    if fine_tune:
        suite_runs.check(tasks, root)
    ranking = [task for task in tasks if task.prefix == "VQAv2"]
    ranks_otherwise = ranked is not None or first_word_twice
    if ranks_otherwise and not ranking:
        raise TriviumError("--ranked and --first-word-twice are of VQAv2 alone: name it with --task")
    if root is not None and not root.is_dir():
        raise TriviumError(f"--data.root {root}: there is no such folder")
    if out.exists() and not out.is_dir():
        raise TriviumError(f"{out} is a file: name a folder with --out")
    tuned = read_fine_tuned(fine_tuned)
    chosen_runs = [tuned_runs.of_task(task, tuned) for task in tasks]  # before anything is measured
    cache = make_cache_root()
    bundle = open_model(path, image_size, device)
    if ranks_otherwise:
        bundle = bundle.ranking(ranked, first_word_twice or None)
        if (done := tuned_runs.of_task(ranking[0], tuned)) is not None:
            raise TriviumError(
                f"the figures of VQAv2 are read from {done.folder}, which ranked as it was set: leave out --ranked and"
                " --first-word-twice, or that run from --fine-tuned"
            )

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    failed: dict[PaperTask, Exception] = {}
    asking: list[PaperTask] = []
    if fine_tune and root is not None:
        asking = [task for task, tuned_run in zip(tasks, chosen_runs, strict=True) if tuned_run is None]
        if block is not None:  # of the model as it is
            asking = [task for task in asking if task.kind != "grounding"]
        try:
            folders, failed = suite_runs.fine_tune(
                asking, bundle, path, root, out, rows=rows, image_size=image_size, device=device, say=say
            )  # fmt: skip
        except suite_runs.Stopped as stopped:
            say("the evaluation is stopped too: the same command goes on from here")
            return stopped.exit_code
        tuned += read_fine_tuned(folders)
        chosen_runs = [tuned_runs.of_task(task, tuned) for task in tasks]
    for tuned_run in dict.fromkeys(filter(None, chosen_runs)):
        if (doubt := tuned_run.doubt(str(path))) is not None:
            say(f"--fine-tuned: {doubt}")
    for unused in (each for each in tuned if each not in chosen_runs):
        say(f"--fine-tuned: {unused.folder} has no figure that these tasks ask for, and is left out")
    run = suite.run(
        tasks, bundle, root, cache, fine_tuned=tuned, rows=rows, block=block, say=say, own=open_own, path=str(path)
    )  # fmt: skip
    run_of_model = _run_of(path)
    for each in run.tasks:
        if (error := failed.get(each.task)) is not None:
            why = f"a mistake of ours ({error!r}): please report it" if suite_runs.is_ours(error) else str(error)
            each.notes.insert(0, f"its fine-tuning came to nothing: {why}")
        if rows is not None and each.state == "read" and each.task in asking and each.task.verb not in TASKS:
            each.notes.append("learned from all of its training rows: --rows caps what is measured of it alone")
        if each.task.kind == "fine-tuning" and each.state in ("measured", "kept"):  # by its own head
            if (few := _rows(run_of_model)) is not None:
                each.rests_on(tuned_runs.PART.format(few))
            elif (few := _joint_rows(run_of_model, each.task.verb)) is not None:
                each.rests_on(f"learned from at most {few:,} training rows")
            elif bundle.head is None and each.task.protocol == "fine-tune":  # a UniT's
                each.rests_on("learned beside other tasks, not fine-tuned")
    if not any(each.state in HAS_FIGURES for each in run.tasks):
        _list_absent(run)
        if not failed and not any(each.state in ("unscored", "damaged", "failed") for each in run.tasks):
            where = "no --data.root is given" if root is None else f"below {root} is nothing to measure this model on"
            raise TriviumError(
                f"there is nothing to measure: {where}, and --fine-tuned names no result for these tasks"
            )
    note = (
        "" if rows is None else f"At most {rows:,} pictures of each split were used: these are not the papers' figures."
    )
    page = suite_report.write(
        out,
        suite_report.SuiteReport(
            f"{name or 'Tasks'}: {path}",
            run,
            {"total": time.perf_counter() - begun},
            shlex.join(["trivium", *sys.argv[1:]]),
            run_folder.machine(),
            note,
        ),
    )
    _print(run)
    print(f"report: {page}")
    states = {each.state for each in run.tasks}
    if "failed" in states or any(map(suite_runs.is_ours, failed.values())):
        return 1
    return 2 if "damaged" in states or failed else 0


def tasks_of(name: str | None, chosen: Sequence[str]) -> list[PaperTask]:
    """The tasks of a suite; or those of it, or of all suites, that are named. Raises TriviumError."""
    if name is not None and name not in SUITES:
        raise TriviumError(f"there is no suite {name}: there are {', '.join(SUITES)}")
    suites = SUITES.values() if name is None else [SUITES[name]]
    offered = list(dict.fromkeys(task for tasks in suites for task in tasks))
    if not chosen:
        return offered
    names = {task.name.lower(): task.name for task in offered}
    found = []
    for word in chosen:
        if word.lower() not in names:
            near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
            hint = f"did you mean {names[near[0]]!r}?" if near else f"there are {', '.join(names.values())}"
            raise TriviumError(f"there is no task {word!r}{'' if name is None else f' in {name}'}: {hint}")
        matching = [task for task in offered if task.name == names[word.lower()]]
        found += matching if name is not None else matching[:1]  # of all suites the first that has it, FLAVA's
    return list(dict.fromkeys(found))


def read_fine_tuned(folders: Sequence[Path]) -> list[TunedRun]:
    """Runs of `trivium finetune`: each folder itself, or the run folders in it. Raises TriviumError."""
    found: dict[Path, TunedRun] = {}
    for folder in folders:
        is_run = (folder / "results.json").is_file()
        if not is_run and (folder / SEEDS).is_file():
            raise TriviumError(
                f"--fine-tuned {folder} holds runs of several seeds and no median of them yet: end them with"
                f" `{shlex.join(['trivium', 'finetune', str(folder), '--resume'])}`, or name the run of one seed"
            )
        runs = [folder] if is_run else sorted(file.parent for file in folder.glob("*/results.json"))
        for run in [] if is_run else _unfinished(folder):
            again = shlex.join(["trivium", "finetune", str(run), "--resume"])
            print(f"--fine-tuned: {run} has no results yet and is left out: end it with `{again}`", file=sys.stderr)
        if not runs:
            raise TriviumError(
                f"--fine-tuned {folder} holds no results.json: name a run of trivium finetune that is done"
            )
        for run in runs:
            read, notes = results.read(run / "results.json"), results.read_notes(run / "results.json")
            found.setdefault(run.resolve(), TunedRun(run, read, _inits(run), _rows(run), tuple(notes)))
    return list(found.values())


def _unfinished(folder: Path) -> list[Path]:
    """Runs in a folder, of one seed or of several, that have no results yet."""
    inside = sorted(each for each in folder.glob("*") if (each / SEEDS).is_file() or _settings(each))
    return [run for run in inside if not (run / "results.json").is_file()]


def _config(run: Path) -> Config | None:
    """Of a run of fine-tuning, or of the first of several seeds; of anything else none."""
    for file in [run / "config.json", *sorted(run.glob("seed-*/config.json"))]:
        try:
            config = configuration.load(file)
        except TriviumError:
            continue
        return config if config.recipe == "finetune" else None
    return None


def _settings(run: Path) -> dict[str, Any]:
    config = _config(run)
    return {} if config is None else config.values


def _rows(run: Path) -> int | None:
    """Training rows that a run of fine-tuning was given at most; None: all, or it is none."""
    config = _config(run)
    if config is None or config.arguments.get("task") not in TASKS:  # of the others it caps what is measured
        return None
    rows = config.values.get("data.rows")
    return rows if isinstance(rows, int) else None


def _joint_rows(run: Path, task: str) -> int | None:
    """Training rows of one of its tasks that a run of a UniT was given at most; None: all, or it is none."""
    try:
        config = configuration.load(run / "config.json")
    except TriviumError:
        return None
    rows = config.values.get(f"tasks.{task}.rows")
    return rows if isinstance(rows, int) else None


def _inits(run: Path) -> tuple[str, ...]:
    """What a run of fine-tuning began from; where that is such a run itself, what that began from, and so on."""
    found: list[str] = []
    init = _settings(run).get("init")
    while isinstance(init, str) and init not in found:
        found.append(init)
        init = _settings(_run_of(Path(init))).get("init")
    return tuple(found)


def _run_of(model: Path) -> Path:
    """The run folder of a model that lies in it: RUN/model, RUN/checkpoints/STEP, or the model in that."""
    inside = (model, *list(model.resolve().parents)[:3])
    return next((folder for folder in inside if (folder / "passport.json").is_file()), model)


def _list_absent(run: SuiteRun) -> None:
    for each in (each for each in run.tasks if each.state not in HAS_FIGURES):
        if each.missing is not None:
            print(f"{run.title(each.task)}: expected {each.missing.expected}; published at {each.missing.owners}")
        for note in each.notes:
            print(f"{run.title(each.task)}: {note}")


def _print(run: SuiteRun) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("task", "figure", "this model", "the paper's", "state"):
        table.add_column(column, justify="left" if column in ("task", "figure", "state") else "right")
    published = suite_report.papers_own(suite_report.columns([each.task for each in run.tasks]))
    for each in run.tasks:
        for place, figure in enumerate(each.task.figures):
            ours = each.figure(figure)
            cell = None if published is None else published.cells.get((each.task.key, place))
            shown = f"{100 * ours.value:.2f}" if ours is not None else "–"
            beside = cell.shown if cell is not None and cell.is_comparable and not each.is_other(figure) else "–"
            table.add_row(*map(Text, (run.title(each.task), each.metric(figure), shown, beside, each.state)))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    _list_absent(run)
