"""Fine-tuning for grounding as a recipe: a trained ALBEF or FLAVA, and referring expressions. No box is trained on.

It is the fine-tuning on retrieval (recipes/retrieval.py) with expressions for captions (ALBEF, section 4.4): ITC and
ITM, expressions of one picture answers to each other. As published, pictures are whole, mirrored half of the time
although expressions say left and right, and changed at random. The checkpoint that counts is the one that finds best on
the first split that is measured: by the boxes that a detector proposes, or by pointing where none are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trivium.bundle import Bundle
from trivium.bundle.untrained import no_matching
from trivium.data import leakage
from trivium.data.referring import SPLITS, ExpressionRows, Referring, read_referring
from trivium.data.task_collate import cut
from trivium.errors import TriviumError
from trivium.evaluate import grounding
from trivium.evaluate.embedded import Evaluation
from trivium.methods.momentum import SoftTargets
from trivium.models.albef import Albef
from trivium.models.flava import Flava
from trivium.recipes import limits
from trivium.recipes.albef import optim_of
from trivium.recipes.chosen import many_passes, with_steps
from trivium.recipes.data import absolute
from trivium.recipes.prepared import Losses, Recipe, mixtures
from trivium.recipes.retrieval import PUBLISHED, Objectives, PreparedMatching, pools_fit, put_together
from trivium.recipes.start import open_trained
from trivium.train.config import leaves
from trivium.train.optim import Optim
from trivium.train.protocol import Method
from trivium.train.run import Train

TITLES = {"refcoco+": "RefCOCO+", "refcoco": "RefCOCO", "refcocog": "RefCOCOg"}  # as papers call them


@dataclass(frozen=True)
class GroundingData:
    """Referring expressions, and what is done to each."""

    root: str | None = None  # folder that holds refcoco+/refs(unc).p and instances.json, or scenes
    rows: int | None = None  # expressions of each split that are measured, evenly spread; None: all
    batch: int = 256  # pairs of one step, over all processes
    max_length: int = 30  # tokens of an expression; longer ones are cut
    image_size: int | None = 384  # side of the pictures in pixels; None: the model's own
    flip: float = 0.5  # probability of a mirrored picture
    random_changes: int = 2  # of shape and light, drawn for each picture (data/random_augment.py)
    cache_megabytes: int = 256  # of decoded pictures, in each worker

    def with_absolute_paths(self) -> GroundingData:
        return replace(self, root=None if self.root is None else absolute(self.root))


@dataclass(frozen=True)
class GroundingRecipe(Recipe):
    """Everything that a fine-tuning for grounding is."""

    objectives: Objectives = field(default_factory=Objectives)
    distillation: SoftTargets = field(default_factory=lambda: SoftTargets(alpha=0.4))  # of ALBEF; alpha 0: none
    data: GroundingData = field(default_factory=GroundingData)
    optim: Optim = PUBLISHED
    train: Train = field(default_factory=Train)
    init: str | None = None  # the model: a run folder, a model folder or a foreign checkpoint
    epochs: float | None = 5  # times through the training expressions, in place of train.steps
    block: int | None = None  # whose attention is measured, from 0; None: the family's own choice, as published
    select_on: str | None = None  # the figure that is to be highest; None: val.accuracy, or val.pointing

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedGrounding:
        """Open expressions and model.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; the trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)


GROUNDING = {"grounding": GroundingRecipe()}


