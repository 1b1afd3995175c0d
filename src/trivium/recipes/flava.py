"""FLAVA as a recipe: one dial sets the size, every leaf of the tree can be set by its dotted path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.bundle import Bundle
from trivium.bundle.untrained import MATCHING, among
from trivium.data.codes import CodeCache
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.evaluate import losses
from trivium.evaluate.embedded import Evaluation
from trivium.load import image_tokenizer_hash, load_image_tokenizer
from trivium.methods.flava import LOSSES, FlavaMethod, Scope
from trivium.methods.pixels import Pixels
from trivium.models.dvae import DVae
from trivium.models.flava import SIZES, Flava, FlavaConfig
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.models.towers import vit_of
from trivium.recipes import limits, validation
from trivium.recipes.bert import Bert
from trivium.recipes.data import (
    Data,
    Inputs,
    Sources,
    all_pictures,
    check_shapes,
    make_image_tokenizer,
    make_streams,
    open_sources,
)
from trivium.recipes.prepared import PreparedPairs, Recipe, on_drawings
from trivium.recipes.priors import start_at_frequencies
from trivium.recipes.start import check_words, open_start, vocabulary
from trivium.recipes.towers import ImageTower, TextTower, read_text
from trivium.train.budget import memory_dial_named
from trivium.train.config import leaves
from trivium.train.initial import initialise
from trivium.train.optim import Optim
from trivium.train.protocol import Source
from trivium.train.run import Train

HEADS = ("*_head.decoder.weight",)
PUBLISHED_ZEROS = ("image.class_token", "image.mask_token", "image.positions", "multimodal.class_token")
OF_BOTH = ("mmm_image", "mmm_text", "itm")  # losses that reach the multimodal encoder
FED_BY = {"pairs": (*OF_BOTH, "contrastive"), "images": ("mim",), "text": ("mlm",)}


@dataclass(frozen=True)
class Objectives:
    """Weights of the six losses; 0 = never computed, and a stream that feeds no other loss is left out."""

    mim: float = 1.0
    mlm: float = 1.0
    mmm_image: float = 1.0
    mmm_text: float = 1.0
    itm: float = 1.0
    contrastive: float = 1.0
    masked_share: float = 1.0  # share of the pairs that take the masked pass; below 1 is cheaper and changes training
    contrastive_form: Literal["softmax", "sigmoid"] = "softmax"  # SigLIP: "sigmoid" with model.start_logit_scale 10
    contrastive_scope: Scope = "global"  # what a row gives gradient to, or sees, of the other ranks of the batch
    num_ranks: int = 1  # equal parts that the batch is cut into, for the two other scopes; no matter the processes

    def streams(self) -> list[str]:
        """The streams that feed a loss. Raises TriviumError where every weight is 0."""
        names = [stream for stream, fed in FED_BY.items() if any(getattr(self, loss) for loss in fed)]
        if not names:
            raise TriviumError(
                "every loss has weight 0, so nothing would be trained: set one, such as --objectives.contrastive 1"
            )
        return names


@dataclass(frozen=True)
class FlavaRecipe(Recipe):
    """Everything that a FLAVA run is."""

    model: FlavaConfig  # with `init`, the file's own shape counts instead
    objectives: Objectives = field(default_factory=Objectives)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # a model folder, run folder or foreign checkpoint to start from
    init_text: str | None = None  # the text side starts as a text run's (whole), or as a BERT's (embeddings and head)
    init_image: str | None = None  # the image encoder starts as that of an image run, a DINO, a ViT, a DeiT or a BEiT
    init_std: float = 0.02  # of the normal distribution that weights are drawn from; the published value
    init_zeros: bool = False  # True: class tokens, mask token and positions of pictures start at zero, as published
    label_frequencies: bool = False  # True: the heads start at the frequencies of their labels (see priors.py)
    validate: int = 4096  # held-out samples of each stream that losses are measured on, up to 8 times each; 0: none

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedFlava:
        """Open the data, make or read tokenizer and codebook, build model and method.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; tokenizer and codebook are then its own, and
                the trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)

    def pictures(self) -> tuple[Source, Views, ImageTokenizer]:
        """What a cache of codes is made from: every picture of the run, those of validation too; which part of each
        the image tokenizer sees, and at which size; and the image tokenizer."""
        limits.check(leaves(self))
        start, config = open_start(self, None, Flava, "FLAVA")
        _check(config, self.data)
        sources = open_sources(self.data)
        pictures = all_pictures(sources)
        tower = None if start is not None or self.init_image is None else ImageTower.read(self.init_image)
        views, image_tokenizer = _image_side(self, sources, start or tower, config)
        assert image_tokenizer is not None, "there are pictures"
        return pictures, views, image_tokenizer

    def inputs(self) -> Inputs:
        """See `HasInputs`. Every stream that has data, whatever the losses weigh; no codebook is learned for it."""
        limits.check(leaves(self))
        start, config = open_start(self, None, Flava, "FLAVA")
        _check(config, self.data)
        sources, views = open_sources(self.data), self.data.views(config.image_size)
        image_tokenizer = None if start is None else start.image_tokenizer
        if image_tokenizer is None and self.data.image_tokenizer != "patches":
            image_tokenizer = load_image_tokenizer(self.data.image_tokenizer)
        if image_tokenizer is not None and self.data.codes is None:
            views = _seen_by(image_tokenizer, views, config)
        text_start = None if start is not None or self.init_text is None else read_text(self.init_text)
        tokenizer = _vocabulary(self, start, text_start, sources, config)
        train, held_out = (
            make_streams(self.data, sources, views, config.patch_size, tokenizer, None, FED_BY, train)
            for train in (True, False)
        )
        return Inputs(sources, train, held_out, tokenizer)


