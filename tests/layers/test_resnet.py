"""A padded picture gives what it gives alone; what is frozen is torch's batch norm; DC5 is torchvision's arithmetic."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.layers.resnet import Convolution, FrozenBatchNorm, Reach, ResNet, inside, together

# Odd and even sides, a picture of one pixel, one as large as the batch, one whose map has a single place.
SIZES = [(53, 37), (64, 31), (1, 1), (33, 64), (64, 64), (17, 2)]


def drawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Convolutions that keep the scale of what passes, and norms that move it: else padding would stay zero."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 4:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=draw)
            elif name.endswith(("running_var", "weight")):
                tensor.uniform_(0.5, 1.5, generator=draw)
            else:
                tensor.normal_(0, 0.5, generator=draw)
    return module.to(dtype)


def network(norm: str, bottleneck: bool, dilated: bool = True, dtype: torch.dtype = torch.float64) -> ResNet:
    return drawn(ResNet((8, 16, 24), (1, 2, 2), bottleneck, norm, 1e-5, dilated), dtype)  # type: ignore[arg-type]


def through(resnet: ResNet, pixels: Tensor, sizes_B2: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The map of a single run, [B, C, H, W], and the sizes of the pictures in it."""
    x_BCHW, reach = resnet([pixels], sizes_B2)
    return x_BCHW, reach.sizes_B2


