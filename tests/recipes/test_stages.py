"""FLAVA's towers alone and its three stages: what is handed on, what is not, and what is not done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.recipes.shop import checkpoint, data_of, digests, flags, lines_of, trivium
from trivium.bundle import Bundle
from trivium.cli.stages import run_stages
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.load import image_tokenizer_hash, load_image_tokenizer, save_image_tokenizer
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.flava import SIZES
from trivium.models.towers import image_from_vit
from trivium.models.vit import ViT, ViTConfig
from trivium.recipes.dino import dino
from trivium.recipes.flava import flava
from trivium.recipes.stages import Stages, flava_stages
from trivium.recipes.unimodal import mim, mlm
from trivium.train.config import Config, leaves, set_leaves

STAGES = ("text", "dino", "mim", "joint")


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(checkpoint(run, step) / "model" / "model.safetensors")


def words(shop: Path, by: tuple[str, ...] = ("dino", "mim"), **changes: object) -> list[str]:
    own = {f"{stage}.{name}": value for stage in ("text", "dino", "mim") for name, value in {
        "batch": 8, "train.steps": 4, "train.workers": 0, "train.precision": "fp32", "train.threads": 1,
        "train.log-every": 1, "train.save-every": 2,
    }.items()}  # fmt: skip
    own |= {"dino.crops.global-size": 32, "dino.crops.local-size": 16, "dino.crops.num-local": 2}
    own |= {"dino.head-width": 16, "dino.bottleneck-width": 8, "dino.num-prototypes": 16}
    stages = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    joint = {"train__steps": 4, "train__save_every": 2} | changes
    return [*data_of(shop), "--image-by", *by, *stages, *flags(**joint)]


@pytest.fixture(scope="module")
def staged(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "stages"
    assert trivium("pretrain", "flava-stages", "--out", out, *words(shop)) == 0
    return out


# ------------------------------------------------------------------------------------------------ one tower


def test_the_published_stages() -> None:
    """Singh et al., supplement B.1 (RoBERTa's schedule for words); Bao et al., section 3.1 (BEiT)."""
    text, image = mlm("base"), mim("base")
    assert (text.train.steps, text.data.batch, text.data.length_alone) == (125_000, 2048, 512)
    assert (text.optim.lr, text.optim.betas, text.optim.eps, text.optim.weight_decay) == (5e-4, (0.9, 0.98), 1e-6, 0.01)
    assert (text.optim.warmup, text.optim.schedule, text.optim.clip) == (10_000, "linear", "none")
    assert text.objectives.streams() == ["text"]
    assert (image.data.batch, image.optim.lr, image.optim.weight_decay, image.optim.clip_norm) == (
        2048,
        1.5e-3,
        0.05,
        3,
    )
    assert image.optim.lr * image.optim.final == pytest.approx(1e-5)
    assert (image.optim.betas, image.optim.eps, image.optim.warmup) == ((0.9, 0.999), 1e-8, 10 / 800)
    assert (image.optim.schedule, image.optim.clip) == ("cosine", "global")
    assert (image.data.crop_scale, image.data.flip, image.data.color_jitter) == ((0.08, 1.0), 0.5, 0.4)
    assert image.train.steps == pytest.approx(800 * 1_281_167 / 2048, rel=0.01)
    assert image.objectives.streams() == ["images"]
    joint = flava_stages("base")
    assert {name: leaves(joint)[name] for name in leaves(flava("base"))} == leaves(flava("base"))
    assert leaves(joint)["text.train.steps"] == 125_000


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_comes_back_from_its_config(size: str) -> None:
    for recipe in (mlm, mim, flava_stages):
        values = json.loads(json.dumps(leaves(recipe(size))))
        assert set_leaves(recipe("small" if size == "tiny" else "tiny"), values) == recipe(size)


@pytest.mark.parametrize(("recipe", "loss", "untouched"), [("mlm", "mlm", "image."), ("mim", "mim", "text.")])
def test_a_tower_alone_trains_its_own_and_nothing_else(
    shop: Path, tmp_path: Path, recipe: str, loss: str, untouched: str
) -> None:
    run = tmp_path / "run"
    assert trivium("pretrain", recipe, "--out", run, *data_of(shop), *flags(train__steps=4, train__save_every=2)) == 0
    assert {name for line in lines_of(run / "metrics.jsonl") for name in line.get("losses", {})} == {loss}
    before, after = weights(run, 2), weights(run, 4)
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"image", "mim_head"} if recipe == "mim" else {"text", "mlm_head"}
    assert not any(name.startswith(untouched) for name in changed)
    assert (checkpoint(run, 4) / "model" / "image_tokenizer.safetensors").is_file() == (recipe == "mim")


