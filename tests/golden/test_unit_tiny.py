"""Thirty-six steps of a tiny UniT in float64, of three tasks in turn: every loss stays on its stored curve.

As test_flava_tiny.py: `--regenerate-golden` stores new ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.golden.stored import fall, hold
from trivium.invariance import split
from trivium.invariance.unit import make_batch, random_unit, unit_method
from trivium.train.protocol import Key
from trivium.train.step import step

CURVES = Path(__file__).with_name("unit_tiny.json")
TASKS, STEPS = ("vg", "vqav2", "qnli"), 36


def curves() -> dict[str, list[float]]:
    """One batch of each task, in two micro-batches."""
    method = unit_method(random_unit())
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.05)
    batches = {task: split(make_batch(task, 8), 4) for task in TASKS}
    found: dict[str, list[float]] = {}
    for number in range(STEPS):
        task = TASKS[number % len(TASKS)]
        result = step(method, batches[task], Key(0, task, number), optimizer, clip="global")
        assert result.accepted
        for name, value in result.losses.items():
            found.setdefault(name, []).append(round(value, 6))
    return found


def test_every_loss_stays_on_its_curve(request: pytest.FixtureRequest) -> None:
    hold(curves(), CURVES, request)


def test_the_stored_curves_fall() -> None:
    stored = json.loads(CURVES.read_text())
    assert set(stored) == {"vg.class", "vg.box", "vg.giou", "vg.attributes", "vqav2", "qnli"}
    for name, values in stored.items():
        assert fall(values) > 0, name
