"""ALBEF's model alone: what a text is, what fusion reads, other sizes of pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.invariance.albef import TINY, make_batch, random_albef
from trivium.models.albef import SIZES, Albef
from trivium.models.bert import Bert
from trivium.models.encoded import EncodesImage, EncodesText, Matches
from trivium.models.vit import ViT


def pixels_of(rows: int, side: int = TINY.image_size) -> Tensor:
    return torch.randn(rows, 3, side, side, dtype=torch.float64)


def test_it_has_the_abilities_that_evaluations_ask_for() -> None:
    model = random_albef()
    assert isinstance(model, EncodesImage) and isinstance(model, EncodesText) and isinstance(model, Matches)
    assert len(model.blocks()) == TINY.image_layers + TINY.text_layers + TINY.fusion_layers


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_sizes_can_be_built(size: str) -> None:
    with torch.device("meta"):
        model = Albef(SIZES[size])
    assert model.config_dict()["width"] == SIZES[size].width


def test_what_stands_behind_the_mask_changes_nothing() -> None:
    model, batch = random_albef(), make_batch(5)
    text, image = batch.texts[0], model.encode_image(pixels_of(5))
    changed_BT = torch.where(text.mask_BT, text.ids_BT, 7)
    one, other = (model.encode_text(ids, text.mask_BT) for ids in (text.ids_BT, changed_BT))
    assert torch.allclose(one.projected, other.projected, atol=1e-13)
    fused, again = model.fuse(image, one), model.fuse(image, other)
    assert torch.allclose(fused.tokens[text.mask_BT], again.tokens[text.mask_BT], atol=1e-12)
    assert torch.allclose(model.match(fused), model.match(again), atol=1e-13)


def test_asking_for_some_positions_gives_those_of_all() -> None:
    model, batch = random_albef(), make_batch(4)
    text, pixels = batch.texts[0], pixels_of(4)
    image, words = model.encode_image(pixels), model.encode_text(text.ids_BT, text.mask_BT)
    assert torch.allclose(model.encode_image(pixels, rows=1).projected, image.projected, atol=1e-13)
    assert torch.allclose(model.encode_text(text.ids_BT, text.mask_BT, 1).projected, words.projected, atol=1e-13)
    whole, first = model.fuse(image, words), model.fuse(image, words, rows=1)
    assert torch.allclose(model.match(first), model.match(whole), atol=1e-13)
    assert torch.allclose(model.predict_words(first.states), model.predict_words(whole.states[:, :1]), atol=1e-13)


def test_positions_of_another_size_are_resampled_bicubically() -> None:
    """The class token's stays; the others as a picture of their grid, corners not aligned (the public code)."""
    model, pixels = random_albef(), pixels_of(2, 48)
    grid, new = TINY.grid, 48 // TINY.patch_size
    table = model.image.positions[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(new, new), mode="bicubic", align_corners=False)
    larger = Albef(replace(TINY, image_size=48)).double()
    state = dict(model.state_dict())
    patches = table.permute(0, 2, 3, 1).flatten(1, 2)
    state["image.positions"] = torch.cat([model.image.positions[:, :1], patches], dim=1)
    larger.load_state_dict(state)
    assert torch.allclose(model.encode_image(pixels).tokens, larger.encode_image(pixels).tokens, atol=1e-12)


def test_fitted_to_another_size_it_is_the_same_function_with_a_position_for_each_patch() -> None:
    model = random_albef()
    side = 2 * TINY.image_size
    fitted = model.for_pictures_of(side)
    assert model.for_pictures_of(TINY.image_size) is model
    assert fitted.config == replace(TINY, image_size=side)
    assert fitted.image.positions.shape[1] == 1 + fitted.config.grid**2 == 1 + 4 * TINY.grid**2
    pixels_BCHW = torch.randn(2, 3, side, side, dtype=torch.float64)
    assert torch.allclose(fitted.encode_image(pixels_BCHW).tokens, model.encode_image(pixels_BCHW).tokens, atol=1e-12)
    assert (
        fitted.image.positions.requires_grad and fitted.image.positions.data_ptr() != model.image.positions.data_ptr()
    )


def test_parts_of_what_was_encoded() -> None:
    model, batch = random_albef(), make_batch(5)
    whole = model.encode_text(batch.texts[0].ids_BT, batch.texts[0].mask_BT)
    parts = whole.split(2)
    assert [len(part.states) for part in parts] == [2, 2, 1]
    assert torch.allclose(torch.cat([part.projected for part in parts]), whole.projected, atol=1e-14)
    assert torch.equal(torch.cat([part.mask for part in parts if part.mask is not None]), batch.texts[0].mask_BT)
    assert len(model.encode_image(pixels_of(3)).split(3)) == 1


def test_it_starts_from_a_vit_and_a_bert() -> None:
    """The paper's start: 14 x 14 positions become ours, BERT's first blocks text, its last ones fusion."""
    model = random_albef()
    tower = ViT(replace(TINY.image_tower, image_size=24, mask_token=True)).double()
    bert = Bert(replace(TINY.text_tower, num_layers=5, mlm_head=True, pooler=True)).double()
    crossing = model.fusion.blocks[0].cross_attention.key_value.weight.clone()
    with torch.no_grad():
        for parameter in (*tower.parameters(), *bert.parameters()):
            parameter.copy_(torch.randn_like(parameter))
    model.start_image(tower)
    model.start_text(bert)
    table = tower.positions[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(4, 4), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(model.image.positions[:, 1:], table)
    assert torch.equal(model.image.positions[:, :1], tower.positions[:, :1])
    assert torch.equal(model.image.encoder.blocks[1].mlp_in.weight, tower.encoder.blocks[1].mlp_in.weight)
    blocks = [*model.text.encoder.blocks, *model.fusion.blocks]
    for mine, theirs in zip(blocks, bert.encoder.blocks, strict=True):
        assert torch.equal(mine.attention.qkv.weight, theirs.attention.qkv.weight)
        assert torch.equal(mine.mlp_norm.bias, theirs.mlp_norm.bias)
    assert torch.equal(model.fusion.blocks[0].cross_attention.key_value.weight, crossing)
    assert torch.equal(model.text.embeddings.word.weight, bert.embeddings.word.weight)
    states = torch.randn(3, TINY.width, dtype=torch.float64)
    assert torch.equal(model.predict_words(states), bert.predict_words(states))
