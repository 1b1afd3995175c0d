"""CLIP as a recipe: one dial sets the size, every leaf of the tree can be set by its dotted path."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trivium.bundle import Bundle
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.evaluate import losses
from trivium.methods.clip import ClipMethod, Scope
from trivium.methods.pixels import Pixels
from trivium.models.clip import SIZES, Clip, ClipConfig
from trivium.recipes import limits, validation
from trivium.recipes.data import Inputs, PairData, Sources, check_shapes, make_pairs, open_sources
from trivium.recipes.prepared import PreparedPairs, Recipe
from trivium.recipes.start import open_start, vocabulary
from trivium.train.config import leaves
from trivium.train.initial import initialise
from trivium.train.optim import Optim
from trivium.train.run import Train


@dataclass(frozen=True)
class Objective:
    """The one loss."""

    contrastive_form: Literal["softmax", "sigmoid"] = "softmax"  # SigLIP: "sigmoid" with model.start_logit_scale 10
    contrastive_scope: Scope = "global"  # what a row gives gradient to, or sees, of the other ranks of the batch
    num_ranks: int = 1  # equal parts that the batch is cut into, for the two other scopes; no matter the processes


@dataclass(frozen=True)
class ClipRecipe(Recipe):
    """Everything that a CLIP run is."""

    model: ClipConfig  # with `init`, the file's own shape counts instead
    objectives: Objective = field(default_factory=Objective)
    data: PairData = field(default_factory=PairData)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # a model folder, run folder or foreign checkpoint to start from
    init_std: float = 0.02  # of the normal distribution that weights are drawn from
    validate: int = 4096  # held-out pairs that the loss is measured on, up to 8 times each; 0: none

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedClip:
        """Open the data, make or read the tokenizer, build model and method.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; the tokenizer is then its own, and the
                trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)

    def inputs(self) -> Inputs:
        """See `HasInputs`."""
        limits.check(leaves(self))
        start, config = open_start(self, None, Clip, "CLIP")
        _check(config, self.data)
        sources, views = open_sources(self.data), self.data.views(config.image_size)
        tokenizer = _vocabulary(self, start, sources, config)
        train, held_out = (
            make_pairs(self.data, sources, views, config.patch_size, tokenizer, train) for train in (True, False)
        )
        return Inputs(sources, train, held_out, tokenizer)


def clip(size: str = "tiny") -> ClipRecipe:
    """CLIP (Radford et al. 2021). size: "tiny" for a laptop tonight, "small", or "base", the published ViT-B/16.

    Base takes the paper's optimizer and, as the CLIP that FLAVA is compared with, FLAVA's batch and number of updates.
    Its published vocabulary is a file: --data.vocabulary bpe_simple_vocab_16e6.txt.gz.
    """
    if size not in SIZES:
        raise TriviumError(f"there is no CLIP of size {size}: use one of {', '.join(SIZES)}")
    model = ClipConfig.of_size(size)
    if size == "tiny":
        return ClipRecipe(
            model,
            data=PairData(batch=128, max_length=32),
            optim=Optim(lr=1.5e-3, weight_decay=0.1, warmup=0.08),
            train=Train(steps=2000, save_every=500),
            init_std=0.13,  # as FLAVA's of this width
        )
    published = Optim(
        lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, warmup=2000, clip="none",
        no_decay=("*bias", "*norm*", "*logit_scale*"),  # all that are no gains or biases are decayed (section 2.5)
    )  # fmt: skip
    data = PairData(batch=8192, max_length=77)
    if size == "small":
        return ClipRecipe(
            model,
            data=replace(data, batch=512),
            optim=replace(published, warmup=0.05, clip="global"),
            train=Train(steps=50_000, micro_batch=128),
        )
    return ClipRecipe(model, data=data, optim=published, train=Train(steps=150_000, micro_batch=128))


@dataclass
class PreparedClip(PreparedPairs):
    """CLIP's run with its parts in memory."""

    recipe: ClipRecipe  # with the vocabulary that was found

    def chance(self) -> dict[str, float]:
        objectives = self.recipe.objectives
        columns = validation.columns(self.validation["pairs"], objectives.contrastive_scope, objectives.num_ranks)
        return {"contrastive": losses.contrastive_chance(columns, objectives.contrastive_form == "sigmoid")}


def _prepare(recipe: ClipRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> PreparedClip:
    limits.check(leaves(recipe))
    objectives, data, seed = recipe.objectives, recipe.data, recipe.train.seed
    limits.check_ranks(objectives.contrastive_scope, objectives.num_ranks, data.batch)
    start, config = open_start(recipe, resume_from, Clip, "CLIP")
    _check(config, data)
    sources = open_sources(data)
    tokenizer = _vocabulary(recipe, start, sources, config)
    notes = []
    if start is None:
        config = replace(config, vocab_size=tokenizer.vocab_size, end_id=tokenizer.sep_id)
    elif resume_from is None:
        notes += _fits(recipe, start, config, tokenizer)

    model = Clip(config)
    initialise(model, seed, recipe.init_std)
    if start is not None:
        model.load_state_dict(start.model.state_dict())
    views = data.views(config.image_size)
    transform = (ImageTransform() if start is None else start.transform).at(views.size)
    method = ClipMethod(
        model, Pixels(transform.mean, transform.std), objectives.contrastive_scope, objectives.num_ranks,
        objectives.contrastive_form,
    )  # fmt: skip
    bundle = Bundle("clip", model, tokenizer, transform, max_length=data.max_length)
    streams = make_pairs(data, sources, views, config.patch_size, tokenizer)
    assert streams, "with no path at all there are the embedded pairs"
    held_out = make_pairs(data, sources, views, config.patch_size, tokenizer, train=False)
    recipe = replace(recipe, model=config)
    return PreparedClip.of_streams(recipe, name, arguments, method, bundle, sources, streams, held_out, notes)


def _vocabulary(recipe: ClipRecipe, start: Bundle | None, sources: Sources, config: ClipConfig) -> Tokenizer:
    files = "the path of its tokenizer.json or of its byte pairs"
    return vocabulary(recipe, start, sources, config.vocab_size, files)


def _fits(recipe: ClipRecipe, start: Bundle, config: ClipConfig, tokenizer: Tokenizer) -> list[str]:
    """What of the recipe gives way to the model that a run starts from, a sentence each.

    Raises TriviumError where words of the data have no place in the model.
    """
    end_id = config.vocab_size - 1 if config.end_id is None else config.end_id
    if tokenizer.vocab_size > config.vocab_size or tokenizer.sep_id != end_id:
        raise TriviumError(
            f"the vocabulary has {tokenizer.vocab_size} words and ends a text with number {tokenizer.sep_id}, the model"
            f" of {recipe.init} has {config.vocab_size} and {end_id}: give the vocabulary that it was trained with"
        )
    notes = []
    if start.tokenizer is not None and recipe.data.vocabulary != "learned":
        notes.append(f"{recipe.init} brings its own vocabulary, so --data.vocabulary is not used")
    if replace(recipe.model, vocab_size=config.vocab_size, end_id=config.end_id) != config:
        notes.append(f"the shape of the model is that of {recipe.init}, whatever --size and --model say")
    return notes


def _check(config: ClipConfig, data: PairData) -> None:
    """Raises TriviumError where shapes do not go together."""
    check_shapes(data, config.image_size, config.patch_size, config.max_length)
    limits.check_heads(config.image_width, config.image_heads, "image-heads", "image-width")
    limits.check_heads(config.text_width, config.text_heads, "text-heads", "text-width")
