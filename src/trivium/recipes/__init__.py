"""Recipes by name: functions that return a whole run as a tree of dataclasses (see train/config.py)."""

from __future__ import annotations

from trivium.recipes.albef import albef
from trivium.recipes.clip import clip
from trivium.recipes.dino import dino
from trivium.recipes.dvae import dvae
from trivium.recipes.finetune import finetune
from trivium.recipes.flava import flava
from trivium.recipes.stages import flava_stages
from trivium.recipes.unimodal import mim, mlm
from trivium.recipes.unit import unit
from trivium.train.config import Recipe

RECIPES: dict[str, Recipe] = {
    "flava": flava,
    "flava-stages": flava_stages,
    "mlm": mlm,
    "mim": mim,
    "clip": clip,
    "dino": dino,
    "albef": albef,
    "dvae": dvae,
    "unit": unit,
    "finetune": finetune,
}
