"""The papers' tasks on whatever data is there: each by itself, kept when it is done, and none in the way of another.

What a task gave is kept (task_runs.py) in a folder named after all that it depends on: the model, the version of the
protocol, the names, sizes and times of the data files. A second call finds it there; an interrupted one goes on with
what is left.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from trivium.bundle import Bundle
from trivium.bundle.hashes import model_hash
from trivium.bundle.untrained import no_cosine, no_matching
from trivium.data.detection import LAYOUTS, DetectionRows, find_val
from trivium.data.referring import SPLITS, Referring, find_referring
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.evaluate import comparable, detection, grounding, pairs, task_runs, tuned_runs
from trivium.evaluate import features as encoding
from trivium.evaluate.classification import Measured, classification
from trivium.evaluate.datasets import Missing, find, layouts
from trivium.evaluate.datasets.captions import BY_NAME as CAPTIONED
from trivium.evaluate.datasets.captions import Captioned, find_captions
from trivium.evaluate.datasets.pictures import DataSet, with_rows
from trivium.evaluate.feature_store import ModelEncoder, features, identity, stamp_of
from trivium.evaluate.paper_tasks import PaperTask
from trivium.evaluate.reranking import judges
from trivium.evaluate.task_runs import HAS_FIGURES, SuiteRun, TaskRun
from trivium.evaluate.tuned_runs import TunedRun
from trivium.models.encoded import Detects, EncodesImage, EncodesText
from trivium.models.grounding import Grounds

# Of the protocols: a change of what they measure is another number.
VERSIONS = {"classification": 3, "retrieval": 3, "grounding": 2, "detection": 2, "fine-tuning": 3}

AS_IT_IS = "the model as it is; the paper's were fine-tuned on the training expressions (trivium finetune {})"
NOT_TUNED = "nothing says that this model was fine-tuned for {}, and zero-shot figures do not stand in such a row"


class OwnTask(ABC):
    """Rows of the task that a model was fine-tuned for, and the head that it has for them."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Of everything beside the model that its figures depend on."""

    @abstractmethod
    def first(self, rows: int) -> OwnTask:
        """At most so many rows of each split, evenly spread."""

    @abstractmethod
    def measure(self, folder: Path, say: Callable[[str], None]) -> Measured:
        """Its figures, under the names that `trivium finetune` gives them after its title; "" is the title alone. None
        where no row has a label, and then the first note says so.

        folder: where the predictions are written.
        """


# A folder: the data is there, and the model has no head for it; None: neither is there.
OpenOwn = Callable[[PaperTask, Bundle, Path | None], OwnTask | Path | Missing | None]


def run(
    tasks: Sequence[PaperTask],
    bundle: Bundle,
    root: Path | None,
    cache: Path,
    *,
    fine_tuned: Sequence[TunedRun] = (),
    rows: int | None = None,
    block: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    own: OpenOwn = lambda *_: None,
    path: str | None = None,
) -> SuiteRun:
    """Measure every task whose data is below `root`, and say of each other what it lacks.

    Args:
        cache: folder of features and of what was measured before.
        fine_tuned: runs of `trivium finetune`.
        rows: at most so many pictures of each split; such figures are not those of the papers.
        block: whose attention grounding looks at; None: the family's own choice.
        own: opens the rows of a task that takes fine-tuning, for the head that a model has (recipes/own_head.py).
        path: where the model is: for the commands that are told, and to see whether a run began from it.
    """
    encoder = ModelEncoder(bundle) if isinstance(bundle.model, EncodesImage) else None
    done = []
    for task in tasks:
        begun = time.perf_counter()
        try:
            found = _one(task, bundle, encoder, root, cache, fine_tuned, rows, block, say, own, path)
        except (TriviumError, BadSample) as error:
            found = TaskRun(task, "damaged", notes=[str(error)])
            say(f"{task.name}: {error}")
        except Exception as error:  # one task never takes the others with it
            traceback.print_exc()
            found = TaskRun(task, "failed", notes=[f"a mistake of ours ({error!r}): please report it"])
        if found.state not in ("kept", "read"):
            found.seconds = time.perf_counter() - begun
        for note in found.warnings if found.state in HAS_FIGURES else []:
            say(f"{task.name}: {note}")
        done.append(found)
    return SuiteRun(done)


