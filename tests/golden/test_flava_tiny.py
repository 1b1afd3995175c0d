"""Twenty steps of a tiny FLAVA in float32 on generated pictures and captions: every loss stays on its stored curve.

A change that means to move the curves says so and stores new ones:

    pytest tests/golden --regenerate-golden

then reads `git diff tests/golden` before it commits them. The tolerance is 1e-3: processors round differently.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.flava_batches import split
from tests.golden.stored import fall, hold
from trivium.methods.flava import LOSSES, FlavaMethod, Pixels
from trivium.models.flava import Flava, FlavaConfig
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Images, Key, Texts, uniform64
from trivium.train.step import step

CURVES = Path(__file__).with_name("flava_tiny.json")
STEPS, ROWS, LENGTH, COLOURS = 20, 16, 10, 8
SIZE = FlavaConfig.of_size("tiny", vocab_size=256, num_codes=64)
SHALLOW = replace(SIZE, image_layers=2, text_layers=2, multimodal_layers=1)
MIXTURE = ("pairs", "images", "pairs", "text")
CONTRASTIVE: dict[str, dict[str, Any]] = {
    "contrastive, sigmoid": {"contrastive_form": "sigmoid"},
    "contrastive, local_gradient": {"contrastive_scope": "local_gradient", "num_ranks": 4},
}


def draws(stream: str, number: int, name: str, *shape: int) -> torch.Tensor:
    """Uniform numbers that no release of any library changes."""
    place = Key(0, f"golden/{stream}/{name}", number)
    return place.uniform("draw", torch.arange(math.prod(shape)).view(*shape))


def generated(stream: str, number: int) -> Batch:
    """Pictures of one colour with some noise; captions that name the colour; codes that follow from the pixels."""
    colour_B = (draws(stream, number, "colour", ROWS) * COLOURS).long()
    targets, images, texts = {}, (), ()
    grid = SIZE.grid
    if stream != "text":
        shade_BC = torch.from_numpy(uniform64(7, np.arange(COLOURS * 3))).view(COLOURS, 3)[colour_B]
        noise_BCHW = draws(stream, number, "noise", ROWS, 3, 64, 64) - 0.5
        pixels_BCHW = ((shade_BC[:, :, None, None] + 0.2 * noise_BCHW).clamp(0, 1) * 255).to(torch.uint8)
        images = (Images(pixels_BCHW, same_B=colour_B),)
        targets["image_mask"] = draws(stream, number, "patches", ROWS, grid**2) < 0.4
        targets["codes"] = (colour_B * 8)[:, None] + (draws(stream, number, "codes", ROWS, grid**2) * 2).long()
    if stream != "images":
        ids_BT = 10 + (draws(stream, number, "words", ROWS, LENGTH) * 100).long()
        ids_BT[:, 0], ids_BT[:, 2] = 2, 200 + colour_B
        lengths_B = 4 + (draws(stream, number, "lengths", ROWS) * (LENGTH - 3)).long()
        mask_BT = torch.arange(LENGTH) < lengths_B[:, None]
        ids_BT = ids_BT.masked_fill(~mask_BT, 0)
        selected_BT = (draws(stream, number, "tokens", ROWS, LENGTH) < 0.3) & mask_BT
        targets |= {"selected": selected_BT, "masked_ids": ids_BT.masked_fill(selected_BT, 4)}
        texts = (Texts(ids_BT, mask_BT, same_B=colour_B.clone()),)
    if stream == "pairs":
        false_B = draws(stream, number, "false", ROWS) < 0.25
        texts[0].ids_BT[false_B] = texts[0].ids_BT[false_B].roll(1, 0)
        texts[0].mask_BT[false_B] = texts[0].mask_BT[false_B].roll(1, 0)
        for name in ("selected", "masked_ids"):
            targets[name][false_B] = targets[name][false_B].roll(1, 0)
        texts[0].same_B[false_B] = texts[0].same_B[false_B].roll(1, 0)
        targets["matched"] = ~false_B
    return Batch(stream, torch.arange(ROWS), torch.arange(ROWS), images, texts, targets)


def trained(method: FlavaMethod, *streams: str) -> dict[str, list[float]]:
    """A batch of each of these streams in turn, each in two micro-batches (the cached pass)."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)
    found: dict[str, list[float]] = {}
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(
            1.0, (number + 1) / 10
        )  # without a warm-up the first steps throw it
        place = number % len(streams)
        batches = split(generated(streams[place], place), 2)
        result = step(method, batches, Key(0, streams[place], number), optimizer, clip="global")
        assert result.accepted
        for name, value in result.losses.items():
            found.setdefault(name, []).append(round(value, 6))
    return found


def flava_method(size: FlavaConfig = SIZE, std: float = 0.02, **options: Any) -> FlavaMethod:
    """At the start of a run. options: of FlavaMethod."""
    model = Flava(size)
    initialise(model, seed=0, std=std)
    return FlavaMethod(model, None, Pixels((0.5,) * 3, (0.25,) * 3), **options)


def curves(dtype: torch.dtype = torch.float32) -> dict[str, list[float]]:
    """All losses, and the contrastive one alone in its other form and with its other gradient."""
    found = trained(flava_method().to(dtype), *MIXTURE)
    assert set(found) == set(LOSSES)
    for name, options in CONTRASTIVE.items():
        method = flava_method(SHALLOW, 0.09, weights=dict.fromkeys(LOSSES, 0.0) | {"contrastive": 1.0}, **options)
        found[name] = trained(method.to(dtype), "pairs", "pairs")["contrastive"]
    return found


def test_every_loss_stays_on_its_curve(request: pytest.FixtureRequest) -> None:
    hold(curves(), CURVES, request)


def test_the_stored_curves_fall() -> None:
    """What is stored is a model that learns its batches."""
    for name, values in json.loads(CURVES.read_text()).items():
        assert fall(values) > 0, name
