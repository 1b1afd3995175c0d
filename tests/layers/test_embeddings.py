"""Embeddings against their plain forms: values and gradients, float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from trivium.layers.embeddings import BertEmbeddings, PatchEmbedding, interpolate_positions, sine_positions


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (4, 4)])
def test_patches_through_one_linear_map_equal_a_strided_convolution(size: tuple[int, int]) -> None:
    module = PatchEmbedding(width=10, patch_size=4).double()
    pixels_BCHW = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    mine = module(pixels_BCHW)
    weight = module.projection.weight.view(10, 3, 4, 4)
    plain = F.conv2d(pixels_BCHW, weight, module.projection.bias, stride=4).flatten(2).transpose(1, 2)
    direction = torch.randn_like(mine)
    inputs = (pixels_BCHW, module.projection.weight, module.projection.bias)
    for a, b in zip(
        [mine, *torch.autograd.grad((mine * direction).sum(), inputs)],
        [plain, *torch.autograd.grad((plain * direction).sum(), inputs)],
        strict=True,
    ):
        assert float((a - b).abs().max()) <= 1e-10


def test_a_transposed_picture_is_cut_into_the_same_patches() -> None:
    module = PatchEmbedding(width=6, patch_size=4).double()
    pixels_BCHW = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    not_contiguous = pixels_BCHW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as a decoder hands it over
    assert torch.equal(module(pixels_BCHW), module(not_contiguous))


def test_positions_of_a_constant_table_stay_constant_and_a_slope_keeps_its_direction() -> None:
    constant = torch.full((9, 2), 3.0, dtype=torch.float64)
    assert torch.allclose(
        interpolate_positions(constant, (3, 3), (5, 7)), torch.full((35, 2), 3.0, dtype=torch.float64)
    )
    rows_ND = torch.arange(3.0).repeat_interleave(3)[:, None]  # grows from top to bottom, row-major
    table = interpolate_positions(rows_ND, (3, 3), (6, 4)).view(6, 4)
    assert (table.diff(dim=0) > 0).all()
    assert torch.allclose(table, table[:, :1].expand(6, 4))


def test_the_same_grid_is_returned_untouched() -> None:
    table = torch.randn(12, 3)
    assert interpolate_positions(table, (3, 4), (3, 4)) is table


def test_padding_has_no_gradient_and_segment_zero_is_the_default() -> None:
    module = BertEmbeddings(
        vocab_size=9, width=8, max_length=6, num_segments=2, eps=1e-12, pad_id=0, dropout=0.0
    ).double()
    ids_BT = torch.tensor([[3, 4, 0, 0]])
    default = module(ids_BT)
    assert torch.equal(default, module(ids_BT, torch.zeros_like(ids_BT)))
    assert not torch.allclose(default, module(ids_BT, torch.ones_like(ids_BT)))
    (default * torch.randn_like(default)).sum().backward()
    grad = module.word.weight.grad
    assert grad is not None and not grad[0].any() and grad[3].any()


def test_sine_positions_place_by_place_and_channel_by_channel() -> None:
    sizes = [(5, 3), (2, 7), (1, 1)]
    found = sine_positions(torch.tensor(sizes), 5, 7, 8, torch.float64).view(3, 5, 7, 8)
    for row, (height, width) in enumerate(sizes):
        for y in range(height):
            for x in range(width):
                for channel in range(8):
                    place, side = ((y, height), (x, width))[channel // 4]
                    n = channel % 4
                    angle = (place + 1) / (side + 1e-6) * 2 * math.pi / 10000 ** (2 * (n // 2) / 4)
                    expected = math.cos(angle) if n % 2 else math.sin(angle)
                    assert float(found[row, y, x, channel]) == pytest.approx(expected, abs=1e-12)
