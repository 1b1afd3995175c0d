"""Fine-tuning as a recipe: a trained model of any family, and one of the tasks in tasks.py.

The checkpoint that is best on the held-out rows is the one that counts: it is kept, it is measured at the end, and its
model folder, with head and labels, is RUN/model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivium.bundle import Bundle
from trivium.data import leakage
from trivium.data.labelled import LabelledRows, Splits, is_labelled
from trivium.data.random_augment import RandomAugment
from trivium.data.small_vqa import as_answers
from trivium.data.task_collate import TaskCollate, TaskImage, TaskText, cut
from trivium.data.tokenizer import ANSWER_TOKENS
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.evaluate import tasks as figures_of
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.tasks import Predictions
from trivium.methods.answers import Answering
from trivium.methods.finetune import FineTuning
from trivium.methods.flava import Pixels
from trivium.methods.momentum import SoftTargets
from trivium.methods.text_assignment import POOL, TextAssignment
from trivium.models.albef import Albef
from trivium.models.albef_heads import AnswerDecoder, TwoPictures, decoder_config
from trivium.models.bert import BertConfig
from trivium.models.encoded import EncodesImage, EncodesText, Fuses
from trivium.models.finetuned import FineTuned, Gives, HeadConfig, Reads, read, tells_segments_apart
from trivium.recipes import limits
from trivium.recipes.chosen import keep_best, many_passes, steps_per_epoch, with_steps
from trivium.recipes.grounding import GROUNDING, GroundingRecipe
from trivium.recipes.predict import check_readable, predict, tell_held_out, title_of
from trivium.recipes.prepared import Losses, Prepared, Recipe, mixtures
from trivium.recipes.retrieval import RETRIEVAL, RetrievalRecipe
from trivium.recipes.start import open_trained, told_of_fusion
from trivium.recipes.tasks import TASKS, Head, Task, TaskData, guess
from trivium.train.config import leaves
from trivium.train.initial import initialise
from trivium.train.optim import Optim
from trivium.train.protocol import Method, Stream
from trivium.train.run import Train

EPOCHS = 10.0  # of a task without published updates
THROUGH_FUSION: tuple[Reads, ...] = ("fused", "states", "two_pictures")


@dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    """Everything that a fine-tuning run is."""

    task: str
    head: Head = field(default_factory=Head)
    data: TaskData = field(default_factory=TaskData)
    optim: Optim = field(default_factory=Optim)
    distillation: SoftTargets = field(default_factory=SoftTargets)  # alpha 0: none
    train: Train = field(default_factory=Train)
    init: str | None = None  # the model: a run folder, a model folder or a foreign checkpoint
    dropout: float | None = None  # of the model while it is trained; None: as its checkpoint says
    epochs: float | None = None  # times through the training rows, each in whole batches; in place of train.steps
    select_on: str | None = (
        None  # the held-out figure that is to be highest, such as dev.accuracy; None: the task's own
    )

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedTask:
        """Open rows and model, put the head on it.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; the trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)


def finetune(task: str) -> FinetuneRecipe | RetrievalRecipe | GroundingRecipe:
    """Fine-tune a trained model for one task, with the published settings where there are any."""
    if task in RETRIEVAL:
        return RETRIEVAL[task]
    if task in GROUNDING:
        return GROUNDING[task]
    if task not in TASKS:
        raise TriviumError(f"there is no task {task}: use one of {', '.join((*TASKS, *RETRIEVAL, *GROUNDING))}")
    of = TASKS[task]
    steps, epochs, patience = (of.steps or 1000, of.epochs, None) if of.steps or of.epochs else (1000, EPOCHS, 3)
    train = Train(steps=steps, patience=patience)
    return FinetuneRecipe(task, of.head, of.data, of.optim, of.distillation, train, dropout=of.dropout, epochs=epochs)