@dataclass
class PreparedGrounding(PreparedMatching):
    """A fine-tuning run with its parts in memory."""

    recipe: GroundingRecipe
    bundle: Bundle
    expressions: Referring
    folder: Path | None = None  # where predictions are written, once the run has chosen its checkpoint

    def settle(self, out: Path) -> str | None:
        self.folder = out / "predictions"
        return super().settle(out)

    def measures(self, recipe: GroundingRecipe) -> Callable[[Method], dict[str, Any]]:
        """Every figure of the split that a checkpoint is chosen by."""
        bundle, data = self.bundle, self.expressions

        def measure(method: Method) -> dict[str, Any]:
            assert bundle.model is method.exported()
            first = [_first(data)]
            found = grounding.run(bundle, data, splits=first, block=recipe.block, rows=recipe.data.rows).results
            return {"figures": {name: result.value for name, result in found.items()}}

        return measure

    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        recipe, title = self.recipe, TITLES[self.expressions.name]
        measured = grounding.run(
            self.bundle, self.expressions, block=recipe.block, rows=recipe.data.rows, folder=self.folder, say=say
        )  # fmt: skip
        found = Evaluation()
        found.results |= {f"{title}.{name}": result for name, result in measured.results.items()}
        found.chance |= {f"{title}.{name}": value for name, value in measured.chance.items()}
        found.not_applicable += measured.notes
        say("pictures that training and held-out rows have in common")
        rows = {split: ExpressionRows(self.expressions.good(split)) for split in self.expressions.splits}
        found.notes += leakage.of_pairs(rows.pop("train"), rows)
        for name, result in measured.results.items():
            if name in measured.chance:
                split, _, figure = name.partition(".")
                found.headline.append(
                    f"{title}, {split}, {figure.replace('_', ' ')}: {result.value:.1%} of {result.n:,} expressions"
                    f" (chance {measured.chance[name]:.1%})."
                )
        return found, {}


def _first(data: Referring) -> str:
    """The split that a checkpoint is chosen by. Raises TriviumError where there is none."""
    found = next((split for split in SPLITS if split in data.splits), None)
    if found is None:
        raise TriviumError(
            f"{data.name} holds no split to choose a checkpoint by: there is none of {', '.join(SPLITS)}"
        )
    return found


def _prepare(
    recipe: GroundingRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None
) -> PreparedGrounding:
    limits.check(leaves(recipe))
    settings = recipe.data
    if settings.root is None:
        raise TriviumError(
            "no referring expressions are given: name the folder that holds refcoco+/refs(unc).p, or scenes in that"
            " form, with --data.root"
        )
    start = open_trained(recipe.init, resume_from)
    if not isinstance(start.model, Albef | Flava):
        raise TriviumError(
            "grounding looks at the attention from words to patches, and a model of the family"
            f" {start.family} has none: use an ALBEF or a FLAVA"
        )
    if start.tokenizer is None:
        raise TriviumError(f"{recipe.init} came without a tokenizer: put its tokenizer.json or vocab.txt beside it")
    grounding.refuse_cropped(start)
    data = read_referring(settings.root)
    if not data.splits.get("train") or not data.good("train"):
        raise TriviumError(f"{settings.root}: {data.name} has no usable expression of its split train to learn from")
    train = ExpressionRows(data.good("train"))
    recipe = with_steps(recipe, len(train))
    pools_fit(recipe, start.model)
    notes = [*data.notes, *many_passes(recipe, len(train))]
    if bad := data.bad("train"):
        notes.append(f"train: {len(bad):,} expressions cannot be used; the first: {bad[0]}")
    if resume_from is None and start.head is not None:
        notes.append("left out is the head that the model has: grounding has no use for it")
    method, bundle, stream = put_together(recipe, start, train, notes)
    if (why := no_matching(bundle.untrained)) is not None:
        raise TriviumError(f"{why}, and grounding is measured by it: choose --objectives.itm above 0")
    for split in data.splits:
        texts = [(f"{each.file} ({each.where})", each.text) for each in data.good(split)]
        notes += [f"{split}: {sentence}" for sentence in cut("expressions", start.tokenizer, bundle.max_length, texts)]
    return PreparedGrounding.of(
        recipe, name, arguments, method, bundle, mixtures(recipe, [stream]), notes,
        optim=optim_of(recipe.optim, method), select=f"figures.{_select(recipe, data)}", measures_start=True,
        expressions=data,
    )  # fmt: skip


def _select(recipe: GroundingRecipe, data: Referring) -> str:
    """Raises TriviumError where no such figure is measured."""
    split = _first(data)
    known = [f"{split}.{figure}" for figure in ("accuracy", "pointing", "among_annotated")]
    known = known if data.proposed is not None else known[1:]
    select = recipe.select_on or known[0]
    if select not in known:
        raise TriviumError(f"--select-on {select}: no such figure is measured: use one of {', '.join(known)}")
    return select
