"""Heads that start at the frequencies of their labels."""

from __future__ import annotations

from dataclasses import replace

import torch

from trivium.recipes import validation
from trivium.recipes.flava import FlavaRecipe, flava


def small(**changes: object) -> FlavaRecipe:
    recipe = flava("tiny")
    model = replace(
        recipe.model, width=32, mlp_width=64, num_heads=2, image_layers=1, text_layers=1, multimodal_layers=1,
        projection_width=32, vocab_size=1000, num_codes=64,
    )  # fmt: skip
    train = replace(recipe.train, workers=0)
    return replace(recipe, model=model, train=train, validate=256, **changes)


def test_a_head_begins_at_the_loss_of_a_guess_from_frequencies() -> None:
    losses = {}
    for label_frequencies in (True, False):
        prepared = small(label_frequencies=label_frequencies).prepare("flava", {"size": "tiny"})
        losses[label_frequencies] = validation.losses(prepared.run.method, prepared.validation, 0, 128)
    chance = prepared.chance()
    for name in ("mim", "mmm_image", "mlm", "mmm_text"):
        # The bias alone would lose the cross-entropy of training against held-out frequencies: chance and a little.
        assert chance[name] - 0.1 < losses[True][name] < losses[False][name] - 0.2, name
    assert abs(losses[True]["mim"] - chance["mim"]) < 0.35
    assert abs(losses[True]["itm"] - chance["itm"]) < 0.02 < losses[False]["itm"] - chance["itm"]


def test_nothing_else_changes() -> None:
    with_, without = (
        small(label_frequencies=on).prepare("flava", {"size": "tiny"}).run.method.model.state_dict()
        for on in (True, False)
    )
    changed = {name for name in with_ if not torch.equal(with_[name], without[name])}
    heads = ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head", "itm_head")
    assert changed == {f"{head}.decoder.bias" for head in heads}
