"""Every task that a trained model can be fine-tuned for: what it reads and gives, its files, its metric, its defaults.

| where the defaults come from | tasks |
|---|---|
| fairseq's RoBERTa recipe for GLUE, which FLAVA took over without a sweep (FLAVA, appendix B.2) | the eight of GLUE |
| FLAVA, appendix B.2 | vqav2, snli_ve, hateful_memes |
| ALBEF, section 4 and its public code | visual_entailment (SNLI-VE again), vqa (VQAv2 again), nlvr2, its preparation |
| our own choice | easy_vqa, daquar; classification and regression of one's own tables |

The papers leave open: the head on a text (here RoBERTa's own), the inside of the two-layer head on a fused pair (here
GELU and dropout; its 1,536 are stated), betas and eps of the tasks with pictures. fairseq decays biases and norms too;
here they never are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from trivium.data.files import Kind
from trivium.data.glue import read_glue
from trivium.data.image_text_tasks import read_hateful_memes, read_snli_ve
from trivium.data.labelled import Splits
from trivium.data.labelled_tables import Columns, read_tables
from trivium.data.small_vqa import read_daquar, read_easy_vqa
from trivium.data.statements import read_assignments, read_nlvr2
from trivium.data.vqa import read_questions, read_vqa
from trivium.errors import TriviumError
from trivium.evaluate import losses
from trivium.methods.momentum import SoftTargets
from trivium.models.finetuned import Gives
from trivium.recipes.data import absolute
from trivium.train.optim import Optim


@dataclass(frozen=True)
class Head:
    """What stands on top of the model."""

    hidden: int | Literal["width", "none"] = "width"  # of the inner layer; "width": as wide as what it reads
    activation: Literal["tanh", "gelu", "relu"] = "tanh"
    dropout: float = 0.1
    fusion: Literal["auto", "fused", "concatenated"] = (
        "auto"  # of picture and text; auto: fused where that was trained, or where the head is one of ALBEF's own
    )
    answers: Literal["auto", "written", "scored"] = "auto"  # of questions; auto: written where the model is an ALBEF
    ranked: int = 128  # written answers of the list that are read to their end: those that begin most likely
    first_word_twice: bool = False  # they are ranked as the public code does, which counts an answer's first word twice


@dataclass(frozen=True)
class TaskData:
    """Where the rows of a task are, and what is done to each."""

    root: str | None = None  # folder of a published task in its official layout
    train: tuple[str, ...] = ()  # one's own tables: CSV, TSV, JSONL, Parquet
    dev: tuple[str, ...] = ()  # to choose the checkpoint by; without them a share of the training rows is held out
    test: tuple[str, ...] = ()  # measured at the end where they have labels, and predicted
    held_out: float = 0.1  # that share
    image_column: str | None = None  # None: found by its usual names
    text_column: str | None = None
    second_text_column: str | None = None  # named: the task reads pairs of texts
    label_column: str | None = None
    rows: int | None = None  # training rows that are used, evenly spread; None: all
    min_questions: int = 9  # of VQA: with an answer, for it to be a class
    batch: int = 32  # rows of one step, over all processes
    max_length: int | None = None  # tokens of a text or a pair; None: as many as the model has positions
    image_size: int | None = None  # side of the pictures in pixels; None: the model's own
    crop_scale: tuple[float, float] = (1.0, 1.0)  # share of the area that a random crop shows
    flip: float = 0.0  # probability of a mirrored picture
    random_changes: int = 0  # of shape and light, drawn for each picture (data/random_augment.py); 0: none
    blank_pictures: bool = False  # a grey one for each: what the text alone tells, a baseline
    sort_by_length: bool = True  # texts inside a batch, so that micro-batches are padded less

    def with_absolute_paths(self) -> TaskData:
        return replace(
            self,
            root=None if self.root is None else absolute(self.root),
            train=tuple(map(absolute, self.train)),
            dev=tuple(map(absolute, self.dev)),
            test=tuple(map(absolute, self.test)),
        )


@dataclass(frozen=True)
class Task:
    """One task. Its loss follows from `gives` (see methods/finetune.py), and its best checkpoint is the one with the
    best `reported` on the dev split."""

    name: str
    title: str  # as papers call it, and its figures
    reads: Kind  # "text", "images", or "pairs" of both
    gives: Gives
    open: Callable[[TaskData], Splits]
    metrics: tuple[str, ...]
    reported: str  # the metric that a paper prints, as a mean over the held-out splits of the same name
    head: Head = field(default_factory=Head)
    data: TaskData = field(default_factory=TaskData)
    optim: Optim = field(default_factory=Optim)
    distillation: SoftTargets = field(default_factory=SoftTargets)
    steps: int | None = None  # as published; None: the recipe counts epochs
    epochs: float | None = None  # as published; None without `steps`: as many as the recipe has, with patience
    dropout: float | None = 0.1  # of the model; None: as its checkpoint says
    num_pictures: int = 1  # of a row, where it has any
    asks: bool = False  # its classes are answers to questions, and an ALBEF writes them


def guess(splits: Splits, gives: Gives) -> float | None:
    """The loss of a model that knows only how often each label occurs in training; None of answers that are written."""
    rows = list(splits.train.good())
    if gives == "class":
        return losses.chance(torch.tensor([row.label for row in rows]), len(splits.labels))
    if gives == "number":
        value_N = torch.tensor([row.value for row in rows], dtype=torch.float64)
        return float(value_N.var(correction=0)) / splits.scale**2
    if gives == "answers":
        right: Counter[int] = Counter()
        for row in rows:
            right.update(row.answers or {})
        return sum(losses.binary_entropy(degree / len(rows)) for degree in right.values())
    return None


def glue_optim(lr: float, warmup: int) -> Optim:
    """fairseq's, shared by all eight: Adam, polynomial decay to 0 of power 1, nothing clipped."""
    return Optim(
        lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, warmup=warmup, schedule="linear", final=0.0, clip="none"
    )


