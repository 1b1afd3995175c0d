"""The ViT tower: its published sizes, its positions as DINO resamples them, its attention maps, stochastic depth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from trivium.models.vit import DropPath, ViT, ViTConfig

TINY = ViTConfig(width=32, num_heads=4, mlp_width=48, num_layers=3, image_size=32, patch_size=8, mask_token=True)


def random_vit(config: ViTConfig = TINY) -> ViT:
    model = ViT(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter) + (parameter == 1))
    return model


@pytest.mark.parametrize(
    ("size", "patch_size", "parameters"),
    [("small", 16, 21_665_664), ("small", 8, 21_670_272), ("base", 16, 85_798_656), ("base", 8, 85_807_872)],
)
def test_published_numbers_of_parameters(size: str, patch_size: int, parameters: int) -> None:
    with torch.device("meta"):
        model = ViT(ViTConfig.of_size(size, patch_size=patch_size))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("size", [(48, 48), (24, 64), (16, 32)])
def test_positions_are_resampled_as_in_dinos_code(size: tuple[int, int]) -> None:
    """Written after `interpolate_pos_encoding` there: a scale factor of (patches + 0.1) / sqrt(N)."""
    model = random_vit(replace(TINY, position_offset=0.1))
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    grid = model.positions[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    height, width = (side // 8 + 0.1 for side in size)
    resampled = F.interpolate(grid, scale_factor=(height / math.sqrt(16), width / math.sqrt(16)), mode="bicubic")
    patches = model.patches(pixels) + resampled.permute(0, 2, 3, 1).reshape(1, -1, 32)
    expected = torch.cat([(model.class_token + model.positions[:, :1]).expand(2, 1, 32), patches], dim=1)
    assert torch.allclose(model.embed(pixels), expected, rtol=0, atol=1e-12)
    to_the_size = random_vit(TINY)
    to_the_size.load_state_dict(model.state_dict())
    assert not torch.allclose(model.embed(pixels), to_the_size.embed(pixels), rtol=0, atol=1e-6)


def test_the_maps_are_what_the_fused_attention_weighs_with() -> None:
    model = random_vit()
    with torch.no_grad():  # at 0.05 all maps are flat
        for parameter in model.parameters():
            parameter.mul_(8)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    maps_BHLL = model.attention_maps(pixels)
    assert maps_BHLL.shape == (2, 4, 17, 17)
    assert torch.allclose(maps_BHLL.sum(-1), torch.ones(2, 4, 17, dtype=torch.float64))
    assert maps_BHLL.max() > 0.2
    x_BLD = model.embed(pixels)
    for block in model.encoder.blocks[:-1]:
        x_BLD = block(x_BLD)
    last = model.encoder.blocks[-1]
    value_BHLE = last.attention.qkv(last.attention_norm(x_BLD))[..., 64:].unflatten(-1, (4, 8)).transpose(1, 2)
    plain = last.attention.out((maps_BHLL @ value_BHLE).transpose(1, 2).flatten(2))
    assert torch.allclose(plain, last.attention(last.attention_norm(x_BLD)), rtol=0, atol=1e-12)


def test_needed_rows_alone_are_exact_and_hidden_patches_are_hidden() -> None:
    model = random_vit()
    pixels, masked = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 5] = True
    whole = model.encode_image(pixels, masked)
    assert torch.allclose(whole.pooled, model.encode_image(pixels, masked, rows=1).pooled, rtol=0, atol=1e-12)
    other = pixels.clone()
    other[0, :, 8:16, 8:16] = 7.0  # patch 5 of the grid of 4
    assert torch.equal(whole.states, model.encode_image(other, masked).states)
    assert not torch.equal(whole.states, model.encode_image(other).states)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    path = DropPath(0.25)
    dropped = path(torch.ones(4000, 2, 3))
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert all(len(sample.unique()) == 1 for sample in dropped[:50])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(path.eval()(torch.ones(5, 1, 1)), torch.ones(5, 1, 1))
    model = ViT(replace(TINY, drop_path=0.4))
    assert [block.dropout[1].rate for block in model.encoder.blocks] == [0.0, 0.2, 0.4]
    model.load_state_dict(ViT(TINY).state_dict())  # no name depends on it
