"""Twenty steps of a tiny dVAE in float32 on generated pictures: both terms stay on their stored curves, trained as
published and as the tiny recipe does.

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
from tests.golden.stored import fall, hold
from trivium.invariance import dvae
from trivium.methods import dvae as module
from trivium.methods.dvae import LOSSES, Annealing, DVaeMethod
from trivium.models.dvae import DVae
from trivium.recipes.dvae import dvae as recipe
from trivium.recipes.dvae import spread
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


def curves(method: DVaeMethod, lr: float, dtype: torch.dtype = torch.float32) -> dict[str, list[float]]:
    """Four batches in turn, each in two micro-batches, the weight of the KL and the temperature annealed on the way."""
    method = method.to(dtype)
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4)
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number in range(STEPS):
        result = step(method, split(generated(number % 4), 2), Key(0, "images", number), optimizer, clip="global")
        assert result.accepted
        for name, value in result.losses.items():
            found[name].append(round(value, 6))
    return found


def drawn() -> DVae:
    model = DVae(CONFIG)
    initialise(model, seed=0, std="fan in")
    return model


def published() -> DVaeMethod:
    return DVaeMethod(drawn(), Annealing(temperature_length=0.8, kl_length=0.5), STEPS, average=0.9)


def as_the_tiny_recipe() -> DVaeMethod:
    """Every code in use at the start, a falling weight of the KL, log-scales held, unused codes given away once.

    The beginning of a run, at a lower rate: at the temperature of its end, and after many splittings, the last digits,
    in which processors differ, grow tenfold a step.
    """
    tiny, model = recipe("tiny"), drawn()
    assert tiny.logit_deviation is not None and tiny.annealing.start_kl_weight > tiny.annealing.kl_weight
    spread(model, [generated(number).images[0].pixels_BCHW for number in range(4)], tiny.logit_deviation)
    return DVaeMethod(model, tiny.annealing, 5 * STEPS, tiny.average, tiny.least_log_scale, split_every=7)


def test_both_terms_stay_on_their_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    split_now, num_split = module.split_codes, []
    monkeypatch.setattr(module, "split_codes", lambda *given: num_split.append(split_now(*given)))
    found = curves(published(), lr=3e-3)
    assert set(found) == set(LOSSES) and not num_split
    found |= {f"{name}, as tiny": values for name, values in curves(as_the_tiny_recipe(), lr=2e-3).items()}
    assert any(num_split)
    hold(found, CURVES, request)


def test_the_stored_curves_are_those_of_a_model_that_learns() -> None:
    """Pictures become likelier, and codes tell more than nothing."""
    stored = json.loads(CURVES.read_text())
    for way in ("", ", as tiny"):
        assert fall(stored[f"likelihood{way}"]) > 0, way
        assert max(stored[f"kl{way}"]) > 0.01, way
