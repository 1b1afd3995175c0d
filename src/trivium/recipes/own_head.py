"""A fine-tuned model on the official files of its own task, or a UniT on those of each of its tasks, read by the head
that it has: what the evaluation suite asks of a model whose weights come from elsewhere, and of one whose run is not at
hand.

Rows, collate, figures and their names are those of `trivium finetune` (tasks.py, finetune.py, predict.py), of a UniT
those of its run (unit_tasks.py, unit.py). Easy to get wrong: the files number their labels in another order than some
heads, so they are matched by name; a writer of answers ranks the list that came with its weights, and without one the
list of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from trivium.bundle import Bundle
from trivium.bundle.asked import asked_of, names_unknown
from trivium.bundle.hashes import head_hash
from trivium.data.answers import normalized
from trivium.data.detection_collate import Augmentation
from trivium.data.glue import GLUE
from trivium.data.labelled import LabelledRows, Row, Splits, wholly_labelled
from trivium.data.task_collate import TaskCollate
from trivium.data.tokenizer import Tokenizer
from trivium.data.vqa import outside_list
from trivium.errors import BadSample, TriviumError
from trivium.evaluate import detection
from trivium.evaluate.classification import Measured
from trivium.evaluate.datasets import Missing
from trivium.evaluate.datasets.captions import RETRIEVAL
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.feature_store import stamp_of
from trivium.evaluate.paper_tasks import PaperTask
from trivium.evaluate.suite import OwnTask
from trivium.evaluate.tasks import Predictions
from trivium.methods.finetune import FineTuning
from trivium.methods.pixels import Pixels
from trivium.methods.unit import UnitMethod
from trivium.models.finetuned import FineTuned, Gives
from trivium.models.unit import Unit, UnitTask
from trivium.recipes.finetune import collate_of
from trivium.recipes.predict import predict, predict_by, tell_held_out, title_of
from trivium.recipes.tasks import TASKS, Task, TaskData
from trivium.recipes.unit_tasks import JointTask, Opened

Predicted = Callable[[LabelledRows], Predictions]

ROWS_AT_ONCE = 32
# By a task's title: folders below the root of all data; patterns of which one must match there; and those of all files
# that say what its rows are, with "train" in the names of those to learn from; Karpathy's are all splits in one.
PLACES: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "VQAv2": (
        ("vqav2", "VQAv2", "vqa", "coco", "."), ("v2_OpenEnded_mscoco_*_questions.json", "vqa_*.json"),
        ("v2_*.json", "vqa_*.json", "vg_qa.json", "answer_list.json"),
    ),
    "SNLI-VE": (
        ("snli_ve", "SNLI-VE", "snli-ve", "."), ("snli_ve_*.jsonl", "ve_*.json"), ("snli_ve_*.jsonl", "ve_*.json"),
    ),
    "NLVR2": (
        ("nlvr2", "NLVR2", "nlvr", "."), ("data/dev.json", "data/test1.json", "nlvr_*.json"),
        ("data/*.json", "nlvr_*.json"),
    ),
    "Hateful Memes": (("hateful_memes", "hateful-memes"), ("dev*.jsonl", "test*.jsonl"), ("*.jsonl",)),
    **{
        each.name: (
            each.folders, (each.albef.replace("_test", "_train"), each.karpathy),
            (each.albef.replace("_test", "_*"), each.karpathy),
        )
        for each in RETRIEVAL
    },
    **{
        files.folder: (("glue_data", "glue", "."), (f"{files.folder}/dev*.tsv",), (f"{files.folder}/*.tsv",))
        for files in GLUE.values()
    },
}  # fmt: skip


def open_own(asked: PaperTask, bundle: Bundle, root: Path | None) -> OwnTask | Path | Missing | None:
    """The held-out rows of a task below `root`; where the model has no head for it, their folder or None.

    Raises TriviumError: they are there and cannot be read, or hold other labels than the head.
    """
    found = _place(asked, root)
    name, gives, own = _answered(asked, bundle)
    if name is None:
        return found
    task = TASKS[name]
    if found is None:
        return Missing(asked.expected, asked.owners)
    where = TaskData(root=str(found))
    if gives == "answers":  # those that are chosen from are the model's
        where = replace(where, min_questions=1)
    splits = task.open(where)
    held_out = {name: wholly_labelled(rows) for name, rows in splits.held_out.items()}
    if not held_out:
        raise TriviumError(f"{found} holds the training rows of {task.title} alone: put those to measure on there")
    if own is not None:
        of = asked_of(bundle, own.name, own.reads)
        if of.labels is None or len(of.labels) != own.num_labels:
            raise names_unknown(of)
        bundle = replace(bundle, labels=of.labels, max_length=of.max_length)
    if gives == "class":
        held_out = {name: _numbered(rows, splits.labels, bundle) for name, rows in held_out.items()}
    elif gives == "answers":  # they are scored by their names, and the files number them in another order
        held_out = {name: rows.with_rows([_unnumbered(row) for row in rows.rows]) for name, rows in held_out.items()}
    elif gives != "number" and not bundle.labels:
        is_listed = bool(splits.train.rows) or (found / "answer_list.json").is_file()
        if not is_listed or len(splits.labels) < 2:  # not one drawn from what is to be answered
            raise TriviumError(
                f"this model ranks a list of answers, and has none: put answer_list.json into {found}, or beside the"
                " file of the model"
            )
        bundle = replace(bundle, labels=list(splits.labels))
    return OwnHead(task, bundle, replace(splits, held_out=held_out), own)


def without_head(asked: PaperTask, bundle: Bundle, root: Path) -> Path | None:
    """The folder below `root` with the rows of a task that the model has no head for; None: it has one, or none is
    there."""
    return _place(asked, root) if _answered(asked, bundle)[0] is None else None


def annotation_files(asked: PaperTask, folder: Path) -> list[Path]:
    """The files in the folder of a task's data that say what its rows are."""
    return sorted({file for pattern in PLACES[asked.prefix][2] for file in folder.glob(pattern)})


