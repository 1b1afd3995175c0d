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
from tests.golden.stored import fall, hold
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
SHALLOW = replace(SIZE, num_layers=2)


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


def curve(method: DinoMethod, lr: float = 1e-3) -> dict[str, list[float]]:
    """Four batches in turn, each in two micro-batches (the cached pass)."""
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.04)
    found: dict[str, list[float]] = {name: [] for name, weight in method.weights.items() if weight}
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (number + 1) / 10)
        result = step(method, split(generated(number % 4), 2), Key(0, "crops", number), optimizer, clip="global")
        assert result.accepted
        for name in found:
            found[name].append(round(result.losses[name], 6))
    return found


def dino_method(size: DinoConfig, settings: Distillation, weights: dict[str, float]) -> DinoMethod:
    model = Dino(size)
    initialise(model, seed=0, std=0.06)
    return DinoMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), settings, STEPS, weights)


def curves() -> dict[str, list[float]]:
    """All three losses at once; the crops' under Sinkhorn; and iBOT's alone, at a rate at which it falls step by step,
    after a teacher that hardly moves: it is asked what the others do not teach it on the way."""
    changing = Distillation(momentum=0.9, first_teacher_temperature=0.04, teacher_temperature=0.07)
    still = Distillation(momentum=0.996, first_teacher_temperature=0.07, teacher_temperature=0.07)
    found = curve(dino_method(SIZE, changing, {"koleo": 0.1, "ibot": 1.0}))
    assert set(found) == set(LOSSES)
    sinkhorn = curve(dino_method(SHALLOW, replace(changing, centring="sinkhorn"), {}))
    alone = curve(dino_method(SHALLOW, still, {"crops": 0.0, "ibot": 1.0}), lr=1e-4)
    return found | {"crops, sinkhorn": sinkhorn["crops"], "ibot alone": alone["ibot"]}


def test_every_loss_stays_on_its_curve(request: pytest.FixtureRequest) -> None:
    hold(curves(), CURVES, request)


def test_the_stored_curves_are_of_a_model_that_learns() -> None:
    stored = json.loads(CURVES.read_text())
    for name, values in stored.items():
        assert fall(values) > 0, name
    by_fours = [sum(stored["ibot alone"][start : start + 4]) for start in range(0, STEPS, 4)]
    assert by_fours == sorted(by_fours, reverse=True)  # not in its first steps alone
