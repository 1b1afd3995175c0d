"""The tasks that a UniT learns together: which there are, where their rows are, what becomes of each.

A task of labels is one of those that `finetune` takes (tasks.py); detection is COCO's or Visual Genome's format. A task
of one's own is one more entry of TASKS and one of the recipe's `tasks` (see docs/how-to.md).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from trivium.data import embedded
from trivium.data.detection import LAYOUTS, Detection, read_detection
from trivium.data.detection_collate import Augmentation, DetectionCollate
from trivium.data.glue import GLUE
from trivium.data.labelled import Splits
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.data.task_collate import TaskCollate, TaskImage, TaskText
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from trivium.errors import TriviumError
from trivium.methods.unit import Labels
from trivium.models.unit import UnitTask
from trivium.recipes.data import absolute
from trivium.recipes.tasks import TASKS, Task, guess
from trivium.train.protocol import Source

TEXTS_FOR_VOCABULARY = 50_000  # of each task
SCENES = {"coco": "coco", "vg": "vg", "vqav2": "vqa", "snli_ve": "snli-ve"}  # task -> its folder among scenes
OF_GLUE = ("qnli", "mnli", "qqp", "sst2")


@dataclass(frozen=True)
class JointTask:
    """One of the tasks. It is trained where its data is named."""

    number: int  # of its task tokens in the layout of released files, another for each task
    task: str | None = None  # one of those of `trivium finetune`, or coco or vg (detection); None: that of its own name
    root: str | None = None  # folder of a published task in its official layout
    train: tuple[str, ...] = ()  # one's own tables: CSV, TSV, JSONL, Parquet
    dev: tuple[str, ...] = ()
    ratio: float = 0.1  # share of the steps, relative to those of the others
    batch: int = 64  # rows of one step, over all processes
    rows: int | None = None  # training rows that are used, evenly spread; None: all
    of_one_picture: int = 1  # rows that stand together in training where one picture has as many: it is encoded once
    num_queries: int = 25
    text: Literal["class", "all"] = "class"  # which of the text's tokens the decoder reads
    max_length: int = 128  # tokens of its texts
    min_questions: int = 9  # of VQA: with an answer, for it to be a class

    @property
    def is_given(self) -> bool:
        return self.root is not None or bool(self.train)


@dataclass(frozen=True)
class JointData:
    """What the tasks share. With no data named at all, here or at a task, scenes are made and used."""

    scenes: str | None = None  # folder that `trivium data scenes` wrote: coco, vg, vqa and snli-ve inside
    glue: str | None = None  # folder of GLUE: those of QNLI, MNLI, QQP and SST-2 that are in it
    num_scenes: int = 8000  # that are made
    short: int = 800  # pixels of a picture's shorter side
    longest: int = 1333  # and at most of its longer one
    augmentation: Augmentation = field(default_factory=Augmentation)  # of detection
    vocabulary: str = "bert"  # "learned" from the tasks' texts, "bert", or the path of a tokenizer.json

    @property
    def transform(self) -> ImageTransform:
        return ImageTransform(self.short, "bilinear", IMAGENET_MEAN, IMAGENET_STD, "shortest", self.longest)


# The shares of the eight are the paper's; numbers are those of the released weights, where they have one.
PUBLISHED = {
    "coco": JointTask(0, ratio=0.20, num_queries=100),
    "vg": JointTask(1, ratio=0.07, num_queries=100),
    "vqav2": JointTask(3, ratio=0.26, text="all", max_length=25),
    "snli_ve": JointTask(9, ratio=0.12, max_length=25),
    "qnli": JointTask(5, ratio=0.10),
    "mnli": JointTask(6, ratio=0.10),
    "qqp": JointTask(8, ratio=0.10),
    "sst2": JointTask(7, ratio=0.05),
    "hateful_memes": JointTask(2, ratio=0.05, max_length=64),
    "easy_vqa": JointTask(10, ratio=0.05, text="all", max_length=25),
    "daquar": JointTask(11, ratio=0.05, text="all", max_length=25),
}


@dataclass
class Opened:
    """A task with its rows."""

    name: str
    given: JointTask
    of: Task | None  # None: detection
    data: Splits | Detection

    @property
    def title(self) -> str:
        """What results and pages call it: as papers do, or by its own name where it is another of the same kind."""
        if self.name != self.kind:
            return self.name
        return LAYOUTS[self.kind].figure if self.of is None else self.of.title

    @property
    def kind(self) -> str:
        return self.given.task or self.name

    @property
    def is_by_picture(self) -> bool:
        """Whether rows of one picture stand together in training."""
        return self.given.of_one_picture > 1 and self.of is not None and self.of.reads == "pairs"

    @cached_property
    def train(self) -> Source:
        """The training rows, in the order that is mixed."""
        if isinstance(self.data, Splits) and self.is_by_picture:
            return self.data.train.by_picture(self.given.of_one_picture)
        return self.data.train

    @property
    def for_model(self) -> UnitTask:
        """The task as the model is built for it."""
        given = self.given
        if isinstance(self.data, Detection):
            attributes = len(self.data.attributes) or None
            return UnitTask(self.name, "detection", "image", len(self.data.classes), given.number, given.num_queries,
                            attributes)  # fmt: skip
        assert self.of is not None
        reads: Literal["image", "text", "both"] = {"images": "image", "text": "text", "pairs": "both"}[self.of.reads]  # type: ignore[assignment]
        return UnitTask(self.name, "labels", reads, len(self.data.labels), given.number, given.num_queries,
                        text=given.text, gives="answers" if self.of.gives == "answers" else "class",
                        max_length=given.max_length)  # fmt: skip

    @property
    def target(self) -> Labels:
        """What its batches hold, of a task of labels."""
        assert self.of is not None
        return "answers" if self.of.gives == "answers" else "label"

    @property
    def guess(self) -> float:
        """The loss of a model that knows only how often each label occurs in training, of a task of labels."""
        assert isinstance(self.data, Splits) and self.of is not None
        found = guess(self.data, self.of.gives)
        assert found is not None, "answers of a UniT are classes"
        return found

    @property
    def labels(self) -> dict[str, list[str]]:
        if isinstance(self.data, Splits):
            return {self.name: list(self.data.labels)}
        attributes = {f"{self.name}.attributes": list(self.data.attributes)} if self.data.attributes else {}
        return {self.name: list(self.data.classes)} | attributes

    def texts(self) -> Iterator[str]:
        """Of training, for a vocabulary: some, evenly spread."""
        if isinstance(self.data, Splits) and self.of is not None and self.of.reads != "images":
            for row in self.data.train.capped(TEXTS_FOR_VOCABULARY).good():
                yield from (text for text in (row.text, row.second_text) if text)

    def collate(
        self, transform: ImageTransform, augmentation: Augmentation, tokenizer: Tokenizer, positions: int
    ) -> TaskCollate | DetectionCollate:
        if self.of is None:
            return DetectionCollate(transform, augmentation)
        assert isinstance(self.data, Splits)
        texts = TaskText(tokenizer, min(self.given.max_length, positions), segments=True)
        return TaskCollate(
            None if self.of.reads == "images" else texts,
            None if self.of.reads == "text" else TaskImage(transform),
            len(self.data.labels),
            sort_by_length=False,
        )

    def cut(self, collate: TaskCollate | DetectionCollate) -> list[str]:
        """Sentences on texts of each split that are longer than what is read of them, and on pictures of training with
        more boxes than can be found."""
        if isinstance(self.data, Detection) or isinstance(collate, DetectionCollate):
            return self._beyond_queries()
        splits = {"train": self.data.train, **self.data.held_out}
        return [f"{self.name}, {split}: {said}" for split, rows in splits.items() for said in collate.cut(rows)]

    def _beyond_queries(self) -> list[str]:
        assert isinstance(self.data, Detection)
        rows, queries = self.data.train, self.given.num_queries
        boxes_N = np.diff(np.append(0, np.cumsum(rows.usable_M))[rows.starts])
        if not (more := int((boxes_N > queries).sum())):
            return []
        flag = f"--tasks.{self.name.replace('_', '-')}.num-queries"
        return [
            f"{self.name}: {more:,} of {len(rows):,} training pictures have more boxes than its {queries} queries can"
            f" find, at most {boxes_N.max()}: {flag} {boxes_N.max()} would hold them all"
        ]


def known() -> list[str]:
    return [*LAYOUTS, *TASKS]


def with_data(tasks: Mapping[str, JointTask], data: JointData) -> dict[str, JointTask]:
    """The tasks that are trained, with the folders that `data` names for several of them. Raises TriviumError."""
    found = dict(tasks)

    def give(name: str, root: str) -> None:
        if name in found and not found[name].is_given:
            found[name] = replace(found[name], root=root)

    scenes = data.scenes
    if scenes is None and data.glue is None and not any(task.is_given for task in tasks.values()):
        scenes = str(made_scenes(data.num_scenes))
    if scenes is not None:
        there = [name for name, folder in SCENES.items() if os.path.isdir(os.path.join(scenes, folder))]
        if not there:
            raise TriviumError(
                f"{scenes} holds none of the folders {', '.join(SCENES.values())}: write them with trivium data scenes"
                f" --out {scenes}, or give another --data.scenes"
            )
        for name in there:
            give(name, os.path.join(scenes, SCENES[name]))
    if data.glue is not None:
        there = [name for name in OF_GLUE if os.path.isdir(os.path.join(data.glue, GLUE[name].folder))]
        if not there:
            folders = ", ".join(GLUE[name].folder for name in OF_GLUE)
            raise TriviumError(f"{data.glue} holds none of {folders}: give the folder of GLUE as --data.glue")
        for name in there:
            give(name, data.glue)
    chosen = {name: task for name, task in found.items() if task.is_given and task.ratio > 0}
    if not chosen:
        raise TriviumError("no task has both data and a ratio above 0, so nothing would be trained: name data for one")
    return chosen


def made_scenes(count: int) -> Path:
    """Scenes of the embedded drawings, kept where caches are, made where they are not there yet.

    Several processes may come at once: each makes them in a folder of its own, and the first one done puts it in place.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium" / f"scenes-{count}"
    if not cache.exists():
        own = cache.with_name(f".{cache.name}.{secrets.token_hex(8)}")
        try:
            _write_both_halves(count, own)
            own.rename(cache)
        except OSError:
            if not cache.is_dir():  # where it is one, another process was faster
                raise
        finally:
            shutil.rmtree(own, ignore_errors=True)
    _write_both_halves(count, cache)  # only what was lost since
    return cache