def _one(
    task: PaperTask,
    bundle: Bundle,
    encoder: ModelEncoder | None,
    root: Path | None,
    cache: Path,
    fine_tuned: Sequence[TunedRun],
    rows: int | None,
    block: int | None,
    say: Callable[[str], None],
    own: OpenOwn,
    path: str | None,
) -> TaskRun:
    cannot = lacks(task, bundle)
    if cannot is not None:
        return TaskRun(task, "not applicable", notes=[cannot])
    data: Data | None = None
    if task.kind in ("detection", "fine-tuning") or (task.kind == "grounding" and block is None):
        read = _fine_tuned(task, fine_tuned, path)
        if read.state == "read":
            return read
    if task.kind == "fine-tuning":
        if task.name in CAPTIONED and task.name in bundle.tuned_for:
            again = replace(task, kind="retrieval")
            found = _one(again, bundle, encoder, root, cache, (), rows, block, say, own, path)
            return _as_fine_tuned(found, task, bundle.tuned_for, rows)
        opened = own(task, bundle, root)
        if opened is None or isinstance(opened, Path):
            why = NOT_TUNED.format(task.name) if task.name in CAPTIONED else "this model has no head for it"
            told = read.notes if opened is None else [f"its data is there: {_how_to(task, path, str(opened))}"]
            missing = read.missing if opened is None else None
            return replace(read, missing=missing, notes=[f"{why}; {each}" for each in told])
        data = opened
    else:
        untaught = _untrained(task, bundle)
        if untaught is not None:
            return TaskRun(task, "not applicable", notes=[untaught])
        data = _data(task, root)
    if isinstance(data, Missing):
        return TaskRun(task, "missing", missing=data)
    if isinstance(data, Boxes):
        _same_classes(task, bundle, data)
    if rows is not None and not isinstance(data, Referring):
        data = with_rows(data, rows) if isinstance(data, DataSet) else data.first(rows)
    model = model_hash(bundle) if encoder is None else encoder.hash
    how = f"{rows if block is None else (rows, block)}" if isinstance(data, Referring) else ""
    if isinstance(data, Captioned) and bundle.fusion_trained is False:  # which the same tensors may not say
        how = "by cosine alone"
    depends = f"{VERSIONS[task.kind]} {model} {_identity(data)} {how}"
    folder = cache / "tasks" / f"{_slug(task.name)}-{hashlib.sha256(depends.encode()).hexdigest()[:32]}"
    kept = task_runs.kept(task, folder)
    if kept is not None:
        return _told(kept, rows, data, bundle)
    begun = time.perf_counter()

    def tell(part: str) -> None:
        say(f"{task.name}: {part}")

    if isinstance(data, OwnTask):
        measured = data.measure(folder, say)
    elif encoder is None:
        raise AssertionError("who reads no pictures was turned away")
    elif isinstance(data, DataSet):
        measured = classification(data, encoder, cache / "features", bundle, tell)
    elif isinstance(data, Referring):
        grounded = grounding.run(bundle, data, rows=rows, block=block, say=tell)
        notes = [*grounded.notes, AS_IT_IS.format(task.verb)]
        notes += [] if block is None else [f"by the attention of block {block}"]
        measured = Measured(grounded.results, notes, grounded.is_final)
    elif isinstance(data, Boxes):
        measured = detected(task, bundle, data, tell)
    else:
        measured = zero_shot_retrieval(data, encoder, cache / "features", tell, task.shortlist)
    if not measured.results:  # is not kept: whoever adds the labels wants figures, who reads the predictions, them
        unscored = TaskRun(task, "unscored", notes=measured.notes, missing=Missing(task.expected, task.owners))
        return _told(unscored, rows, data, bundle)
    named = {".".join(filter(None, (task.prefix, name))): result for name, result in measured.results.items()}
    found = TaskRun(task, "measured", named, measured.notes)
    if measured.is_final:
        try:
            task_runs.keep(found, folder, time.perf_counter() - begun)
        except (OSError, TriviumError) as error:  # a full disk: what was measured stands all the same
            found.notes.append(f"it is not kept for the next call: {error}")
    return _told(found, rows, data, bundle)


def _told(found: TaskRun, rows: int | None, data: Data, bundle: Bundle) -> TaskRun:
    """With what is to be said of it in this suite and at this call, which is not kept: others ask for other figures."""
    task, head, notes = found.task, bundle.head_config, list(found.notes)
    if rows is not None:
        what = "expressions" if isinstance(data, Referring) else "rows" if isinstance(data, OwnTask) else "pictures"
        how = "drawn with a fixed seed" if isinstance(data, DataSet) else "evenly spread"
        notes.insert(0, f"at most {rows:,} {what} of each split, {how}: not the papers' figures")
    if task.protocol == "zero-shot" and task.name in bundle.tuned_for:
        notes += _which(bundle.tuned_for)
    trained = None
    if isinstance(data, DataSet):
        trained = len(data.train) + (0 if data.validation is None else len(data.validation))
    is_side_by_side = isinstance(data, OwnTask) and head is not None and head.reads == "concatenated"
    return replace(
        found, notes=[*notes, *_on_other_splits(found)], side_by_side=is_side_by_side,
        parts=comparable.parts(found, rows, trained, bundle.tuned_for),
    )  # fmt: skip


