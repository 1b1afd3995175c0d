"""ALBEF as a recipe: what its sizes say, what `prepare` makes of data, a run that resumes with teacher and queues."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trivium as package
from tests.recipes.shop import THINGS, checkpoint, digests, lines_of, trivium
from trivium.bundle import Bundle
from trivium.cli.overrides import set_overrides, split_overrides
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.evaluate.reranking import judges
from trivium.methods.albef import AlbefMethod
from trivium.models.albef import Albef
from trivium.models.bert import Bert
from trivium.models.finetuned import HeadConfig
from trivium.models.vit import ViT
from trivium.recipes import validation
from trivium.recipes.albef import AlbefRecipe, PreparedAlbef, albef
from trivium.recipes.prepared import on_pairs
from trivium.train.config import leaves, set_leaves
from trivium.train.initial import initialise
from trivium.train.optim import build, learning_rate

# Fits every test here: a step takes a few hundredths of a second.
TINY = {
    "model.width": 32, "model.mlp-width": 64, "model.num-heads": 2, "model.projection-width": 16,
    "model.image-layers": 1, "model.text-layers": 1, "model.fusion-layers": 2, "model.image-size": 32,
    "model.patch-size": 8, "data.batch": 8, "train.workers": 0, "train.precision": "fp32", "train.threads": 1,
    "train.log-every": 1, "train.steps": 6, "objectives.queue": "null",
}  # fmt: skip


def words_of(shop: Path, **changes: object) -> list[str]:
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    files = [str(shop / "goods.csv"), str(shop / "goods.jsonl")]
    flags = [word for name, value in {**TINY, **named}.items() for word in (f"--{name}", str(value))]
    return ["--data.pairs", *files, "--data.validation", *files, *flags]


def recipe_on(shop: Path, **changes: object) -> AlbefRecipe:
    return set_overrides(albef("tiny"), split_overrides(words_of(shop, **changes)))


@pytest.fixture(scope="module")
def prepared(shop: Path) -> PreparedAlbef:
    return recipe_on(shop).prepare("albef", {"size": "tiny"})


def test_base_is_the_published_run() -> None:
    recipe = albef("base")
    model, optim, data = recipe.model, recipe.optim, recipe.data
    assert (model.width, model.image_layers, model.text_layers, model.fusion_layers) == (768, 12, 6, 6)
    assert (model.image_size, model.projection_width, model.dropout) == (256, 256, 0.1)
    assert (data.batch, data.max_length, data.crop_scale, data.flip) == (512, 25, (0.2, 1.0), 0.5)
    assert (data.random_changes, albef("tiny").data.random_changes) == (2, 0)
    assert (optim.betas, optim.weight_decay, optim.clip) == ((0.9, 0.999), 0.02, "none")
    assert optim.lr * learning_rate(optim, 1999, recipe.train.steps) == pytest.approx(1e-4)
    assert optim.lr * learning_rate(optim, recipe.train.steps, recipe.train.steps) == pytest.approx(1e-5)
    assert (recipe.distillation.itc, recipe.distillation.mlm, recipe.distillation.ramp) == (0.4, 0.4, None)
    assert recipe.distillation.momentum(recipe.train.steps) == pytest.approx(0.995)
    assert data.batch % recipe.train.micro_batch == 0 == recipe.train.micro_batch % recipe.objectives.pool


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_comes_back_from_its_config(size: str) -> None:
    recipe = albef(size)
    values = json.loads(json.dumps(leaves(recipe)))
    assert set_leaves(albef("small" if size == "tiny" else "tiny"), values) == recipe


def test_no_other_size() -> None:
    with pytest.raises(TriviumError, match="use one of tiny, small, base"):
        albef("huge")


def test_a_queue_holds_a_quarter_of_the_pairs(shop: Path, prepared: PreparedAlbef) -> None:
    method = prepared.run.method
    assert isinstance(method, AlbefMethod)
    assert len(method.image_queue) == len(THINGS) // 4 == 6
    assert method.epoch_steps == 3 and method.num_steps == 6
    assert not prepared.notes
    longer = recipe_on(shop, objectives__queue=7).prepare("albef", {})
    assert len(longer.run.method.text_queue) == 7  # type: ignore[union-attr, arg-type]
    assert "more than a quarter of the 24 pairs" in longer.notes[0] and "--objectives.queue 6" in longer.notes[0]


def test_positions_of_texts_begin_smaller_than_words_where_asked(shop: Path, prepared: PreparedAlbef) -> None:
    whole = recipe_on(shop, init_positions=1.0).prepare("albef", {}).run.method.state_dict()
    for name, tensor in prepared.run.method.state_dict().items():
        if "embeddings.position" in name or "embeddings.segment" in name:
            torch.testing.assert_close(tensor, 0.3 * whole[name], msg=name)
        else:
            assert torch.equal(tensor, whole[name]), name


def test_post_norm_blocks_begin_smaller_than_the_rest_where_asked(shop: Path, prepared: PreparedAlbef) -> None:
    whole = recipe_on(shop, init_blocks=1.0).prepare("albef", {}).run.method.state_dict()
    for name, tensor in prepared.run.method.state_dict().items():
        in_blocks = "text.encoder." in name or "fusion." in name
        torch.testing.assert_close(tensor, (0.5 if in_blocks and tensor.ndim > 1 else 1) * whole[name], msg=name)


def test_the_temperature_is_decayed_where_the_published_recipe_is(shop: Path, prepared: PreparedAlbef) -> None:
    words = words_of(shop, train__micro_batch=8, optim__weight_decay=0.03)
    small = set_overrides(albef("small"), split_overrides(words)).prepare("albef", {"size": "small"})
    for run, decay in ((small.run, 0.03), (prepared.run, 0.0)):
        temperature = run.method.get_parameter("model.temperature")
        groups = build(run.method, run.optim).param_groups
        assert [g["full_decay"] for g in groups if any(each is temperature for each in g["params"])] == [decay]
    assert not small.recipe.optim.groups and "optim.groups.0.pattern" not in small.run.config.values


def test_captions_that_are_cut_are_told_before_the_first_step(shop: Path) -> None:
    said = recipe_on(shop, data__max_length=3).prepare("albef", {}).notes
    assert len(said) == 2, "of the pairs and of those held out"
    assert "data.pairs: 36 captions have more than 3 tokens and are cut there; the first: " in said[0]
    assert "goods.csv (line 2)" in said[0] and said[1].startswith("data.validation: 36 captions")


def test_what_runs_is_a_function_of_the_recipe_and_its_seed(shop: Path, prepared: PreparedAlbef) -> None:
    again = recipe_on(shop).prepare("albef", {"size": "tiny"}).run.method.state_dict()
    for name, tensor in prepared.run.method.state_dict().items():
        assert torch.equal(again[name], tensor), name
    other = recipe_on(shop, train__seed=1).prepare("albef", {}).run.method.state_dict()
    assert not torch.equal(other["image_queue"], again["image_queue"])


def test_captions_end_open_and_the_config_states_their_vocabulary(prepared: PreparedAlbef) -> None:
    bundle = prepared.bundle
    assert bundle is not None and bundle.tokenizer is not None
    [ids] = bundle.tokenizer.encode(["A red bar."], 32)
    assert bundle.tokenizer.sep_id not in ids and len(ids) == 4
    assert prepared.run.config.values["model.vocab_size"] == bundle.tokenizer.vocab_size


def test_a_run_of_another_length_has_other_schedules(prepared: PreparedAlbef) -> None:
    method = prepared.run.method
    settled = prepared.with_train(steps=500)
    assert settled.run.method is method and method.num_steps == 500
    assert method.distillation.momentum(method.num_steps) == pytest.approx(1 - 1 / 50)  # type: ignore[union-attr]
    prepared.with_train(steps=6)


def test_a_ramp_in_samples_is_one_in_steps_of_this_batch(shop: Path) -> None:
    recipe = recipe_on(shop, distillation__ramp_samples=100, data__batch=8)
    method = recipe.prepare("albef", {"size": "tiny"}).run.method
    assert method.distillation.ramp == 13  # type: ignore[union-attr]


def test_chance_is_what_a_model_without_knowledge_reaches(prepared: PreparedAlbef) -> None:
    chance = prepared.chance()
    assert chance["itc"] == pytest.approx(math.log(8 + 6))
    assert chance["itm"] == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert 0 < chance["mlm"] <= math.log(prepared.recipe.model.vocab_size)
    untrained = validation.losses(prepared.run.method, prepared.validation, 0, 8)
    assert untrained.keys() == chance.keys()
    assert all(untrained[loss] > 0.8 * value for loss, value in chance.items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objectives__pool": 3}, "micro-batches of 8 pairs cut pools of 3 in two"),
        ({"train__micro_batch": 1}, "a micro-batch of one pair holds no false one for ITM"),
        ({"objectives__pool": 1}, "--objectives.pool 1: this must be a whole number of 2 or more"),
        ({"objectives__itc": 0, "objectives__itm": 0, "objectives__mlm": 0}, "nothing would be trained"),
        ({"data__max_length": 65}, "texts of 65 tokens do not fit a model of 64 positions"),
        ({"data__image_size": 30}, "cannot be cut into patches of 8"),
        ({"model__num_heads": 5}, "cannot be shared by 5 heads"),
        ({"distillation__itc": 1.5}, "--distillation.itc 1.5: this must be a share"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(shop: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(TriviumError) as raised:
        recipe_on(shop, **changes).prepare("albef", {})
    assert sentence in str(raised.value)


def test_without_itm_a_micro_batch_may_hold_one_pair(shop: Path) -> None:
    recipe = recipe_on(shop, train__micro_batch=1, objectives__itm=0, objectives__pool=3)
    assert recipe.prepare("albef", {"size": "tiny"}).with_train(steps=7).run.train.micro_batch == 1


def test_it_is_known_which_parts_no_loss_has_reached(shop: Path, prepared: PreparedAlbef, tmp_path: Path) -> None:
    """Masked words train the fusion and not the matching head; a file may have come without either."""
    assert prepared.bundle.untrained == ()
    without = recipe_on(shop, objectives__itm=0).prepare("albef", {"size": "tiny"}).bundle
    assert without.fusion_trained and without.untrained == ("itm_head",) and not judges(without)
    projections = ("image_projection", "text_projection")
    replace(prepared.bundle, untrained=("itm_head", *projections)).save(tmp_path / "start")
    for off, left in (("itc", projections), ("itm", ("itm_head",)), ("mlm", ())):
        recipe = recipe_on(shop, init=tmp_path / "start", **{f"objectives__{off}": 0})
        again = recipe.prepare("albef", {"size": "tiny"})
        assert again.bundle.untrained == left
        if off == "itc":
            found = on_pairs(again.bundle, recipe.data, again.sources, lambda _: None)
            [why] = found.not_applicable
            assert not found.results and "nothing has trained this model's projections" in why


@pytest.fixture(scope="module")
def twelve(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps in micro-batches of 4 that kept its checkpoints of steps 6 and 12."""
    out = tmp_path_factory.mktemp("albef") / "twelve"
    words = words_of(shop, train__steps=12, train__save_every=6, train__micro_batch=4, distillation__reach=20)
    assert trivium("pretrain", "albef", "--size", "tiny", "--out", out, *words) == 0
    return out


