"""DINO as a recipe: pictures without labels, a teacher that is an average of its students."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from trivium.bundle import Bundle
from trivium.data import embedded
from trivium.data.crops import CropCollate, MultiCrop
from trivium.data.sources import Concat, open_source
from trivium.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from trivium.errors import TriviumError
from trivium.evaluate import attention, floors
from trivium.evaluate.embedded import Evaluation
from trivium.load import load, open_own
from trivium.methods.dino import DinoMethod, Distillation
from trivium.methods.pixels import Pixels
from trivium.models.dino import SIZES, Dino, DinoConfig
from trivium.models.vit import ViT
from trivium.recipes import limits
from trivium.recipes.data import Inputs, Sources, absolute
from trivium.recipes.prepared import Losses, Prepared, Recipe, mixtures, on_drawings
from trivium.train.config import Config, leaves
from trivium.train.initial import initialise
from trivium.train.optim import Group, Optim
from trivium.train.protocol import Method, Source, Stream
from trivium.train.run import Run, Train

LAST_LAYER = ("head.prototypes", "head.gain")  # the gain too, where it is learned
NOTHING_LABELLED = (
    "nearest neighbours and the overlap of attention with objects: these pictures have no labels and no masks; measure"
    " the model on some with trivium evaluate RUN --pairs, or fine-tune it"
)
# For drawings: they are small, stand on white and are told apart by their colours as much as by their outlines, so no
# crop loses its colours (grey, solarise) and hue hardly turns; blur hides how a style shades and draws its lines.
DRAWINGS = MultiCrop(
    global_size=64, local_size=32, num_local=4, global_scale=(0.5, 1.0), local_scale=(0.1, 0.5),
    brightness=0.2, contrast=0.2, saturation=0.2, hue=0.03, grey=0.0, blur=(0.3, 0.1, 0.1), blur_radius=(0.1, 1.0),
    solarise=(0.0, 0.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """Where pictures come from; no label or text is read. With no path: the embedded drawings of three styles."""

    images: tuple[str, ...] = ()  # CSV, TSV, JSONL, Parquet, tar shards (addresses too), a folder, a .list
    image_column: str | None = None  # in tables; None: found by its usual names
    batch: int = 128  # pictures of one step, over all processes
    cache_megabytes: int = 256  # of decoded pictures, in each worker

    @property
    def is_embedded(self) -> bool:
        return not self.images

    def with_absolute_paths(self) -> Self:
        """The same for whoever stands in another folder."""
        return replace(self, images=tuple(map(absolute, self.images)))

    def open(self) -> Source:
        """Raises TriviumError with the file and what to do."""
        if self.is_embedded:
            return Concat([embedded.pairs("train"), embedded.images("train")])
        return open_source("images", self.images, image_column=self.image_column)


@dataclass(frozen=True)
class Objectives:
    """Weights of what DINOv2 adds to the loss of the crops."""

    koleo: float = 0.0  # 0.1 there
    ibot: float = 0.0  # 1 there


@dataclass(frozen=True)
class DinoRecipe(Recipe):
    """Everything that a DINO run is."""

    model: DinoConfig  # with `init`, the file's own shape counts instead
    crops: MultiCrop = field(default_factory=MultiCrop)
    distillation: Distillation = field(default_factory=Distillation)
    objectives: Objectives = field(default_factory=Objectives)
    data: Pictures = field(default_factory=Pictures)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # a model folder, run folder or foreign checkpoint: a DINO, or a ViT for its tower alone
    init_std: float = 0.02  # of the normal distribution that weights are drawn from; the published value

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedDino:
        """Open the pictures, build student and teacher.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; the trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)

    def inputs(self) -> Inputs:
        """See `HasInputs`."""
        limits.check(leaves(self))
        _, config = _open_start(self, None)
        _check(self, config)
        source = self.data.open()
        return Inputs(Sources(None, source, None, None, None, None), [_crops(self, config, source)])


