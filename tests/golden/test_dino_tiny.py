"""Twenty steps of a tiny DINO in float32 on generated crops: every loss stays on its stored curve.

As for FLAVA (test_flava_tiny.py): `pytest tests/golden --regenerate-golden` stores new curves, whose diff is read
before it is committed. The tolerance is 1e-3: processors round differently.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.dino_batches import split
from tests.golden.stored import hold
from tests.golden.test_flava_tiny import draws
from trivium.methods.dino import LOSSES, DinoMethod, Distillation
from trivium.methods.pixels import Pixels
from trivium.models.dino import Dino, DinoConfig
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Images, Key
from trivium.train.step import step

CURVES = Path(__file__).with_name("dino_tiny.json")
STEPS, ROWS, COLOURS = 20, 16, 8
SIZE = replace(DinoConfig.of_size("tiny", patch_size=16, num_prototypes=256), mask_token=True)


def generated(number: int) -> Batch:
    """Crops of pictures of one colour, with some noise of their own; local ones at half the size."""
    colour_B = (draws("crops", number, "colour", ROWS) * COLOURS).long()
    shade_BC = draws("crops", 0, "shades", COLOURS, 3)[colour_B]
    images = []
    for crop, size in enumerate([64, 64, 32, 32]):
        noise_BCHW = draws("crops", number, f"noise {crop}", ROWS, 3, size, size) - 0.5
        pixels_BCHW = ((shade_BC[:, :, None, None] + 0.3 * noise_BCHW).clamp(0, 1) * 255).to(torch.uint8)
        images.append(Images(pixels_BCHW, same_B=colour_B))
    masks = draws("crops", number, "patches", ROWS, 2, SIZE.grid**2) < 0.3
    return Batch("crops", torch.arange(ROWS), torch.arange(ROWS), tuple(images), (), {"patch_mask": masks})


def curves() -> dict[str, list[float]]:
    """Four batches in turn, each in two micro-batches (the cached pass), all three losses on."""
    model = Dino(SIZE)
    initialise(model, seed=0, std=0.06)
    settings = Distillation(momentum=0.9, first_teacher_temperature=0.04, teacher_temperature=0.07)
    method = DinoMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), settings, STEPS, {"koleo": 0.1, "ibot": 1.0})
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.04)
    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (number + 1) / 10)
        result = step(method, split(generated(number % 4), 2), Key(0, "crops", number), optimizer, clip="global")
        assert result.accepted
        for name, value in result.losses.items():
            found[name].append(round(value, 6))
    return found


def test_every_loss_stays_on_its_curve(request: pytest.FixtureRequest) -> None:
    found = curves()
    assert set(found) == set(LOSSES)
    hold(found, CURVES, request)


def test_the_stored_curves_are_of_a_model_that_learns() -> None:
    stored = json.loads(CURVES.read_text())
    for name in ("crops", "ibot"):
        assert stored[name][-1] < stored[name][0], name