def _write_both_halves(count: int, folder: Path) -> None:
    for split, number in (("train", count), ("new-scenes", max(4, count // 8))):
        write_scenes(Scenes(split, number), folder, tuple(SCENES.values()))  # type: ignore[arg-type]


def opened(tasks: Mapping[str, JointTask]) -> list[Opened]:
    """Open the rows of each. Raises TriviumError for a task that there is not, and as its reader does."""
    found = []
    for name, given in tasks.items():
        kind = given.task or name
        if given.of_one_picture > 1 and (kind in LAYOUTS or (kind in TASKS and TASKS[kind].reads != "pairs")):
            raise TriviumError(
                f"--tasks.{name}.of-one-picture is of texts on pictures, and {name} has none: leave it out"
            )
        if kind in LAYOUTS:
            if given.root is None:
                raise TriviumError(f"the boxes of the task {name} are not named: give --tasks.{name}.root DIR")
            boxes = read_detection(kind, given.root)
            found.append(Opened(name, given, None, replace(boxes, train=boxes.train.capped(given.rows))))
            continue
        if kind not in TASKS:
            raise TriviumError(f"there is no task {kind}: use one of {', '.join(known())}")
        of = TASKS[kind]
        if of.gives not in ("class", "answers") or of.num_pictures > 1:
            what = "two pictures" if of.num_pictures > 1 else f"a {of.gives}"
            raise TriviumError(f"{of.title} is about {what}, and a UniT answers with classes: leave out {name}")
        rows = replace(
            of.data, root=given.root, train=given.train, dev=given.dev, min_questions=given.min_questions
        )  # fmt: skip
        try:
            splits = of.open(rows).checked()
        except TriviumError as error:
            raise TriviumError(_with_own_flags(str(error), name)) from error
        splits = replace(splits, notes=[_with_own_flags(note, name) for note in splits.notes])
        found.append(Opened(name, given, of, replace(splits, train=splits.train.capped(given.rows))))
    return found


def _with_own_flags(sentence: str, name: str) -> str:
    """Readers name the flags of `finetune`, which has one task and can be told its columns."""
    sentence = re.sub(r"name one of them with --data\.[\w-]+", "rename them so that one is meant", sentence)
    return sentence.replace("--data.", f"--tasks.{name.replace('_', '-')}.")


def make_tokenizer(vocabulary: str, tasks: list[Opened], vocab_size: int) -> Tokenizer:
    """Raises TriviumError where the file of a tokenizer is none."""
    texts = [text for task in tasks for text in task.texts()]
    if vocabulary == "learned" and texts:
        return Tokenizer.train(texts, vocab_size)
    if vocabulary in ("learned", "bert"):
        return Tokenizer.wordpiece(embedded.bert_vocabulary())
    return Tokenizer.from_file(Path(vocabulary))


def with_absolute_paths(tasks: Mapping[str, JointTask]) -> dict[str, JointTask]:
    return {
        name: replace(
            task,
            root=None if task.root is None else absolute(task.root),
            train=tuple(map(absolute, task.train)),
            dev=tuple(map(absolute, task.dev)),
        )
        for name, task in tasks.items()
    }
