"""FLAVA as a recipe: what its sizes say, how its values travel, and what `prepare` makes of data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.recipes.shop import LOSSES, THINGS, checkpoint, data_of, flags, trivium
from trivium.cli.overrides import set_overrides, split_overrides
from trivium.errors import TriviumError
from trivium.recipes import validation
from trivium.recipes.flava import FlavaRecipe, PreparedFlava, flava
from trivium.train.budget import OutOfMemory
from trivium.train.config import leaves, set_leaves
from trivium.train.optim import learning_rate
from trivium.train.protocol import Batch
from trivium.train.trainer import evaluate as evaluated


def recipe_on(shop: Path, **changes: object) -> FlavaRecipe:
    """The tiny recipe of these tests on the shop's data, with validation pairs."""
    data = data_of(shop)
    words = [*data, "--data.validation", *data[1:3], *flags(**changes)]
    return set_overrides(flava("tiny"), split_overrides(words))


@pytest.fixture(scope="module")
def prepared(shop: Path) -> PreparedFlava:
    return recipe_on(shop).prepare("flava", {"size": "tiny"})


def state(prepared: PreparedFlava) -> dict[str, Tensor]:
    return prepared.run.method.state_dict()


# ------------------------------------------------------------------------------------------------ sizes


def test_base_is_the_published_run() -> None:
    """Singh et al. 2022, section 4 and supplement A."""
    recipe = flava("base")
    assert (recipe.model.width, recipe.model.image_layers, recipe.model.multimodal_layers) == (768, 12, 6)
    assert recipe.data.batch == 8192
    assert (recipe.data.pairs_ratio, recipe.data.images_ratio, recipe.data.text_ratio) == (0.70, 0.15, 0.15)
    assert recipe.optim.lr == 1e-3
    assert recipe.optim.betas == (0.9, 0.999)
    assert recipe.optim.weight_decay == 0.1
    assert learning_rate(recipe.optim, 9_999, recipe.train.steps) == 1.0
    assert learning_rate(recipe.optim, 999, recipe.train.steps) == pytest.approx(0.1)
    assert recipe.objectives.masked_share == 1.0  # nothing that changes training, unless it is asked for
    assert (recipe.data.max_length, recipe.data.length_alone) == (77, 512)  # of a caption, of a text alone
    assert recipe.data.batch % recipe.train.micro_batch == 0


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_comes_back_from_its_config(size: str) -> None:
    recipe = flava(size)
    values = json.loads(json.dumps(leaves(recipe)))
    assert set_leaves(flava("small" if size == "tiny" else "tiny"), values) == recipe


@given(st.text(max_size=8).filter(lambda size: size not in ("tiny", "small", "base")))
def test_no_other_size(size: str) -> None:
    with pytest.raises(TriviumError, match="use one of tiny, small, base"):
        flava(size)


# ---------------------------------------------------------------------------------------------- prepare


def test_what_runs_is_a_function_of_the_recipe_and_its_seed(shop: Path, prepared: PreparedFlava) -> None:
    again = recipe_on(shop).prepare("flava", {"size": "tiny"})
    assert again.run.config.digest() == prepared.run.config.digest()
    for name, tensor in state(prepared).items():
        assert torch.equal(state(again)[name], tensor), name
    assert again.bundle.tokenizer.encode(["a red bar"], 32) == prepared.bundle.tokenizer.encode(["a red bar"], 32)
    other = recipe_on(shop, train__seed=1).prepare("flava", {"size": "tiny"})
    assert not torch.equal(state(other)["model.image.class_token"], state(prepared)["model.image.class_token"])


def test_the_published_zeros_are_an_option_and_change_nothing_else(shop: Path, prepared: PreparedFlava) -> None:
    assert not any(flava(size).init_zeros for size in ("tiny", "small", "base"))
    published = state(recipe_on(shop, init_zeros="true").prepare("flava", {"size": "tiny"}))
    zeros = {
        f"model.{n}" for n in ("image.class_token", "image.mask_token", "image.positions", "multimodal.class_token")
    }
    for name, tensor in state(prepared).items():
        assert torch.equal(published[name], torch.zeros_like(tensor) if name in zeros else tensor), name
        assert name not in zeros or tensor.all(), name


def test_the_config_states_the_shape_that_was_found(prepared: PreparedFlava) -> None:
    values = prepared.run.config.values
    assert values["model.vocab_size"] == prepared.bundle.tokenizer.vocab_size < 4096
    assert values["model.num_codes"] == prepared.bundle.image_tokenizer.num_codes == 16
    assert prepared.bundle.model.config == prepared.recipe.model
    assert prepared.bundle.max_length == prepared.recipe.data.max_length


def test_settling_a_budget_opens_nothing_again(prepared: PreparedFlava) -> None:
    settled = prepared.with_train(steps=7, minutes=None, micro_batch=4)
    assert settled.run.method is prepared.run.method
    assert settled.sources is prepared.sources
    assert settled.run.train == settled.recipe.train == replace(prepared.recipe.train, steps=7, micro_batch=4)
    assert settled.run.config.values == prepared.run.config.values | {"train.steps": 7, "train.micro_batch": 4}
    assert [settled.run.mixture.stream_at(step).micro_batch for step in range(3)] == [4, 4, 4]
    assert prepared.recipe.train.steps == 6