def lacks(task: PaperTask, bundle: Bundle) -> str | None:
    """Why a model cannot do a task; None where it can."""
    model, name = bundle.model, type(bundle.model).__name__
    if task.domain in ("vision", "multimodal") and not isinstance(model, EncodesImage):
        return f"{name} reads no pictures"
    if task.domain in ("language", "multimodal") and not isinstance(model, EncodesText):
        return f"{name} reads no texts"
    if task.kind == "grounding" and not isinstance(model, Grounds):
        return f"{name} has no attention from words to patches that a matching head judges"
    if task.kind == "detection":
        if not isinstance(model, Detects):
            return f"{name} has no `detect`"
        config: Any = model.config
        tasks = [each.name for each in config.tasks if each.kind == "detection"]
        if task.verb not in tasks:
            return f"this {name} has no task {task.verb}: it detects for {', '.join(tasks) or 'none'}"
    if task.kind in ("retrieval", "grounding") and bundle.tokenizer is None:
        return "this checkpoint came without a tokenizer"
    return None


def _untrained(task: PaperTask, bundle: Bundle) -> str | None:
    """Why a model cannot do a task as it is, though a fine-tuning would teach it; None where it can."""
    if task.kind == "grounding":
        return no_matching(bundle.untrained)
    return no_cosine(bundle.untrained) if task.kind == "retrieval" else None


@dataclass(frozen=True)
class Boxes:
    """Pictures with boxes, and the names of their classes by number."""

    rows: DetectionRows
    classes: tuple[str, ...]

    def first(self, rows: int) -> Boxes:
        """So many of them."""
        return replace(self, rows=self.rows.capped(rows))


Data = DataSet | Captioned | Referring | Boxes | OwnTask | Missing


def _data(task: PaperTask, root: Path | None) -> Data:
    if task.kind == "classification":
        layout = layouts.BY_NAME[task.name]
        return Missing(layout.expected, layout.owners) if root is None else find(layout, root)
    found: Captioned | Referring | Boxes | None = None
    if task.kind == "detection":
        boxes = None if root is None else find_val(task.verb, str(root))
        found = None if boxes is None else Boxes(*boxes)
    elif task.kind == "grounding":
        found = None if root is None else find_referring(root, [task.name.lower()])
    elif root is not None:
        found = find_captions(CAPTIONED[task.name], root)
    return Missing(task.expected, task.owners) if found is None else found


def _fine_tuned(task: PaperTask, runs: Sequence[TunedRun], path: str | None) -> TaskRun:
    """The figures that a run of `trivium finetune` left."""
    run = tuned_runs.of_task(task, runs)
    if run is not None:
        figures, is_side_by_side = run.figures(task)
        found = TaskRun(task, "read", figures, seconds=run.seconds, side_by_side=is_side_by_side)
        found.parts = comparable.parts(found)
        if run.part is not None:
            found.rests_on(run.part)
        if task.domain == "multimodal":
            how = "picture and text vector side by side" if is_side_by_side else "the model's own states"
            found.notes.append(f"fine-tuned: the head reads {how}")
        found.notes += [*filter(None, [run.doubt(path)]), *run.notes]
        found.notes += _on_other_splits(found)
        return found
    notes = [_how_to(task, path, "DIR")] if task.verb else []
    return TaskRun(task, "not fine-tuned", notes=notes, missing=Missing(task.expected, task.owners))


def _how_to(task: PaperTask, path: str | None, data: str) -> str:
    out = f"runs/{task.verb}"
    command = shlex.join(["trivium", "finetune", task.verb, "--init", path or "MODEL", "--data", data, "--out", out])
    return f"fine-tune it with `{command}`, then name the run with `--fine-tuned {out}`; --fine-tune does both"


def _on_other_splits(found: TaskRun) -> list[str]:
    return [
        f"ours is {figure.instead}, since {figure.splits[-1]}, on which the papers' numbers rest, was not measured here"
        for figure in found.task.figures
        if found.on_another_split(figure) is not None
    ]


