"""`trivium detect`: the picture and the list that it writes, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.recipes.shop import trivium
from tests.test_load import new_bundle
from trivium.bundle import Bundle
from trivium.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from trivium.models.unit import Unit, UnitConfig, UnitTask

TASKS = (
    UnitTask("coco", "detection", "image", 3, 0, num_queries=2),
    UnitTask("vg", "detection", "image", 3, 1, num_queries=2, num_attributes=3),
    UnitTask("kind", "labels", "image", 2, 2),
)
LABELS = {
    "coco": ["", "cup", "mug"], "vg": ["", "thing", "other thing"], "vg.attributes": ["", "red", "blue"],
    "kind": ["a", "b"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever it is shown: for coco a cup in the middle, half as high and wide, at 0.7, twice; for vg a blue thing."""
    torch.manual_seed(0)
    unit = Unit(
        UnitConfig.of_size(
            "tiny", tasks=TASKS, width=16, num_heads=2, mlp_width=16, decoder_layers=1, image_width=16, image_layers=1,
            backbone_widths=(8, 8), backbone_blocks=(1, 1), text_layers=0, attribute_width=4,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name in ("coco", "vg"):
            head: Any = unit.heads[name]
            for layer in (head.boxes[-1], head.classes):
                layer.weight.zero_()
                layer.bias.zero_()
            head.classes.bias.copy_(torch.tensor([1e-9, 0.7, 0.1, 0.2]).log())
        head.attributes.decoder.weight.zero_()
        head.attributes.decoder.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    transform = ImageTransform(32, "bilinear", IMAGENET_MEAN, IMAGENET_STD, "shortest", 64)
    folder = tmp_path_factory.mktemp("model") / "unit"
    Bundle("unit", unit, None, transform, labels_of=LABELS).save(folder)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "white.png"
    Image.new("RGB", (160, 80), "white").save(path)
    return path


def test_the_picture_and_the_list_say_what_was_found(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.png"
    assert trivium("detect", model, picture, "--out", out) == 0
    cup = {"label": "cup", "score": 0.7, "box": [40.0, 20.0, 120.0, 60.0]}
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "picture": str(picture), "drawn": "found.png", "objects": [cup, cup]
    }  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0.70  cup  from (40.0, 20.0) to (120.0, 60.0)"
    assert said[2] == f"2 objects with a score of 0.5 or more: {out}, {tmp_path / 'found.json'}"
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (80, 160, 3)
    assert (pixels[40, [40, 120]] != 255).any(-1).all() and (pixels[60, 60] != 255).any(), "a frame"
    assert (pixels[30:50, 50:110] == 255).all() and (pixels[70:] == 255).all(), "and white inside and outside of it"


def test_a_task_is_chosen_and_its_attributes_are_named(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trivium("detect", model, picture, "--task", "vg", "--out", tmp_path / "found.webp") == 0
    [first, _] = json.loads((tmp_path / "found.json").read_text())["objects"]
    assert (first["label"], first["attribute"]) == ("thing", "blue")
    assert "0.70  blue thing  from" in capsys.readouterr().out
    assert Image.open(tmp_path / "found.webp").format == "WEBP"


def test_nothing_above_the_score_is_an_empty_list_and_the_picture_as_it_was(
    model: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trivium("detect", model, picture, "--score", 0.71) == 0
    assert json.loads((tmp_path / "white-detected.json").read_text())["objects"] == []
    assert (np.asarray(Image.open(tmp_path / "white-detected.png")) == 255).all()


def test_mistakes_are_sentences_and_nothing_is_written(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.png").write_bytes(b"nothing")
    blind = tmp_path / "flava"
    new_bundle().save(blind)
    out = tmp_path / "found.png"
    before = picture.read_bytes()
    for words, says in (
        ((model, tmp_path / "none.png", "--out", out), "none.png: there is no such picture"),
        ((model, tmp_path / "no.png", "--out", out), "no.png: cannot be read as a picture"),
        ((model, picture, "--out", tmp_path / "found.txt"), "name a picture to write, such as found.png"),
        ((model, picture, "--out", tmp_path / "x" / "found.png"), "there is no folder"),
        ((model, picture, "--out", picture), "is the picture itself, which would be lost"),
        ((model, picture, "--out", out, "--score", 1.5), "--score 1.5: it lies between 0 and 1"),
        ((model, picture, "--out", out, "--task", "cococo"), "has no task 'cococo': it has coco, vg, kind"),
        ((model, picture, "--out", out, "--task", "kind"), "the task 'kind' detects nothing"),
        ((blind, picture, "--out", out), "finds no objects"),
    ):
        assert trivium("detect", *words) == 2
        assert says in capsys.readouterr().err
        assert not list(tmp_path.glob("found*")) and not list(tmp_path.glob(".*"))
    assert picture.read_bytes() == before


def test_a_picture_of_ones_own_is_not_replaced(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "holiday.png"
    Image.new("RGB", (4, 4), "red").save(out)
    before = out.read_bytes()
    assert trivium("detect", model, picture, "--out", out) == 2
    assert f"{out} exists already, and no holiday.json beside it" in capsys.readouterr().err
    assert out.read_bytes() == before and not (tmp_path / "holiday.json").exists()


def test_a_file_of_ones_own_is_not_replaced_by_the_list(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, own = tmp_path / "keep.png", tmp_path / "keep.json"
    for content in ('{"mine": 1}', "[]", "no JSON"):
        own.write_text(content)
        assert trivium("detect", model, picture, "--out", out) == 2
        assert f"{own}, where the objects would be listed, holds something else" in capsys.readouterr().err
        assert own.read_text() == content and not out.exists()
    own.unlink()
    for score in (0.5, 0.71):  # a list of its own is
        assert trivium("detect", model, picture, "--out", out, "--score", score) == 0
    assert json.loads(own.read_text())["objects"] == []