def test_the_streams_are_those_whose_data_is_there(shop: Path, prepared: PreparedFlava) -> None:
    assert {prepared.run.mixture.stream_at(step).name for step in range(3)} == {"pairs", "images", "text"}
    recipe = recipe_on(shop)
    pairs_alone = replace(recipe, data=replace(recipe.data, images=(), text=()))
    mixture = pairs_alone.prepare("flava", {}).run.mixture
    assert {mixture.stream_at(step).name for step in range(20)} == {"pairs"}


def test_a_text_alone_may_be_longer_than_a_caption(shop: Path) -> None:
    """Lines are cut into windows that its length holds, and neither it nor a caption is cut by the other's."""
    lines = shop.parent / "long.txt"
    lines.write_text(" ".join(f"{colour} {shape}" for colour, shape in THINGS) + "\n")
    recipe = recipe_on(shop, data__max_length=8)
    recipe = replace(recipe, data=replace(recipe.data, text=(str(lines),)))

    def widths(recipe: FlavaRecipe) -> dict[str, int]:
        mixture, found = recipe.prepare("flava", {}).run.mixture, {}
        for [batch] in mixture.loader(0, 0, 1, 3):
            if batch.texts:
                found[batch.stream] = batch.texts[0].mask_BT.sum(1).max().item()
        return found

    short = widths(recipe)
    long = widths(replace(recipe, data=replace(recipe.data, text_length=40)))
    assert short["pairs"] == long["pairs"] <= 8 and short["text"] <= 8
    assert 2 * short["text"] < long["text"] <= 40


def test_the_sigmoid_form_has_a_bias_that_is_trained_and_saved_with_the_method(
    shop: Path, prepared: PreparedFlava, tmp_path: Path
) -> None:
    assert "logit_bias" not in state(prepared)
    run, words = tmp_path / "run", (*data_of(shop), *flags(objectives__contrastive_form="sigmoid"))
    assert trivium("pretrain", "flava", "--out", run, *words) == 0
    [bias] = load_file(checkpoint(run, 6) / "training" / "method.safetensors")["logit_bias"]
    assert bias != -10.0 and abs(bias + 10.0) < 0.1
    assert "logit_bias" not in load_file(checkpoint(run, 6) / "model" / "model.safetensors")


# ------------------------------------------------------------------------------------- losses and chance


def test_validation_losses_are_the_same_at_each_call_and_change_nothing(prepared: PreparedFlava) -> None:
    before = {name: tensor.clone() for name, tensor in state(prepared).items()}
    first = validation.losses(prepared.run.method, prepared.validation, 0, 8)
    assert first.keys() == set(LOSSES)
    assert validation.losses(prepared.run.method, prepared.validation, 0, 8) == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(prepared).items())


def test_validation_takes_the_micro_batch_of_the_recipe_and_its_losses_stay(shop: Path) -> None:
    """Neither the model nor the image tokenizer ever sees more rows at once than a step does."""
    whole = recipe_on(shop, data__batch=16).prepare("flava", {})
    method = whole.run.method
    losses = evaluated(whole.run)["losses"]
    chance = whole.chance()
    seen = []

    def at_most_four(batch: Batch) -> None:
        seen.append(len(batch))
        if len(batch) > 4:
            raise MemoryError

    for name in ("embed", "separate", "codes"):
        plain = getattr(method, name)
        setattr(method, name, lambda batch, *more, plain=plain: (at_most_four(batch), plain(batch, *more))[1])
    small = whole.with_train(micro_batch=4)
    assert evaluated(small.run)["losses"] == pytest.approx(losses, rel=1e-5)
    assert small.chance() == pytest.approx(chance)
    assert max(seen) == 4
    with pytest.raises(
        OutOfMemory, match=r"validation on stream .* with 16 samples at once: use --train\.micro-batch 8 "
    ):
        evaluated(whole.run)
    with pytest.raises(OutOfMemory, match="the image tokenizer with 16 samples at once"):
        whole.chance()


def test_validation_is_on_every_row_and_chance_knows_the_small_last_batch(shop: Path) -> None:
    """24 rows in batches of 16 and 8: a contrastive row is one of its own batch, so chance weighs both logarithms."""
    assert len(THINGS) == 24
    prepared = recipe_on(shop, data__batch=16).prepare("flava", {})
    sizes = {stream: [len(batch) for batch in batches] for stream, batches in prepared.validation.items()}
    eight_passes = [16, 8] * 8
    assert sizes == {"pairs": eight_passes, "images": eight_passes, "text": eight_passes}
    assert prepared.chance()["contrastive"] == pytest.approx((16 * math.log(16) + 8 * math.log(8)) / 24)


def test_chance_is_what_a_model_without_knowledge_reaches(prepared: PreparedFlava) -> None:
    """No constant guess does better on these samples, and a new model does about as well as chance, or worse."""
    chance = prepared.chance()
    assert chance.keys() == set(LOSSES)
    assert chance["contrastive"] == pytest.approx(math.log(8))
    assert chance["itm"] == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9))
    for loss in ("mim", "mmm_image"):
        assert 0 < chance[loss] <= math.log(16)
    for loss in ("mlm", "mmm_text"):
        assert 0 < chance[loss] <= math.log(prepared.recipe.model.vocab_size)
    untrained = validation.losses(prepared.run.method, prepared.validation, 0, 8)
    assert all(untrained[loss] > 0.8 * chance[loss] for loss in ("mim", "mlm", "mmm_image", "mmm_text"))
