"""FLAVA's three stages as one recipe (Singh et al. 2022, section 3.4 and supplement B.1).

    text     its text encoder alone, by masked words
    image    its image encoder alone, by DINO, by masked patches (BEiT), or by one after the other
    joint    all losses on pairs, pictures and texts; both encoders start as trained, the multimodal one at random

Each stage is a run of its own, in a folder of its own, made by a recipe that could be called alone. This file only says
what each of them is given; what is shared, the model's shape and the data, is stated once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from trivium.data.crops import MultiCrop
from trivium.errors import TriviumError
from trivium.methods.dino import Distillation
from trivium.methods.flava import LOSSES
from trivium.models.dino import DinoConfig
from trivium.recipes.dino import DinoRecipe, Pictures, dino
from trivium.recipes.dino import Objectives as DinoObjectives
from trivium.recipes.flava import FlavaRecipe, flava
from trivium.recipes.unimodal import NOTHING, mim, mlm
from trivium.train.optim import Optim
from trivium.train.run import Train

WAYS = (("dino",), ("mim",), ("dino", "mim"))  # to train the image encoder
JOINT = "joint"  # the last stage, and the folder that holds what all of it was for


@dataclass(frozen=True)
class Stage:
    """What a stage has of its own."""

    batch: int
    optim: Optim
    train: Train

    def of(self, recipe: FlavaRecipe) -> FlavaRecipe:
        """A recipe on the data and the model of `recipe`, as this stage runs it."""
        own = {name: getattr(self, name) for name in _names(Stage)[1:]}
        data = {name: getattr(self, name) for name in _names(type(self)) if name not in own}
        plain = {name: getattr(recipe, name) for name in _names(FlavaRecipe)}
        return FlavaRecipe(**plain | own | {"data": replace(recipe.data, **data)})


@dataclass(frozen=True)
class TextStage(Stage):
    max_length: int  # tokens of a text

    def of(self, recipe: FlavaRecipe) -> FlavaRecipe:
        stage = super().of(recipe)
        return replace(stage, data=replace(stage.data, text_length=None))


@dataclass(frozen=True)
class DinoStage:
    """The tower is FLAVA's image encoder; what is DINO's alone stands here."""

    batch: int
    optim: Optim
    train: Train
    crops: MultiCrop
    distillation: Distillation
    objectives: DinoObjectives
    head_width: int
    bottleneck_width: int
    num_prototypes: int  # outputs of the head
    fixed_gain: bool  # False learns better at S/16 and is less stable
    drop_path: float  # stochastic depth of the student
    init_std: float

    def of(self, recipe: FlavaRecipe) -> DinoRecipe:
        """DINO on the pictures of `recipe`, with its image encoder as the tower."""
        flava, data = recipe.model, recipe.data
        model = DinoConfig(
            flava.width, flava.num_heads, flava.mlp_width, flava.image_layers, flava.image_size, flava.patch_size,
            flava.eps, flava.dropout, self.drop_path, head_width=self.head_width,
            bottleneck_width=self.bottleneck_width, num_prototypes=self.num_prototypes, fixed_gain=self.fixed_gain,
        )  # fmt: skip
        pictures = Pictures(data.images or data.pairs, data.image_column, self.batch, data.cache_megabytes)
        return DinoRecipe(
            model, self.crops, self.distillation, self.objectives, pictures, self.optim, self.train,
            init_std=self.init_std,
        )  # fmt: skip


@dataclass(frozen=True)
class MimStage(Stage):
    crop_scale: tuple[float, float]  # share of the area that a random crop shows
    flip: float  # probability of a mirrored picture
    color_jitter: float  # strength of random changes of colour


def _names(kind: type[Any]) -> list[str]:
    return [each.name for each in fields(kind)]


def _stage(kind: type[Any], recipe: FlavaRecipe | DinoRecipe) -> Any:
    """What a stage has of its own, as the recipe of that stage alone has it."""
    places = (recipe, recipe.data, recipe.model)
    return kind(**{name: next(getattr(at, name) for at in places if hasattr(at, name)) for name in _names(kind)})


@dataclass(frozen=True)
class Stages(FlavaRecipe):
    """The joint stage, and those before it. The flags of the joint stage are those of `flava`."""

    image_by: tuple[Literal["dino", "mim"], ...] = ("dino",)  # how the image encoder is trained, in this order
    text: TextStage = field(default_factory=lambda: _stage(TextStage, mlm()))
    dino: DinoStage = field(default_factory=lambda: _stage(DinoStage, dino()))
    mim: MimStage = field(default_factory=lambda: _stage(MimStage, mim()))

    def prepare(self, name: str, arguments: dict[str, Any], resume_from: Path | None = None) -> Any:
        raise AssertionError("a staged run is prepared stage by stage: see `plan`")

    def plan(self, out: Path) -> list[Planned]:
        """The stages in order, each with what it starts from. `out`: the folder that theirs lie in.

        Raises:
            TriviumError: no such way to train the image encoder, or a start that a stage would overwrite.
        """
        if self.image_by not in WAYS:
            raise TriviumError(f"--image-by {' '.join(self.image_by)}: choose dino, mim, or dino mim, in this order")
        if not (self.data.is_embedded or self.data.images or self.data.pairs):
            raise TriviumError("there is no picture for the image encoder: give --data.images or --data.pairs")
        if self.data.codes is not None and "mim" in self.image_by and self._crops() != self._crops(self.mim):
            scale, flip = self._crops()
            raise TriviumError(
                "--data.codes holds the codes of one kind of crop, and the stage mim cuts pictures in another way than"
                f" the joint stage: set --mim.crop-scale {' '.join(map(str, scale))} --mim.flip {flip}, or leave out"
                " --data.codes"
            )
        if self.init or self.init_text or self.init_image:
            raise TriviumError(
                "the stages start their towers themselves: leave out --init, --init-text and --init-image, or train the"
                " joint stage alone with `trivium pretrain flava`"
            )

        def one_loss(recipe: FlavaRecipe, loss: str) -> FlavaRecipe:
            weights: dict[str, Any] = {name: float(name == loss) for name in LOSSES}
            return replace(recipe, objectives=replace(recipe.objectives, **weights))

        stages = [Planned("text", "mlm", one_loss(self.text.of(self), "mlm"))]
        before: str | None = None
        for name in self.image_by:
            recipe: FlavaRecipe | DinoRecipe
            if name == "mim":
                recipe = replace(self.mim.of(self), objectives=replace(NOTHING, mim=1.0), init_image=before)
            else:
                recipe = self.dino.of(self)
            stages.append(Planned(name, name, recipe))
            before = str(out / name)
        joint = Stage(self.data.batch, self.optim, self.train).of(self)
        joint = replace(joint, init_text=str(out / "text"), init_image=before)
        return [*stages, Planned(JOINT, "flava", joint)]

    def _crops(self, of: MimStage | None = None) -> tuple[tuple[float, float], float]:
        """What decides which part of a picture is seen; of the joint stage by default."""
        where = of or self.data
        return tuple(where.crop_scale), where.flip  # type: ignore[return-value]

    def in_own_flags(self, stage: str, sentence: str) -> str:
        """A sentence about the recipe of a stage, with its flags as they are called here: --text.batch, where the
        recipe alone has --data.batch."""
        if stage == JOINT:
            return sentence
        kind = type(getattr(self, stage))
        own = {name.replace("_", "-") for name in _names(kind)}
        folded = ("data", "model") if kind is DinoStage else ("data",)  # whose fields stand here without their branch

        def renamed(flag: re.Match[str]) -> str:
            parts = flag[1].split(".")
            inner = parts[1:] if parts[0] in folded else parts
            return "--" + ".".join([stage, *inner]) if inner and inner[0] in own else flag[0]

        return re.sub(r"--([a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*)", renamed, sentence)


@dataclass(frozen=True)
class Planned:
    """One stage."""

    name: str  # of its folder
    recipe_name: str  # by which config.json knows it
    recipe: FlavaRecipe | DinoRecipe


def flava_stages(size: str = "tiny") -> Stages:
    """FLAVA in its three stages. size: as of flava."""
    joint = flava(size)
    given = {name: getattr(joint, name) for name in _names(FlavaRecipe)}
    by_dino = _stage(DinoStage, dino(size))
    return Stages(**given, text=_stage(TextStage, mlm(size)), dino=by_dino, mim=_stage(MimStage, mim(size)))


def remaining(stages: Sequence[Planned], out: Path) -> list[Planned]:
    """Those that are not done: a run writes its page last."""
    return [stage for stage in stages if not (out / stage.name / "report.html").is_file()]
