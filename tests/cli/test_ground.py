"""`trivium ground`, `trivium finetune grounding` and the suite's RefCOCO+, from end to end, and their mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import trivium
from tests.cli.test_finetune import figures
from tests.cli.test_finetune_retrieval import QUICK, saved
from tests.recipes.shop import lines_of
from tests.recipes.shop import trivium as run
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.errors import TriviumError
from trivium.explain.heat_maps import GAP, LETTERS, PER_LINE, SIDE, overlay, shown
from trivium.methods.albef import AlbefMethod


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: saved(folder / family, family) for family in ("albef", "flava", "clip")}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Square, so that a tile of the wall is one."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)).resize((90, 90)).save(path)
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of RefCOCO+, of scenes, with their own boxes proposed."""
    out = tmp_path_factory.mktemp("scenes")
    for made in (Scenes("train", 8, seed=6), Scenes("new-scenes", 4, seed=6)):
        write_scenes(made, out, ["refcoco"])
    for half in ("train", "val"):
        folder = (out / "refcoco" / half / "refcoco").rename(out / "refcoco" / half / "refcoco+")
        boxes: dict[str, list[list[int]]] = {}
        for annotation in json.loads((folder / "instances.json").read_text())["annotations"]:
            boxes.setdefault(str(annotation["image_id"]), []).append(annotation["bbox"])
        (folder / "dets.json").write_text(json.dumps(boxes))
    return out / "refcoco"


# --------------------------------------------------------------------------------------------------- heat maps