@dataclass
class PreparedTask(Prepared):
    """A fine-tuning run with its parts in memory."""

    recipe: FinetuneRecipe
    bundle: Bundle
    task: Task
    splits: Splits
    collate: TaskCollate
    folder: Path | None = None  # where predictions are written, once the run has chosen its checkpoint

    def measures(self, recipe: FinetuneRecipe) -> Callable[[Method], dict[str, Any]]:
        """Every metric of every labelled split that is no test."""
        task, splits, collate, chosen_by = self.task, self.splits, self.collate, recipe.select_on or ""
        rows = {n: r for n, r in _labelled(splits).items() if not n.startswith("test") or chosen_by.startswith(f"{n}.")}

        def measure(method: Method) -> dict[str, Any]:
            assert isinstance(method, FineTuning)
            at_once = recipe.rows_at_once
            found = {name: predict(method, split, collate, at_once, splits.labels) for name, split in rows.items()}
            figures = {f"{n}.{m}": figures_of.figure(m, p) for n, p in found.items() for m in task.metrics}
            return {"figures": figures}

        return measure

    def with_train(self, **changes: Any) -> PreparedTask:
        """Schedules may be shares of the run: a run of another length has others."""
        changed = super().with_train(**changes)
        method = changed.run.method
        assert isinstance(method, FineTuning)
        if method.teacher is not None:
            method.teacher.num_steps = changed.recipe.train.steps
        _check_pools(changed.recipe)
        return changed

    def settle(self, out: Path) -> str | None:
        """Put the weights of the best checkpoint into the method, and its model folder at RUN/model."""
        self.folder = out
        return keep_best(self.run, out)

    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        method = self.run.method
        assert isinstance(method, FineTuning)
        found = Evaluation()
        head = method.model.config
        if head.reads == "concatenated":
            found.not_applicable.append(
                "what a head on the fused class token gives: this one reads the pooled picture and the pooled text side"
                " by side"
            )
        what, leaks = ("texts", leakage.of_texts) if self.task.reads == "text" else ("pictures", leakage.of_pictures)
        say(f"{what} that training and held-out rows have in common")
        found.notes += leaks(self.splits.train, self.splits.held_out)

        def predicted(rows: LabelledRows) -> Predictions:
            return predict(method, rows, self.collate, self.recipe.rows_at_once, self.splits.labels)

        folder = None if self.folder is None else self.folder / "predictions"
        title = title_of(self.task, head.reads)
        tell_held_out(found, self.task, title, self.splits.held_out, predicted, folder, say)
        return found, {}


# ----------------------------------------------------------------------------------------------------- preparing