def _as_fine_tuned(found: TaskRun, task: PaperTask, tuned_for: Sequence[str], rows: int | None) -> TaskRun:
    """Retrieval as any model does it, under the names of a fine-tuned one."""
    renamed = {name.replace(".zero_shot.", ".test."): result for name, result in found.results.items()}
    named = replace(found, task=task, results=renamed, notes=[*found.notes, *_which(tuned_for)])
    return replace(named, parts=comparable.parts(named, rows))


def _which(tuned_for: Sequence[str]) -> list[str]:
    several = f"it was fine-tuned for {' or '.join(tuned_for)}: its file does not say for which of them"
    return [several] if len(tuned_for) > 1 else []


def _same_classes(task: PaperTask, bundle: Bundle, data: Boxes) -> None:
    """Raises TriviumError where the model means another thing by a number than the file."""
    trained = (bundle.labels_of or {}).get(task.verb)
    for number, (known, named) in enumerate(zip_longest(trained or [], data.classes, fillvalue="")):
        if trained and known != named:
            raise TriviumError(
                f"{data.rows.file} calls class {number} {named or 'nothing'!r}, and this model knows it as"
                f" {known or 'nothing'!r}: measure it on the data set that it was trained for"
            )


def detected(task: PaperTask, bundle: Bundle, data: Boxes, say: Callable[[str], None]) -> Measured:
    """COCO's figures on the validation half."""
    layout = LAYOUTS[task.verb]
    say(f"{layout.validation}: {len(data.rows):,} pictures")
    seen, bad = detection.find(bundle, data.rows, task.verb)
    figures = detection.measure(data.rows, seen, data.classes)
    found = Measured({f"{layout.validation}.{name}": result for name, result in figures.items()})
    found.is_final = not any(isinstance(each, UnreadableNow) for each in bad)
    if bad:
        found.notes.append(f"{len(bad):,} pictures cannot be read and are left out; the first: {bad[0]}")
    if layout.num_validation not in (None, len(data.rows)):
        found.notes.append(f"{len(data.rows):,} pictures where the published figures rest on {layout.num_validation:,}")
    return found


def zero_shot_retrieval(
    data: Captioned, encoder: ModelEncoder, store: Path, say: Callable[[str], None], shortlist: int
) -> Measured:
    """Recalls, five captions to a picture: TR finds the text for a picture, IR the picture for a text; by cosine, and
    re-ranked where the model matches."""
    found = Measured(notes=[f"{data.splits}: {len(data):,} pictures", *data.notes])
    images = features(encoder, data.pictures, store, say)
    found.is_final = images.is_final
    if images.bad:
        found.notes.append(
            f"{len(images.bad):,} of {len(data):,} pictures cannot be read and are left out with their captions; the"
            f" first: {images.bad[0]}"
        )
    if "projected" not in images.readings:
        raise TriviumError("this model has no space that pictures and texts share, so nothing can be found by cosine")
    captions = [(row, text) for row in images.rows_N.tolist() for text in data.captions[row]]
    say(f"{len(captions):,} captions")
    texts_BD = encoding.of_texts(encoder.bundle, [text for _, text in captions])
    rows = images.rows_N.tolist()
    shown = pairs.Captioned(
        images.readings["projected"], texts_BD, torch.from_numpy(images.rows_N),
        torch.tensor([row for row, _ in captions]), [data.pictures.name(row) for row in rows],
        [f"{data.pictures.name(row)}, {n}" for row in rows for n in range(1, len(data.captions[row]) + 1)],
        [text for _, text in captions], lambda number: data.pictures.read(rows[number]),
    )  # fmt: skip
    if judges(encoder.bundle):
        say(f"re-ranking the {shortlist} candidates in front")
    measured = pairs.measure(encoder.bundle, shown, "zero_shot.tr", "zero_shot.ir", shortlist)
    found.results |= measured.results
    found.notes += measured.not_applicable + measured.headline
    return found


def _identity(data: DataSet | Captioned | Referring | Boxes | OwnTask) -> str:
    if isinstance(data, OwnTask):
        return data.identity
    if isinstance(data, Boxes):
        files = [data.rows.file, *map(data.rows.path, range(len(data.rows)))]
        return "".join(stamp_of(Path(file)) for file in files)
    if isinstance(data, Referring):
        measured = [each for split in SPLITS if split in data.splits for each in data.good(split)]
        return "".join(map(stamp_of, [*data.tables, *map(Path, sorted({each.image for each in measured}))]))
    if isinstance(data, Captioned):
        return f"{identity(data.pictures)} {data.captions!r}"
    splits = [f"{identity(split.pictures)} {split.labels_N.tobytes().hex()}" for split in data.every]
    words = [data.classes, data.prompts, data.templates]
    return "\n".join([*splits, *map(stamp_of, data.tables), repr(words)])


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)
