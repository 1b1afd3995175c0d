"""DINO as a recipe: what its sizes say, how its values travel, a run from end to end, resumed and started from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes.shop import checkpoint, digests, lines_of, trivium
from trivium.cli.overrides import set_overrides, split_overrides
from trivium.errors import TriviumError
from trivium.evaluate.report import percent
from trivium.load import load
from trivium.models.dino import Dino
from trivium.models.vit import ViT
from trivium.recipes.dino import DinoRecipe, PreparedDino, dino
from trivium.train import optim as optimizers
from trivium.train.config import leaves, set_leaves

SHAPES = {
    "model__width": 16, "model__num_heads": 2, "model__mlp_width": 24, "model__num_layers": 2, "model__patch_size": 16,
    "model__head_width": 24, "model__bottleneck_width": 8, "model__num_prototypes": 32, "model__image_size": 32,
    "crops__global_size": 32, "crops__local_size": 16, "crops__num_local": 2, "data__batch": 8, "train__workers": 0,
    "train__precision": "fp32", "train__steps": 4, "train__save_every": 2,
}  # fmt: skip


def flags_of(**changes: object) -> list[str]:
    pairs = (SHAPES | changes).items()
    return [word for name, value in pairs for word in (f"--{name.replace('__', '.').replace('_', '-')}", str(value))]


def recipe(**changes: object) -> DinoRecipe:
    return set_overrides(dino("tiny"), split_overrides(flags_of(**changes)))


def prepared(**changes: object) -> PreparedDino:
    return recipe(**changes).prepare("dino", {"size": "tiny"})


@pytest.fixture(scope="module")
def pictures(shop: Path) -> Path:
    """The shop's pictures alone: a run on them has nothing to be measured on, and ends quickly."""
    return shop / "pictures"


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dino") / "run"
    words = flags_of(distillation__centring="mean")  # which alone keeps a centre
    assert trivium("pretrain", "dino", "--out", out, "--data.images", pictures, *words) == 0
    return out


def test_published_sizes() -> None:
    """Of the code and its long runs: see their arguments beside the released weights."""
    small, base = dino("small"), dino("base")
    assert (small.model.width, small.model.num_heads, small.model.fixed_gain) == (384, 6, False)
    assert (base.model.width, base.model.num_heads, base.model.fixed_gain) == (768, 12, True)
    for each in (small, base):
        assert each.model.num_prototypes == 65536
        assert (each.distillation.momentum, each.distillation.teacher_temperature) == (0.996, 0.07)
        assert (each.optim.weight_decay, each.optim.weight_decay_final) == (0.04, 0.4)
        assert (each.crops.num_local, each.crops.global_scale, each.crops.local_scale) == (10, (0.25, 1), (0.05, 0.25))
        assert (each.objectives.koleo, each.objectives.ibot) == (0, 0)
        assert (each.distillation.first_teacher_temperature, each.distillation.student_temperature) == (0.04, 0.1)
        assert (each.distillation.center_momentum, each.distillation.centring) == (0.9, "mean")
        assert (each.data.batch, each.optim.schedule, each.model.drop_path) == (1024, "cosine", 0.1)
        assert (each.crops.global_size, each.crops.local_size) == (224, 96)
        assert isinstance(each.train.micro_batch, int) and each.data.batch % each.train.micro_batch == 0
    for each, epochs, lr, lowest, temperature_epochs, frozen_epochs in (
        (small, 800, 5e-4 * 1024 / 256, 1e-5, 30, 1),
        (base, 400, 7.5e-4 * 1024 / 256, 2e-6, 50, 3),
    ):
        assert each.optim.lr == pytest.approx(lr)
        assert each.optim.lr * each.optim.final == pytest.approx(lowest)
        assert each.optim.warmup == pytest.approx(10 / epochs)
        assert each.distillation.temperature_warmup == pytest.approx(temperature_epochs / epochs)
        assert each.distillation.freeze_last_layer == pytest.approx(frozen_epochs / epochs)
        assert each.train.steps == pytest.approx(epochs * 1_281_167 / 1024, rel=0.01)
    assert small.optim.clip == "none"
    assert (base.optim.clip, base.optim.clip_norm) == ("per_tensor", 0.3)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_comes_back_from_its_config(size: str) -> None:
    values = json.loads(json.dumps(leaves(dino(size))))
    assert set_leaves(dino("small" if size == "tiny" else "tiny"), values) == dino(size)


