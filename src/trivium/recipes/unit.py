"""UniT as a recipe: several tasks, one model (Hu & Singh 2021).

    trivium pretrain unit --data.scenes scenes --data.glue glue        the tasks whose data is named
    trivium pretrain unit                                              scenes that are made for it

Which tasks there are: recipes/unit_tasks.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from trivium.bundle import Bundle
from trivium.data.detection import Detection
from trivium.data.detection_collate import Augmentation
from trivium.data.labelled import LabelledRows, Splits, is_labelled
from trivium.data.mixture import StreamMixture
from trivium.data.task_collate import TaskCollate
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError
from trivium.evaluate import detection
from trivium.evaluate import tasks as figures_of
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.evaluate.tasks import Predictions
from trivium.load import load, open_own
from trivium.methods.pixels import Pixels
from trivium.methods.unit import PARTS, UnitMethod
from trivium.models.bert import Bert
from trivium.models.unit import SIZES, Unit, UnitConfig
from trivium.recipes import limits, unit_losses
from trivium.recipes.data import absolute
from trivium.recipes.predict import predict_by, tell_held_out
from trivium.recipes.prepared import Losses, Prepared
from trivium.recipes.unit_start import FROZEN, at_random, from_bert, from_unit
from trivium.recipes.unit_tasks import (
    PUBLISHED,
    JointData,
    JointTask,
    Opened,
    make_tokenizer,
    opened,
    with_absolute_paths,
    with_data,
)
from trivium.train.config import leaves
from trivium.train.optim import Group, Optim
from trivium.train.protocol import Method, Stream
from trivium.train.run import Train


@dataclass(frozen=True)
class Objectives:
    """Weights of the losses of detection, DETR's and UniT's. Matching weighs its costs by the published ones,
    whatever is set."""

    classes: float = PARTS["class"]
    box: float = PARTS["box"]
    giou: float = PARTS["giou"]
    attributes: float = PARTS["attributes"]

    @property
    def parts(self) -> dict[str, float]:
        """By the names of the losses."""
        return {"class": self.classes, "box": self.box, "giou": self.giou, "attributes": self.attributes}


@dataclass(frozen=True)
class UnitRecipe:
    """Everything that a UniT run is."""

    settled: ClassVar[tuple[str, ...]] = ("model.tasks",)  # fields that nobody sets: the data decides them

    model: UnitConfig
    objectives: Objectives = field(default_factory=Objectives)
    tasks: dict[str, JointTask] = field(default_factory=lambda: dict(PUBLISHED))
    data: JointData = field(default_factory=JointData)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # a UniT, such as a run of detection alone: what fits is taken; or a DETR
    init_text: str | None = None  # a BERT in Hugging Face's layout for the text encoder, with its tokenizer
    measure: int | None = None  # rows of each held-out split that are measured, evenly spread; None: all

    def rows_at_once(self, batch: int) -> int:
        """Rows of one forward of a task with this batch."""
        most = self.train.micro_batch if isinstance(self.train.micro_batch, int) else batch
        return next(rows for rows in range(min(most, batch), 0, -1) if batch % rows == 0)

    def with_absolute_paths(self) -> UnitRecipe:
        """The same for whoever stands in another folder: what a config that is kept should state."""
        paths = {name: None if (path := getattr(self, name)) is None else absolute(path) for name in
                 ("init", "init_text")}  # fmt: skip
        given = {name: None if (path := getattr(self.data, name)) is None else absolute(path) for name in
                 ("scenes", "glue")}  # fmt: skip
        vocabulary = self.data.vocabulary
        if vocabulary not in ("learned", "bert"):
            vocabulary = absolute(vocabulary)
        data = replace(self.data, **given, vocabulary=vocabulary)  # type: ignore[arg-type]
        return replace(self, tasks=with_absolute_paths(self.tasks), data=data, **paths)  # type: ignore[arg-type]

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedUnit:
        """Open the tasks, make or read the tokenizer, build model and method.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; the tokenizer is then its own, and the
                trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)


def unit(size: str = "tiny") -> UnitRecipe:
    """UniT (Hu & Singh 2021). size: "tiny" for a laptop tonight, "small", or "base", the published one.

    Base has the paper's optimizer and shares of the tasks, and starts as the paper does with --init-text, a BERT, and
    --init, a DETR, whose backbone alone is taken.
    """
    if size not in SIZES:
        raise TriviumError(f"there is no UniT of size {size}: use one of {', '.join(SIZES)}")
    model = UnitConfig.of_size(size, tasks=())
    if size != "base":
        return _small(model, size == "tiny")
    published = Optim(
        lr=5e-5, betas=(0.9, 0.999), weight_decay=1e-4, warmup=2000, clip_norm=0.1, no_decay=(), decay_vectors=True,
        freeze=("image.backbone.stem.*", "image.backbone.stages.0.*"), groups=(Group("image.backbone.*", rate=0.2),),
    )  # fmt: skip
    return UnitRecipe(model, optim=published, train=Train(steps=500_000, micro_batch=4, save_every=10_000))