def _place(asked: PaperTask, root: Path | None) -> Path | None:
    folders, patterns, _ = PLACES[asked.prefix]
    places = [] if root is None else [root / folder for folder in folders]
    return next((place for place in places for pattern in patterns if next(place.glob(pattern), None)), None)


def _answered(asked: PaperTask, bundle: Bundle) -> tuple[str | None, Gives, UnitTask | None]:
    """The name of a task that a model has a head for, what it gives, and of a UniT the task as its model has it."""
    head = bundle.head_config
    if head is not None:
        return head.task if head.task in TASKS and TASKS[head.task].title == asked.prefix else None, head.gives, None
    for own in bundle.model.config.tasks if isinstance(bundle.model, Unit) else ():
        if own.kind == "labels" and own.name in TASKS and TASKS[own.name].title == asked.prefix:
            return own.name, own.gives, own
    return None, "class", None


@dataclass(frozen=True)
class OwnHead(OwnTask):
    """Rows and model, whose labels are those of this task. splits.held_out: labelled as the head numbers them."""

    task: Task
    bundle: Bundle
    splits: Splits
    own: UnitTask | None = None  # of a UniT

    @property
    def identity(self) -> str:
        rows = [each for some in self.splits.held_out.values() for each in some.rows]
        named = head_hash(self.bundle) if self.own is None else f"{self.own} {self.bundle.labels}"
        digest = hashlib.sha256(named.encode())
        for each in rows:
            digest.update(f"\n{each!r}".encode())
        pictures = {each.image for each in rows if isinstance(each, Row)}
        pictures |= {each.second_image for each in rows if isinstance(each, Row)}
        for picture in sorted(filter(None, pictures)):
            digest.update(stamp_of(Path(picture)).encode())
        return digest.hexdigest()

    def first(self, rows: int) -> OwnHead:
        held_out = {name: some.capped(rows) for name, some in self.splits.held_out.items()}
        return replace(self, splits=replace(self.splits, held_out=held_out))

    def measure(self, folder: Path, say: Callable[[str], None]) -> Measured:
        reads = None if self.bundle.head_config is None else self.bundle.head_config.reads
        title = self.task.title if reads is None else title_of(self.task, reads)
        collate, predicted = self._of_head() if self.own is None else self._of_unit(self.own)
        found = Evaluation(not_applicable=self._notes())
        held_out = self.splits.held_out
        for name, rows in held_out.items():
            found.not_applicable += [f"{name}: {sentence}" for sentence in collate.cut(rows)]
        predictions = folder / "predictions"
        if not tell_held_out(found, self.task, title, held_out, predicted, predictions, say):
            raise TriviumError(f"{self.task.title}: nothing can be measured: {found.not_applicable[-1]}")
        how = "which it learned among others"
        if self.bundle.head_config is not None:
            beside = "picture and text vector side by side" if reads == "concatenated" else "the model's own states"
            how = f"trained for {self.bundle.head_config.task}, which reads {beside}"
        notes = [f"by the model's own head, {how}", *self._ranking(), *found.notes, *found.not_applicable]
        notes += [f"what it says of each row: {predictions}"] if any(predictions.glob("*.jsonl")) else []
        if not found.results:
            notes.insert(0, "there is no figure, since no row that can be read has a label: labelled ones are missing")
        results = {name[len(title) :].lstrip("."): each for name, each in found.results.items()}
        return Measured(results, notes, found.is_final)

    def _of_head(self) -> tuple[TaskCollate, Predicted]:
        """As `trivium finetune` measures it."""
        bundle, head, labels = self.bundle, self.bundle.head_config, tuple(self.bundle.labels or ())
        assert head is not None and bundle.head is not None
        splits = replace(self.splits, labels=labels, center=head.center, scale=head.scale)
        collate = collate_of(TaskData(), self.task, splits, bundle, head.gives)
        ranked = None if collate.writes is None else collate.encoded_answers(labels)
        whole = FineTuned(bundle.model, bundle.head, head, ranked)
        method = FineTuning(whole, self._pixels).to(bundle.device).eval()
        return collate, lambda rows: predict(method, rows, collate, ROWS_AT_ONCE, labels)

    def _of_unit(self, own: UnitTask) -> tuple[TaskCollate, Predicted]:
        """As the run of a UniT measures it."""
        bundle, labels = self.bundle, tuple(self.bundle.labels or ())
        if own.reads != "image" and bundle.tokenizer is None:
            raise TriviumError("the model came without a tokenizer: put its tokenizer.json or vocab.txt beside it")
        model, tokenizer = cast(Unit, bundle.model), cast(Tokenizer, bundle.tokenizer)
        given = JointTask(own.number, max_length=bundle.max_length)
        opened = Opened(own.name, given, self.task, replace(self.splits, labels=labels))
        collate = opened.collate(bundle.transform, Augmentation(), tokenizer, model.config.max_length)
        assert isinstance(collate, TaskCollate)
        method = UnitMethod(model, self._pixels, {own.name: opened.target}).to(bundle.device).eval()
        at_once = ROWS_AT_ONCE if own.reads == "text" else detection.AT_ONCE
        return collate, lambda rows: predict_by(
            method.answers, method, rows, collate, at_once, labels, stream=own.name
        )  # fmt: skip

    @property
    def _pixels(self) -> Pixels:
        return Pixels(self.bundle.transform.mean, self.bundle.transform.std)

    def _ranking(self) -> list[str]:
        """How a writer ranks: figures of two ways are not to be compared unsaid."""
        head = self.bundle.head_config
        if head is None or head.gives != "text":
            return []
        read = min(head.ranked, len(self.bundle.labels or ()))
        twice = ", and the first word counts twice, as in the public code" if head.first_word_twice else ""
        return [f"of the list of answers the {read:,} that begin most likely are read to their end{twice}"]

    def _notes(self) -> list[str]:
        """What the reader says of these rows; of answers outside a list, where it is that of the model."""
        if self.task.gives != "answers":
            return [sentence for sentence in self.splits.notes if not sentence.startswith("train: ")]
        known = set(map(normalized, self.bundle.labels or ()))
        return [told for name, rows in self.splits.held_out.items() for told in outside_list(name, rows, known)]


def _unnumbered(row: Row | BadSample) -> Row | BadSample:
    return replace(row, answers={}) if isinstance(row, Row) and row.answers is not None else row


def _numbered(rows: LabelledRows, theirs: Sequence[str], bundle: Bundle) -> LabelledRows:
    """The same rows, their labels numbered as the head's are."""
    ours = bundle.labels or []
    if sorted(ours) != sorted(theirs):
        raise TriviumError(
            f"these files hold the labels {', '.join(theirs)}, and this model's head knows"
            f" {', '.join(ours) or 'none by name'}: measure it on the data that it was trained for"
        )
    number = [ours.index(label) for label in theirs]
    return rows.with_rows(
        [
            replace(row, label=number[row.label]) if isinstance(row, Row) and row.label is not None else row
            for row in rows.rows
        ]
    )