def flava(size: str = "tiny") -> FlavaRecipe:
    """FLAVA (Singh et al. 2022). size: "tiny" for a laptop tonight, "small", or "base", the published one."""
    if size not in SIZES:
        raise TriviumError(f"there is no FLAVA of size {size}: use one of {', '.join(SIZES)}")
    model = FlavaConfig.of_size(size)
    if size == "tiny":
        return FlavaRecipe(
            model,
            data=Data(batch=128, max_length=32),
            optim=Optim(lr=1.5e-3, weight_decay=0.1, warmup=0.08),
            train=Train(steps=2000, save_every=500),
            label_frequencies=True,
            init_std=0.13,  # of 0.02, 0.05, 0.09, 0.13 and 0.2 the one that learns fastest at this width
        )
    # Not stated: AdamW's eps and which parameters are spared from decay; those are PyTorch's and, as everywhere, ours.
    published = Optim(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, warmup=10_000, clip="none")
    data = Data(batch=8192, max_length=77, text_length=model.max_length, vocabulary="bert")
    if size == "small":
        return FlavaRecipe(
            model,
            data=replace(data, batch=512),
            optim=replace(published, warmup=0.05, clip="global"),
            train=Train(steps=50_000, micro_batch=128),
        )
    return FlavaRecipe(model, data=data, optim=published, train=Train(steps=214_000, micro_batch=128))


@dataclass
class PreparedFlava(PreparedPairs):
    """FLAVA's run with its parts in memory."""

    recipe: FlavaRecipe  # with the vocabulary and the codes that were found

    def evaluation(self, say: Callable[[str], None]) -> Evaluation:
        return super().evaluation(say) if "pairs" in self.recipe.objectives.streams() else self._one_tower(say)

    def _one_tower(self, say: Callable[[str], None]) -> Evaluation:
        """Of a run without pairs the image encoder alone can be measured on drawings, where it was trained."""
        bundle, model = self.bundle, self.run.method.model
        assert bundle is not None and isinstance(model, Flava)
        if not (self.recipe.data.is_embedded and self.recipe.objectives.mim):
            return Evaluation(not_applicable=["retrieval and classification: this run trained on no pairs"])
        return on_drawings(Bundle("vit", vit_of(model), None, bundle.transform), say)

    def chance(self) -> dict[str, float]:
        method, config = self.run.method, self.recipe.model
        assert isinstance(method, FlavaMethod)
        rows = self.recipe.rows_at_once
        pieces = validation.all_pieces(self.validation, rows)
        with memory_dial_named("the image tokenizer", rows):
            labels = losses.labels_of(pieces, lambda batch: method.codes(batch, torch.arange(len(batch))).cpu())
        num_classes = {"mim": config.num_codes, "mmm_image": config.num_codes}
        num_classes |= {"mlm": config.vocab_size, "mmm_text": config.vocab_size}
        objectives, batches = self.recipe.objectives, self.validation.get("pairs", [])
        columns = validation.columns(batches, objectives.contrastive_scope, objectives.num_ranks)
        sigmoid = objectives.contrastive_form == "sigmoid"
        found = losses.chances(labels, num_classes, self.recipe.data.false_pairs, columns, sigmoid)
        return found if batches else {name: found[name] for name in labels}


