from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trivium.models import dvae
from trivium.models.dvae import DVae, DVaeConfig, map_pixels, unmap_pixels


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        model = DVae(DVaeConfig(decoder=True))
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert model.decoder is not None
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert model.stride == 8
    assert model.input_size(224, 16) == 112


@given(groups=st.integers(1, 4), blocks=st.integers(1, 2), height=st.integers(1, 3), width=st.integers(1, 3))
def test_codes_are_the_argmax_of_the_logits_row_by_row(groups: int, blocks: int, height: int, width: int) -> None:
    model = (
        DVae(DVaeConfig(width=4, num_groups=groups, blocks_per_group=blocks, num_codes=11))
        .double()
        .frozen(torch.float64)
    )
    pixels = torch.rand(2, 3, height * model.stride, width * model.stride, dtype=torch.float64)
    logits = model.encoder(map_pixels(pixels))
    assert torch.equal(model.encode(pixels), logits.argmax(1).flatten(1))


def test_codes_do_not_depend_on_the_size_of_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DVae(DVaeConfig(width=4, num_codes=13)).frozen()
    pixels = torch.rand(3, 3, 32, 32)
    expected = model.encode(pixels)
    monkeypatch.setattr(dvae, "LOGITS_AT_ONCE", 13 * 5)  # 48 rows in pieces of 5
    assert torch.equal(model.encode(pixels), expected)


def test_a_code_sees_its_own_place() -> None:
    """Pixels far from a code's square do not reach it; its own do. (The receptive field is wide, not endless.)"""
    model = DVae(DVaeConfig(width=4, num_groups=2, blocks_per_group=1, num_codes=6)).double()
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    logits = model.encoder(pixels)
    (gradient,) = torch.autograd.grad(logits[0, :, 3, 20].sum(), pixels)
    reached = gradient[0].abs().sum(0).nonzero()
    (top, left), (bottom, right) = reached.min(0).values.tolist(), reached.max(0).values.tolist()
    assert top <= 6 <= bottom
    assert left <= 40 <= right
    assert bottom < 32
    assert left > 16


def test_decoding_is_the_decoder_on_one_hot_codes() -> None:
    model = DVae(DVaeConfig(width=8, num_groups=3, num_codes=10, code_width=5, decoder=True)).frozen()
    codes = torch.randint(0, 10, (2, 16))
    assert model.decoder is not None
    out = model.decoder(F.one_hot(codes.view(2, 4, 4), 10).permute(0, 3, 1, 2).float())
    pictures = model.decode(codes)
    assert pictures is not None
    assert torch.allclose(pictures, unmap_pixels(torch.sigmoid(out[:, :3])), atol=1e-6)
    assert torch.equal(model.decode(codes.view(2, 4, 4)), pictures)
    assert DVae(DVaeConfig(width=4, num_codes=10)).decode(codes) is None


@given(st.floats(0, 1))
def test_mapping_pixels_and_back(value: float) -> None:
    pixel = torch.tensor(value, dtype=torch.float64)
    assert 0.1 <= map_pixels(pixel) <= 0.9
    assert abs(unmap_pixels(map_pixels(pixel)) - pixel) < 1e-12
    assert unmap_pixels(torch.tensor(0.0)) == 0
    assert unmap_pixels(torch.tensor(1.0)) == 1


def test_initial_weights_keep_the_published_scale() -> None:
    layer = DVae(DVaeConfig(width=64, num_codes=32)).encoder.groups[1][1].convs[1]
    assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(32 * 9), rel=0.03)
    assert not layer.bias.any()


def test_frozen_takes_no_gradient_and_half_precision_agrees_mostly() -> None:
    model = DVae(DVaeConfig(width=16, num_codes=16))
    pixels = torch.rand(2, 3, 32, 32)
    exact = model.frozen().encode(pixels)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    rough = model.frozen(torch.bfloat16).encode(pixels)
    assert (rough == exact).float().mean() > 0.8