def dino(size: str = "tiny") -> DinoRecipe:
    """DINO (Caron et al. 2021). size: "tiny" for drawings on a laptop, "small" (S/16) or "base" (B/16), the published
    ones; --model.patch-size 8 makes S/8 and B/8."""
    if size not in SIZES:
        raise TriviumError(f"there is no DINO of size {size}: use one of {', '.join(SIZES)}")
    model = DinoConfig.of_size(size)
    if size == "tiny":
        # Two departures from DINO, both from DINOv2: within minutes, centring by a mean left pictures on a few tens of
        # the prototypes, and what was learned was no better than a random start, at rates of 3e-4 and of 1e-3.
        return DinoRecipe(
            model,
            DRAWINGS,
            Distillation(momentum=0.99, teacher_temperature=0.07, centring="sinkhorn", freeze_last_layer=0.05),
            Objectives(koleo=0.1),
            data=Pictures(batch=64),
            optim=Optim(lr=5e-4, betas=(0.9, 0.999), weight_decay=0.04, weight_decay_final=0.1, warmup=0.1, final=0.01),
            train=Train(steps=1600, save_every=400, evaluate_every=400),
            init_std=0.06,
        )
    published = Optim(
        betas=(0.9, 0.999), weight_decay=0.04, weight_decay_final=0.4, no_decay=("*bias", "*norm*"), clip="per_tensor",
    )  # fmt: skip
    if size == "small":  # 800 epochs of ImageNet
        return DinoRecipe(
            replace(model, drop_path=0.1),
            MultiCrop(num_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)),
            Distillation(teacher_temperature=0.07, temperature_warmup=30 / 800, freeze_last_layer=1 / 800),
            data=Pictures(batch=1024),
            optim=replace(published, lr=5e-4 * 1024 / 256, final=0.005, warmup=10 / 800, clip="none"),
            train=Train(steps=1_000_000, micro_batch=64),
        )
    return DinoRecipe(  # 400 epochs of ImageNet
        replace(model, drop_path=0.1),
        MultiCrop(num_local=10, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)),
        Distillation(teacher_temperature=0.07, temperature_warmup=50 / 400, freeze_last_layer=3 / 400),
        data=Pictures(batch=1024),
        optim=replace(published, lr=7.5e-4 * 1024 / 256, final=2e-6 / 3e-3, warmup=10 / 400, clip_norm=0.3),
        train=Train(steps=500_000, micro_batch=64),
    )


@dataclass
class PreparedDino(Prepared):
    """DINO's run with its parts in memory."""

    recipe: DinoRecipe

    def measures(self, recipe: DinoRecipe) -> Callable[[Method], dict[str, Any]] | None:
        """Nearest neighbours on the held-out style, where the drawings are what it learns from."""
        bundle = self.bundle
        assert bundle is not None
        if not recipe.data.is_embedded:
            return None
        return lambda method: {name: result.value for name, result in floors.neighbours(bundle).items()}

    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        assert self.bundle is not None
        if not self.recipe.data.is_embedded:
            say("attention")
            [stream] = self.mixture_of(self.recipe.train).streams
            figure = attention.on_pictures(self.bundle, stream.source)
            shown = [] if figure is None else [figure]
            return Evaluation(figures=shown, not_applicable=[NOTHING_LABELLED]), {}
        found = on_drawings(self.bundle, say)
        say("random start and pixels")
        untrained = self._untrained()
        floors.add(found, untrained)
        say("attention")
        boundaries, figures = attention.boundaries(self.bundle, untrained)
        found.results |= boundaries
        found.figures += figures
        return found, {}

    def with_train(self, **changes: Any) -> PreparedDino:
        """Schedules are shares of the run: a run of another length has others."""
        changed = super().with_train(**changes)
        method = changed.run.method
        assert isinstance(method, DinoMethod)
        method.num_steps = changed.recipe.train.steps
        return replace(changed, run=replace(changed.run, optim=_optim(changed.recipe)))

    def _untrained(self) -> Bundle:
        """The model as a run of this seed starts."""
        assert self.bundle is not None
        model = Dino(self.recipe.model)
        initialise(model, self.recipe.train.seed, self.recipe.init_std)
        return replace(self.bundle, model=model.to(self.bundle.device))


