"""What a FLAVA is: its size, and what its encoders hand out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.flava_batches import TINY, make_batch, random_flava
from trivium.models.flava import SIZES, Flava, FlavaConfig


def num_parameters(config: FlavaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Flava(config).parameters())


def test_the_published_model_has_its_published_number_of_parameters() -> None:
    assert num_parameters(FlavaConfig()) == 303_859_063
    assert num_parameters(FlavaConfig.of_size("base")) == 303_859_063


def test_sizes_grow_and_each_is_a_model() -> None:
    counts = [num_parameters(config) for config in SIZES.values()]
    assert list(SIZES) == ["tiny", "small", "base"]
    assert counts[0] * 5 < counts[1] and counts[1] * 3 < counts[2]
    for config in SIZES.values():
        assert config.image_size % config.patch_size == 0 and config.width % config.num_heads == 0


def test_single_fields_of_a_size_can_change_and_no_others() -> None:
    changed = FlavaConfig.of_size("tiny", width=256, vocab_size=99)
    assert changed == replace(SIZES["tiny"], width=256, vocab_size=99)
    with pytest.raises(TypeError):
        FlavaConfig.of_size("tiny", depth=3)


def test_projected_rows_have_unit_length_and_pooled_is_the_class_token_after_the_norm() -> None:
    model, batch = random_flava(), make_batch("pairs", 3)
    image = model.encode_image(torch.randn(3, 3, 32, 32, dtype=torch.float64))
    text = model.encode_text(batch.texts[0].ids_BT, batch.texts[0].mask_BT)
    for encoded, projection in ((image, model.image_projection), (text, model.text_projection)):
        assert torch.allclose(encoded.projected.norm(dim=-1), torch.ones(3, dtype=torch.float64))
        assert torch.allclose(encoded.pooled, encoded.tokens[:, 0], rtol=0, atol=1e-12)
        direction = projection(encoded.tokens[:, 0])
        assert torch.allclose(encoded.projected, direction / direction.norm(dim=-1, keepdim=True), rtol=0, atol=1e-12)
    fused = model.fuse(image, text)
    assert torch.allclose(fused.pooled, fused.tokens[:, 0], rtol=0, atol=1e-12)
    with pytest.raises(AssertionError):
        _ = fused.projected


def test_fusing_reads_the_states_before_the_final_norm() -> None:
    model, batch = random_flava(), make_batch("pairs", 2)
    image = model.encode_image(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    text = model.encode_text(batch.texts[0].ids_BT)
    before = model.fuse(image, text).tokens
    with torch.no_grad():
        model.image.norm.weight.mul_(3.0)
        model.text.norm.bias.add_(1.0)
    assert torch.equal(before, model.fuse(image, text).tokens)


def test_a_masked_patch_is_hidden_and_its_place_is_known() -> None:
    model = random_flava()
    pixels_BCHW = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    masked_BN = torch.zeros(1, 16, dtype=torch.bool)
    masked_BN[0, 5] = True  # second row, second column of the 4 x 4 grid
    other_BCHW = pixels_BCHW.clone()
    other_BCHW[:, :, 8:16, 8:16] = 7.0
    hidden = model.encode_image(pixels_BCHW, masked_BN).states
    assert torch.equal(hidden, model.encode_image(other_BCHW, masked_BN).states)
    assert not torch.allclose(hidden, model.encode_image(pixels_BCHW).states)
    elsewhere_BN = masked_BN.roll(1, dims=1)
    assert not torch.allclose(model.encode_image(other_BCHW, elsewhere_BN).states, hidden)


def test_padding_changes_no_text_state_whatever_its_length() -> None:
    model = random_flava(replace(TINY))
    ids_BT = torch.randint(5, TINY.vocab_size, (2, 5))
    padded_BT = torch.nn.functional.pad(ids_BT, (0, 6))
    mask_BT = torch.arange(11).expand(2, -1) < 5
    short, long = model.encode_text(ids_BT), model.encode_text(padded_BT, mask_BT)
    assert torch.allclose(short.states, long.states[:, :5], rtol=0, atol=1e-12)
    image = model.encode_image(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert torch.allclose(
        model.match(model.fuse(image, short)), model.match(model.fuse(image, long)), rtol=0, atol=1e-12
    )


def test_a_picture_that_does_not_divide_into_patches_is_refused() -> None:
    with pytest.raises(AssertionError, match="30x32"):
        random_flava().encode_image(torch.randn(1, 3, 30, 32, dtype=torch.float64))
