"""ALBEF as a recipe: captioned pictures, a teacher that is an average of its students, queues of what it saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.bundle import Bundle
from trivium.bundle.untrained import MATCHING, among
from trivium.data.random_augment import RandomAugment
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.evaluate import losses
from trivium.methods.albef import FALSE_SHARE, LOSSES, AlbefMethod, Distillation, Duplicates
from trivium.methods.pixels import Pixels
from trivium.models.albef import SIZES, Albef, AlbefConfig
from trivium.recipes import limits
from trivium.recipes.data import Inputs, PairData, Sources, check_shapes, make_pairs, open_sources
from trivium.recipes.prepared import PreparedPairs, Recipe
from trivium.recipes.start import check_words, open_start, vocabulary
from trivium.recipes.towers import AlbefImageTower, AlbefTextTower
from trivium.train.config import leaves
from trivium.train.initial import initialise
from trivium.train.optim import Group, Optim
from trivium.train.protocol import Method, Stream
from trivium.train.run import Train

PUBLISHED_QUEUE = 65_536
HELD_OUT_MASKED = 0.15  # of the tokens, in validation
SHARE_IN_QUEUE = 4  # a queue holds at most one pair in so many: longer, and nearly every row meets itself in it


@dataclass(frozen=True)
class Pairs(PairData):
    """The same with words to be masked. [CLS] is one of the tokens of a caption, and no [SEP] stands at its end. The
    defaults are the published ones."""

    batch: int = 512
    max_length: int = 25
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: float = 0.5
    vocabulary: str = "bert"
    mask_probability: float = 0.15  # of a token to be masked in training; held-out text is always measured at 0.15
    whole_words: bool = False  # mask whole words instead of word pieces
    random_changes: int = 2  # of shape and light, drawn for each picture (data/random_augment.py); 0: none


@dataclass(frozen=True)
class Objectives:
    """Weights of the three losses; 0 = never computed."""

    itc: float = 1.0
    itm: float = 1.0
    mlm: float = 1.0
    duplicates: Duplicates = "mask"  # other rows of the same picture or caption in ITC: see methods/albef.py
    negatives: Literal["hard", "random"] = "hard"  # false pairs of ITM: alike, or any
    pool: int = 64  # pairs among which these are drawn; the micro-batch, where that is smaller
    queue: int | None = None  # rows; None: 65,536, at most a quarter of the pairs


@dataclass(frozen=True)
class AlbefRecipe(Recipe):
    """Everything that an ALBEF pretraining is."""

    model: AlbefConfig  # with `init`, the file's own shape counts instead
    objectives: Objectives = field(default_factory=Objectives)
    distillation: Distillation = field(default_factory=Distillation)
    data: Pairs = field(default_factory=Pairs)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # a model folder, run folder or foreign checkpoint to start from
    init_image: str | None = None  # a ViT, DeiT or DINO for the picture's tower (the paper: DeiT-B/16)
    init_text: str | None = None  # a BERT for text and fusion (the paper: bert-base-uncased); it brings its vocabulary
    init_std: float = 0.02  # of the normal distribution that weights are drawn from; the published value
    # As large as words, positions make the class tokens of all texts alike.
    init_positions: float = 1.0  # times `init_std`: of positions and segments of texts
    # Large, they soon make all words of a text alike: their norms stand behind what is added.
    init_blocks: float = 1.0  # times `init_std`: of the blocks of text and fusion
    validate: int = 4096  # held-out pairs that losses are measured on, up to 8 times each; 0: none

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedAlbef:
        """Open the pairs, make or read the tokenizer, build student and teacher.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked; the trainer restores the weights.
        """
        return _prepare(self, name, arguments, resume_from)

    def inputs(self) -> Inputs:
        """See `HasInputs`."""
        limits.check(leaves(self))
        start, config = open_start(self, None, Albef, "ALBEF")
        _check(config, self)
        sources = open_sources(self.data)
        assert sources.pairs is not None, "data without a path is the embedded drawings"
        text = None if start is not None or self.init_text is None else AlbefTextTower.read(self.init_text)
        tokenizer = _vocabulary(self, start, text, sources, config)
        train, held_out = (_streams(self, sources, config, tokenizer, train) for train in (True, False))
        queue = queue_rows(self.objectives.queue, len(sources.pairs), [])
        return Inputs(sources, train, held_out, tokenizer, queue)


def albef(size: str = "tiny") -> AlbefRecipe:
    """ALBEF (Li et al. 2021). size: "tiny" for a laptop tonight, "small", or "base", the published one."""
    if size not in SIZES:
        raise TriviumError(f"there is no ALBEF of size {size}: use one of {', '.join(SIZES)}")
    model = AlbefConfig.of_size(size)
    if size == "tiny":
        # At a rate of 1e-3 and more all keys drift together, and those of a queue tell by their age that they are no
        # pair of anything: the loss falls by that alone, and retrieval stays at chance.
        return AlbefRecipe(
            model,
            objectives=Objectives(queue=0),
            distillation=Distillation(ramp=0.2, reach=0.1),
            data=Pairs(
                batch=128, max_length=32, crop_scale=(0.9, 1.0), flip=0.0, vocabulary="learned", random_changes=0
            ),
            optim=Optim(lr=1.5e-3, weight_decay=0.1, warmup=0.08),
            train=Train(steps=2000, save_every=500),
            init_std=0.09,
            init_positions=0.3,
            init_blocks=0.5,
        )
    published = Optim(
        lr=1e-4, betas=(0.9, 0.999), weight_decay=0.02, no_decay=("*bias", "*norm*"), warmup=2000, final=0.1,
        clip="none",
    )  # fmt: skip
    if size == "small":
        return AlbefRecipe(
            model, data=Pairs(batch=256), optim=replace(published, lr=3e-4, warmup=0.05, clip="global"),
            train=Train(steps=50_000, micro_batch=64),
        )  # fmt: skip
    # 30 epochs of 5.1 million pairs.
    return AlbefRecipe(model, optim=published, train=Train(steps=300_000, micro_batch=64))


@torch.no_grad()
def at_random(model: Albef, recipe: AlbefRecipe) -> None:
    """The weights that a run of the recipe begins with where no other model gives it any: drawn by its seed, smaller
    in positions and segments of texts (`init_positions`) and in the blocks of text and fusion (`init_blocks`)."""
    initialise(model, recipe.train.seed, recipe.init_std)
    for embedding in (model.text.embeddings.position, model.text.embeddings.segment):
        embedding.weight.mul_(recipe.init_positions)
    for parameter in (*model.text.encoder.parameters(), *model.fusion.parameters()):
        if parameter.ndim > 1:
            parameter.mul_(recipe.init_blocks)


@dataclass
class PreparedAlbef(PreparedPairs):
    """ALBEF's run with its parts in memory."""

    recipe: AlbefRecipe  # with the vocabulary that was found

    def chance(self) -> dict[str, float]:
        method, batches = self.run.method, self.validation["pairs"]
        assert isinstance(method, AlbefMethod)
        words = losses.labels_of([replace(batch, images=()) for batch in batches], lambda batch: batch.rows_B)["mlm"]
        sizes = [len(batch) for batch in batches]
        columns = sum(size * math.log(size + len(method.queue_same)) for size in sizes) / sum(sizes)
        return {
            "itc": columns,
            "itm": losses.binary_entropy(FALSE_SHARE),
            "mlm": losses.chance(words, self.recipe.model.vocab_size),
        }

    def with_train(self, **changes: Any) -> PreparedAlbef:
        """Schedules may be shares of the run: a run of another length has others."""
        changed = super().with_train(**changes)
        method = changed.run.method
        assert isinstance(method, AlbefMethod)
        method.num_steps = changed.recipe.train.steps
        check_pools(changed.recipe)
        return changed