def _prepare(recipe: DinoRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> PreparedDino:
    limits.check(leaves(recipe))
    start, config = _open_start(recipe, resume_from)
    config = replace(config, mask_token=config.mask_token or recipe.objectives.ibot > 0)
    _check(recipe, config)
    given, recipe = recipe.model, replace(recipe, model=config)
    source, seed = recipe.data.open(), recipe.train.seed
    model = Dino(config)
    initialise(model, seed, recipe.init_std)
    notes = []
    if recipe.objectives.ibot and recipe.distillation.centring == "sinkhorn":
        notes.append("Sinkhorn balances whole pictures alone: iBOT's hidden patches are centred by their mean")
    if start is not None and resume_from is None:
        notes.append(_start(model, start, str(recipe.init)))
        if _tower_and_head(config) != _tower_and_head(given):
            notes.append(f"the shape of the model is that of {recipe.init}, whatever --size and --model say")
    transform = ImageTransform(recipe.crops.global_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop="center")
    if start is not None:
        transform = start.transform.at(recipe.crops.global_size)
    method = DinoMethod(
        model, Pixels(transform.mean, transform.std), recipe.distillation, recipe.train.steps, asdict(recipe.objectives)
    )
    bundle = Bundle("dino", method.exported(), None, transform)
    mixture_of = mixtures(recipe, [_crops(recipe, config, source)])
    run = Run(
        method,
        mixture_of(recipe.train),
        _optim(recipe),
        recipe.train,
        export=bundle.save,
        config=Config(name, arguments, leaves(recipe)),
        blocks=lambda: [*model.blocks(), *method.teacher.blocks()],
    )
    prepared = PreparedDino(recipe, run, bundle, mixture_of, name, arguments, notes)
    prepared.run.evaluate = prepared.measures(recipe)
    return prepared


def _crops(recipe: DinoRecipe, config: DinoConfig, source: Source) -> Stream:
    collate = CropCollate(
        recipe.crops, config.patch_size, recipe.objectives.ibot > 0, cache_bytes=recipe.data.cache_megabytes << 20
    )
    return Stream("crops", source, collate, recipe.data.batch, recipe.rows_at_once)


def _optim(recipe: DinoRecipe) -> Optim:
    """With the prototypes frozen for their share of the run. A learned gain is decayed as they are: as published, where
    it is a column [K, 1] and no vector."""
    until = round(recipe.distillation.freeze_last_layer * recipe.train.steps)
    frozen = (Group(name, weight_decay=recipe.optim.weight_decay, freeze_until=until) for name in LAST_LAYER)
    return replace(recipe.optim, groups=(*recipe.optim.groups, *frozen))


def _open_start(recipe: DinoRecipe, resume_from: Path | None) -> tuple[Bundle | None, DinoConfig]:
    """The model to start from and the shape of the run's. Raises TriviumError where it is of another family."""
    if resume_from is None and recipe.init is None:
        return None, recipe.model
    start = open_own(resume_from) if resume_from is not None else load(str(recipe.init))
    if isinstance(start.model, Dino):
        return start, replace(start.model.config, drop_path=recipe.model.drop_path, dropout=recipe.model.dropout)
    if isinstance(start.model, ViT):
        tower = asdict(start.model.config) | {"drop_path": recipe.model.drop_path, "dropout": recipe.model.dropout}
        return start, replace(recipe.model, **tower)
    raise TriviumError(f"{recipe.init} holds a {start.family}, and DINO starts from a DINO or a ViT: give one of them")


def _tower_and_head(config: DinoConfig) -> DinoConfig:
    """Without what a start leaves to the recipe."""
    return replace(config, drop_path=0.0, dropout=0.0, mask_token=False)


@torch.no_grad()
def _start(model: Dino, start: Bundle, path: str) -> str:
    """Give the student what a file has for it; what a user reads of it."""
    if isinstance(start.model, Dino):
        model.load_state_dict(start.model.state_dict(), strict=False)  # a mask token may be new
        return f"student and teacher start from {path}, head and all"
    model.backbone.load_state_dict(start.model.state_dict(), strict=False)
    return f"the tower starts from {path}, the head at random"


def _check(recipe: DinoRecipe, config: DinoConfig) -> None:
    """Raises TriviumError where shapes do not go together."""
    for flag, size in (
        ("--model.image-size", config.image_size),
        ("--crops.global-size", recipe.crops.global_size),
        ("--crops.local-size", recipe.crops.local_size),
    ):
        limits.check_patches(size, config.patch_size, flag)
    limits.check_heads(config.width, config.num_heads)
