"""CLIP as its users meet it: trained on pairs of one's own, resumed, continued, evaluated, embedded and searched."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.recipes.shop import checkpoint, digests, lines_of, trivium
from trivium.load import load
from trivium.models.clip import SIZES, Clip
from trivium.recipes.clip import clip
from trivium.train.config import leaves

TINY = {
    "model.image-width": 32, "model.image-heads": 2, "model.image-mlp-width": 64, "model.image-layers": 1,
    "model.text-width": 32, "model.text-heads": 2, "model.text-mlp-width": 64, "model.text-layers": 1,
    "model.projection-width": 16, "model.image-size": 32, "model.patch-size": 8, "data.batch": 8,
    "train.workers": 0, "train.precision": "fp32", "train.threads": 1, "train.log-every": 1, "train.steps": 20,
    "train.save-every": 10,
}  # fmt: skip


def flags(**changes: object) -> list[str]:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [word for name, value in {**TINY, **named}.items() for word in (f"--{name}", str(value))]


def data_of(shop: Path) -> list[str]:
    return ["--data.pairs", str(shop / "goods.csv"), "--data.validation", str(shop / "goods.jsonl")]


@pytest.fixture(scope="module")
def trained(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "clip"
    assert trivium("pretrain", "clip", "--out", out, *data_of(shop), *flags()) == 0
    return out


def test_a_run_learns_and_is_measured_on_its_validation_pairs(trained: Path) -> None:
    steps = [line for line in lines_of(trained / "metrics.jsonl") if "stream" in line]
    losses = [line["losses"]["contrastive"] if "losses" in line else line["contrastive"] for line in steps]
    assert len(losses) == 20 and sum(losses[-5:]) < sum(losses[:5])
    results = json.loads((trained / "results.json").read_text())["results"]
    assert results["losses.contrastive.chance"]["value"] == pytest.approx(
        (8 * math.log(8) + 4 * math.log(4)) / 12, rel=1e-6
    )  # twelve held-out pairs in batches of 8
    assert results["losses.contrastive.final"]["value"] > 0
    assert 0 <= results["retrieval.pairs.text_to_image_r10"]["value"] <= 1
    assert (trained / "report.html").is_file()


def test_the_model_folder_is_a_clip_that_embeds(trained: Path, shop: Path) -> None:
    bundle = load(trained)
    assert bundle.family == "clip" and isinstance(bundle.model, Clip)
    assert bundle.tokenizer is not None and bundle.model.config.end_id == bundle.tokenizer.sep_id
    image = bundle.encode_image([shop / "pictures" / "red-circle.png"] * 3)
    text = bundle.encode_text(["a red circle", "a very long text about a blue square, a green bar and more", "red"])
    assert image.projected.shape == text.projected.shape == (3, 16)
    alone = bundle.encode_text("red").projected
    assert torch.allclose(text.projected[2], alone[0], atol=1e-6)  # pads change nothing
    several = bundle.encode_text(["a red circle", "red"], batch=1).projected
    assert torch.allclose(several[1], alone[0], atol=1e-6)


def test_the_verbs_take_it(trained: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trivium("evaluate", trained, "--pairs", shop / "goods.csv", "--out", tmp_path / "figures") == 0
    assert "on these pairs: R@10" in capsys.readouterr().out
    table = tmp_path / "pictures.parquet"
    assert trivium("embed", trained, shop / "pictures", "--out", table) == 0
    assert "24 embeddings" in capsys.readouterr().out
    assert trivium("search", trained, "a red circle", "--images", shop / "pictures") == 0
    assert ".png" in capsys.readouterr().out


def test_ten_and_ten_steps_are_twenty(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(checkpoint(run, 20))
    assert trivium("pretrain", "clip", "--out", run, "--resume") == 0
    assert digests(checkpoint(run, 20)) == digests(checkpoint(trained, 20))


def test_a_run_starts_from_another_and_says_what_gives_way(
    trained: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--init", trained, *data_of(shop), *flags(train__steps=1, optim__lr=0.0, model__text_layers=3)]
    assert trivium("pretrain", "clip", "--out", tmp_path / "run", *words) == 0
    assert "the shape of the model is that of" in capsys.readouterr().err
    before, after = load(trained).model.state_dict(), load(tmp_path / "run").model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scope", ["local_gradient", "local"])
def test_scopes_are_flags(shop: Path, tmp_path: Path, scope: str) -> None:
    words = [*data_of(shop), *flags(train__steps=2), "--objectives.contrastive-scope", scope]
    assert trivium("pretrain", "clip", "--out", tmp_path / "run", *words, "--objectives.num-ranks", 4) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    whole = (8 * math.log(8) + 4 * math.log(4)) / 12
    expected = whole - math.log(4) if scope == "local" else whole
    assert results["losses.contrastive.chance"]["value"] == pytest.approx(max(0.0, expected), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objectives.num-ranks": 3, "objectives.contrastive-scope": "local"}, "cannot be cut into 3 ranks"),
        ({"objectives.num-ranks": 2}, "give both or neither"),
        ({"objectives.contrastive-scope": "local"}, "give both or neither"),
        ({"objectives.contrastive-scope": "near"}, '"global" or "local_gradient" or "local", not "near"'),
        ({"model.text-heads": 3}, "choose --model.text-heads so that it divides --model.text-width"),
        ({"model.image-size": 30}, "cannot be cut into patches of 8"),
        ({"model.activation": "relu"}, 'model.activation takes "gelu" or "quick_gelu"'),
        ({"data.max-length": 65}, "do not fit a model of 64 positions"),
        ({"data.vocabulary": "nothing.txt"}, "nothing.txt does not exist"),
        ({"data.images": "pictures"}, "data.images"),
    ],
)
def test_mistakes_are_sentences(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], says: str
) -> None:
    words = [word for name, value in {**TINY, **changes}.items() for word in (f"--{name}", value)]
    assert trivium("pretrain", "clip", "--out", tmp_path / "run", *data_of(shop), *words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_family_is_refused(
    twenty: Path, trained: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", tmp_path / "run", "--data.pairs", shop / "goods.csv"]
    assert trivium("pretrain", "clip", "--init", twenty, *words) == 2
    assert "of the family flava, and CLIP starts from one of its own family" in capsys.readouterr().err
    assert trivium("pretrain", "flava", "--init", trained, *words) == 2
    assert "of the family clip, and FLAVA starts from one of its own family" in capsys.readouterr().err


def test_each_size_is_a_recipe_with_its_own_values() -> None:
    for size, config in SIZES.items():
        recipe = clip(size)
        assert recipe.model == config
        assert recipe.data.max_length <= config.max_length
    published = leaves(clip("base"))
    assert (published["optim.lr"], published["optim.weight_decay"], published["optim.eps"]) == (5e-4, 0.2, 1e-6)