def _glue(
    name: str,
    title: str,
    lr: float,
    batch: int,
    steps: int,
    warmup: int,
    metrics: tuple[str, ...] = ("accuracy",),
    gives: Gives = "class",
) -> Task:
    def open(data: TaskData) -> Splits:
        return read_glue(name, _root(data, f"--data.root DIR, the folder that holds {title} of GLUE"))

    return Task(
        name, title, "text", gives, open, metrics, metrics[0], data=TaskData(batch=batch),
        optim=glue_optim(lr, warmup), steps=steps,
    )  # fmt: skip


def _of_pairs(
    name: str,
    title: str,
    lr: float,
    steps: int,
    read: Callable[[str, TaskData], Splits],
    metrics: tuple[str, ...] = ("accuracy",),
    gives: Gives = "class",
    image_size: int | None = None,
) -> Task:
    """A task of a picture and a text with FLAVA's settings."""

    def open(data: TaskData) -> Splits:
        return read(_root(data, f"--data.root DIR, the folder of {title}"), data)

    return Task(
        name, title, "pairs", gives, open, metrics, metrics[0],
        head=Head(hidden=1536, activation="gelu"),
        data=TaskData(batch=256, image_size=image_size),
        optim=Optim(lr=lr, betas=(0.9, 0.999), weight_decay=0.01, warmup=2000, schedule="cosine", clip="none"),
        steps=steps,
        dropout=None,
    )  # fmt: skip


_ALBEF_DATA = TaskData(batch=256, max_length=25, image_size=384, crop_scale=(0.5, 1.0), flip=0.5, random_changes=2)


def _as_albef(
    name: str,
    title: str,
    epochs: float,
    open: Callable[[TaskData], Splits],
    *,
    gives: Gives = "class",
    warmup: int = 100,
    final: float = 0.05,
    data: TaskData | None = None,
    distillation: SoftTargets | None = None,
    num_pictures: int = 1,
) -> Task:
    """A task of a text and pictures with ALBEF's settings."""
    return Task(
        name, title, "pairs", gives, open, ("accuracy",), "accuracy",
        head=Head(activation="relu", dropout=0.0),
        data=data or _ALBEF_DATA,
        optim=Optim(
            lr=2e-5, betas=(0.9, 0.999), weight_decay=0.02, no_decay=("*bias", "*norm*"), warmup=warmup, final=final,
            clip="none",
        ),
        distillation=distillation or SoftTargets(alpha=0.4),
        dropout=None,
        num_pictures=num_pictures,
        epochs=epochs,
    )  # fmt: skip


def _root(data: TaskData, what: str) -> str:
    if data.root is None:
        raise TriviumError(f"the data of this task is not named: give {what}")
    return data.root


def _vqa(root: str, data: TaskData) -> Splits:
    return read_vqa(root, data.min_questions)


def _tables(kind: Kind, regression: bool, data: TaskData) -> Splits:
    columns = Columns(data.image_column, data.text_column, data.second_text_column, data.label_column)
    return read_tables(
        data.train, data.dev, data.test, columns, kind=kind, regression=regression, held_out_share=data.held_out
    )


def _visual_entailment(data: TaskData) -> Splits:
    return read_snli_ve(_root(data, "--data.root DIR, the folder of SNLI-VE"))


def _albef_vqa(data: TaskData) -> Splits:
    return read_vqa(_root(data, "--data.root DIR, the folder of VQAv2"), data.min_questions)


