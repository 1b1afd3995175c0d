"""Twenty steps of a tiny ALBEF in float32 on generated pictures and captions: every loss stays on its stored curve.

As test_flava_tiny.py, whose pairs these are: `--regenerate-golden` stores new ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.flava_batches import split
from tests.golden.stored import hold
from tests.golden.test_flava_tiny import ROWS, STEPS, generated
from trivium.methods.albef import LOSSES, AlbefMethod, Distillation
from trivium.methods.pixels import Pixels
from trivium.models.albef import Albef, AlbefConfig
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Key
from trivium.train.step import step

CURVES = Path(__file__).with_name("albef_tiny.json")


def pairs(number: int) -> Batch:
    """Those of FLAVA's curves that are true; a false one's caption becomes its own again by losing its picture."""
    batch = generated("pairs", number)
    true_B = batch.targets["matched"]
    same_B = torch.where(true_B, batch.images[0].same_B, 100 + torch.arange(ROWS))
    batch.images[0].same_B, batch.texts[0].same_B = same_B, same_B.clone()
    batch.targets["matched"] = torch.ones_like(true_B)
    return batch


def curves() -> dict[str, list[float]]:
    """Four batches in turn, each in two micro-batches (the cached pass) of one pool."""
    model = Albef(AlbefConfig.of_size("tiny", vocab_size=256))
    initialise(model, seed=0, std=0.09)
    method = AlbefMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), Distillation(ramp=0.5, reach=0.2), STEPS, 4, queue=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (number + 1) / 10)
        result = step(method, split(pairs(number % 4), 2), Key(0, "pairs", number), optimizer, clip="global")
        assert result.accepted
        for name, value in result.losses.items():
            found[name].append(round(value, 6))
    return found


def test_every_loss_stays_on_its_curve(request: pytest.FixtureRequest) -> None:
    found = curves()
    assert set(found) == set(LOSSES)
    hold(found, CURVES, request)


def test_the_stored_curves_fall() -> None:
    """What is stored is a model that learns its four batches."""
    for name, values in json.loads(CURVES.read_text()).items():
        assert sum(values[-4:]) < sum(values[:4]), name