@pytest.mark.parametrize("family", ["albef", "flava"])
@pytest.mark.parametrize("block", [None, 0])
def test_a_wall_of_every_word(
    family: str, block: int | None, models: dict[str, Path], picture: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "maps.png"
    words = [] if block is None else ["--block", block]
    text = "a picture of number two"
    assert run("ground", models[family], "--image", picture, "--text", text, "--out", out, *words) == 0
    assert capsys.readouterr().out == f"heat maps: {out}\n"
    with Image.open(out) as page:
        tiles = 2 + 5
        assert page.width == GAP + PER_LINE * (SIDE + GAP)
        assert page.height == 2 * (SIDE + 2 * GAP + LETTERS) + LETTERS + 2 * GAP
        pixels = np.asarray(page.convert("RGB"))
    top = LETTERS + 2 * GAP
    corners = [(top + n // PER_LINE * (SIDE + 2 * GAP + LETTERS), GAP + n % PER_LINE * (SIDE + GAP)) for n in range(10)]
    drawn = [pixels[row : row + SIDE, column : column + SIDE] for row, column in corners]
    assert all(float(tile.std()) > 0 for tile in drawn[:tiles]) and all(
        int(tile.min()) == 255 for tile in drawn[tiles:]
    )
    bundle = trivium.load(models[family])
    [heat] = bundle.ground(picture, text, block)
    assert heat.words == ("a", "picture", "of", "number", "two")
    assert np.array_equal(drawn[0], shown(picture, bundle.transform))
    assert np.array_equal(drawn[1], overlay(drawn[0], heat.text_nn))
    assert np.array_equal(drawn[6], overlay(drawn[0], heat.words_Wnn[4]))


@pytest.mark.parametrize("family", ["albef", "flava"])
def test_a_picture_is_looked_at_at_another_size(
    family: str, models: dict[str, Path], picture: Path, tmp_path: Path
) -> None:
    bundle = trivium.load(models[family])
    size, patch = bundle.transform.size, bundle.model.config.patch_size
    words = ("--image", picture, "--text", "a picture", "--out", tmp_path / "maps.png", "--image-size", 2 * size)
    assert run("ground", models[family], *words) == 0
    bundle.transform = bundle.transform.at(2 * size)
    [heat] = bundle.ground(picture, "a picture")
    assert heat.text_nn.shape == (2 * size // patch, 2 * size // patch)
    with Image.open(tmp_path / "maps.png") as page:
        pixels = np.asarray(page.convert("RGB"))
    top, left = LETTERS + 2 * GAP, GAP + SIDE + GAP
    expected = overlay(shown(picture, bundle.transform), heat.text_nn)
    assert np.array_equal(pixels[top : top + SIDE, left : left + SIDE], expected)


def test_an_overlay_is_red_where_it_is_hot_and_the_picture_where_it_is_not() -> None:
    grey = np.full((40, 80, 3), 90, np.uint8)
    heat = torch.zeros(4, 4)
    heat[0, 3] = 2.0
    painted = overlay(grey, heat)
    assert painted[2, 75, 0] > painted[2, 75, 2] + 60  # red at the top right
    assert np.abs(painted[30:, :40].astype(int) - 90).max() <= 3
    assert np.array_equal(overlay(grey, torch.full((4, 4), 3.0)), grey), "an even map says nothing"


def test_a_word_of_several_pieces_is_one_map(models: dict[str, Path], picture: Path) -> None:
    bundle = trivium.load(models["albef"])
    [heat] = bundle.ground(picture, "Two  unheard-of number")
    assert heat.words == ("two", "", "of", "number")  # nothing is left of a word that the vocabulary does not have
    assert heat.words_Wnn.shape == (4, 4, 4)
    several = bundle.ground([picture, picture], ["number two", "a"])
    assert torch.allclose(several[0].text_nn, bundle.ground(picture, "number two")[0].text_nn, rtol=1e-4, atol=1e-12)


def test_of_a_long_text_it_is_told_how_much_is_read(
    models: dict[str, Path], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, max_length = tmp_path / "maps.png", trivium.load(models["flava"]).max_length
    for num_words in (max_length - 2, max_length + 5):  # [CLS] and [SEP] are tokens, too
        text = " ".join(["number"] * num_words)
        assert run("ground", models["flava"], "--image", picture, "--text", text, "--out", out) == 0
        told = capsys.readouterr().err.splitlines()
    assert told == [
        f"trivium: note: the text is longer than the {max_length} tokens that this model reads: its first"
        f" {max_length - 2} of {max_length + 5} words and marks are read, the others are not"
    ]


def test_mistakes_are_sentences(
    models: dict[str, Path], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.png").write_bytes(b"nothing")
    out = tmp_path / "maps.png"
    for words, says in (
        ((models["clip"], "--image", picture, "--text", "a"), "(clip) has no attention from words to patches"),
        ((models["albef"], "--image", tmp_path / "none.png", "--text", "a"), "none.png: there is no such picture"),
        ((models["albef"], "--image", tmp_path / "no.png", "--text", "a"), "no.png: cannot be read as a picture"),
        ((models["albef"], "--image", picture, "--text", " "), "the text to look for is empty"),
        ((models["albef"], "--image", picture, "--text", "?"), 'the text "?" holds nothing that this model reads'),
        ((models["albef"], "--image", picture, "--text", "a", "--block", 3), "there is no block 3 in which words"),
        ((models["albef"], "--image", picture, "--text", "a", "--image-size", 30), "cannot be cut into patches of 8"),
    ):
        assert run("ground", *words, "--out", out) == 2
        assert says in capsys.readouterr().err
        assert not out.exists() and not list(tmp_path.glob(".maps*"))
    bundle = trivium.load(models["albef"])
    with pytest.raises(TriviumError, match="there is no block -1 in which words"):
        bundle.ground(picture, "a", block=-1)
    with pytest.raises(TriviumError, match="the picture's tower has no block -1"):
        bundle.ground_by_cosine(picture, "a", block=-1)
    size = bundle.transform.size
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    whole, shares = (bundle.ground_by_cosine(each, "a")[0] for each in (pixels, pixels / 255))
    torch.testing.assert_close(whole, shares)  # pixels as floats are the same pixels
    assert run("ground", models["albef"], "--image", picture, "--text", "a", "--out", tmp_path / "maps.gif") == 2
    assert "an image is a .png or a .jpg" in capsys.readouterr().err
    before = picture.read_bytes()
    (tmp_path / "folder.png").mkdir()
    for place, says in (
        (tmp_path / "x" / "maps.png", "there is no folder"),
        (tmp_path / "folder.png", "is a folder: name the file to write"),
        (tmp_path / "folder.png" / ".." / picture.name, "is the picture itself, which would be lost"),
    ):
        assert run("ground", models["albef"], "--image", picture, "--text", "a", "--out", place) == 2
        assert says in capsys.readouterr().err
    assert picture.read_bytes() == before


# ------------------------------------------------------------------------------------------------- fine-tuning


def tune(init: Path, root: Path, out: Path, *words: object) -> int:
    flags = [word for name, value in QUICK.items() for word in (f"--{name}", str(value))]
    return run("finetune", "grounding", "--init", init, "--data", root, "--out", out, *flags, *words)


@pytest.mark.parametrize("family", ["albef", "flava"])
def test_expressions_train_and_the_best_checkpoint_is_measured(
    family: str, models: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert tune(models[family], scenes, out, "--objectives.pool", 6) == 0
    found = figures(out)
    _, *rest = lines_of(out / "metrics.jsonl")  # after the one on what it began with
    measured = [entry["results"]["figures"] for entry in rest if "results" in entry]
    best = max(measured, key=lambda each: each["val.accuracy"])
    for figure in ("accuracy", "pointing", "among_annotated"):
        assert found[f"RefCOCO+.val.{figure}"] == best[f"val.{figure}"]
    lines = lines_of(out / "predictions" / "val.jsonl")
    for figure in ("accuracy", "pointing", "among_annotated"):
        assert sum(line[figure] for line in lines) / len(lines) == pytest.approx(found[f"RefCOCO+.val.{figure}"])
    for line in lines:
        (x, y), (left, top, width, height) = line["point"], line["label"]
        assert line["pointing"] == (left <= x < left + width and top <= y < top + height)
        assert line["box"] is None or len(line["box"]) == 4
    first = rest[0]["losses"]
    assert set(first) == ({"itc", "itm"} if family == "albef" else {"contrastive", "itm"})
    assert run("evaluate", out) == 0
    assert figures(out)["RefCOCO+.val.pointing"] == found["RefCOCO+.val.pointing"]


def test_expressions_of_one_picture_are_answers_to_each_other(
    models: dict[str, Path], scenes: Path, tmp_path: Path
) -> None:
    from trivium.recipes.finetune import finetune
    from trivium.train import config

    changes = {"init": str(models["albef"]), "data.root": str(scenes), "data.image_size": 32, "data.max_length": 3}
    settings = config.Config("finetune", {"task": "grounding"})
    recipe = config.set_leaves(finetune("grounding"), changes)
    prepared = recipe.prepare(settings.recipe, settings.arguments)
    method = prepared.run.method
    assert isinstance(method, AlbefMethod) and method.duplicates == "positive" and method.weights["mlm"] == 0
    assert method.distillation.itc == 0.4
    with pytest.raises(TriviumError, match="a picture of 30 pixels cannot be cut into patches of 8"):
        config.set_leaves(recipe, {"data.image_size": 30}).prepare(settings.recipe, settings.arguments)
    for split in ("train", "val"):
        [note] = [note for note in prepared.notes if note.startswith(f"{split}: ")]
        assert "expressions have more than 3 tokens and are cut there; the first: " in note and "(entry " in note
    stream = prepared.mixture_of(prepared.recipe.train).stream_at(0)
    assert stream.collate.images.changes is not None and stream.collate.images.views.flip == 0.5


def test_mistakes_of_finetuning_are_sentences(
    models: dict[str, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    middle = trivium.load(models["albef"])
    replace(middle, transform=replace(middle.transform, crop="center")).save(tmp_path / "middle")
    for init, root, words, says in (
        (tmp_path / "middle", scenes, (), "sees only the middle of a picture"),
        (models["clip"], scenes, (), "a model of the family clip has none"),
        (models["albef"], tmp_path / "empty", (), "holds no referring expressions"),
        (models["albef"], scenes / "val", (), "has no usable expression of its split train"),
        (models["albef"], scenes, ("--select-on", "val.recall"), "use one of val.accuracy, val.pointing"),
        (models["albef"], scenes, ("--data.random-changes", -1), "0 or more"),
    ):
        assert tune(init, root, tmp_path / "run", *words) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- suite


def test_the_suite_measures_a_model_as_it_is(
    models: dict[str, Path], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    words = ("--suite", "albef", "--task", "RefCOCO+", "--data.root", scenes, "--out", out)
    assert run("evaluate", models["albef"], *words) == 0
    first = json.loads((out / "results.json").read_text())["results"]
    assert {f"RefCOCO+.val.{name}" for name in ("accuracy", "accuracy.at_best", "pointing")} <= first.keys()
    capsys.readouterr()
    assert run("evaluate", models["albef"], *words) == 0
    assert "expressions" not in capsys.readouterr().err, "nothing is computed again"
    again = json.loads((out / "results.json").read_text())["results"]
    assert again["RefCOCO+.val.accuracy"] == first["RefCOCO+.val.accuracy"]
    shutil.rmtree(out)
    assert run("evaluate", models["clip"], *words) == 2
    assert "has no attention from words to patches" in capsys.readouterr().out
