"""The dVAE as a recipe: trained, resumed, measured, and then the image tokenizer of a FLAVA."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.shop import checkpoint, data_of, digests, flags, trivium
from trivium.convert import dalle
from trivium.errors import TriviumError
from trivium.evaluate import results
from trivium.load import image_tokenizer_hash, load_image_tokenizer, save_image_tokenizer
from trivium.methods.dvae import DVaeMethod
from trivium.models.dvae import DVae, DVaeConfig, map_pixels
from trivium.models.patch_codebook import PatchCodebook
from trivium.objectives.dvae import logit_laplace
from trivium.recipes.dvae import _constant_likelihood, dvae, spread
from trivium.train.config import leaves, set_leaves

TINY = {
    "model.width": 8, "model.num-groups": 3, "model.num-codes": 12, "model.code-width": 6, "data.image-size": 16,
    "data.batch": 8, "train.workers": 0, "train.precision": "fp32", "train.threads": 1, "train.steps": 6,
    "train.save-every": 3, "optim.lr": 3e-3, "split-every": 5,
}  # fmt: skip


def words(shop: Path, **changes: object) -> list[str]:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    settings = [word for name, value in {**TINY, **named}.items() for word in (f"--{name}", str(value))]
    return ["--data.images", str(shop / "goods.csv"), "--data.validation", str(shop / "pictures"), *settings]


@pytest.fixture(scope="module")
def trained(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "dvae"
    assert trivium("pretrain", "dvae", "--out", out, *words(shop)) == 0
    return out


def test_base_is_the_published_run() -> None:
    """Ramesh et al. 2021, A.2 and A.3."""
    recipe = dvae("base")
    assert recipe.model == DVaeConfig(decoder=True)
    assert (recipe.data.batch, recipe.data.image_size, recipe.train.steps) == (512, 256, 3_000_000)
    assert (recipe.optim.lr, recipe.optim.lr * recipe.optim.final) == (1e-4, pytest.approx(1.25e-6))
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == ((0.9, 0.999), 1e-8, 1e-4)
    assert recipe.average == 0.999
    assert recipe.least_log_scale is None  # nothing that changes training
    assert recipe.logit_deviation is None
    assert recipe.split_every == 0


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_comes_back_from_its_config(size: str) -> None:
    recipe = dvae(size)
    values = json.loads(json.dumps(leaves(recipe)))
    assert set_leaves(dvae("small" if size == "tiny" else "tiny"), values) == recipe


def test_a_run_ends_with_figures_and_pictures(trained: Path) -> None:
    found = results.read(trained / "results.json")
    assert math.isfinite(found["losses.likelihood.final"].value)
    assert found["losses.kl.chance"].value == 0
    gain = found["reconstruction.psnr"].value - found["reconstruction.mean_picture_psnr"].value
    assert found["reconstruction.gain"].value == pytest.approx(gain)
    assert 1 / 12 <= found["codes.used"].value <= 1
    assert found["codes.used"].n == 24 * 16  # pictures, codes of each
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert "What the codes keep" in page
    assert "How often each code is used" in page
    assert "Held-out pictures that went through their codes" in page
    assert f"--data.image-tokenizer {trained}" in page
    assert "Pixels (likelihood)" in page
    assert "trivium search" not in page


def test_what_is_kept_is_the_average_of_the_weights(trained: Path) -> None:
    folder = checkpoint(trained, 6)
    kept = load_file(folder / "model" / "image_tokenizer.safetensors")
    training = load_file(folder / "training" / "method.safetensors")
    counts = {"counts_K", "features_KD"}  # of the splitting of codes; the average is not stored twice
    assert set(training) == {f"model.{name}" for name in kept} | counts
    assert not torch.equal(training["model.encoder.stem.weight"], kept["encoder.stem.weight"])


def test_three_and_three_steps_are_six(trained: Path, tmp_path: Path) -> None:
    """Codes are split after the fifth, by what was counted before the run was stopped too."""
    counted = [load_file(checkpoint(trained, at) / "training" / "method.safetensors")["counts_K"] for at in (3, 6)]
    assert [int(counts.sum()) for counts in counted] == [3 * 8 * 16, 1 * 8 * 16]
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(checkpoint(run, 6))
    assert trivium("pretrain", run, "--resume") == 0
    assert digests(checkpoint(run, 6)) == digests(checkpoint(trained, 6))


def test_evaluating_a_run_measures_it_again(trained: Path) -> None:
    before = results.read(trained / "results.json")
    assert trivium("evaluate", trained) == 0
    after = results.read(trained / "results.json")
    assert after["reconstruction.psnr"] == before["reconstruction.psnr"]
    assert after["losses.likelihood.final"].value == pytest.approx(before["losses.likelihood.final"].value)


def test_a_budget_in_minutes_moves_the_schedules_too(shop: Path) -> None:
    recipe = set_leaves(dvae("tiny"), {"model.width": 8, "data.images": [str(shop / "pictures")], "train.workers": 0})
    prepared = recipe.prepare("dvae", {}).with_train(steps=40)
    method = prepared.run.method
    assert isinstance(method, DVaeMethod)
    method.schedule(28)  # 0.7 of 40 steps
    assert method.temperature == pytest.approx(1 / 16)


def test_every_code_starts_with_the_same_logits_over_the_pictures_of_the_run() -> None:
    model = DVae(DVaeConfig(width=8, num_groups=2, blocks_per_group=1, num_codes=40, decoder=True))
    pictures = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    mapped = map_pixels(pictures / 255)
    with torch.no_grad():
        before = model.logits(mapped)
        spread(model, [pictures[:2], pictures[2:]], 2.0)
        after = model.logits(mapped)
    deviation, mean = torch.std_mean(after, dim=(0, 2, 3))
    assert torch.allclose(mean, torch.zeros(40), atol=1e-4)
    assert torch.allclose(deviation, torch.full((40,), 2.0), atol=1e-4)
    ranked = [logits[:, 3].flatten().argsort() for logits in (before, after)]
    assert torch.equal(*ranked)  # which places a code likes is as it was drawn
    assert len(after.argmax(1).unique()) > len(before.argmax(1).unique())


# ------------------------------------------------------------------------------------ what it is trained for


def test_it_serves_as_the_image_tokenizer_of_a_flava(trained: Path, shop: Path, tmp_path: Path) -> None:
    """One code for each patch: stride 4 to patches of 8 pixels, so it looks at half the size."""
    run = tmp_path / "flava"
    settings = [*data_of(shop), *flags(train__steps=3), "--data.image-tokenizer", str(trained)]
    assert trivium("pretrain", "flava", "--out", run, *settings) == 0
    tokenizer = load_image_tokenizer(trained)
    assert isinstance(tokenizer, DVae)
    assert image_tokenizer_hash(load_image_tokenizer(run)) == image_tokenizer_hash(tokenizer)
    assert json.loads((run / "config.json").read_text())["values"]["model.num_codes"] == 12
    assert tokenizer.decode(torch.zeros(1, 4, dtype=torch.int64)) is not None


def test_its_codes_are_cached_and_trained_on(
    trained: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*data_of(shop), *flags(train__steps=3), "--data.image-tokenizer", str(trained)]
    cache = tmp_path / "codes.safetensors"
    assert trivium("data", "codes", "flava", "--out", cache, "--crops", 2, *settings) == 0
    codes = load_file(cache)["codes"]
    assert codes.shape[1:] == (3, 16)
    assert int(codes.int().max()) < 12

    def runs(*_: object) -> None:
        raise AssertionError("the encoder runs")

    for name in ("encode", "features"):
        monkeypatch.setattr(DVae, name, runs)
    assert trivium("pretrain", "flava", "--out", tmp_path / "without", *settings) == 1  # it would, without the cache
    assert trivium("pretrain", "flava", "--out", tmp_path / "run", *settings, "--data.codes", cache) == 0


def test_it_goes_out_to_the_names_of_dalle_and_comes_back_as_a_start(
    trained: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_image_tokenizer(trained)
    assert trivium("convert", trained, "--to", "dalle", "--out", tmp_path / "dalle") == 0
    encoder, decoder = (load_file(tmp_path / "dalle" / f"{part}.safetensors") for part in ("encoder", "decoder"))
    again = dalle.from_dalle(encoder, decoder)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in tokenizer.state_dict().items())
    run = tmp_path / "run"
    settings = words(shop, model__width=16, train__steps=1, optim__lr=0.0)
    assert trivium("pretrain", "dvae", "--out", run, "--init", tmp_path / "dalle", *settings) == 0
    assert "the shape of the model is that of" in capsys.readouterr().err
    kept = load_image_tokenizer(run)
    assert all(torch.allclose(t, tokenizer.state_dict()[name]) for name, t in kept.state_dict().items())


# ----------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_told(shop: Path, trained: Path, tmp_path: Path) -> None:
    recipe = set_leaves(dvae("tiny"), {"data.images": [str(shop / "pictures")]})

    def refused(sentence: str, **values: object) -> None:
        with pytest.raises(TriviumError, match=sentence):
            set_leaves(recipe, {n.replace("__", "."): value for n, value in values.items()}).prepare("dvae", {})

    refused("cannot be cut into codes of 4: choose a multiple, such as --data.image-size 48", data__image_size=50)
    refused("leave it True", model__decoder=False)
    refused("--train.shard and --split-every do not go together", train__shard=True)
    refused("a quarter of it inside", model__width=3)
    refused("--annealing.temperature 0.0: this must be a number above 0", annealing__temperature=0.0)
    refused("--average 1.0: this must be 0 or more and below 1", average=1.0)
    refused("give --data.images too", data__images=[], data__validation=["pictures"])
    save_image_tokenizer(DVae(replace(DVaeConfig(width=4, num_codes=5), num_groups=2)), tmp_path / "encoder")
    refused("the encoder of a dVAE alone", init=str(tmp_path / "encoder"))
    save_image_tokenizer(PatchCodebook(4, 8), tmp_path / "patches")
    refused(r"another kind \(patch_codebook\)", init=str(tmp_path / "patches"))
    with pytest.raises(TriviumError, match="there is no dVAE of size huge: use one of tiny, small, base"):
        dvae("huge")


def test_without_held_out_pictures_a_run_says_so(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = words(shop, train__steps=1)
    at = without.index("--data.validation")
    del without[at : at + 2]
    assert trivium("pretrain", "dvae", "--out", tmp_path / "run", *without) == 0
    assert "not measured: losses and reconstruction on held-out pictures: give" in capsys.readouterr().out


def test_chance_is_the_best_constant(shop: Path) -> None:
    """No location and scale for each channel gives the held-out pictures a higher likelihood."""
    values = {"data.images": [str(shop / "pictures")], "data.validation": [str(shop / "pictures")], "model.width": 4}
    prepared = set_leaves(dvae("tiny"), values).prepare("dvae", {})
    pixels = torch.cat([batch.images[0].pixels_BCHW for batch in prepared.validation["images"]])
    mapped = map_pixels(pixels.double() / 255)
    location = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([location, log_scale], lr=0.05)
    for _ in range(400):
        loss = logit_laplace(location.expand_as(mapped), log_scale.expand_as(mapped), mapped) / mapped.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert _constant_likelihood(prepared.validation) == pytest.approx(loss.item(), abs=0.02)
    assert _constant_likelihood(prepared.validation) <= loss.item() + 1e-9