def _small(model: UnitConfig, tiny: bool) -> UnitRecipe:
    """Trained from a random start, on pictures of 128 or 320 pixels."""
    optim = Optim(
        lr=8e-4 if tiny else 2e-4, betas=(0.9, 0.99), weight_decay=0.02, warmup=0.05, clip_norm=1.0,
        no_decay=(*Optim().no_decay, "*task_tokens*", "queries.*", "*anchors"),
    )  # fmt: skip
    if not tiny:
        shorts = tuple(range(224, 353, 32))
        augmentation = Augmentation(shorts=shorts, before_crop=(256, 320, 384), crop_sides=(192, 320))
        data = JointData(short=320, longest=533, augmentation=augmentation)
        return UnitRecipe(model, data=data, optim=optim, train=Train(steps=50_000, micro_batch=16))
    # Without crops scenes keep one size: others would be encoded apart, or padded, which takes half of a step on a GPU.
    augmentation = Augmentation(shorts=(128,), crop=0.0, before_crop=(128, 144, 160), crop_sides=(96, 128), jitter=0.3)
    tasks = {
        name: replace(task, num_queries=min(task.num_queries, 20), batch=32,
                      max_length=min(task.max_length, 48))
        for name, task in PUBLISHED.items()
    }  # fmt: skip
    data = JointData(short=128, longest=213, augmentation=augmentation, vocabulary="learned")
    # In the time there is, boxes are found long before what they hold.
    return UnitRecipe(
        model, Objectives(classes=3.0), tasks, data, optim, Train(steps=3000, save_every=500), measure=2000
    )


@dataclass
class PreparedUnit(Prepared):
    """A UniT run with its parts in memory."""

    recipe: UnitRecipe
    bundle: Bundle
    tasks: list[Opened]
    collates: dict[str, Any]

    def measures(self, recipe: UnitRecipe) -> Callable[[Method], dict[str, Any]] | None:
        """mAP of every task of detection, every metric of the others, of what has labels and can be read. None where
        it is not asked for between steps: when a run ends, `held_out` is made anyway."""
        if recipe.train.evaluate_every is None:
            return None
        bundle, tasks, collates = self.bundle, self.tasks, self.collates

        def figures(method: UnitMethod, task: Opened, name: str) -> dict[str, float]:
            if isinstance(task.data, Detection):
                chosen = task.data.held_out[name].capped(recipe.measure)
                seen, _ = detection.find(bundle, chosen, task.name, _pictures_at_once(task, recipe))
                results = detection.measure(chosen, seen, task.data.classes, has_intervals=False)
                return {figure: result.value for figure, result in results.items()}
            assert task.of is not None
            found = _predictions(method, task, task.data.held_out[name].capped(recipe.measure), collates, recipe)
            return {metric: figures_of.figure(metric, found) for metric in task.of.metrics}

        def measure(method: Method) -> dict[str, Any]:
            assert isinstance(method, UnitMethod)
            found: dict[str, float] = {}
            for task in tasks:
                for name, split in task.data.held_out.items():
                    if not isinstance(split, LabelledRows) or is_labelled(split):
                        # What cannot be read does not end the training: when it is over, that is told.
                        with contextlib.suppress(TriviumError):
                            of_split = figures(method, task, name)
                            found |= {f"{task.name}.{name}.{figure}": value for figure, value in of_split.items()}
            return {"figures": found}

        return measure

    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        found, method = Evaluation(), self.run.method
        assert isinstance(method, UnitMethod)
        for task in self.tasks:
            if not task.data.held_out:
                found.not_applicable.append(f"{task.title}: its data has nothing that is held out")
            if isinstance(task.data, Detection):
                self._boxes(found, task, task.data, say)
            else:
                self._labels(found, task, task.data, say)
        losses, bad = unit_losses.on_held_out(
            method, self.tasks, self.collates, self.recipe.rows_at_once, self.recipe.measure, say
        )
        found.not_applicable += bad
        return found, losses

    def _labels(self, found: Evaluation, task: Opened, data: Splits, say: Callable[[str], None]) -> None:
        method, of = self.run.method, task.of
        assert isinstance(method, UnitMethod) and of is not None
        labelled = {}
        for name, rows in data.held_out.items():
            if is_labelled(rows):
                labelled[name] = rows.capped(self.recipe.measure)
            else:
                found.not_applicable.append(f"{task.title}, {name}: it has no labels, so nothing is asked of it here")
        own = Evaluation()
        predicted = partial(_predictions, method, task, collates=self.collates, recipe=self.recipe)
        tell_held_out(own, of, task.title, labelled, predicted, None, say)
        guesses = {f"{name}.majority": Result(own.chance[name]) for name in own.results if name in own.chance}
        found.results |= own.results | guesses
        found.chance |= own.chance
        found.notes += [f"{task.title}, {sentence}" for sentence in own.notes]
        found.headline += own.headline
        found.not_applicable += [f"{task.title}, {sentence}" for sentence in own.not_applicable]
        found.is_final &= own.is_final

    def _boxes(self, found: Evaluation, task: Opened, data: Detection, say: Callable[[str], None]) -> None:
        for name, rows in data.held_out.items():
            say(f"{task.title}: {name}")
            chosen = rows.capped(self.recipe.measure)
            try:
                seen, bad = detection.find(self.bundle, chosen, task.name, _pictures_at_once(task, self.recipe))
            except TriviumError as error:  # the figures of all else are not lost for it
                found.not_applicable.append(f"{task.title}, {name}: {error}")
                continue
            if bad:
                found.not_applicable.append(
                    f"{task.title}, {name}: {len(bad):,} of {len(chosen):,} pictures, which cannot be read; the first:"
                    f" {bad[0]}"
                )
            figures = detection.measure(chosen, seen, data.classes)
            found.results |= {f"{task.title}.{name}.{figure}": result for figure, result in figures.items()}
            if "ap" in figures:
                found.headline.append(
                    f"{task.title}, {name}: mAP {figures['ap'].value:.3f}, at IoU 0.5 {figures['ap50'].value:.3f}, over"
                    f" {len(seen):,} pictures."
                )
            else:
                found.not_applicable.append(f"{task.title}, {name}: none of {len(seen):,} pictures has a true box")
            found.figures.append(
                detection.wall(chosen, seen, f"{task.title}: what it finds", data.classes, data.attributes)
            )