def test_a_size_that_is_none() -> None:
    with pytest.raises(TriviumError, match="no DINO of size large: use one of tiny, small, base"):
        dino("large")


def test_a_run_leaves_its_teacher(run: Path) -> None:
    bundle = load(run)
    assert isinstance(bundle.model, Dino) and bundle.family == "dino"
    files = [load_file(file) for file in sorted((checkpoint(run, 4) / "training").glob("method*.safetensors"))]
    method = {name: tensor for file in files for name, tensor in file.items()}
    model = load_file(checkpoint(run, 4) / "model" / "model.safetensors")
    assert torch.equal(model["backbone.norm.weight"], bundle.model.backbone.norm.weight)
    assert "center" in method and "model.backbone.positions" in method
    assert not torch.equal(method["model.backbone.positions"], model["backbone.positions"])  # student and teacher
    assert method["center"].abs().sum() > 0
    encoded = bundle.encode_image(torch.rand(3, 3, 32, 32))
    assert encoded.pooled.shape == (3, 16) and not encoded.is_projected
    page = (run / "report.html").read_text()
    assert "no labels" in page and "Where it looks" in page and "attention maps of" in page
    stats = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["stats"]
    assert set(stats) >= {"teacher_entropy", "rows"} and not set(stats) & {"center", "shares", "features"}


def test_a_run_that_was_stopped_ends_with_the_same_bytes(run: Path, pictures: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(checkpoint(copy, 4))
    assert trivium("pretrain", copy, "--resume") == 0
    assert digests(checkpoint(copy, 4)) == digests(checkpoint(run, 4))


def test_schedules_are_shares_of_the_run() -> None:
    short = prepared(distillation__freeze_last_layer=0.5, train__steps=10)
    long = short.with_train(steps=100)
    assert long.run.method.num_steps == 100  # type: ignore[union-attr]
    optimizer = optimizers.build(long.run.method, long.run.optim)
    frozen = [group for group in optimizer.param_groups if group["freeze_until"]]
    assert [group["freeze_until"] for group in frozen] == [50]
    method: Any = long.run.method
    assert [id(p) for group in frozen for p in group["params"]] == [id(method.model.head.prototypes)]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in method.teacher.parameters()}
    assert id(method.model.head.gain) not in trained
    learned = prepared(distillation__freeze_last_layer=0.5, train__steps=10, model__fixed_gain="false")
    groups = optimizers.build(learned.run.method, learned.run.optim).param_groups
    method = learned.run.method
    frozen_names = {id(p) for group in groups if group["freeze_until"] == 5 for p in group["params"]}
    assert frozen_names == {id(method.model.head.prototypes), id(method.model.head.gain)}
    [last] = [group for group in groups if group["freeze_until"]]
    assert last["weight_decay"] == learned.recipe.optim.weight_decay > 0


def test_neighbours_are_measured_while_it_trains() -> None:
    each = prepared()
    assert each.run.evaluate is not None
    with torch.no_grad():
        found = each.run.evaluate(each.run.method)
    assert found is not None and 0 < found["knn.other_concepts.subgroup"] < 1
    assert each.bundle is not None and each.bundle.model is each.run.method.exported()


@pytest.mark.slow
def test_a_run_on_drawings_keeps_and_shows_what_was_measured_in_its_midst(tmp_path: Path) -> None:
    assert dino("tiny").train.evaluate_every == 400  # of 1,600 steps
    run = tmp_path / "run"
    assert trivium("pretrain", "dino", "--out", run, *flags_of(train__evaluate_every=2)) == 0
    measured = {line["step"]: line["results"] for line in lines_of(run / "metrics.jsonl") if "results" in line}
    assert list(measured) == [2, 4]
    figures = {
        name: result["value"] for name, result in json.loads((run / "results.json").read_text())["results"].items()
    }
    page = (run / "report.html").read_text()
    for name, title in (("subgroup", "Subgroup"), ("other_concepts.group", "Group, own concept left out")):
        curve = [measured[step][f"knn.{name}"] for step in (2, 4)]
        assert curve[1] == pytest.approx(figures[f"knn.{name}"])
        told = "; ".join(f"step {step}: {percent(share)}" for step, share in zip((2, 4), curve, strict=True))
        assert f'alt="{title}, by nearest neighbours: {told}"' in page
        assert f"<b>{percent(curve[1])}</b> against {percent(figures[f'knn.pixels.{name}'])} from pixels" in page


