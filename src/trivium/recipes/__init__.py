"""Recipes by name: functions that return a whole run as a tree of dataclasses (see train/config.py)."""

from __future__ import annotations

from trivium.recipes.dino import dino
from trivium.recipes.flava import flava

RECIPES = {"dino": dino, "flava": flava}