# ----------------------------------------------------------------------------------------------------- preparing


def _prepare(recipe: UnitRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> PreparedUnit:
    limits.check(leaves(recipe))
    if recipe.model.backbone_norm == "frozen" and recipe.init is None and resume_from is None:
        raise TriviumError(f"{FROZEN}: name one with --init, or train from a random start with --size small")
    given = with_data(recipe.tasks, recipe.data)
    tasks = opened(given)
    if boxes := [task.name for task in tasks if task.of is None and not any(recipe.objectives.parts.values())]:
        flag = f"--tasks.{boxes[0].replace('_', '-')}.ratio 0"
        raise TriviumError(f"every loss of boxes has weight 0, so {boxes[0]} would teach nothing: leave it out, {flag}")
    notes = [f"{task.name}: {note}" for task in tasks for note in task.data.notes]
    start = open_own(resume_from) if resume_from is not None else None if recipe.init is None else load(recipe.init)
    if start is not None and not isinstance(start.model, Unit):
        raise TriviumError(f"{recipe.init} holds a {start.family}, and a UniT starts from a UniT: give one")
    text = None if recipe.init_text is None or resume_from is not None else load(recipe.init_text)
    if text is not None and not isinstance(text.model, Bert):
        raise TriviumError(
            f"{recipe.init_text} holds a {text.family}, and the text encoder starts from a BERT: give one"
        )
    if text is not None and start is not None and start.model.text is not None:
        raise TriviumError(
            f"{recipe.init} brings a text encoder, and so does {recipe.init_text}: leave out --init-text, or name a run"
            " of boxes alone"
        )
    tokenizer = next((b.tokenizer for b in (start, text) if b is not None and b.tokenizer is not None), None)
    if tokenizer is None:
        tokenizer = make_tokenizer(recipe.data.vocabulary, tasks, recipe.model.vocab_size)
    config = _config(recipe, tasks, start, text, tokenizer)
    _check_shape(config)
    # A text encoder that no task needs is left out of the model, not out of the recipe.
    recipe = replace(recipe, model=replace(config, text_layers=config.text_layers or recipe.model.text_layers))

    model = Unit(config)
    at_random(model, recipe.train.seed)
    if text is not None:
        notes.append(from_bert(model, text, str(recipe.init_text)))
    labels_of = {name: names for task in tasks for name, names in task.labels.items()}
    if start is not None:
        taken = from_unit(model, start, str(recipe.init), recipe.train.seed, labels_of)
        notes += taken if resume_from is None else []
    transform = recipe.data.transform
    targets = {task.name: task.target for task in tasks if task.of is not None}
    guesses = {task.name: task.guess for task in tasks if task.of is not None}
    method = UnitMethod(model, Pixels(transform.mean, transform.std), targets, recipe.objectives.parts, guesses)
    max_length = max((task.given.max_length for task in tasks), default=config.max_length)
    bundle = Bundle(
        "unit", model, tokenizer if config.text_layers else None, transform,
        max_length=min(max_length, config.max_length),
        labels_of=labels_of,
    )  # fmt: skip
    collates = {
        task.name: task.collate(transform, recipe.data.augmentation, tokenizer, config.max_length) for task in tasks
    }
    notes += [sentence for task in tasks for sentence in task.cut(collates[task.name])]

    def mixture_of(train: Train) -> StreamMixture:
        with_train = replace(recipe, train=train)
        streams = [
            Stream(t.name, t.train, collates[t.name], t.given.batch, with_train.rows_at_once(t.given.batch),
                   t.given.ratio, window=1 if t.is_by_picture else None)
            for t in tasks
        ]  # fmt: skip
        return StreamMixture(streams, train.seed, "ratio", train.workers)

    return PreparedUnit.of(
        recipe, name, arguments, method, bundle, mixture_of, notes, tasks=tasks, collates=collates
    )  # fmt: skip


def _config(
    recipe: UnitRecipe, tasks: list[Opened], start: Bundle | None, text: Bundle | None, tokenizer: Tokenizer
) -> UnitConfig:
    """The shape of the model, with the tasks that the data has.

    Raises TriviumError where words of the data have no place in the model.
    """
    config, of_tasks = recipe.model, tuple(task.for_model for task in tasks)
    if start is not None:  # its weights know places as it has them
        own: Any = start.model.config
        config = replace(
            config, place_temperature=own.place_temperature, place_scale=own.place_scale, anchored=own.anchored
        )
    reads_text = any(task.reads != "image" for task in of_tasks)
    if not reads_text:
        return replace(config, tasks=of_tasks, text_layers=0)
    if text is not None:
        bert: Any = text.model.config
        config = replace(
            config, text_width=bert.width, text_heads=bert.num_heads, text_mlp_width=bert.mlp_width,
            text_layers=bert.num_layers, vocab_size=bert.vocab_size, max_length=bert.max_length,
            num_segments=bert.num_segments, pad_id=bert.pad_id, text_eps=bert.eps,
        )  # fmt: skip
    elif start is None or start.tokenizer is None:
        config = replace(config, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    else:
        of_start: Any = start.model.config
        config = replace(config, vocab_size=of_start.vocab_size, pad_id=of_start.pad_id)
    if tokenizer.vocab_size > config.vocab_size:
        raise TriviumError(
            f"the vocabulary has {tokenizer.vocab_size} words and the model room for {config.vocab_size}: give the"
            " vocabulary that it was trained with"
        )
    return replace(config, tasks=of_tasks)


def _check_shape(config: UnitConfig) -> None:
    """Raises TriviumError where parts of the model would not fit each other."""
    limits.check_heads(config.width, config.num_heads)
    limits.check_heads(config.image_width, config.num_heads, of="image-width")
    if config.text_layers:
        limits.check_heads(config.text_width, config.text_heads, "text-heads", "text-width")
    if config.image_width % 4:
        raise TriviumError(
            f"--model.image-width {config.image_width}: this must be a multiple of 4, a sine and a cosine for each side"
        )
    widths, blocks = config.backbone_widths, config.backbone_blocks
    if len(widths) != len(blocks):
        raise TriviumError(
            f"--model.backbone-blocks gives {len(blocks)} stages and --model.backbone-widths {len(widths)}: give both"
            " as many numbers"
        )
    if config.backbone_norm == "group" and any(width > 8 and width % 8 for width in widths):
        raise TriviumError(
            f"--model.backbone-widths {' '.join(map(str, widths))}: GroupNorm makes groups of 8 channels, so each must"
            " be a multiple of 8, or less"
        )


# ----------------------------------------------------------------------------------------------------- measuring


def _pictures_at_once(task: Opened, recipe: UnitRecipe) -> int:
    """Of detection, where it is measured: no more than were trained at once, on which the device had its memory."""
    return min(detection.AT_ONCE, recipe.rows_at_once(task.given.batch))


def _predictions(
    method: UnitMethod, task: Opened, rows: LabelledRows, collates: dict[str, TaskCollate], recipe: UnitRecipe
) -> Predictions:
    assert not isinstance(task.data, Detection)
    batch = recipe.rows_at_once(task.given.batch)
    return predict_by(
        method.answers, method, rows, collates[task.name], batch, task.data.labels, stream=task.name
    )  # fmt: skip