def test_a_run_keeps_teacher_queues_and_their_positions(twelve: Path) -> None:
    kept = load_file(checkpoint(twelve, 12) / "training" / "method.safetensors")
    assert int(kept["queue_pointer"]) == 12 * 8 % 6
    assert (kept["queue_same"] >= 0).all() and kept["image_queue"].shape == (6, 16)
    assert any(name.startswith("teacher.fusion") for name in kept)
    logged = [line for line in lines_of(twelve / "metrics.jsonl") if "losses" in line]
    assert set(logged[0]["losses"]) == {"itc", "itm", "mlm"}
    assert set(logged[0]["stats"]) == {"itc_kl", "itm_left_out"}, "the teacher reads no masked word yet"
    assert logged[0]["stats"]["itc_kl"] == pytest.approx(logged[0]["losses"]["itc"])
    for line in logged[1:]:  # the ramp has begun: the papers' form lies below by the entropy of what is taught
        assert set(line["stats"]) == {"itc_kl", "mlm_kl", "itm_left_out"}
        assert all(line["stats"][f"{name}_kl"] < line["losses"][name] for name in ("itc", "mlm"))
    results = json.loads((twelve / "results.json").read_text())["results"]
    assert {"losses.itc.final", "losses.itm.chance", "retrieval.pairs.text_to_image_r10"} <= set(results)