def test_the_end_of_a_run_on_drawings() -> None:
    evaluation, losses = prepared().held_out(lambda _: None, None)
    assert losses == {}
    for name in ("knn.other_concepts.subgroup", "knn.pixels.subgroup", "above.random_start.knn.subgroup",
                 "attention.jaccard.head_1", "attention.jaccard.random_start.head_2"):  # fmt: skip
        assert name in evaluation.results, name
    # Nothing was trained: it is its own random start.
    assert evaluation.results["above.random_start.knn.subgroup"].value == 0
    assert [figure.title for figure in evaluation.figures][:1] == ["Where it looks"]


def test_a_run_starts_from_a_dino_or_a_vit(run: Path, pictures: Path, tmp_path: Path) -> None:
    from_dino = recipe(init=run, data__images=pictures).prepare("dino", {})
    assert from_dino.notes == [f"student and teacher start from {run}, head and all"]
    expected = load(run).model.state_dict()
    method: Any = from_dino.run.method
    assert all(torch.equal(tensor, expected[name]) for name, tensor in method.model.state_dict().items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in method.teacher.state_dict().items())
    tower = tmp_path / "tower"
    assert trivium("convert", run, "--to", "timm-vit", "--out", tower) == 0
    assert isinstance(load(tower).model, ViT)
    from_vit = recipe(init=tower, data__images=pictures, objectives__ibot=1.0).prepare("dino", {})
    assert from_vit.notes == [  # its shape was stated; the mask token is what iBOT asks for
        "Sinkhorn balances whole pictures alone: iBOT's hidden patches are centred by their mean",
        f"the tower starts from {tower}, the head at random",
    ]
    method = from_vit.run.method
    assert torch.equal(method.model.backbone.positions, expected["backbone.positions"])
    assert method.model.backbone.mask_token is not None
    other = recipe(init=tower, data__images=pictures, model__num_layers=5).prepare("dino", {})
    assert other.notes[1] == f"the shape of the model is that of {tower}, whatever --size and --model say"
    assert len(other.run.method.model.backbone.encoder.blocks) == 2


def test_what_sinkhorn_leaves_to_the_mean_is_said(pictures: Path) -> None:
    sinkhorn = {"data__images": pictures, "distillation__centring": "sinkhorn"}
    assert not recipe(**sinkhorn).prepare("dino", {}).notes
    [note] = recipe(**sinkhorn, objectives__ibot=1.0).prepare("dino", {}).notes
    assert "iBOT's hidden patches are centred by their mean" in note


def test_what_does_not_fit_is_said(pictures: Path, twenty: Path) -> None:
    with pytest.raises(TriviumError, match=r"patches of 16: choose a multiple, such as --crops\.local-size 16"):
        prepared(crops__local_size=20)
    with pytest.raises(TriviumError, match="starts from a DINO or a ViT"):
        recipe(init=twenty).prepare("dino", {})
    with pytest.raises(TriviumError, match="nowhere does not exist"):
        recipe(data__images="nowhere").prepare("dino", {})


@pytest.mark.parametrize("layout", ["hf-vit", "timm-vit", "dino"])
def test_weights_go_out_and_come_back(run: Path, tmp_path: Path, layout: str, capsys: Any) -> None:
    assert trivium("convert", run, "--to", layout, "--out", tmp_path / "theirs") == 0
    assert ("left out" in capsys.readouterr().out) == (layout != "dino")
    assert trivium("convert", tmp_path / "theirs", "--to", "trivium", "--out", tmp_path / "ours") == 0
    mine, back = load(run), load(tmp_path / "ours")
    theirs = back.model.state_dict()
    prefix = "" if layout == "dino" else "backbone."
    expected = {n.removeprefix(prefix): t for n, t in mine.model.state_dict().items() if n.startswith(prefix)}
    assert theirs.keys() == expected.keys() and all(torch.equal(theirs[name], expected[name]) for name in expected)
    assert back.transform.mean == mine.transform.mean
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.allclose(back.encode_image(pixels).pooled, mine.encode_image(pixels).pooled, atol=1e-5)


def test_configs_keep_absolute_paths() -> None:
    assert replace(dino(), init="a").with_absolute_paths().init == str(Path("a").absolute())
