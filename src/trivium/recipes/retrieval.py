"""Fine-tuning on retrieval as a recipe: a trained ALBEF, FLAVA or CLIP, and captioned pictures.

| model | what it is trained by |
|---|---|
| ALBEF | ITC against the momentum encoder's keys of batch and queue, ITM with hard negatives; distillation or not |
| FLAVA | the contrastive loss within the batch, ITM with hard negatives |
| CLIP | the contrastive loss within the batch |

The settings are those of ALBEF's section 4.1, whose public code leaves captions uncut in training, where here they are
cut as in the evaluation; of one's own data pictures are cropped and mirrored alone. The checkpoint that finds best on
the dev pictures is the one that counts (mean of R@1, 5 and 10, both ways; re-ranked, where the model matches).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from torch import nn

from trivium.bundle import Bundle
from trivium.bundle.untrained import among, no_cosine
from trivium.data import leakage
from trivium.data.collate import ImageInput, PairCollate, TextInput
from trivium.data.random_augment import RandomAugment
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.evaluate import pairs, retrieval
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.reranking import SHORTLIST, judges
from trivium.methods.albef import FALSE_SHARE, AlbefMethod, Distillation, Duplicates
from trivium.methods.clip import ClipMethod
from trivium.methods.momentum import SoftTargets
from trivium.methods.pixels import Pixels
from trivium.methods.retrieval import RetrievalMethod
from trivium.models.albef import Albef
from trivium.models.clip import Clip
from trivium.models.encoded import Matches
from trivium.models.flava import Flava
from trivium.recipes import limits
from trivium.recipes.albef import check_pools, optim_of, queue_rows
from trivium.recipes.chosen import keep_best, many_passes, steps_per_epoch, with_steps
from trivium.recipes.data import Sources
from trivium.recipes.notices import cut_captions, noticed
from trivium.recipes.prepared import Losses, Prepared, Recipe, mixtures
from trivium.recipes.retrieval_data import RetrievalData, open_splits
from trivium.recipes.start import open_trained
from trivium.train.config import leaves
from trivium.train.optim import Optim
from trivium.train.protocol import Method, Source, Stream
from trivium.train.run import Train


@dataclass(frozen=True)
class Objectives:
    """Weights of the two losses; 0 = never computed."""

    contrastive: float = 1.0  # in ALBEF: ITC
    itm: float = 1.0  # of models that match
    duplicates: Duplicates = "positive"  # other captions of a picture, in ALBEF's ITC: see methods/albef.py
    negatives: Literal["hard", "random"] = "hard"  # false pairs of ITM: alike, or any
    pool: int = 32  # pairs among which these are drawn; the micro-batch, where that is smaller
    queue: int | None = None  # rows of ALBEF's queues; None: 65,536, at most a quarter of the pairs


OF_ALBEF = ("duplicates", "queue")  # fields of Objectives that no other model has a use for
OF_MATCHING = ("negatives", "pool")  # and those that a model which cannot match has none for


@dataclass(frozen=True)
class RetrievalRecipe(Recipe):
    """Everything that a fine-tuning on retrieval is."""

    objectives: Objectives = field(default_factory=Objectives)
    distillation: SoftTargets = field(default_factory=lambda: SoftTargets(alpha=0.4))  # of ALBEF; alpha 0: none
    data: RetrievalData = field(default_factory=RetrievalData)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # the model: a run folder, a model folder or a foreign checkpoint
    epochs: float | None = None  # times through the training pairs, in place of train.steps
    shortlist: int = SHORTLIST  # candidates of each query that are re-ranked by matching; 0: none
    select_on: str | None = (
        None  # the figure that is to be highest, such as dev.recall; None: re-ranked where it can be
    )

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedRetrieval:
        """Open pairs and model.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; the trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)


PUBLISHED = Optim(  # the warm-up of the public code starts at the full rate, so it is none
    lr=1e-5, betas=(0.9, 0.999), weight_decay=0.02, no_decay=("*bias", "*norm*"), warmup=0, final=0.1, clip="none",
)  # fmt: skip


def _recipe(epochs: float, shortlist: int, data: RetrievalData | None = None) -> RetrievalRecipe:
    return RetrievalRecipe(data=data or RetrievalData(), optim=PUBLISHED, epochs=epochs, shortlist=shortlist)


RETRIEVAL = {
    "retrieval": _recipe(10, SHORTLIST, RetrievalData(image_size=None, random_changes=0)),  # of one's own
    "retrieval_flickr30k": _recipe(10, 128),
    "retrieval_coco": _recipe(5, 256),
}


@dataclass
class PreparedMatching(Prepared):
    """Fine-tuning on which texts belong to which pictures, for retrieval or for grounding."""

    def with_train(self, **changes: Any) -> Self:
        """Schedules may be shares of the run: a run of another length has others."""
        changed = super().with_train(**changes)
        if isinstance(changed.run.method, AlbefMethod):
            changed.run.method.num_steps = changed.recipe.train.steps
        assert changed.bundle is not None
        pools_fit(changed.recipe, changed.bundle.model)
        return changed

    def settle(self, out: Path) -> str | None:
        return keep_best(self.run, out)