def padded(sizes: list[tuple[int, int]], fill: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch with anything in its padding, the sizes, and each picture alone."""
    draw = torch.Generator().manual_seed(5)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixels = torch.full((len(sizes), 3, height, width), fill, dtype=dtype)
    alone = [torch.randn(1, 3, *size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]
    for row, picture in enumerate(alone):
        pixels[row, :, : picture.shape[2], : picture.shape[3]] = picture[0]
    return pixels, torch.tensor(sizes), alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dilated", [True, False])
@pytest.mark.parametrize("norm", ["frozen", "group"])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_padded_picture_gives_what_it_gives_alone(
    norm: str, bottleneck: bool, dilated: bool, dtype: torch.dtype
) -> None:
    resnet = network(norm, bottleneck, dilated, dtype)
    pixels, sizes_B2, alone = padded(SIZES, float("nan"), dtype)
    maps, map_sizes = through(resnet, pixels, sizes_B2)
    assert map_sizes is not None
    for row, picture in enumerate(alone):
        expected, none = through(resnet, picture)
        assert none is None
        assert map_sizes[row].tolist() == list(expected.shape[2:])
        found = maps[row, :, : expected.shape[2], : expected.shape[3]]
        error = float(((found - expected[0]).abs().max() / expected.abs().max()).detach())
        assert error <= (1e-12 if dtype == torch.float64 else 1e-5), f"{SIZES[row]}: {error:.2g}"


@torch.no_grad()
def test_fifty_layers_give_of_a_padded_picture_what_it_gives_alone() -> None:
    resnet = drawn(ResNet((64, 128, 256, 512), (3, 4, 6, 3), True, "frozen", 1e-5, True), torch.float32)
    pixels, sizes_B2, alone = padded([(96, 130), (128, 80), (33, 47)], 9.0, torch.float32)
    maps, map_sizes = through(resnet, pixels, sizes_B2)
    assert map_sizes is not None
    for row, picture in enumerate(alone):
        [expected], _ = through(resnet, picture)
        assert map_sizes[row].tolist() == list(expected.shape[1:])
        found = maps[row, :, : expected.shape[1], : expected.shape[2]]
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_gradients_of_a_padded_batch_are_those_of_its_pictures_one_by_one(norm: str) -> None:
    resnet = network(norm, bottleneck=norm == "frozen")
    pixels, sizes_B2, alone = padded(SIZES, 7.0, torch.float64)
    pixels.requires_grad_()
    maps, map_sizes = through(resnet, pixels, sizes_B2)
    assert map_sizes is not None
    weight = torch.randn(maps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    real = inside(map_sizes, *maps.shape[2:])[:, None]
    names = [name for name, _ in resnet.named_parameters()]
    (maps.square() * weight * real).sum().backward()
    mine = {name: p.grad.clone() for name, p in resnet.named_parameters()}
    resnet.zero_grad()
    for row, picture in enumerate(alone):
        expected = through(resnet, picture)[0]
        (expected.square() * weight[row : row + 1, :, : expected.shape[2], : expected.shape[3]]).sum().backward()
    for name in names:
        wanted = resnet.get_parameter(name).grad
        torch.testing.assert_close(mine[name], wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))
    outside = ~inside(sizes_B2, *pixels.shape[2:])[:, None].expand_as(pixels)
    assert float(pixels.grad[outside].abs().max()) == 0


def test_without_the_zeros_padding_would_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above are about: the same network that leaves padding as the norms make it."""
    monkeypatch.setattr("trivium.layers.resnet.without_padding", lambda x, mask: x)
    resnet = network("frozen", bottleneck=True)
    pixels, sizes_B2, alone = padded(SIZES, 0.0, torch.float64)
    maps, _ = through(resnet, pixels, sizes_B2)
    expected = through(resnet, alone[0])[0]
    assert float((maps[0, :, : expected.shape[2], : expected.shape[3]] - expected[0]).abs().max()) > 1e-2


RUNS = [(2, 64, 48), (1, 33, 64), (3, 17, 2), (1, 1, 1)]


def in_runs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(8)
    return [torch.randn(n, 3, h, w, generator=draw, dtype=torch.float64).to(dtype) for n, h, w in RUNS]


@pytest.mark.parametrize("dilated", [True, False])
@pytest.mark.parametrize("norm", ["frozen", "group"])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_several_runs_give_values_and_gradients_of_each_alone(norm: str, bottleneck: bool, dilated: bool) -> None:
    resnet = network(norm, bottleneck, dilated)
    pictures = [pixels.requires_grad_() for pixels in in_runs()]
    x_PC, reach = resnet(pictures)
    alone = [through(resnet, pixels)[0] for pixels in pictures]
    assert reach.runs == tuple((len(x), *x.shape[2:]) for x in alone)
    expected = together(alone)
    torch.testing.assert_close(x_PC, expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))
    weight = torch.randn(x_PC.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mine, wanted = (torch.autograd.grad((y.square() * weight).sum(), [*resnet.parameters(), *pictures])
                    for y in (x_PC, expected))  # fmt: skip
    for found, gradient in zip(mine, wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-11 * float(gradient.abs().max()))


def test_of_several_runs_what_knows_no_neighbours_is_one_product_and_weights_are_made_ready_once() -> None:
    resnet = network("frozen", bottleneck=True, dtype=torch.float32)
    with (
        mock.patch("trivium.layers.resnet.F.conv2d", side_effect=F.conv2d) as in_calls,
        mock.patch("trivium.layers.resnet.F.linear", side_effect=F.linear) as at_once,
        torch.autocast("cpu", torch.bfloat16),
    ):
        resnet(in_runs(torch.float32))
    convolutions = [each.conv for each in resnet.modules() if isinstance(each, Convolution)]
    pointwise = [conv for conv in convolutions if conv.kernel_size == conv.stride == (1, 1)]
    others = len(convolutions) - len(pointwise)
    assert pointwise and at_once.call_count == len(pointwise)
    assert {call.args[3] for call in in_calls.call_args_list} == {(1, 1), (2, 2)}
    side_by_side = sum(call.args[3] == (1, 1) for call in in_calls.call_args_list)
    strided = sum(conv.stride == (2, 2) for conv in convolutions)
    assert in_calls.call_count - side_by_side == len(RUNS) * strided
    assert others - strided < side_by_side < len(RUNS) * (others - strided), "some stand side by side, not all"
    weights = [call.args[1] for call in in_calls.call_args_list]
    assert len({id(weight) for weight in weights}) == others
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert {weight.dtype for weight in weights[len(RUNS) :]} == {torch.bfloat16}, "of all but the first"


@pytest.mark.parametrize("size", [(64, 2), (40, 1), (1, 1)])
def test_of_narrow_pictures_everything_is_written_in_bfloat16(size: tuple[int, int]) -> None:
    """oneDNN leaves parts unwritten, so that what stood in memory before would come out."""
    resnet = drawn(ResNet((64, 128), (1, 1), True, "frozen", 1e-5, False), torch.float32)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = through(resnet, pixels)[0]
    wanted = torch.autograd.grad(expected.square().sum(), [*resnet.parameters()])
    for _ in range(3):
        left = [torch.full((count,), float("nan"), dtype=torch.bfloat16) for count in (1 << n for n in range(4, 20))]
        del left
        with torch.autocast("cpu", torch.bfloat16):
            found = through(resnet, pixels)[0]
        mine = torch.autograd.grad(found.float().square().sum(), [*resnet.parameters()])
        for ours, right in zip((found, *mine), (expected, *wanted), strict=True):
            assert float((ours - right).norm()) <= 0.3 * float(right.norm())


@pytest.mark.parametrize("norm", ["frozen", "group"])
@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_convolutions_get_what_they_are_fastest_with_beside_padding_too(norm: str, fill: float) -> None:
    """Channels last in memory, from the first to the last: each that does not get it makes a copy."""
    resnet = network(norm, bottleneck=True, dtype=torch.float32)
    layouts: list[bool] = []
    for module in resnet.modules():
        if isinstance(module, Convolution):
            module.register_forward_pre_hook(
                lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    pixels, sizes_B2, _ = padded(SIZES, fill, torch.float32)
    resnet([pixels], sizes_B2)
    assert layouts and all(layouts)


def test_sizes_without_padding_are_no_padding() -> None:
    resnet = network("group", bottleneck=False)
    pixels = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    maps, sizes = through(resnet, pixels, torch.tensor([[32, 48], [32, 48]]))
    assert sizes is None
    assert torch.equal(maps, through(resnet, pixels)[0])


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_a_frozen_norm_multiplied_into_the_weights_is_torchs_batch_norm(eps: float) -> None:
    ours: Convolution = drawn(Convolution(5, 7, 3, "frozen", eps, stride=2, dilation=2))
    norm = ours.norm
    assert isinstance(norm, FrozenBatchNorm)
    assert not list(norm.parameters())
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    raw = F.conv2d(x, ours.conv.weight, None, 2, 2, 2)
    expected = F.batch_norm(raw, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, eps)
    before = Reach(((2, 9, 11),), None)
    found = ours(x, before, before.halved())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), ours.conv.weight)[0] for y in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_resnet_50_has_its_parameters_and_dc5_its_strides_and_dilations() -> None:
    with torch.device("meta"):
        resnet = ResNet((64, 128, 256, 512), (3, 4, 6, 3), True, "frozen", 1e-5, dilated=True)
    assert sum(p.numel() for p in resnet.parameters()) == 23_454_912
    last: Any = resnet.stages[-1]
    inner = [block.convolutions[1].conv for block in last]
    assert [conv.stride for conv in inner] == [(1, 1)] * 3
    # As torchvision's replace_stride_with_dilation: the first block still looks at its neighbours.
    assert [conv.dilation for conv in inner] == [(1, 1), (2, 2), (2, 2)]
    assert through(resnet, torch.empty(1, 3, 800, 1333, device="meta"))[0].shape == (1, 2048, 50, 84)