def test_six_and_six_steps_are_twelve(twelve: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(twelve, out)
    shutil.rmtree(checkpoint(out, 12))
    (out / "results.json").unlink()
    assert trivium("pretrain", "albef", "--out", out, "--resume") == 0
    assert digests(checkpoint(out, 12)) == digests(checkpoint(twelve, 12))


def test_a_model_folder_is_a_start_and_a_bundle(shop: Path, twelve: Path, tmp_path: Path) -> None:
    bundle = package.load(twelve)  # type: ignore[operator]
    assert isinstance(bundle.model, Albef) and bundle.false_pairs == pytest.approx(2 / 3)
    pictures = [str(shop / "pictures" / f"{colour}-{shape}.png") for colour, shape in THINGS[:3]]
    image, text = bundle.encode_image(pictures), bundle.encode_text(["a red circle"])
    assert (image.projected @ text.projected.T).shape == (3, 1)
    assert 0 <= float(bundle.match(pictures[0], "a red circle")) <= 1
    started = recipe_on(shop, init=str(twelve)).prepare("albef", {})
    assert "brings its own vocabulary" in started.notes[0]
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(started.run.method.state_dict()[f"model.{name}"], tensor)
    teacher = started.run.method.state_dict()["teacher.image.class_token"]
    assert torch.equal(teacher, bundle.model.image.class_token)
    assert replace(started.recipe.model, dropout=0.0) == bundle.model.config
    head = HeadConfig("colours", "fused", "class", bundle.model.config.width, 2)
    replace(bundle, head=head.build(), head_config=head, labels=["red", "blue"]).save(tmp_path / "tuned")
    assert "left out is the head" in recipe_on(shop, init=str(tmp_path / "tuned")).prepare("albef", {}).notes[0]


def test_a_picture_that_is_not_there_is_replaced_and_named(shop: Path, tmp_path: Path) -> None:
    entries = [{"image": str(shop / "pictures" / f"{c}-{s}.png"), "caption": [f"a {c} {s}"]} for c, s in THINGS]
    entries[5]["image"] = "gone.png"
    annotations = tmp_path / "pairs.json"
    annotations.write_text(json.dumps(entries))
    words = [word for name, value in (TINY | {"validate": 0}).items() for word in (f"--{name}", str(value))]
    out = tmp_path / "run"
    assert trivium("pretrain", "albef", "--out", out, "--data.pairs", annotations, *words) == 0
    skipped = (out / "skipped.jsonl").read_text()
    assert "pairs.json (entry 5): its picture" in skipped and "gone.png does not exist" in skipped


def test_towers_start_from_a_vit_and_a_bert(shop: Path, tmp_path: Path) -> None:
    """Model folders of both; the BERT brings its vocabulary, which is then read as captions are."""
    recipe = recipe_on(shop)
    tokenizer = Tokenizer.train([f"a {colour} {shape}" for colour, shape in THINGS], 200)
    config = replace(
        recipe.model.text_tower, num_layers=3, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, mlm_head=True
    )
    vit, bert = ViT(replace(recipe.model.image_tower, image_size=16)), Bert(config)
    initialise(vit, 5)
    initialise(bert, 6)
    Bundle("vit", vit, None, ImageTransform(16)).save(tmp_path / "vit")
    Bundle("bert", bert, tokenizer, ImageTransform(), max_length=32).save(tmp_path / "bert")
    towers = {"init_image": str(tmp_path / "vit"), "init_text": str(tmp_path / "bert")}
    prepared = replace(recipe, **towers).prepare("albef", {})
    method = prepared.run.method
    assert isinstance(method, AlbefMethod)
    for model in (method.model, method.teacher):
        assert torch.equal(model.image.class_token, vit.class_token)
        assert torch.equal(model.fusion.blocks[1].mlp_in.weight, bert.encoder.blocks[2].mlp_in.weight)
    assert prepared.bundle is not None and prepared.bundle.tokenizer is not None
    assert tokenizer.sep_id not in prepared.bundle.tokenizer.encode(["a red bar"], 32)[0]
    assert len(prepared.notes) == 2
    for changes, sentence in (
        ({"init_image": towers["init_text"]}, "starts from a ViT"),
        ({"init_text": towers["init_image"]}, "start from a BERT"),
        ({"init": "x", "init_image": "y"}, "--init starts the whole model"),
        (
            {"model": replace(recipe.model, fusion_layers=1)},
            r"is of another shape than the model's: set --model\.fusion-layers 2",
        ),
    ):
        with pytest.raises(TriviumError, match=sentence):
            replace(recipe, **(towers if "model" in changes else {}) | changes).prepare("albef", {})
