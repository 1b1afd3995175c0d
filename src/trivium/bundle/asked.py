"""What a model is asked for: the task that a head was put on it for, or one of those that a UniT learned together.

B batch, C channels, H height, W width, T text tokens, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from torch import Tensor, nn

from trivium.errors import TriviumError
from trivium.models.finetuned import Gives, tells_segments_apart
from trivium.models.unit import Unit, UnitTask

if TYPE_CHECKING:
    from trivium.bundle import Bundle

NO_HEAD = "this model has no head for a task: fine-tune it first, with trivium finetune"
READ = {"image": "a picture alone", "text": "texts alone", "both": "a picture with a text"}


@dataclass(frozen=True)
class Asked:
    """A task, and what is read for it."""

    task: str
    reads: Literal["image", "text", "both"]
    gives: Gives
    num_pictures: int
    max_length: int  # tokens of a text
    segments: bool  # a first text is told from a second
    labels: list[str] | None  # None: their names are not known
    own: UnitTask | None = None  # of a UniT, whose model has the head


def asked_of(bundle: Bundle, task: str | None, reads: Literal["image", "text", "both"]) -> Asked:
    """The task that is meant.

    Args:
        task: its name; None: the one that there is for what is given, of a UniT with several the questions.
        reads: what is given.

    Raises:
        TriviumError: there is none, or several of a UniT's fit.
    """
    head = bundle.head_config
    if bundle.head is not None and head is not None:
        if task not in (None, head.task):
            raise TriviumError(f"this model was fine-tuned for {head.task}: leave out the task {task!r}")
        kind: Literal["image", "text", "both"] = head.reads if head.reads in ("image", "text") else "both"
        return Asked(
            head.task, kind, head.gives, head.num_pictures, bundle.max_length, tells_segments_apart(bundle.model),
            bundle.labels,
        )  # fmt: skip
    if not isinstance(bundle.model, Unit):
        raise TriviumError(NO_HEAD)
    own = _own(bundle.model, task, reads)
    length = min(bundle.max_length, own.max_length or bundle.max_length)
    return Asked(own.name, own.reads, own.gives, 1, length, True, (bundle.labels_of or {}).get(own.name), own)


def _own(model: Unit, name: str | None, reads: str) -> UnitTask:
    answering = [task for task in model.config.tasks if task.kind == "labels"]
    if name is not None:
        if model.task(name) not in answering:
            raise TriviumError(f"the task {name!r} finds objects and answers nothing: see trivium detect")
        return model.task(name)
    if not answering:
        raise TriviumError(NO_HEAD)
    fitting = [task for task in answering if task.reads == reads]
    # All words are read of a question alone: where one is given with its picture, that is what it is taken for.
    fitting = [task for task in fitting if task.text == "all"] or fitting
    if not fitting:
        known = ", ".join(f"{task.name} ({READ[task.reads]})" for task in answering)
        raise TriviumError(f"this UniT answers nothing about {READ[reads]}: it has {known}")
    if len(fitting) > 1:
        known = ", ".join(task.name for task in fitting)
        raise TriviumError(f"this UniT has several tasks of {READ[reads]}, {known}: name one, in a command with --task")
    return fitting[0]


def own_answers(
    model: nn.Module,
    task: UnitTask,
    pixels_BCHW: Tensor | None,
    sizes_B2: Tensor | None,
    ids_BT: Tensor | None,
    mask_BT: Tensor | None,
    segments_BT: Tensor | None,
) -> Tensor:
    """Probabilities of the labels of one of a UniT's tasks, or how right each answer is, [B, K]. Pixels are
    normalised; what the task does not read is None."""
    model = cast(Unit, model)
    image = None if pixels_BCHW is None else model.encode_image(pixels_BCHW, sizes_B2, task.name)
    text = None if ids_BT is None else model.encode_text(ids_BT, mask_BT, segments_BT, task.name)
    logits_BK = model.label(task.name, image, text).float()
    return logits_BK.sigmoid() if task.gives == "answers" else logits_BK.softmax(-1)


def names_unknown(asked: Asked) -> TriviumError:
    if asked.own is None:
        return TriviumError("the names of this model's labels are not known: put its labels.json into its folder")
    return TriviumError(
        f"the names of this UniT's labels of {asked.task} are not known: put a labels.json that has them, as in"
        f' {{"{asked.task}": ["yes", "no", ...]}}, beside the released file, or set bundle.labels_of'
    )
