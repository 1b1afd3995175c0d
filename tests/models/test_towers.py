"""A ViT as FLAVA's image encoder: the same numbers, and told where it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trivium.errors import TriviumError
from trivium.invariance.flava import TINY, random_flava
from trivium.models import towers
from trivium.models.vit import ViT, ViTConfig

VIT = ViTConfig(width=32, num_heads=4, mlp_width=48, num_layers=2, image_size=32, patch_size=8, mask_token=True)


def random_vit(config: ViTConfig = VIT) -> ViT:
    model = ViT(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, dtype=torch.float64))
    return model


def test_a_vit_becomes_the_image_encoder_number_by_number() -> None:
    vit, flava = random_vit(), random_flava(replace(TINY, eps=VIT.eps))
    taken, said = towers.image_from_vit(vit.state_dict(), VIT, flava.config)
    assert said == []
    state = flava.state_dict()
    expected = {name for name in state if name.startswith("image.") and not name.startswith("image.pooler.")}
    assert taken.keys() == expected
    flava.load_state_dict(taken, strict=False)
    pixels, hidden = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3, 16) < 0.4
    assert torch.equal(flava.encode_image(pixels, hidden).tokens, vit.encode_image(pixels, hidden).tokens)
    assert torch.equal(flava.encode_image(pixels).pooled, vit.encode_image(pixels).pooled)


def test_another_grid_is_interpolated_as_the_tower_itself_would_and_said() -> None:
    config = replace(VIT, image_size=48, mask_token=False, position_offset=0.1)
    vit, flava = random_vit(config), random_flava(replace(TINY, eps=VIT.eps))
    taken, said = towers.image_from_vit(vit.state_dict(), config, flava.config)
    assert said[0].startswith("its positions, of 6 x 6 patches, are interpolated to 4 x 4")
    assert "drawn" in said[1]
    flava.load_state_dict(taken, strict=False)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(flava.encode_image(pixels).tokens, vit.encode_image(pixels).tokens, atol=1e-6)  # float32


def test_another_eps_is_said_with_the_flag() -> None:
    _, said = towers.image_from_vit(random_vit().state_dict(), VIT, TINY)
    assert said == ["its LayerNorms have eps 1e-06, the model's 1e-12: for equal features set --model.eps 1e-06"]


def test_another_shape_is_refused_with_the_flags() -> None:
    config = replace(VIT, width=64, num_layers=5)
    with pytest.raises(TriviumError, match=r"set --model\.width 64 --model\.image-layers 5$"):
        towers.image_from_vit(ViT(config).state_dict(), config, TINY)


def test_the_image_encoder_of_a_flava_is_a_vit_and_comes_back() -> None:
    flava = random_flava()
    vit = towers.vit_of(flava)
    pixels, hidden = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3, 16) < 0.4
    assert torch.equal(flava.encode_image(pixels, hidden).tokens, vit.encode_image(pixels, hidden).tokens)
    taken, said = towers.image_from_vit(vit.state_dict(), vit.config, flava.config)
    assert said == []
    assert all(torch.equal(tensor, flava.state_dict()[name]) for name, tensor in taken.items())


def test_the_text_encoder_comes_with_its_own_head_alone() -> None:
    text = towers.parts_of(random_flava().state_dict(), towers.TEXT)
    assert {"text.embeddings.word.weight", "text.norm.bias", "mlm_head.norm.weight"} <= text.keys()
    assert {name.split(".")[0] for name in text} == {"text", "mlm_head"}
