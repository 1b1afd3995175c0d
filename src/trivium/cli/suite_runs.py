"""`trivium evaluate --suite S --fine-tune`: a run of `trivium finetune` for each task that takes one.

It is the command that the report tells otherwise, with the published settings. Its folder is named after the task and
after all that the run depends on: the model, the settings, and path, size and time of the files that say what the rows
are. So the same call finds there what is done and goes on with what was stopped, and another model, or an annotation
file in the place of another, begins another.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trivium.bundle import Bundle
from trivium.bundle.hashes import model_hash
from trivium.cli.finetune import finetune
from trivium.data.referring import find_referring
from trivium.errors import BadSample, TriviumError
from trivium.evaluate.datasets.captions import BY_NAME as CAPTIONED
from trivium.evaluate.feature_store import stamp_of
from trivium.evaluate.paper_tasks import PaperTask
from trivium.evaluate.suite import lacks
from trivium.recipes.finetune import EPOCHS
from trivium.recipes.finetune import finetune as recipe_of
from trivium.recipes.own_head import annotation_files, without_head
from trivium.recipes.tasks import TASKS
from trivium.train import distributed
from trivium.train.config import leaves

FOLDER = "fine-tuned"  # in that of the evaluation
TAKES = ("fine-tuning", "grounding")  # kinds of tasks
WARMUP = 0.06  # of a first look, whose updates are fewer than many a published warm-up


class Stopped(Exception):
    """A signal ended a run, which has saved what it has."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped with code {exit_code}")
        self.exit_code = exit_code


def check(tasks: Sequence[PaperTask], root: Path | None) -> None:
    """Raises TriviumError where a model cannot be fine-tuned for any of these tasks."""
    if root is None:
        raise TriviumError("--fine-tune learns from what lies below --data.root: name that too")
    if not any(task.kind in TAKES for task in tasks):
        raise TriviumError("--fine-tune: none of these tasks takes fine-tuning, so leave it out")
    if distributed.launched() > 1:
        raise TriviumError(
            "--fine-tune is of one process: under torchrun call trivium finetune, and name its runs with --fine-tuned"
        )


def fine_tune(
    tasks: Sequence[PaperTask],
    bundle: Bundle,
    path: Path,
    root: Path,
    out: Path,
    *,
    rows: int | None,
    image_size: int | None,
    device: str,
    say: Callable[[str], None],
) -> tuple[list[Path], dict[PaperTask, Exception]]:
    """Fine-tune a model for each of these tasks that takes it, that the model can do and is not tuned for, and whose
    data lies below `root`. None takes the others with it.

    Args:
        bundle: the model at `path`.
        rows: at most so many training rows, and in a batch; EPOCHS of them take the place of published updates; of
            retrieval and grounding, where all are learned from, so many are measured. None: as published.
        image_size: of the pictures of every run; None: as published.

    Returns:
        Run folders that are done, and of tasks that have none for an error that error.

    Raises:
        Stopped: by a signal.
    """
    done: list[Path] = []
    failed: dict[PaperTask, Exception] = {}
    model = model_hash(bundle)
    for task in (task for task in tasks if task.kind in TAKES and lacks(task, bundle) is None):
        changes = {} if rows is None else _first_look(task.verb, rows)
        if image_size is not None and task.domain == "multimodal":
            changes["data.image_size"] = str(image_size)
        try:
            there = _data(task, bundle, root, say)
            if there is None:
                continue
            data, files = there
            settings = json.dumps(leaves(recipe_of(task.verb)) | changes)
            depends = f"{model} {data.resolve()} {settings}" + "".join(map(stamp_of, files))
            run = out / FOLDER / f"{task.verb}-{hashlib.sha256(depends.encode()).hexdigest()[:8]}"
            code = _train(run, task.verb, path, data, changes, device)
        except Exception as error:
            if is_ours(error):
                traceback.print_exc()
            else:
                say(f"{task.name}: {error}")
            failed[task] = error
        else:
            if not _is_done(run):
                raise Stopped(code)
            done.append(run)
    return done, failed


def is_ours(error: Exception) -> bool:
    """Whether it is no mistake of a user's."""
    return not isinstance(error, TriviumError | BadSample)


def _first_look(verb: str, rows: int) -> dict[str, str]:
    """What is changed of a run's settings. No batch is larger than all rows: one such is several epochs, counted as
    one."""
    changes = {"data.rows": str(rows)}
    if verb in TASKS:
        task = TASKS[verb]
        changes |= {"optim.warmup": str(WARMUP), "data.batch": str(min(rows, task.data.batch))}
        changes |= {} if task.steps is None else {"epochs": str(EPOCHS)}
    return changes


def _data(
    task: PaperTask, bundle: Bundle, root: Path, say: Callable[[str], None]
) -> tuple[Path, Sequence[Path]] | None:
    """The folder that `trivium finetune` takes, and the files there that say what the rows are; None where there is
    nothing to learn, or nothing to learn from, which is said where there are rows to measure on."""
    if task.name in bundle.tuned_for:
        return None
    if task.kind == "grounding":
        found = find_referring(root, [task.name.lower()])
        if found is None:
            return None
        folder, files, learns = root, found.tables, bool(found.splits.get("train"))
    else:
        place = without_head(task, bundle, root)
        if place is None:
            return None
        folder, files = place, annotation_files(task, place)
        learns = task.name in CAPTIONED or any("train" in file.name for file in files)
    if not learns:
        say(f"{task.name}: {folder} holds no training rows, so it is not fine-tuned")
        return None
    return folder, files


def _train(run: Path, verb: str, init: Path, data: Path, changes: Mapping[str, str], device: str) -> int:
    """Begin a run, or go on with it; one that is done is left as it is. Returns the exit code."""
    on_device = {"train.device": device}
    if _is_done(run):
        return 0
    if (run / "config.json").is_file():
        return finetune(str(run), resume=True, overrides=on_device)
    return finetune(verb, init=str(init), data=(str(data),), out=run, overrides={**changes, **on_device})


def _is_done(run: Path) -> bool:
    return (run / "results.json").is_file()
