"""Recipes by name: functions that return a whole run as a tree of dataclasses (see train/config.py)."""

from __future__ import annotations

from trivium.recipes.clip import clip
from trivium.recipes.dino import dino
from trivium.recipes.finetune import finetune
from trivium.recipes.flava import flava
from trivium.train.config import Recipe

RECIPES: dict[str, Recipe] = {"flava": flava, "clip": clip, "dino": dino, "finetune": finetune}
