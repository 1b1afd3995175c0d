"""Twenty steps of a tiny dVAE in float32 on generated pictures: both terms stay on their stored curves.

A change that means to move the curves says so and stores new ones, as in test_flava_tiny.py. The tolerance is 1e-3, of
values of about one: processors round differently.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.flava_batches import split
from tests.golden.stored import hold
from trivium.invariance import dvae
from trivium.methods.dvae import LOSSES, Annealing, DVaeMethod
from trivium.models.dvae import DVae
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Images, Key
from trivium.train.step import step

CURVES = Path(__file__).with_name("dvae_tiny.json")
STEPS, ROWS, SIDE = 20, 16, 4
CONFIG = replace(dvae.TINY, width=16, num_codes=32)


def generated(number: int) -> Batch:
    """Four by four tiles of eight colours each, by numbers that no release of any library changes."""
    place = torch.arange(ROWS * 3 * SIDE**2).view(ROWS, 3, SIDE, SIDE)
    tiles = (Key(0, "golden/dvae", number).uniform("tile", place) * 2).floor() * 200 + 20
    pixels_BCHW = tiles.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)
    row_B = torch.arange(ROWS)
    return Batch("images", row_B, row_B.clone(), (Images(pixels_BCHW, row_B),))


def curves() -> dict[str, list[float]]:
    """Four batches in turn, each in two micro-batches, the weight of the KL and the temperature annealed on the way."""
    model = DVae(CONFIG)
    initialise(model, seed=0, std="fan in")
    method = DVaeMethod(model, Annealing(temperature_length=0.8, kl_length=0.5), STEPS, average=0.9)
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number in range(STEPS):
        result = step(method, split(generated(number % 4), 2), Key(0, "images", number), optimizer, clip="global")
        assert result.accepted
        for name, value in result.losses.items():
            found[name].append(round(value, 6))
    return found


def test_both_terms_stay_on_their_curves(request: pytest.FixtureRequest) -> None:
    found = curves()
    assert set(found) == set(LOSSES)
    hold(found, CURVES, request)


def test_the_stored_curves_are_those_of_a_model_that_learns() -> None:
    """Pictures become likelier, and codes tell more than nothing."""
    stored = json.loads(CURVES.read_text())
    assert stored["likelihood"][-1] < stored["likelihood"][0]
    assert max(stored["kl"]) > 0.01
