"""Recipes by name: functions that return a whole run as a tree of dataclasses (see train/config.py)."""

from __future__ import annotations

from trivium.recipes.clip import clip
from trivium.recipes.dino import dino
from trivium.recipes.flava import flava

RECIPES = {"flava": flava, "clip": clip, "dino": dino}