# ---------------------------------------------------------------------------------------------- hand-over


def test_the_joint_stage_starts_from_both_towers_and_the_rest_at_random(
    staged: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "joint"
    starts = ["--init-text", staged / "text", "--init-image", staged / "mim"]
    capsys.readouterr()
    still = [*data_of(shop), *flags(train__steps=1, optim__lr=0.0)]
    assert trivium("pretrain", "flava", "--out", run, *still, *starts) == 0
    said = capsys.readouterr().err
    assert "taken are the text encoder of 1 blocks" in said
    assert "taken is the image encoder of 1 blocks and its head of masked patches" in said
    text, image, joint = weights(staged / "text", 4), weights(staged / "mim", 4), weights(run, 1)
    for name, tensor in joint.items():
        if name.startswith(("text.", "mlm_head.")):
            assert torch.equal(tensor, text[name]), name
        elif name.startswith(("image.", "mim_head.")) and "pooler" not in name:
            assert torch.equal(tensor, image[name]), name
    fresh = tmp_path / "fresh"
    assert trivium("pretrain", "flava", "--out", fresh, *still) == 0
    multimodal = {name: tensor for name, tensor in weights(fresh, 1).items() if name.startswith("multimodal.")}
    assert all(torch.equal(joint[name], tensor) for name, tensor in multimodal.items())
    for name in ("tokenizer.json", "image_tokenizer.safetensors"):
        source = staged / ("text" if name == "tokenizer.json" else "mim")
        own = (checkpoint(run, 1) / "model" / name).read_bytes()
        assert own == (checkpoint(source, 4) / "model" / name).read_bytes()


def test_a_vit_gives_its_numbers_and_its_mean_and_deviation(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ViTConfig(width=32, num_heads=2, mlp_width=64, num_layers=1, image_size=32, patch_size=8)
    vit = ViT(config)
    transform = ImageTransform(size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    monkeypatch.setattr("trivium.recipes.towers.load", lambda path: Bundle("vit", vit, None, transform))
    values = {"init_image": "somewhere", "model.eps": 1e-6, "data.vocabulary": "bert"}
    prepared = set_leaves(mim("tiny"), values | small(shop)).prepare("mim", {})
    model, method = prepared.run.method.model, prepared.run.method
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.encode_image(pixels).tokens, vit.encode_image(pixels).tokens)
    assert torch.allclose(method.mean.flatten() / 255, torch.tensor(transform.mean))
    assert any("no token for hidden patches" in note for note in prepared.notes)


def small(shop: Path) -> dict[str, object]:
    return {
        "data.images": [str(shop / "pictures")], "data.pairs": [str(shop / "goods.csv")], "data.batch": 8,
        "model.width": 32, "model.mlp_width": 64, "model.num_heads": 2, "model.image_layers": 1,
        "model.text_layers": 1, "model.multimodal_layers": 1, "model.image_size": 32, "model.patch_size": 8,
        "model.num_codes": 16, "train.workers": 0, "validate": 0,
    }  # fmt: skip


def test_an_image_tokenizer_that_is_named_goes_before_that_of_the_tower_and_a_vocabulary_does_not(
    staged: Path, shop: Path, tmp_path: Path
) -> None:
    named = DVae(DVaeConfig(width=8, num_codes=20))
    save_image_tokenizer(named, tmp_path / "dvae")
    starts = {"init_image": str(staged / "mim"), "init_text": str(staged / "text")}
    options = {"data.image_tokenizer": str(tmp_path / "dvae"), "data.vocabulary": "bert"}
    prepared = set_leaves(flava("tiny"), small(shop) | starts | options).prepare("flava", {})
    assert prepared.bundle is not None and prepared.bundle.image_tokenizer is not None
    assert image_tokenizer_hash(prepared.bundle.image_tokenizer) == image_tokenizer_hash(named)
    assert prepared.recipe.model.num_codes == 20
    assert prepared.recipe.model.vocab_size == len(weights(staged / "text", 4)["text.embeddings.word.weight"])
    said = " ".join(prepared.notes)
    assert "left out, since it speaks of the codes of another tokenizer" in said
    assert f"{staged / 'text'} brings its own vocabulary, so --data.vocabulary is not used" in said


def test_mistakes_of_a_start_are_told(staged: Path, shop: Path, tmp_path: Path) -> None:
    def refused(sentence: str, **values: object) -> None:
        with pytest.raises(TriviumError, match=sentence):
            set_leaves(flava("tiny"), small(shop) | {n.replace("__", "."): v for n, v in values.items()}).prepare(
                "x", {}
            )

    text, image = str(staged / "text"), str(staged / "mim")
    refused("--init starts the whole model and --init-image its image side alone", init=image, init_image=image)
    refused("--init starts the whole model and --init-text its text side alone", init=image, init_text=text)
    refused(r"is of another shape than the model's: set --model\.text-layers 1", init_text=text, model__text_layers=3)
    refused(
        r"the image tower is of another shape than the model's: set --model\.image-layers 1$",
        init_image=image,
        model__image_layers=2,
    )
    refused("does not exist", init_image=str(tmp_path / "nothing"))


# ------------------------------------------------------------------------------------------------ stages


def test_three_stages_are_three_runs(staged: Path) -> None:
    assert {path.name for path in staged.iterdir()} == {*STAGES, "config.json"}
    recipes = {stage: json.loads((staged / stage / "config.json").read_text())["recipe"] for stage in STAGES}
    assert recipes == {"text": "mlm", "dino": "dino", "mim": "mim", "joint": "flava"}
    assert json.loads((staged / "mim" / "config.json").read_text())["values"]["init_image"] == str(staged / "dino")
    values = json.loads((staged / "joint" / "config.json").read_text())["values"]
    assert values["init_text"] == str(staged / "text")
    assert values["init_image"] == str(staged / "mim")
    one, other = (load_image_tokenizer(staged / stage) for stage in ("mim", "joint"))
    assert image_tokenizer_hash(one) == image_tokenizer_hash(other)
    for stage in STAGES:
        assert trivium("evaluate", staged / stage) == 0


def test_masked_patches_alone_train_the_image_encoder(shop: Path, tmp_path: Path) -> None:
    """Their stage starts from no other, and the joint stage from it, with its head and its codes."""
    run = tmp_path / "run"
    by_mim = words(shop, by=("mim",), train__steps=1, optim__lr=0.0)
    assert trivium("pretrain", "flava-stages", "--out", run, *by_mim) == 0
    assert {path.name for path in run.iterdir()} == {"text", "mim", "joint", "config.json"}
    values = {stage: json.loads((run / stage / "config.json").read_text())["values"] for stage in ("mim", "joint")}
    assert values["mim"]["init_image"] is None
    assert values["joint"]["init_image"] == str(run / "mim")
    text, image, joint = (weights(run / stage, step) for stage, step in (("text", 4), ("mim", 4), ("joint", 1)))
    for name, tensor in joint.items():
        if name.startswith(("image.", "mim_head.")) and "pooler" not in name:
            assert torch.equal(tensor, image[name]), name
        elif name.startswith(("text.", "mlm_head.")):
            assert torch.equal(tensor, text[name]), name


def test_stages_on_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = flava_stages("tiny")
    monkeypatch.setattr("trivium.train.distributed.world", lambda: 2)
    with pytest.raises(TriviumError, match="one after the other on one process: on several, train each alone"):
        run_stages(tree, Config("flava-stages", {}, leaves(tree)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dino_gives_its_tower_and_what_it_knows_pixels_by(staged: Path, shop: Path, tmp_path: Path) -> None:
    """The teacher's tower, to the last number, under FLAVA's names; its head is left out."""
    dino = weights(staged / "dino", 4)
    tower = {name.removeprefix("backbone."): t for name, t in dino.items() if name.startswith("backbone.")}
    run = tmp_path / "run"
    still = [*data_of(shop), *flags(train__steps=1, optim__lr=0.0), "--init-image", staged / "dino"]
    assert trivium("pretrain", "flava", "--out", run, *still) == 0
    joint = weights(run, 1)
    assert len(tower) == len([name for name in dino if not name.startswith("head.")])
    assert all(torch.equal(joint[f"image.{name}"], tensor) for name, tensor in tower.items())
    transforms = [json.loads((checkpoint(each, n) / "model" / "preprocessor.json").read_text())
                  for each, n in ((run, 1), (staged / "dino", 4))]  # fmt: skip
    assert transforms[0]["mean"] == transforms[1]["mean"]
    assert transforms[0]["crop"] != transforms[1]["crop"]  # how pictures are cut is FLAVA's own


def test_what_is_done_is_not_repeated_and_what_was_stopped_goes_on(
    staged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image stage lost its last checkpoint, the joint stage was not begun."""
    run = tmp_path / "run"
    shutil.copytree(staged, run)
    shutil.rmtree(checkpoint(run / "mim", 4))
    for name in ("report.html", "results.json"):
        (run / "mim" / name).unlink()
    shutil.rmtree(run / "joint")
    untouched = digests(checkpoint(run / "text", 4))
    modified = (run / "text" / "report.html").stat().st_mtime_ns
    capsys.readouterr()
    assert trivium("pretrain", run, "--resume") == 0
    said = capsys.readouterr()
    assert f"stage text: done, in {run / 'text'}" in said.err
    assert "resuming after step 2 of 4" in said.out
    assert (run / "text" / "report.html").stat().st_mtime_ns == modified
    assert digests(checkpoint(run / "text", 4)) == untouched
    assert digests(checkpoint(run / "mim", 4)) == digests(checkpoint(staged / "mim", 4))
    same = {name: digest for name, digest in digests(checkpoint(run / "joint", 4)).items() if name.startswith("model/")}
    assert same.items() <= digests(checkpoint(staged / "joint", 4)).items()
    capsys.readouterr()
    assert trivium("pretrain", run, "--resume") == 0  # nothing is left to do
    assert capsys.readouterr().err.count(": done, in ") == 4


def test_mistakes_of_stages_are_told(
    staged: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(sentence: str, *given: object) -> None:
        assert trivium("pretrain", *given) == 2
        assert sentence in capsys.readouterr().err

    refused("holds a run already: continue it with", "flava-stages", "--out", staged, *words(shop))
    refused("stages that are resumed keep their settings", staged, "--resume", "--text.train.steps", 9)
    new = ["flava-stages", "--out", tmp_path / "run", *words(shop)]
    at = new.index("dino")
    refused("choose dino, mim, or dino mim, in this order", *new[:at], "mim", "dino", *new[at + 2 :])
    refused("the stages start their towers themselves", *new, "--init-text", staged / "text")
    assert not (tmp_path / "run").exists()


def test_the_stage_of_dino_has_the_shape_of_the_image_encoder(tmp_path: Path) -> None:
    """All that the tower is, so that it loads without a word."""
    values = {"model.image_layers": 3, "dino.num_prototypes": 99, "data.pairs": ["a.csv"]}
    whole = set_leaves(flava_stages("base"), values)
    text, stage, joint = whole.plan(tmp_path)
    vit = stage.recipe.model
    assert stage.recipe_name == "dino"
    assert (vit.width, vit.num_layers, vit.patch_size, vit.eps, vit.num_prototypes) == (768, 3, 16, 1e-12, 99)
    assert stage.recipe.data.images == ("a.csv",)
    assert stage.recipe == replace(dino("base"), model=vit, data=stage.recipe.data)
    assert joint.recipe.init_image == str(tmp_path / "dino")
    assert text.recipe.init_image is None
    small_tower = ViT(ViTConfig(width=768, num_layers=3, eps=1e-12))
    _, said = image_from_vit(small_tower.state_dict(), vit, joint.recipe.model)
    assert said == ["it has no token for hidden patches: the model's is drawn"]


def test_a_stage_has_the_model_and_the_data_of_the_whole_and_its_own_schedule(tmp_path: Path) -> None:
    values = {
        "data.pairs": ["a.csv"],
        "data.text": ["b.txt"],
        "model.width": 64,
        "text.max_length": 20,
        "mim.flip": 0.3,
    }
    values["data.text_length"] = 30  # of the joint stage
    whole = set_leaves(flava_stages("tiny"), values | {"image_by": ["mim"]})
    assert isinstance(whole, Stages)
    text, image, joint = (stage.recipe for stage in whole.plan(tmp_path))
    assert text.model == image.model == joint.model == whole.model != SIZES["tiny"]
    assert (text.data.length_alone, image.data.max_length) == (20, whole.data.max_length)
    assert joint.data.length_alone == 30
    assert (text.data.flip, image.data.flip, joint.data.flip) == (0.0, 0.3, 0.0)
    assert {stage.data.pairs for stage in (text, image, joint)} == {("a.csv",)}
    assert text.train == whole.text.train
    assert joint.train == whole.train
    assert [recipe.objectives.streams() for recipe in (text, image)] == [["text"], ["images"]]
    assert joint.objectives == whole.objectives


def test_a_cache_of_codes_is_refused_before_any_stage_where_the_stage_of_patches_crops_otherwise(
    tmp_path: Path,
) -> None:
    whole = set_leaves(flava_stages("tiny"), {"data.codes": "c.safetensors", "image_by": ["mim"], "mim.flip": 0.5})
    with pytest.raises(
        TriviumError, match=r"set --mim\.crop-scale 0\.9 1\.0 --mim\.flip 0\.0, or leave out --data\.codes"
    ):
        whole.plan(tmp_path)
    set_leaves(whole, {"mim.flip": 0.0}).plan(tmp_path)
    set_leaves(whole, {"image_by": ["dino"]}).plan(tmp_path)


def test_a_stage_complains_in_the_flags_that_it_is_given_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(sentence: str, *given: object) -> None:
        assert trivium("pretrain", "flava-stages", "--out", tmp_path / "run", *given) == 2
        assert sentence in capsys.readouterr().err

    refused("--text.batch 0: this must be", "--text.batch", 0)
    refused("--dino.crops.num-local -1: this must be", "--dino.crops.num-local", -1)
    refused("--dino.head-width 0: this must be", "--dino.head-width", 0)
    refused("--text.train.workers -1: this must be", "--text.train.workers", -1)
    refused("--data.batch 0: this must be", "--data.batch", 0)
    refused("raise --model.max-length", "--text.max-length", 99)
    refused("lower --text.max-length", "--text.max-length", 99)


@pytest.mark.parametrize(
    ("flags_given", "says"),
    [
        (["--data.pairs", "none.csv"], "none.csv"),
        (["--dino.train.steps", "0"], "steps"),
        (["--data.text", "words.txt"], "there is no picture for the image encoder"),
    ],
)
def test_a_mistake_leaves_no_run_behind(
    flags_given: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("a red mug\n" * 40)
    assert trivium("pretrain", "flava-stages", "--out", tmp_path / "stages", *flags_given) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "stages").exists()
