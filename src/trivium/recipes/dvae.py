"""The image tokenizer of DALL-E as a recipe: codes that FLAVA's masked patches can be asked for.

    trivium pretrain dvae --size tiny --out runs/dvae
    trivium pretrain flava --data.image-tokenizer runs/dvae

What a run keeps is an image tokenizer and no model: `trivium.load.load_image_tokenizer` opens it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from trivium.data import embedded
from trivium.data.collate import ImageCollate, ImageInput
from trivium.data.loader import StreamReader, evaluation_batches
from trivium.data.sources import Concat, open_source
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.evaluate import image_tokenizer
from trivium.evaluate.embedded import Evaluation
from trivium.load import load_image_tokenizer, save_image_tokenizer
from trivium.methods.dvae import Annealing, DVaeMethod
from trivium.models.dvae import DVae, DVaeConfig, map_pixels
from trivium.recipes import limits, validation
from trivium.recipes.data import Inputs, Sources, absolute
from trivium.recipes.dino import Pictures as PlainPictures
from trivium.recipes.notices import noticed
from trivium.recipes.prepared import Losses, Prepared, Recipe, mixtures
from trivium.recipes.validation import Validation
from trivium.train import distributed
from trivium.train.config import Config, leaves
from trivium.train.initial import initialise
from trivium.train.optim import Optim
from trivium.train.protocol import Method, Source, Stream
from trivium.train.run import Run, Train

PICTURES_FOR_MEAN = 10_000
PICTURES_FOR_SPREAD = 128
SIZES = {
    "tiny": DVaeConfig(width=16, num_groups=3, blocks_per_group=1, num_codes=512, code_width=64, decoder=True),
    "small": DVaeConfig(width=64, num_codes=2048, decoder=True),
    "base": DVaeConfig(decoder=True),
}


@dataclass(frozen=True)
class Pictures(PlainPictures):
    """The same, some of them held out, and what is done to each."""

    validation: tuple[str, ...] = ()  # pictures that are never trained on
    batch: int = 64  # pictures of one step, over all processes
    image_size: int = 64  # side of the pictures in pixels, a multiple of the stride
    crop_scale: tuple[float, float] = (0.44, 0.79)  # share of a random square of the shorter side, as published
    flip: float = 0.5  # probability of a mirrored picture
    scaled_decode: bool = False  # decode large JPEGs at a fraction of their size: faster, not quite the same pixels

    def with_absolute_paths(self) -> Self:
        return replace(super().with_absolute_paths(), validation=tuple(map(absolute, self.validation)))


@dataclass(frozen=True)
class DVaeRecipe(Recipe):
    """Everything that a run of the dVAE is."""

    model: DVaeConfig
    annealing: Annealing = field(default_factory=Annealing)
    data: Pictures = field(default_factory=Pictures)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    init: str | None = None  # an image tokenizer with a decoder to start from: of ours, or DALL-E's files
    average: float = 0.999  # momentum of the average of the weights, which is what is kept
    least_log_scale: float | None = None  # floor of the decoder's log-scales (see methods/dvae.py); None: as published
    logit_deviation: float | None = None  # of each code's logits at the start (see `spread`); None: as drawn, published
    split_every: int = 0  # steps between splittings of frequent codes for unused ones (methods/dvae.py); 0: published
    validate: int = 4096  # held-out pictures that losses are measured on, up to 8 times each; 0: none

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> PreparedDVae:
        """Open the data, build model and method.

        Args:
            name, arguments: of the recipe, as config.json is to state them.
            resume_from: the model folder of a checkpoint that was checked, whose average is what is measured; to go
                on, the trainer restores the weights that are trained.
        """
        return _prepare(self, name, arguments, resume_from)

    def inputs(self) -> Inputs:
        """See `HasInputs`."""
        limits.check(leaves(self))
        _check(self)
        start = _open_start(self.init)
        train, held_out = open_sources(self.data)
        stream, whole = _reading(self.data, train, (self.model if start is None else start.config).stride)
        seen = [] if held_out is None else [replace(stream, source=held_out, collate=whole)]
        return Inputs(Sources(None, train, None, held_out, held_out, None), [stream], seen)


def dvae(size: str = "tiny") -> DVaeRecipe:
    """DALL-E's discrete VAE (Ramesh et al. 2021). size: "tiny" for the embedded drawings and a laptop, "small", or
    "base", the published one."""
    if size not in SIZES:
        raise TriviumError(f"there is no dVAE of size {size}: use one of {', '.join(SIZES)}")
    if size == "tiny":  # everything that a run of minutes needs to use its codes; none of it is published
        return DVaeRecipe(
            SIZES[size],
            Annealing(temperature_length=0.5, start_kl_weight=3.0, kl_weight=0.7, kl_length=0.5),
            Pictures(batch=16, crop_scale=(0.6, 1.0)),
            Optim(lr=5e-3, betas=(0.9, 0.999), weight_decay=1e-4, warmup=0.05, final=0.0125),
            Train(steps=1000, save_every=500),
            average=0.99,
            least_log_scale=-2.5,
            logit_deviation=2.0,
            split_every=25,
        )
    published = Optim(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, warmup=0.0, final=0.0125, clip="none")
    data = Pictures(batch=512, image_size=256)
    if size == "small":
        return DVaeRecipe(
            SIZES[size],
            Annealing(temperature_length=0.5, kl_length=0.1),
            replace(data, batch=64, image_size=128),
            replace(published, lr=3e-4, warmup=0.01, clip="global"),
            Train(steps=50_000),
        )
    # Published are 3,000,000 updates of which the rate falls during 1,200,000; here it falls during all of them.
    return DVaeRecipe(SIZES[size], Annealing(), data, published, Train(steps=3_000_000, micro_batch=8))


@dataclass
class PreparedDVae(Prepared):
    """The run of a dVAE with its parts in memory."""

    recipe: DVaeRecipe
    validation: Validation
    mean_picture: Callable[[], Tensor]  # of training, in [0, 1]: what reconstruction is compared with

    def with_train(self, **changes: Any) -> Self:
        prepared = super().with_train(**changes)
        assert isinstance(self.run.method, DVaeMethod)
        self.run.method.num_steps = prepared.recipe.train.steps
        return prepared

    def measures(self, recipe: DVaeRecipe) -> Callable[[Method], dict[str, Any]]:
        return validation.measures(self.validation, recipe.train.seed, recipe.rows_at_once)

    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        recipe = self.recipe
        if not self.validation:
            missing = "--validate is 0" if not recipe.validate else "give --data.validation pictures not trained on"
            return Evaluation(not_applicable=[f"losses and reconstruction on held-out pictures: {missing}"]), {}
        if final is None:
            say("validation losses")
            final = validation.losses(self.run.method, self.validation, recipe.train.seed, recipe.rows_at_once)
        say("reconstruction of held-out pictures")
        tokenizer = self.run.method.exported()
        assert isinstance(tokenizer, DVae)
        pieces = validation.all_pieces(self.validation, recipe.rows_at_once)
        found = image_tokenizer.run(tokenizer, (batch.images[0].pixels_BCHW for batch in pieces), self.mean_picture())
        chance = {"likelihood": _constant_likelihood(self.validation), "kl": 0.0}
        return found, {name: (value, chance[name]) for name, value in final.items()}


def _prepare(recipe: DVaeRecipe, name: str, arguments: dict[str, Any], resume_from: Path | None) -> PreparedDVae:
    limits.check(leaves(recipe))
    _check(recipe)
    data, seed = recipe.data, recipe.train.seed
    start = _open_start(recipe.init if resume_from is None else str(resume_from))
    config = recipe.model if start is None else start.config
    model = DVae(config)
    initialise(model, seed, std="fan in")
    if start is not None:
        model.load_state_dict(start.state_dict())
    train, held_out = open_sources(data)
    stream, whole = _reading(data, train, config.stride)
    if start is None and recipe.logit_deviation is not None:
        reader = StreamReader(stream, seed)
        batches = [
            reader.micro_batch(number * data.batch, 0) for number in range(-(-PICTURES_FOR_SPREAD // data.batch))
        ]
        spread(model, [batch.images[0].pixels_BCHW for batch in batches], recipe.logit_deviation)

    method = DVaeMethod(
        model, recipe.annealing, recipe.train.steps, recipe.average, recipe.least_log_scale, recipe.split_every
    )

    held_out_batches: Validation = {}
    if held_out is not None and recipe.validate:
        rows = min(recipe.validate, len(held_out))  # once: nothing is drawn that a second look would vary
        held_out_batches["images"] = list(evaluation_batches(held_out, whole, data.batch, rows, "images"))
    notes = [f"validation: {bad}" for batch in held_out_batches.get("images", []) for bad in batch.bad]
    notes += noticed(Sources(None, train, None, held_out, held_out, None))
    if start is not None and start.config != recipe.model and resume_from is None:
        notes.append(f"the shape of the model is that of {recipe.init}, whatever --size and --model say")
    recipe = replace(recipe, model=config)
    mixture_of = mixtures(recipe, [stream])
    run = Run(
        method,
        mixture_of(recipe.train),
        recipe.optim,
        recipe.train,
        export=partial(save_image_tokenizer, method.average),
        config=Config(name, arguments, leaves(recipe)),
        evaluate=validation.measures(held_out_batches, seed, recipe.rows_at_once),
    )
    of_training = partial(mean_picture, train, whole)
    return PreparedDVae(recipe, run, None, mixture_of, name, arguments, notes, held_out_batches, of_training)


def _reading(data: Pictures, train: Source, stride: int) -> tuple[Stream, ImageCollate]:
    """The stream of training, and how held-out pictures are read: whole."""
    views = Views(
        data.image_size,
        crop_scale=data.crop_scale,
        crop_ratio=(1.0, 1.0),
        flip=data.flip,
        scaled_decode=data.scaled_decode,
    )
    image = ImageInput(views, stride)
    collate = ImageCollate(replace(image, cache_bytes=data.cache_megabytes << 20))
    return Stream("images", train, collate, data.batch, data.batch), ImageCollate(image, train=False)


def _open_start(path: str | None) -> DVae | None:
    """Raises TriviumError where nothing can be learned from what is there."""
    if path is None:
        return None
    start = load_image_tokenizer(path)
    if not isinstance(start, DVae):
        raise TriviumError(f"{path} holds an image tokenizer of another kind ({start.kind}): give a dVAE")
    if start.decoder is None:
        raise TriviumError(
            f"{path} holds the encoder of a dVAE alone, and it is trained through its decoder: give a folder with both,"
            " encoder.pkl and decoder.pkl"
        )
    return start


def _check(recipe: DVaeRecipe) -> None:
    """Raises TriviumError where shapes do not go together."""
    if not recipe.model.decoder:
        raise TriviumError("--model.decoder False: a dVAE is trained through its decoder, so leave it True")
    if recipe.train.shard and recipe.split_every:
        raise TriviumError("--train.shard and --split-every do not go together: set one of them to false or 0")
    if recipe.model.width < 4:
        raise TriviumError(f"--model.width {recipe.model.width}: a block has a quarter of it inside, so 4 or more")
    size, stride = recipe.data.image_size, recipe.model.stride
    if size % stride:
        near = max(stride, round(size / stride) * stride)
        raise TriviumError(
            f"a picture of {size} pixels cannot be cut into codes of {stride}: choose a multiple, such as"
            f" --data.image-size {near}"
        )


def open_sources(data: Pictures) -> tuple[Source, Source | None]:
    """Pictures to train on, and held-out ones. Raises TriviumError with the file and what to do."""
    train = data.open()
    if data.is_embedded:
        if data.validation:
            raise TriviumError("--data.validation holds pictures out of data of your own: give --data.images too")
        return train, Concat([embedded.pairs("val"), embedded.images("val")])
    if not data.validation:
        return train, None
    return train, open_source("images", data.validation, image_column=data.image_column)


@torch.no_grad()
def spread(model: DVae, pictures: Sequence[Tensor], deviation: float) -> None:
    """Start with every code in use: over some pictures (uint8) each code's logit gets mean 0 and the same deviation.

    As drawn, a few codes are the likeliest nearly everywhere; those that are never likely are never learned, and a
    short run does not win them back. A start from data, as Krähenbühl et al. (2016) make it. The first process's
    pictures count for all.
    """
    head = model.encoder.head
    bias_K = head.bias
    assert bias_K is not None

    def moved() -> list[Tensor]:
        logits_BKhw = torch.cat([model.logits(map_pixels(pixels_BCHW / 255)) for pixels_BCHW in pictures])
        deviation_K, mean_K = torch.std_mean(logits_BKhw, dim=(0, 2, 3))
        factor_K = deviation / deviation_K.clamp(min=1e-6)
        return [head.weight * factor_K[:, None, None, None], (bias_K - mean_K) * factor_K]

    for parameter, start in zip((head.weight, bias_K), distributed.from_first(moved), strict=True):
        parameter.copy_(start)


def mean_picture(source: Source, collate: ImageCollate) -> Tensor:
    """[3, H, W] in [0, 1], over as many pictures as are enough for a mean."""
    batches = evaluation_batches(source, collate, batch=256, samples=min(PICTURES_FOR_MEAN, len(source)), stream="mean")
    sums, num_pictures = torch.zeros(()), 0
    for batch in batches:
        sums = sums + batch.images[0].pixels_BCHW.float().sum(0)
        num_pictures += len(batch)
    return sums / num_pictures / 255


def _constant_likelihood(held_out: Validation) -> float:
    """The likelihood under one Laplace distribution for each channel, the best there is, whatever the picture."""
    pixels_C = torch.cat([batch.images[0].pixels_BCHW for batch in held_out["images"]]).transpose(0, 1).flatten(1)
    counts_CP = torch.stack([channel.bincount(minlength=256) for channel in pixels_C]).double()  # of each pixel value
    mapped_P = map_pixels(torch.arange(256, dtype=torch.float64) / 255)
    share_CP = counts_CP / counts_CP.sum(1, keepdim=True)
    median_C = torch.logit(mapped_P)[(share_CP.cumsum(1) >= 0.5).int().argmax(1)]
    scale_C = (share_CP * (torch.logit(mapped_P) - median_C[:, None]).abs()).sum(1)
    jacobian = (share_CP * (mapped_P * (1 - mapped_P)).log()).sum(1)
    return float(((2 * scale_C).log() + 1 + jacobian).mean())
