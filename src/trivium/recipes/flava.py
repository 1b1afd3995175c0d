"""FLAVA as a recipe: one dial sets the size, every leaf of the tree can be set by its dotted path."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trivium.data.loader import evaluation_batches
from trivium.data.mixture import StreamMixture
from trivium.data.transforms import ImageTransform
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.evaluate import losses
from trivium.load import Bundle, load
from trivium.methods.flava import LOSSES, FlavaMethod, Pixels
from trivium.models.flava import SIZES, Flava, FlavaConfig
from trivium.recipes.data import (
    Data,
    Sources,
    make_image_tokenizer,
    make_streams,
    make_tokenizer,
    open_sources,
    validation_streams,
)
from trivium.train import step as train_step
from trivium.train.config import Config, leaves
from trivium.train.initial import initialise
from trivium.train.optim import Optim
from trivium.train.protocol import Batch, Key, Method, Source
from trivium.train.trainer import Run, Train


@dataclass(frozen=True)
class Objectives:
    """Weights of the six losses; 0 = never computed."""

    mim: float = 1.0
    mlm: float = 1.0
    mmm_image: float = 1.0
    mmm_text: float = 1.0
    itm: float = 1.0
    contrastive: float = 1.0
    masked_share: float = 1.0  # share of the pairs that take the masked pass; below 1 is cheaper and changes training


@dataclass(frozen=True)
class FlavaRecipe:
    """Everything that a FLAVA run is."""

    model: FlavaConfig  # with `init`, the file's own shape counts instead
    objectives: Objectives = field(default_factory=Objectives)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # a model folder, run folder or foreign checkpoint to start from
    validate: int = 1024  # held-out samples of each stream that losses are measured on

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> Prepared:
        """Open the data, make or read tokenizer and codebook, build model and method.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: a checkpoint folder; tokenizer and codebook are then its own, and the trainer restores the
                weights.
        """
        return _prepare(self, name, arguments, resume_from)


def flava(size: str = "tiny") -> FlavaRecipe:
    """FLAVA (Singh et al. 2022). size: "tiny" for a laptop tonight, "small", or "base", the published one."""
    if size not in SIZES:
        raise TriviumError(f"there is no FLAVA of size {size}: use one of {', '.join(SIZES)}")
    model = FlavaConfig.of_size(size)
    if size == "tiny":
        return FlavaRecipe(
            model,
            Objectives(masked_share=0.25),
            Data(batch=128, max_length=32, crop_scale=(0.5, 1.0), color_jitter=0.4),
            Optim(lr=1.5e-3, weight_decay=0.1, warmup=0.08),
            Train(steps=2000, save_every=500),
        )
    published = Optim(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, warmup=10_000, clip="none")
    data = Data(batch=8192, max_length=77, vocabulary="bert")
    if size == "small":
        return FlavaRecipe(
            model,
            data=replace(data, batch=512),
            optim=replace(published, warmup=0.05, clip="global"),
            train=Train(steps=50_000, micro_batch=128),
        )
    return FlavaRecipe(model, data=data, optim=published, train=Train(steps=214_000, micro_batch=128))


@dataclass
class Prepared:
    """A recipe with its parts in memory."""

    recipe: FlavaRecipe  # as it runs: with the vocabulary and the codes that were found
    run: Run
    sources: Sources
    bundle: Bundle  # of the model that is being trained
    validation: dict[str, list[Batch]]  # stream -> held-out batches
    mixture_of: Callable[[Train], StreamMixture]
    name: str  # of the recipe, and its arguments, as config.json states them
    arguments: dict[str, Any]

    def with_train(self, **changes: Any) -> Prepared:
        """The same with some values of `train` settled: nothing is opened or learned again."""
        recipe = replace(self.recipe, train=replace(self.recipe.train, **changes))
        run = replace(
            self.run,
            train=recipe.train,
            mixture=self.mixture_of(recipe.train),
            config=Config(self.name, self.arguments, leaves(recipe)),
        )
        return replace(self, recipe=recipe, run=run)


def _prepare(recipe: FlavaRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> Prepared:
    data, seed = recipe.data, recipe.train.seed
    sources = open_sources(data)
    start_from = resume_from or recipe.init
    start = None if start_from is None else load(start_from)
    started_model = None if start is None else start.model
    if started_model is not None and not isinstance(started_model, Flava):
        raise TriviumError(f"{start_from} holds a model of another family than FLAVA: {type(started_model).__name__}")

    model_config = recipe.model if started_model is None else started_model.config
    tokenizer = start.tokenizer if start is not None else None
    if tokenizer is None:
        tokenizer = make_tokenizer(data, sources, model_config.vocab_size)
    views = Views(model_config.image_size, crop_scale=data.crop_scale, flip=data.flip)
    image_tokenizer = start.image_tokenizer if start is not None else None
    if image_tokenizer is None:
        image_tokenizer = make_image_tokenizer(data, sources, views, model_config, seed)
    codebook_size = image_tokenizer.input_size(model_config.image_size, model_config.patch_size)
    if codebook_size != model_config.image_size:
        views = replace(views, codebook_size=codebook_size)
    model_config = replace(
        model_config,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        num_codes=image_tokenizer.num_codes,
    )

    model = Flava(model_config)
    initialise(model, seed, std=0.02 * math.sqrt(768 / model_config.width))  # 0.02 at the published width
    if started_model is not None:
        model.load_state_dict(started_model.state_dict())
    weights = {loss: getattr(recipe.objectives, loss) for loss in LOSSES}
    transform = ImageTransform(model_config.image_size) if start is None else start.transform
    pixels = Pixels(transform.mean, transform.std)
    method = FlavaMethod(model, image_tokenizer, pixels, weights, recipe.objectives.masked_share)
    bundle = Bundle("flava", model, tokenizer, transform, image_tokenizer, labels=None, max_length=data.max_length)

    patch = model_config.patch_size
    streams = make_streams(data, sources, views, patch, tokenizer)

    def mixture_of(train: Train) -> StreamMixture:
        rows = train.micro_batch if isinstance(train.micro_batch, int) else data.batch
        return StreamMixture([replace(s, micro_batch=rows) for s in streams], seed, data.schedule, train.workers)

    validation = {
        stream: list(evaluation_batches(source, collate, data.batch, _whole_batches(source, recipe), stream))
        for stream, source, collate in validation_streams(data, sources, views, patch, tokenizer)
    }
    recipe = replace(recipe, model=model_config)
    run = Run(
        method,
        mixture_of(recipe.train),
        recipe.optim,
        recipe.train,
        export=bundle.save,
        config=Config(name, arguments, leaves(recipe)),
        evaluate=lambda method: {"losses": validation_losses(method, validation, seed)},
        blocks=model.blocks,
    )
    return Prepared(recipe, run, sources, bundle, validation, mixture_of, name, arguments)


def _whole_batches(source: Source, recipe: FlavaRecipe) -> int:
    """How many samples to measure on: whole batches, since the contrastive loss depends on the size of its batch."""
    most, batch = min(recipe.validate, len(source)), recipe.data.batch
    return most - most % batch if most >= batch else most


def validation_losses(method: Method, validation: dict[str, list[Batch]], seed: int) -> dict[str, float]:
    """Mean of each loss over the held-out samples, in eval mode with fixed masks."""
    found: dict[str, float] = {}
    for stream, batches in validation.items():
        found |= train_step.measure(method, [[batch] for batch in batches], Key(seed, stream, 0))
    return found


def chance_of(prepared: Prepared) -> dict[str, float]:
    """What each validation loss is for a guess from the labels' frequencies alone (see evaluate/losses.py)."""
    method, config = prepared.run.method, prepared.recipe.model
    assert isinstance(method, FlavaMethod)
    batches = [batch for stream in prepared.validation.values() for batch in stream]
    labels = losses.labels_of(batches, lambda batch: method.codes(batch, torch.arange(len(batch))).cpu())
    num_classes = {"mim": config.num_codes, "mmm_image": config.num_codes}
    num_classes |= {"mlm": config.vocab_size, "mmm_text": config.vocab_size}
    pairs = prepared.validation.get("pairs", [])
    found = losses.chances(labels, num_classes, prepared.recipe.data.false_pairs, max(1, *map(len, pairs), 1))
    return found if pairs else {name: found[name] for name in labels}
