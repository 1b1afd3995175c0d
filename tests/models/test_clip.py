"""What a CLIP is: its size, and what its towers hand out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trivium.invariance.clip import TINY, make_batch, random_clip
from trivium.models.clip import SIZES, Clip, ClipConfig


def num_parameters(config: ClipConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Clip(config).parameters())


def test_the_published_models_have_their_published_number_of_parameters() -> None:
    assert num_parameters(ClipConfig()) == 149_620_737
    assert num_parameters(ClipConfig(patch_size=32)) == 151_277_313
    large = ClipConfig(
        image_width=1024, image_layers=24, image_heads=16, image_mlp_width=4096, patch_size=14,
        text_width=768, text_heads=12, text_mlp_width=3072, projection_width=768,
    )  # fmt: skip
    assert num_parameters(large) == 427_616_513


def test_sizes_grow_and_their_heads_are_64_wide() -> None:
    counts = [num_parameters(config) for config in SIZES.values()]
    assert list(SIZES) == ["tiny", "small", "base"]
    assert counts[0] * 5 < counts[1] and counts[1] * 2 < counts[2]
    for config in SIZES.values():
        assert config.image_size % config.patch_size == 0
        assert config.image_width == 64 * config.image_heads and config.text_width == 64 * config.text_heads
    assert ClipConfig.of_size("tiny", vocab_size=99) == replace(SIZES["tiny"], vocab_size=99)


def test_pooled_is_the_class_token_and_the_end_token_after_the_norm_and_projected_has_unit_length() -> None:
    model, texts = random_clip(), make_batch(5).texts[0]
    image = model.encode_image(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    text = model.encode_text(texts.ids_BT, texts.mask_BT)
    end_B = texts.mask_BT.sum(1) - 1
    assert len(end_B.unique()) > 2
    for encoded, place_B, projection in ((image, torch.zeros(5, dtype=torch.int64), model.image_projection),
                                         (text, end_B, model.text_projection)):  # fmt: skip
        assert torch.allclose(encoded.pooled, encoded.tokens[torch.arange(5), place_B], rtol=0, atol=1e-12)
        direction = projection(encoded.pooled)
        assert torch.allclose(encoded.projected, direction / direction.norm(dim=-1, keepdim=True), rtol=0, atol=1e-12)


def test_the_last_block_at_the_pooled_position_alone_gives_the_same_rows_and_gradients() -> None:
    pixels_BCHW, texts = torch.randn(5, 3, 32, 32, dtype=torch.float64), make_batch(5).texts[0]
    found = []
    for pooled_only in (False, True):
        model = random_clip()
        image = model.encode_image(pixels_BCHW, pooled_only)
        text = model.encode_text(texts.ids_BT, texts.mask_BT, pooled_only)
        assert (image.states.shape[1], text.states.shape[1]) == ((1, 1) if pooled_only else (17, 9))
        (image.projected.sin().sum() + text.projected.cos().sum()).backward()
        grads = [p.grad for name, p in model.named_parameters() if name != "logit_scale"]
        found.append([image.projected, text.projected, *grads])
    for whole, few in zip(*found, strict=True):
        assert float((whole - few).detach().abs().max()) <= 1e-12


def test_a_word_is_seen_by_what_follows_and_by_nothing_before() -> None:
    model = random_clip()
    ids_BT = torch.randint(1, 50, (2, 9))
    other_BT = ids_BT.clone()
    other_BT[:, 4] = 55
    before, after = model.encode_text(ids_BT).states, model.encode_text(other_BT).states
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before[:, 4:] - after[:, 4:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("end_id", [60, None])
def test_padding_changes_nothing_whatever_its_length_or_id(end_id: int | None) -> None:
    model, texts = random_clip(replace(TINY, end_id=end_id)), make_batch(4).texts[0]
    for row in range(4):
        length = int(texts.mask_BT[row].sum())
        alone = model.encode_text(texts.ids_BT[row : row + 1, :length]).projected
        for pad in (0, 60):
            ids_1T = torch.full((1, 16), pad)
            ids_1T[0, :length] = texts.ids_BT[row, :length]
            assert torch.allclose(model.encode_text(ids_1T).projected, alone, rtol=0, atol=1e-12)


def test_pictures_enter_normalised_once_more() -> None:
    """Before the first block: adding the same to every channel of every position there changes nothing."""
    model, pixels_BCHW = random_clip(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model.encode_image(pixels_BCHW).states
    with torch.no_grad():
        model.image.positions.add_(3.0)
    assert torch.allclose(model.encode_image(pixels_BCHW).states, before, rtol=0, atol=1e-9)


def test_a_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(AssertionError, match="17 tokens, but positions for 16"):
        random_clip().encode_text(torch.ones(1, 17, dtype=torch.int64))
