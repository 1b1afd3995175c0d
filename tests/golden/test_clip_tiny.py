"""Twenty steps of a tiny CLIP on generated pairs: the loss of each scope and form stays on its stored curve.

In float64: in float32 what two processors round differently has grown to 6e-3 within these steps. See
test_flava_tiny.py for how curves are stored anew.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.golden.stored import fall, hold
from tests.golden.test_flava_tiny import LENGTH, ROWS, STEPS, generated
from trivium.invariance import split
from trivium.methods.clip import ClipMethod
from trivium.methods.pixels import Pixels
from trivium.models.clip import Clip, ClipConfig
from trivium.objectives.contrastive import Scope
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Key
from trivium.train.step import step

CURVES = Path(__file__).with_name("clip_tiny.json")
SCOPES: tuple[Scope, ...] = ("global", "local_gradient", "local")
SIZE = ClipConfig.of_size("tiny", vocab_size=256, end_id=3)
SHALLOW = replace(SIZE, image_layers=2, text_layers=2)


def pairs(number: int) -> Batch:
    """FLAVA's, with an end token to pool at. False ones are among them: they have no loss and stay as columns."""
    batch = generated("pairs", number)
    text, end_B = batch.texts[0], batch.texts[0].mask_BT.sum(1) - 1
    text.ids_BT[torch.arange(ROWS), end_B] = SIZE.end_id
    assert int(end_B.max()) < LENGTH
    return batch


def curve(size: ClipConfig, scope: Scope, form: Literal["softmax", "sigmoid"]) -> list[float]:
    """Two batches in turn, each in two micro-batches (the cached pass)."""
    model = Clip(size)
    initialise(model, seed=0)
    num_ranks = 1 if scope == "global" else 4
    method = ClipMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), scope, num_ranks, form).double()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)
    found = []
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (number + 1) / 10)
        result = step(method, split(pairs(number % 2), 2), Key(0, "pairs", number), optimizer, clip="global")
        assert result.accepted
        found.append(round(result.losses["contrastive"], 6))
    return found


def test_the_loss_stays_on_its_curve(request: pytest.FixtureRequest) -> None:
    found = {scope: curve(SIZE, scope, "softmax") for scope in SCOPES}
    hold(found | {"sigmoid": curve(SHALLOW, "global", "sigmoid")}, CURVES, request)


def test_the_stored_curves_fall_and_differ() -> None:
    stored = json.loads(CURVES.read_text())
    for name, values in stored.items():
        assert fall(values) > 0, name
    assert stored["global"][0] == pytest.approx(stored["local_gradient"][0], abs=1e-6)  # only the gradient differs
    assert abs(stored["global"][-1] - stored["local_gradient"][-1]) > 1e-3
    assert stored["local"][0] < stored["global"][0]