@dataclass
class PreparedRetrieval(PreparedMatching):
    """A fine-tuning run with its parts in memory."""

    recipe: RetrievalRecipe
    bundle: Bundle
    title: str
    train: Source
    held: dict[str, Source]  # "dev", and "test" where there is one
    folder: Path | None = None  # where predictions are written, once the run has chosen its checkpoint

    def measures(self, recipe: RetrievalRecipe) -> Callable[[Method], dict[str, Any]]:
        """Every figure of the dev pictures, and the mean recall that a checkpoint is chosen by."""
        bundle, dev = self.bundle, self.held["dev"]

        def measure(method: Method) -> dict[str, Any]:
            assert bundle.model is method.exported(), "the bundle is of the model that is trained"
            found = _measured(bundle, dev, recipe, "dev").results
            figures = {name: result.value for name, result in found.items()}
            for order in ("", "_reranked"):
                if f"dev.tr{order}_r1" in found:
                    recall = retrieval.mean_recall(found, f"dev.tr{order}", f"dev.ir{order}")
                    figures[f"dev.recall{order}"] = recall
            return {"figures": figures}

        return measure

    def settle(self, out: Path) -> str | None:
        self.folder = out / "predictions"
        return super().settle(out)

    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        found = Evaluation()
        say("pictures that training and held-out rows have in common")
        found.notes += leakage.of_pairs(self.train, self.held)
        for split, source in self.held.items():
            say(f"{self.title}: {split}, {min(len(source), self.recipe.data.rows):,} pictures")
            prefix = f"{self.title}.{split}"
            folder = None if self.folder is None else self.folder / split
            measured = _measured(self.bundle, source, self.recipe, prefix, folder)
            found.results |= measured.results
            found.chance |= measured.chance
            found.not_applicable += [f"{split}: {sentence}" for sentence in measured.not_applicable]
            orders = ("_reranked", "") if f"{prefix}.tr_reranked_r1" in measured.results else ("",)
            for order in orders:
                recalls = {
                    way: " / ".join(
                        f"{100 * measured.results[f'{prefix}.{way}{order}_r{cutoff}'].value:.1f}"
                        for cutoff in retrieval.CUTOFFS
                    )
                    for way in ("tr", "ir")
                }
                how = "re-ranked by matching" if order else "by cosine"
                found.headline.append(
                    f"{self.title}, {split}, {how}: R@1 / 5 / 10 of texts {recalls['tr']}, of pictures {recalls['ir']}."
                )
            found.headline += [f"{self.title}, {split}: {sentence}" for sentence in measured.headline]
        return found, {}