def _prepare(recipe: FinetuneRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> PreparedTask:
    limits.check(leaves(recipe))
    task = TASKS[recipe.task]
    start = open_trained(recipe.init, resume_from)
    writes = recipe.head.answers != "scored" and recipe.head.fusion != "concatenated" and isinstance(start.model, Albef)
    if writes and task.asks:
        task = replace(task, gives="answers")
    reads = _reads(task, recipe.head, start)
    _check_writing(task, recipe.head, reads)
    splits = task.open(recipe.data)
    if writes and task.asks:
        splits = as_answers(splits)
    splits = replace(splits, train=splits.train.capped(recipe.data.rows)).checked()
    transform = start.transform.at(recipe.data.image_size or start.transform.size)
    if task.reads != "text":
        limits.check_patches(transform.size, start.model.config.patch_size)  # type: ignore[union-attr, arg-type]
    model = _with_dropout(start.model, recipe.dropout)
    if isinstance(model, Albef) and task.reads != "text":
        model = model.for_pictures_of(transform.size)
    config = _head_config(recipe.head, task, splits, reads, model, transform.size)
    head = config.build()
    initialise(head, recipe.train.seed)
    notes, goes_on = list(splits.notes), False
    if recipe.head.fusion == "auto":
        notes += told_of_fusion(start, reads)
    if isinstance(head, AnswerDecoder | TwoPictures) and isinstance(model, Albef):
        head.start(model)
    if resume_from is None and start.head is not None:
        sentence, goes_on = _take_head(head, config, splits, start)
        notes.append(sentence)
    if resume_from is None and start.image_tokenizer is not None:
        notes.append("left out is the image tokenizer of the model: fine-tuning has no use for it")
    if task.name == "text_assignment" and recipe.distillation.alpha:
        notes.append("without distillation: of text assignment there is none")
        recipe = replace(recipe, distillation=replace(recipe.distillation, alpha=0.0))
    recipe = with_steps(recipe, len(splits.train))
    notes += many_passes(recipe, len(splits.train))
    _check_pools(recipe)
    max_length = min(recipe.data.max_length or 10**9, _positions(model))
    reads_with = replace(start, transform=transform, max_length=max_length)
    collate = collate_of(recipe.data, task, splits, reads_with, config.gives)
    for split, rows in {"train": splits.train, **splits.held_out}.items():
        notes += [f"{split}: {sentence}" for sentence in collate.cut(rows)]
    answers_KT = None
    if collate.writes is not None:
        answers_KT = collate.encoded_answers(splits.labels)
        unknown = (answers_KT == collate.writes.unk_id).any(1)
        if unknown.any():
            notes.append(
                f"{int(unknown.sum()):,} of {len(unknown):,} answers hold what the vocabulary has no word piece for,"
                f' and cannot be written; the first: "{splits.labels[int(unknown.int().argmax())]}"'
            )
        trained = {answer for row in splits.train.good() for answer in row.truths}  # said with the rows
        listed = [(f'"{answer[:40]}"', answer) for answer in splits.labels if answer not in trained]
        notes += cut("answers of the list", collate.writes, collate.answer_length, listed)
    made = Answering if config.gives == "text" else TextAssignment if task.name == "text_assignment" else FineTuning
    method = made(
        FineTuned(model, head, config, answers_KT), Pixels(transform.mean, transform.std),
        recipe.distillation.in_steps(recipe.data.batch),
        recipe.train.steps, steps_per_epoch(len(splits.train), recipe.data.batch), guess(splits, config.gives),
    )  # fmt: skip

    named = [split for split in _labelled(splits) if not split.startswith("test")]
    if recipe.select_on is None and not named:
        tests = list(_labelled(splits))
        raise TriviumError(
            f"there is no labelled dev split to choose a checkpoint by, only {', '.join(tests)}: give one, or choose by"
            f" --select-on {tests[0]}.{task.reported}"
        )
    for split in named if task.reads != "text" else ():
        check_readable(split, splits.held_out[split])
    select = recipe.select_on or f"{named[0]}.{task.reported}"
    if select not in (known := [f"{split}.{metric}" for split in _labelled(splits) for metric in task.metrics]):
        raise TriviumError(f"--select-on {select}: no such figure is measured: use one of {', '.join(known)}")
    bundle = replace(
        start, model=model, transform=transform, labels=list(splits.labels) or None, max_length=max_length,
        head=head, head_config=config, image_tokenizer=None, tuned_for=(), labels_of=None,
        fusion_trained=True if reads in THROUGH_FUSION else start.fusion_trained,
    )  # fmt: skip

    def export(folder: Path, weights: Mapping[str, Tensor]) -> None:
        of_model, of_head = (
            {n.removeprefix(prefix): tensor for n, tensor in weights.items() if n.startswith(prefix)}
            for prefix in ("backbone.", "head.")
        )
        bundle.save(folder, of_model, head_weights=of_head)

    stream = Stream(task.name, splits.train, collate, recipe.data.batch, recipe.rows_at_once)
    return PreparedTask.of(
        recipe, name, arguments, method, bundle, mixtures(recipe, [stream]), notes, export=export,
        select=f"figures.{select}", measures_start=goes_on, task=task, splits=splits, collate=collate,
    )  # fmt: skip


def _check_pools(recipe: FinetuneRecipe) -> None:
    """Raises TriviumError where no text would have two other pictures in its micro-batch, or where one would cut a pool
    in two: pictures would come from fewer rows there."""
    rows = recipe.rows_at_once
    if recipe.task != "text_assignment":
        return
    if rows < 3:
        raise TriviumError(
            f"in a micro-batch of {rows} no text has two other pictures to be assigned among: choose"
            " --train.micro-batch, and --data.batch, as 3 or more"
        )
    if rows > POOL and rows % POOL:
        raise TriviumError(
            f"micro-batches of {rows} pairs cut pools of {POOL} in two: choose --train.micro-batch as a multiple of"
            f" {POOL}, or at most {POOL}"
        )


def _head_config(head: Head, task: Task, splits: Splits, reads: Reads, model: nn.Module, side: int) -> HeadConfig:
    blocks = None
    if reads in ("states", "two_pictures"):
        assert isinstance(model, Albef)
        blocks, width = decoder_config(model.config), model.config.width
    else:
        width = _width(model, reads, side, task.num_pictures)
    hidden = {"width": width, "none": None}[head.hidden] if isinstance(head.hidden, str) else head.hidden
    num_outputs = 1 if task.gives == "number" else len(splits.labels)
    return HeadConfig(
        task.name, reads, "text" if reads == "states" else task.gives, width, num_outputs, hidden, head.activation,
        head.dropout, splits.center, splits.scale, blocks, task.num_pictures, head.ranked,
        head.first_word_twice,
    )  # fmt: skip


def collate_of(data: TaskData, task: Task, splits: Splits, start: Bundle, gives: Gives) -> TaskCollate:
    """Raises TriviumError where the model came without a tokenizer."""
    texts, images = None, None
    if task.reads != "images":
        if start.tokenizer is None:
            raise TriviumError("the model came without a tokenizer: put its tokenizer.json or vocab.txt beside it")
        texts = TaskText(start.tokenizer, start.max_length, tells_segments_apart(start.model))
    if task.reads != "text":
        size, filter = start.transform.size, start.transform.filter
        plain = data.crop_scale == (1.0, 1.0) and not data.flip and not data.random_changes
        views = None if plain else Views(size, filter, crop_scale=data.crop_scale, flip=data.flip)
        changes = RandomAugment(data.random_changes) if data.random_changes else None
        images = TaskImage(start.transform, views, data.blank_pictures, changes)
    by_length = data.sort_by_length and texts is not None
    writes = texts.tokenizer.for_answers() if texts is not None and gives == "text" else None
    return TaskCollate(
        texts, images, max(1, len(splits.labels)), splits.center, splits.scale, by_length, writes,
        min(ANSWER_TOKENS, _positions(start.model)),
    )  # fmt: skip


def _reads(task: Task, head: Head, start: Bundle) -> Reads:
    """What the head reads of a model. Raises TriviumError where the model cannot read what the task has."""
    model, family = start.model, start.family
    if task.reads != "images" and not isinstance(model, EncodesText):
        raise TriviumError(f"{task.title} is a task of texts, and a model of the family {family} reads none")
    if task.reads != "text" and not isinstance(model, EncodesImage):
        raise TriviumError(f"{task.title} is a task of pictures, and a model of the family {family} reads none")
    if task.reads == "text":
        return "text"
    if task.reads == "images":
        return "image"
    if head.fusion == "fused" and not isinstance(model, Fuses):
        raise TriviumError(
            f"a model of the family {family} does not read a picture and a text together: leave out --head.fusion"
        )
    if (task.gives == "answers" or task.asks) and head.answers == "written" and not isinstance(model, Albef):
        raise TriviumError(f"a model of the family {family} writes no answers: leave out --head.answers")
    if isinstance(model, Albef) and head.fusion != "concatenated":
        if task.gives == "answers" and head.answers != "scored":
            return "states"
        if task.num_pictures == 2:
            return "two_pictures"
    if task.name == "text_assignment":
        raise TriviumError(
            f"{task.title} prepares ALBEF for two pictures, and {family} is fine-tuned for them as it is"
        )
    if head.fusion == "auto" and start.fusion_trained is False:
        return "concatenated"
    return "fused" if head.fusion != "concatenated" and isinstance(model, Fuses) else "concatenated"


def _check_writing(task: Task, head: Head, reads: Reads) -> None:
    """Raises TriviumError for what is said of written answers where none are written."""
    if head.answers != "auto" and task.gives != "answers" and not task.asks:
        raise TriviumError(f"{task.title}: what it gives is a {task.gives}, not an answer: leave out --head.answers")
    given = {"ranked": head.ranked != Head.ranked, "first-word-twice": head.first_word_twice}
    if reads != "states" and any(given.values()):
        flag = next(name for name, is_given in given.items() if is_given)
        raise TriviumError(f"--head.{flag} is of a head that writes its answers, and this one does not: leave it out")


def _with_dropout(model: nn.Module, dropout: float | None) -> nn.Module:
    """The same weights in a model that drops as much; as it is where its family has no dropout."""
    config: Any = model.config
    if dropout is None or "dropout" not in {field.name for field in fields(config)} or config.dropout == dropout:
        return model
    made: nn.Module = type(model)(replace(config, dropout=dropout))
    made.load_state_dict(model.state_dict())
    return made


def _positions(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.max_length) if isinstance(model, EncodesText) else 2


@torch.no_grad()
def _width(model: nn.Module, reads: Reads, side: int, num_pictures: int) -> int:
    """Of what the head reads: found by reading one empty sample."""
    pixels = torch.zeros(num_pictures, 3, side, side) if reads != "text" else None
    ids = torch.zeros(1, 1, dtype=torch.int64) if reads != "image" else None
    return read(model.eval(), reads, pixels, ids, None, None).shape[1]


def _take_head(head: nn.Module, config: HeadConfig, splits: Splits, start: Bundle) -> tuple[str, bool]:
    """Start from a head that was trained for the same labels, in whatever order; else say that it is not taken.

    Returns what there is to say, and whether all of the head goes on.
    """
    there, old = start.head_config, start.head
    assert there is not None and old is not None
    names = tuple(start.labels or ())
    alike_blocks = there.reads == config.reads and _shape(there) == _shape(config)
    if isinstance(head, AnswerDecoder) and alike_blocks:
        head.load_state_dict(old.state_dict())
        return f"the writer of answers starts as it was trained for {there.task}", True
    if isinstance(head, TwoPictures) and alike_blocks and sorted(names) != sorted(splits.labels):
        assert isinstance(old, TwoPictures)
        head.seconds.load_state_dict(old.seconds.state_dict())
        return f"the second blocks start as they were trained for {there.task}, and a new classifier is drawn", False
    alike = _bare(there) == _bare(config)
    if not alike or sorted(names) != sorted(splits.labels):
        return f"the head that the model has was trained for {there.task} and does not fit: a new one is drawn", False
    state = old.state_dict()
    if names:
        order = torch.tensor([names.index(label) for label in splits.labels])
        state |= {f"decoder.{part}": state[f"decoder.{part}"][order] for part in ("weight", "bias")}
    head.load_state_dict(state)
    return f"the head starts as it was trained for {there.task}, its labels matched by name", True


def _bare(head: HeadConfig) -> HeadConfig:
    """What must agree for the weights to fit."""
    return replace(
        head, task="", dropout=0.0, blocks=_shape(head), ranked=HeadConfig.ranked,
        first_word_twice=HeadConfig.first_word_twice,
    )  # fmt: skip


def _shape(head: HeadConfig) -> BertConfig | None:
    """Of its blocks."""
    return None if head.blocks is None else replace(head.blocks, dropout=0.0)


# ----------------------------------------------------------------------------------------------------- measuring


def _labelled(splits: Splits) -> dict[str, LabelledRows]:
    """What is measured: in the course of a run those that are for that, at its end the tests too."""
    return {name: rows for name, rows in splits.held_out.items() if is_labelled(rows)}