def _nlvr2(data: TaskData) -> Splits:
    return read_nlvr2(_root(data, "--data.root DIR, the folder of NLVR2"))


def _assignments(data: TaskData) -> Splits:
    columns = Columns(data.image_column, data.text_column)
    return read_assignments(data.train, data.dev, data.test, columns, data.held_out)


def _questions(data: TaskData) -> Splits:
    columns = Columns(data.image_column, data.text_column, None, data.label_column)
    return read_questions(data.train, data.dev, data.test, columns, data.held_out)


def _own(name: str, title: str, kind: Kind, gives: Gives = "class", data: TaskData | None = None) -> Task:
    """Of one's own tables."""
    numbers = gives == "number"
    metrics = ("pearson", "spearman") if numbers else ("accuracy",)
    optim = Optim(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01, warmup=0.06, schedule="linear", clip="global")
    return Task(
        name,
        title,
        kind,
        gives,
        partial(_tables, kind, numbers),
        metrics,
        metrics[0],
        data=data or TaskData(),
        optim=optim,
    )


def _asked(name: str, title: str, read: Callable[[str], Splits], what: str) -> Task:
    """A small set of questions, with settings of our own: nobody publishes any for a pretrained model."""

    def open(data: TaskData) -> Splits:
        return read(_root(data, f"--data.root PATH, {what}"))

    return Task(
        name, title, "pairs", "class", open, ("accuracy",), "accuracy", head=Head(hidden=1536, activation="gelu"),
        optim=Optim(lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01, warmup=0.06, schedule="linear", clip="global"),
        dropout=None, asks=True,
    )  # fmt: skip


_WITH_F1 = ("accuracy", "macro_f1")  # the former is what papers print and what a checkpoint is chosen by
_LISTED = (
    # lr, batch, updates and warm-up of fairseq's table for RoBERTa-base
    _glue("cola", "CoLA", 1e-5, 16, 5_336, 320, ("matthews",)),
    _glue("sst2", "SST-2", 1e-5, 32, 20_935, 1_256, _WITH_F1),
    _glue("mrpc", "MRPC", 1e-5, 16, 2_296, 137, ("accuracy_and_f1", "accuracy", "f1")),
    _glue("stsb", "STS-B", 2e-5, 16, 3_598, 214, ("pearson", "spearman"), "number"),
    _glue("qqp", "QQP", 1e-5, 32, 113_272, 28_318, ("accuracy_and_f1", "accuracy", "f1")),
    _glue("mnli", "MNLI", 1e-5, 32, 123_873, 7_432, _WITH_F1),
    _glue("qnli", "QNLI", 1e-5, 32, 33_112, 1_986, _WITH_F1),
    _glue("rte", "RTE", 2e-5, 16, 2_036, 122),
    _of_pairs("vqav2", "VQAv2", 1e-4, 44_000, _vqa, gives="answers", image_size=480),
    _of_pairs("snli_ve", "SNLI-VE", 1e-5, 24_000, lambda root, _: read_snli_ve(root), _WITH_F1),
    _of_pairs(
        "hateful_memes", "Hateful Memes", 1e-5, 24_000, lambda root, _: read_hateful_memes(root), ("auroc", "accuracy")
    ),
    _as_albef(
        "visual_entailment",
        "SNLI-VE",
        5,
        _visual_entailment,
        data=replace(_ALBEF_DATA, max_length=None),
        distillation=SoftTargets(alpha=0.4, ramp=0.0),
    ),
    _as_albef("vqa", "VQAv2", 8, _albef_vqa, gives="answers", warmup=400),
    _as_albef("nlvr2", "NLVR2", 10, _nlvr2, num_pictures=2, data=replace(_ALBEF_DATA, batch=128, max_length=None)),
    _as_albef(
        "text_assignment",
        "text assignment",
        1,
        _assignments,
        num_pictures=2,
        distillation=SoftTargets(),
        final=0.5,
        data=replace(_ALBEF_DATA, batch=512, image_size=None, crop_scale=(0.2, 1.0)),
    ),
    replace(
        _own("question_answering", "question answering", "pairs", "answers", TaskData(label_column="answer")),
        open=_questions,
    ),
    _asked("easy_vqa", "easy-VQA", read_easy_vqa, "the package of easy-VQA or its folder data"),
    _asked("daquar", "DAQUAR", read_daquar, "the folder of DAQUAR"),
    _own("image_classification", "image classification", "images", data=TaskData(crop_scale=(0.5, 1.0), flip=0.5)),
    _own("text_classification", "text classification", "text"),
    _own("text_regression", "text regression", "text", "number"),
    _own("image_text_classification", "classification of a picture and a text", "pairs"),
)
TASKS = {task.name: task for task in _LISTED}