def _measured(
    bundle: Bundle, source: Source, recipe: RetrievalRecipe, prefix: str, folder: Path | None = None
) -> Evaluation:
    """TR finds the texts of a picture, IR the picture of a text."""
    return pairs.run(
        bundle, source, recipe.data.rows, image_to_text=f"{prefix}.tr", text_to_image=f"{prefix}.ir",
        shortlist=recipe.shortlist, folder=folder,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- preparing


def _prepare(
    recipe: RetrievalRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None
) -> PreparedRetrieval:
    limits.check(leaves(recipe))
    start = open_trained(recipe.init, resume_from)
    model, data = start.model, recipe.data
    if not isinstance(model, Albef | Flava | Clip):
        raise TriviumError(
            f"retrieval is of pictures by texts, and a model of the family {start.family} has no space that both share:"
            " use an ALBEF, a FLAVA or a CLIP"
        )
    if start.tokenizer is None:
        raise TriviumError(f"{recipe.init} came without a tokenizer: put its tokenizer.json or vocab.txt beside it")
    title, sources = open_splits(data, arguments["task"])
    train = sources.pop("train")
    recipe = with_steps(recipe, len(train))
    pools_fit(recipe, model)
    notes = [*noticed(Sources(train, None, None, sources["dev"], None, None)), *many_passes(recipe, len(train))]
    if resume_from is None and start.head is not None:
        notes.append("left out is the head that the model has: retrieval has no use for it")
    method, bundle, stream = put_together(recipe, start, train, notes, data.crop_scale, data.sort_by_length)
    bundle = replace(bundle, tuned_for=(title,))
    if (why := no_cosine(bundle.untrained)) is not None:
        raise TriviumError(f"{why}, and retrieval is measured by cosine: choose --objectives.contrastive above 0")
    for split, source in {"train": train, **sources}.items():
        notes += cut_captions(split, source, start.tokenizer, bundle.max_length)
    return PreparedRetrieval.of(
        recipe, name, arguments, method, bundle, mixtures(recipe, [stream]), notes,
        optim=optim_of(recipe.optim, method), select=f"figures.{_select(recipe, bundle)}", measures_start=True,
        title=title, train=train, held=sources,
    )  # fmt: skip


def put_together(
    recipe: Any,
    start: Bundle,
    train: Source,
    notes: list[str],
    crop_scale: tuple[float, float] = (1.0, 1.0),
    sort_by_length: bool = False,
) -> tuple[Method, Bundle, Stream]:
    """What trains a model on pairs, its bundle, and the stream that it learns from.

    Args:
        recipe: of retrieval or grounding.
        start: an Albef, a Flava or a Clip with its tokenizer.
        notes: gets a sentence for each setting that the family has no use for.
    """
    model, data = start.model, recipe.data
    assert isinstance(model, Albef | Flava | Clip) and start.tokenizer is not None
    transform = start.transform.at(data.image_size or start.transform.size)
    patch, max_length = model.config.patch_size, min(data.max_length, model.config.max_length)
    limits.check_patches(transform.size, patch)
    if isinstance(model, Albef):
        model = model.for_pictures_of(transform.size)
    method = _method(model, Pixels(transform.mean, transform.std), recipe, len(train), notes)
    bundle = replace(
        start, model=model, transform=transform, max_length=max_length, head=None, head_config=None, labels=None,
        image_tokenizer=None, tuned_for=(),
        untrained=among(
            start.untrained, matching=_trains_matching(recipe, model), cosine=recipe.objectives.contrastive > 0
        ),
    )  # fmt: skip
    if _trains_matching(recipe, model):
        bundle = replace(bundle, false_pairs=FALSE_SHARE, fusion_trained=True)
    views = Views(transform.size, transform.filter, crop_scale=crop_scale, flip=data.flip)
    changes = RandomAugment(data.random_changes) if data.random_changes else None
    image = ImageInput(views, patch, changes=changes, cache_bytes=data.cache_megabytes << 20, masked=False)
    text = TextInput(start.tokenizer, max_length, probability=None)
    collate = PairCollate(image, text, sort_by_length=sort_by_length)
    return method, bundle, Stream("pairs", train, collate, data.batch, recipe.rows_at_once)


def _trains_matching(recipe: Any, model: nn.Module) -> bool:
    return isinstance(model, Matches) and recipe.objectives.itm > 0


def _method(model: Albef | Flava | Clip, pixels: Pixels, recipe: Any, num_pairs: int, notes: list[str]) -> Method:
    objectives, soft = recipe.objectives, recipe.distillation.in_steps(recipe.data.batch)
    if not objectives.contrastive and not _trains_matching(recipe, model):
        raise TriviumError(
            "every loss has weight 0, so nothing would be trained: set one, such as --objectives.contrastive 1"
        )
    if isinstance(model, Albef):
        queue = queue_rows(objectives.queue, num_pairs, notes)
        return AlbefMethod(
            model, pixels, Distillation(soft.ramp, soft.reach, soft.dropout, itc=soft.alpha, mlm=0.0),
            recipe.train.steps, steps_per_epoch(num_pairs, recipe.data.batch), queue, seed=recipe.train.seed,
            weights={"itc": objectives.contrastive, "itm": objectives.itm, "mlm": 0.0},
            duplicates=objectives.duplicates, negatives=objectives.negatives, pool=objectives.pool,
        )  # fmt: skip
    if soft.alpha:
        notes.append("without distillation: of retrieval it is ALBEF's alone")
    notes += _unused(objectives, OF_ALBEF if isinstance(model, Flava) else OF_ALBEF + OF_MATCHING)
    if isinstance(model, Clip):
        if objectives.itm:
            notes.append("without ITM: CLIP matches nothing, and is trained by the contrastive loss alone")
        return ClipMethod(model, pixels)
    weights = {"contrastive": objectives.contrastive, "itm": objectives.itm}
    return RetrievalMethod(model, pixels, weights, objectives.negatives, objectives.pool)


def _unused(objectives: Objectives, fields: tuple[str, ...]) -> list[str]:
    """A sentence for each of these that was set to something, by a model that has no use for it."""
    changed = [field for field in fields if getattr(objectives, field) != getattr(Objectives(), field)]
    return [f"objectives.{field} has no effect: this model has no use for it" for field in changed]


def _select(recipe: RetrievalRecipe, bundle: Bundle) -> str:
    """Raises TriviumError where no such figure is measured."""
    reranks = recipe.shortlist > 0 and judges(bundle)
    ways, figures = ("tr", "ir"), [f"r{cutoff}" for cutoff in retrieval.CUTOFFS]
    known = [f"dev.recall{order}" for order in (("_reranked", "") if reranks else ("",))]
    known += [f"dev.{way}{order}_{f}" for order in ("", "_reranked")[: 1 + reranks] for way in ways for f in figures]
    select = recipe.select_on or known[0]
    if select not in known:
        raise TriviumError(f"--select-on {select}: no such figure is measured: use one of {', '.join(known)}")
    return select


def pools_fit(recipe: Any, model: nn.Module) -> None:
    """As `check_pools`, of a model that matches. recipe: of retrieval or grounding."""
    if _trains_matching(recipe, model):
        check_pools(recipe)
