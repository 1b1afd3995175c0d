"""FLAVA's stages in float32, twenty steps each: words alone, patches alone, then all losses from both towers.

The batches and how curves are stored anew: test_flava_tiny.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.stored import fall, hold
from tests.golden.test_flava_tiny import MIXTURE, SHALLOW, flava_method, trained
from trivium.methods.flava import LOSSES
from trivium.models.towers import TEXT, image_from_vit, parts_of, vit_of

CURVES = Path(__file__).with_name("flava_stages_tiny.json")


def curves() -> dict[str, list[float]]:
    """By stage and loss."""
    text, image, joint = (flava_method(SHALLOW, 0.09) for _ in range(3))
    found = {"text": trained(text, "text", "text"), "mim": trained(image, "images", "images")}
    vit = vit_of(image.model)
    tower, said = image_from_vit(vit.state_dict(), vit.config, SHALLOW)
    assert not said
    taken = parts_of(text.model.state_dict(), TEXT) | parts_of(image.model.state_dict(), ("mim_head.",)) | tower
    joint.model.load_state_dict(taken, strict=False)
    found["joint"] = trained(joint, *MIXTURE)
    return {f"{stage}: {loss}": values for stage, losses in found.items() for loss, values in losses.items()}


def test_every_stage_stays_on_its_curves(request: pytest.FixtureRequest) -> None:
    found = curves()
    assert set(found) == {"text: mlm", "mim: mim", *(f"joint: {loss}" for loss in LOSSES)}
    hold(found, CURVES, request)


def test_the_stored_curves_fall_and_go_on_where_the_towers_were_left() -> None:
    stored = json.loads(CURVES.read_text())
    for name, values in stored.items():
        assert fall(values) > 0, name
    for stage, loss in (("text", "mlm"), ("mim", "mim")):  # each stage begins at a random start, the joint one does not
        assert stored[f"joint: {loss}"][0] < stored[f"{stage}: {loss}"][0] - 0.5, loss