def _prepare(recipe: FlavaRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> PreparedFlava:
    limits.check(leaves(recipe))
    _check_sorting(recipe)
    limits.check_ranks(recipe.objectives.contrastive_scope, recipe.objectives.num_ranks, recipe.data.batch)
    data, seed = recipe.data, recipe.train.seed
    stream_names = recipe.objectives.streams()
    for flag, tower in (("text", recipe.init_text), ("image", recipe.init_image)):
        if recipe.init is not None and tower is not None:
            raise TriviumError(
                f"--init starts the whole model and --init-{flag} its {flag} side alone: give one of them"
            )
    start, model_config = open_start(recipe, resume_from, Flava, "FLAVA")
    _check(model_config, data)
    sources = open_sources(data)
    text_start = None if start is not None or recipe.init_text is None else read_text(recipe.init_text)
    image_start = None if start is not None or recipe.init_image is None else ImageTower.read(recipe.init_image)
    tokenizer = _vocabulary(recipe, start, text_start, sources, model_config)
    views, image_tokenizer = _image_side(recipe, sources, start or image_start, model_config)
    codes = None
    if data.codes is not None and image_tokenizer is not None:
        codes = CodeCache(data.codes, views, image_tokenizer_hash(image_tokenizer))
    notes: list[str] = []
    if start is None:
        model_config = replace(model_config, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
        if image_tokenizer is not None:
            model_config = replace(model_config, num_codes=image_tokenizer.num_codes)
    elif resume_from is None:
        notes += _fits(recipe, start, model_config, tokenizer, image_tokenizer)

    model = Flava(model_config)
    initialise(model, seed, recipe.init_std, PUBLISHED_ZEROS if recipe.init_zeros else (), HEADS)
    if start is not None:
        model.load_state_dict(start.model.state_dict())
    weights = {loss: getattr(recipe.objectives, loss) for loss in LOSSES}
    transform = (ImageTransform() if start is None else start.transform).at(views.size)
    if image_start is not None:  # pixels as the tower knows them
        transform = replace(transform, mean=image_start.transform.mean, std=image_start.transform.std)
    pixels = Pixels(transform.mean, transform.std)
    objectives = recipe.objectives
    method = FlavaMethod(
        model, _in_steps(image_tokenizer, data), pixels, weights, objectives.masked_share,
        objectives.contrastive_form, objectives.contrastive_scope, objectives.num_ranks,
    )  # fmt: skip
    false_pairs = None if start is None else start.false_pairs
    if recipe.objectives.itm and sources.pairs is not None:
        false_pairs = data.false_pairs
    fusion_trained = False if start is None else start.fusion_trained
    if sources.pairs is not None and any(weights[loss] for loss in OF_BOTH):
        fusion_trained = True
    matches = sources.pairs is not None and weights["itm"] > 0
    untrained = among(MATCHING if start is None else start.untrained, matching=matches)  # files have the projections
    bundle = Bundle(
        "flava", model, tokenizer, transform, image_tokenizer, max_length=data.max_length, false_pairs=false_pairs,
        fusion_trained=fusion_trained, untrained=untrained,
    )  # fmt: skip

    patch = model_config.patch_size
    streams = make_streams(data, sources, views, patch, tokenizer, codes, stream_names)

    if recipe.label_frequencies and start is None:
        start_at_frequencies(method, streams, tokenizer.special_ids, seed)
    if text_start is not None:
        notes.append(text_start.start(model))
    if isinstance(text_start, TextTower) and data.vocabulary != "learned":
        notes.append(f"{recipe.init_text} brings its own vocabulary, so --data.vocabulary is not used")
    if image_start is not None:
        notes += image_start.start(model, image_tokenizer)

    held_out = make_streams(data, sources, views, patch, tokenizer, codes, stream_names, train=False)
    recipe = replace(recipe, model=model_config)
    return PreparedFlava.of_streams(
        recipe, name, arguments, method, bundle, sources, streams, held_out, notes, data.schedule
    )


def _vocabulary(
    recipe: FlavaRecipe, start: Bundle | None, text: Bert | TextTower | None, sources: Sources, config: FlavaConfig
) -> Tokenizer:
    """That of what the run or its text side starts from, else as the recipe says."""
    if isinstance(text, TextTower) or (text is not None and recipe.data.vocabulary == "learned"):
        return text.vocabulary()
    return vocabulary(recipe, start, sources, config.vocab_size)


def _fits(
    recipe: FlavaRecipe,
    start: Bundle,
    config: FlavaConfig,
    tokenizer: Tokenizer,
    image_tokenizer: ImageTokenizer | None,
) -> list[str]:
    """What of the recipe gives way to the model that a run starts from, a sentence each.

    Raises TriviumError where words or codes of the data have no place in the model.
    """
    check_words(recipe, tokenizer, config.vocab_size)
    if image_tokenizer is not None and image_tokenizer.num_codes > config.num_codes:
        raise TriviumError(
            f"the image tokenizer has {image_tokenizer.num_codes} codes, the model of {recipe.init} {config.num_codes}:"
            " give the image tokenizer that it was trained with"
        )
    notes = []
    if start.tokenizer is not None and recipe.data.vocabulary != "learned":
        notes.append(f"{recipe.init} brings its own vocabulary, so --data.vocabulary is not used")
    if start.image_tokenizer is not None and recipe.data.image_tokenizer != "patches":
        notes.append(f"{recipe.init} brings its own image tokenizer, so --data.image-tokenizer is not used")
    given = replace(recipe.model, vocab_size=config.vocab_size, pad_id=config.pad_id, num_codes=config.num_codes)
    if given != config:
        notes.append(f"the shape of the model is that of {recipe.init}, whatever --size and --model say")
    return notes


def _check(config: FlavaConfig, data: Data) -> None:
    """Raises TriviumError where shapes do not go together."""
    check_shapes(data, config.image_size, config.patch_size, config.max_length)
    limits.check_heads(config.width, config.num_heads)


def _check_sorting(recipe: FlavaRecipe) -> None:
    """Rows take the masked pass by their number in the batch: sorted by length, always the same lengths would."""
    if recipe.data.sort_by_length and recipe.objectives.masked_share < 1:
        raise TriviumError("--data.sort-by-length and --objectives.masked-share below 1 do not go together: drop one")


def _image_side(
    recipe: FlavaRecipe, sources: Sources, start: Bundle | ImageTower | None, config: FlavaConfig
) -> tuple[Views, ImageTokenizer | None]:
    """All that decides the codes of a picture. A run on text alone needs no image tokenizer.

    start: a whole model keeps its own; of a tower it is taken, with its head, where the recipe names no other.
    """
    views = recipe.data.views(config.image_size)
    another = isinstance(start, ImageTower) and recipe.data.image_tokenizer != "patches"
    image_tokenizer = None if start is None or another else start.image_tokenizer
    looks = recipe.objectives.streams() != ["text"]
    if image_tokenizer is None and not (looks and (sources.pairs or sources.images or sources.validation_pairs)):
        return views, None
    if image_tokenizer is None:
        image_tokenizer = make_image_tokenizer(recipe.data, sources, views, config, recipe.train.seed)
    return _seen_by(image_tokenizer, views, config), image_tokenizer


def _in_steps(image_tokenizer: ImageTokenizer | None, data: Data) -> ImageTokenizer | None:
    """What makes the codes of batches, those of validation too. What is kept with the model stays in float32."""
    if data.image_tokenizer_precision == "fp32" or image_tokenizer is None:
        return image_tokenizer
    if not isinstance(image_tokenizer, DVae) or data.codes is not None:
        reason = "--data.codes holds them already" if data.codes is not None else "this run has none"
        raise TriviumError(f"--data.image-tokenizer-precision is that of a dVAE's codes made in the step: {reason}")
    return copy.deepcopy(image_tokenizer).frozen(torch.bfloat16)


def _seen_by(image_tokenizer: ImageTokenizer, views: Views, config: FlavaConfig) -> Views:
    codebook_size = image_tokenizer.input_size(views.size, config.patch_size)
    return views if codebook_size == views.size else replace(views, codebook_size=codebook_size)