def _prepare(recipe: AlbefRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> PreparedAlbef:
    limits.check(leaves(recipe))
    data, seed = recipe.data, recipe.train.seed
    if not any(getattr(recipe.objectives, loss) for loss in LOSSES):
        raise TriviumError("every loss has weight 0, so nothing would be trained: set one, such as --objectives.itc 1")
    if recipe.init is not None and (recipe.init_image is not None or recipe.init_text is not None):
        raise TriviumError(
            "--init starts the whole model, --init-image and --init-text one tower each: give it alone, or them"
        )
    start, config = open_start(recipe, resume_from, Albef, "ALBEF")
    config = replace(config, dropout=recipe.model.dropout)
    _check(config, recipe)
    image = None if start is not None or recipe.init_image is None else AlbefImageTower.read(recipe.init_image)
    text = None if start is not None or recipe.init_text is None else AlbefTextTower.read(recipe.init_text)
    sources = open_sources(data)
    assert sources.pairs is not None, "data without a path is the embedded drawings"
    tokenizer = _vocabulary(recipe, start, text, sources, config)
    notes: list[str] = []
    if start is None:
        config = replace(config, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    elif resume_from is None:
        check_words(recipe, tokenizer, config.vocab_size)
        if start.head is not None:
            notes.append("left out is the head that the model has: pretraining has no use for it")
        if start.tokenizer is not None:
            notes.append(f"{recipe.init} brings its own vocabulary, so --data.vocabulary is not used")
    recipe = replace(recipe, model=config)

    model = Albef(config)
    at_random(model, recipe)
    if start is not None:
        model.load_state_dict(start.model.state_dict())
    notes += [tower.start(model) for tower in (image, text) if tower is not None]
    objectives, size = recipe.objectives, data.views(config.image_size).size
    transform = (ImageTransform() if start is None else start.transform).at(size)
    queue = queue_rows(objectives.queue, len(sources.pairs), notes)
    epoch_steps = math.ceil(len(sources.pairs) / data.batch)
    method = AlbefMethod(
        model, Pixels(transform.mean, transform.std), recipe.distillation.in_steps(data.batch),
        recipe.train.steps, epoch_steps, queue,
        seed=seed, weights={loss: getattr(objectives, loss) for loss in LOSSES}, duplicates=objectives.duplicates,
        negatives=objectives.negatives, pool=objectives.pool,
    )  # fmt: skip
    fusion_trained = bool(objectives.itm or objectives.mlm) or (False if start is None else start.fusion_trained)
    before = MATCHING if start is None else start.untrained
    untrained = among(before, matching=objectives.itm > 0, cosine=objectives.itc > 0)
    bundle = Bundle(
        "albef", model, tokenizer, transform, max_length=data.max_length, false_pairs=FALSE_SHARE,
        fusion_trained=fusion_trained, untrained=untrained,
    )  # fmt: skip
    streams, held_out = (_streams(recipe, sources, config, tokenizer, train) for train in (True, False))
    return PreparedAlbef.of_streams(
        recipe, name, arguments, method, bundle, sources, streams, held_out, notes, optim=optim_of(recipe.optim, method)
    )


def optim_of(optim: Optim, method: Method) -> Optim:
    """As a run has it: an ALBEF's temperature is decayed as matrices are, where no pattern of no_decay spares it. As
    published: there it has no dimension, and those of one dimension alone are spared."""
    if not isinstance(method, AlbefMethod):
        return optim
    return replace(optim, groups=(Group("temperature", weight_decay=optim.weight_decay), *optim.groups))


def _vocabulary(
    recipe: AlbefRecipe, start: Bundle | None, text: AlbefTextTower | None, sources: Sources, config: AlbefConfig
) -> Tokenizer:
    """That of what the run or its text tower starts from, else as the recipe says; read as ALBEF reads captions."""
    if start is not None and start.tokenizer is not None:
        return start.tokenizer
    if text is not None and text.tokenizer is not None:
        return text.tokenizer.for_captions()
    return vocabulary(recipe, start, sources, config.vocab_size).for_captions()


def _streams(
    recipe: AlbefRecipe, sources: Sources, config: AlbefConfig, tokenizer: Tokenizer, train: bool
) -> list[Stream]:
    data = recipe.data
    changes = RandomAugment(data.random_changes) if data.random_changes else None
    share = data.mask_probability if train else HELD_OUT_MASKED
    views = data.views(config.image_size)
    return make_pairs(data, sources, views, config.patch_size, tokenizer, train, share, data.whole_words, changes)


def queue_rows(asked: int | None, num_pairs: int, notes: list[str]) -> int:
    """Rows of each queue. notes: gets a sentence where a row is likely to meet itself in it."""
    most = num_pairs // SHARE_IN_QUEUE
    if asked is None:
        return min(PUBLISHED_QUEUE, most)
    if asked > most:
        notes.append(
            f"a queue of {asked:,} is more than a quarter of the {num_pairs:,} pairs: rows meet themselves in it, and"
            f" are left out of their own loss or taken for false; --objectives.queue {most} is enough"
        )
    return asked


def _check(config: AlbefConfig, recipe: AlbefRecipe) -> None:
    """Raises TriviumError where shapes do not go together."""
    check_shapes(recipe.data, config.image_size, config.patch_size, config.max_length)
    limits.check_heads(config.width, config.num_heads)
    check_pools(recipe)


def check_pools(recipe: Any) -> None:
    """Raises TriviumError where ITM would have no negatives, in a micro-batch of one pair, or where a micro-batch would
    cut a pool in two: they would come from fewer pairs there. recipe: of pretraining, retrieval or grounding."""
    rows, pool = recipe.rows_at_once, recipe.objectives.pool
    if not recipe.objectives.itm:
        return
    if rows < 2:
        raise TriviumError(
            "a micro-batch of one pair holds no false one for ITM: choose --train.micro-batch, and --data.batch, as 2"
            " or more, or --objectives.itm 0"
        )
    if rows > pool and rows % pool:
        raise TriviumError(
            f"micro-batches of {rows} pairs cut pools of {pool} in two: choose --train.micro-batch as a multiple of"
            f" {pool}, at most {pool}, or another --objectives.pool"
        )
