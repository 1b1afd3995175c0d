"""A residual network (He et al., CVPR 2016) for pictures of different sizes in one batch.

A padded picture gives the features that it gives alone. Convolutions carry what lies in the padding over its border,
and there is more than zeros in it after the first norm; so padding is set to zero before every convolution and pooling
that looks at neighbours. How far a picture reaches after a layer of stride 2 follows the convolution's own arithmetic:
half its size, rounded up, each time. GroupNorm counts what is no padding.

B batch, C channels, H height, W width, G groups of channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["frozen", "group"]
CHANNELS_OF_A_GROUP = 8
LAYOUT = torch.channels_last  # in memory: what convolutions are fastest with


class FrozenBatchNorm(nn.Module):
    """Batch norm with the statistics and the affine map of a trained network; nothing in it trains."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """[C] each: the whole norm is x * scale + shift."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class Convolution(nn.Module):
    """A convolution and its norm. A frozen norm is multiplied into the convolution's weights, so that no pass over the
    picture is its own; gradients are those of the two apart."""

    norm: FrozenBatchNorm | nn.GroupNorm
    _folded: tuple[Tensor, Tensor] | None = None  # within ResNet.folded_once

    def __init__(
        self, channels: int, out_channels: int, side: int, norm: Norm, eps: float, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.looks_around = side > 1
        padding = dilation * (side // 2)
        self.conv = nn.Conv2d(channels, out_channels, side, stride, padding, dilation, bias=False)
        if norm == "frozen":
            self.norm = FrozenBatchNorm(out_channels, eps)
        else:
            self.norm = nn.GroupNorm(max(1, out_channels // CHANNELS_OF_A_GROUP), out_channels, eps)

    def forward(self, x_BCHW: Tensor, out_mask: Tensor | None) -> Tensor:
        """out_mask: bool [B, 1, H, W] of the result, True = no padding; None: no padding anywhere."""
        conv, norm = self.conv, self.norm
        if isinstance(norm, FrozenBatchNorm):
            weight, shift = self._folded or self.folded(norm)
            return F.conv2d(x_BCHW, weight, shift, conv.stride, conv.padding, conv.dilation)
        x_BCHW = conv(x_BCHW)
        return norm(x_BCHW) if out_mask is None else group_norm(x_BCHW, out_mask, norm)

    def folded(self, norm: FrozenBatchNorm) -> tuple[Tensor, Tensor]:
        """Weights that have the norm in them, and the bias."""
        scale, shift = norm.scale_and_shift()
        return self.conv.weight * scale.view(-1, 1, 1, 1), shift


def group_norm(x_BCHW: Tensor, mask_B1HW: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm (Wu & He, ECCV 2018) over the positions where the mask is True."""
    wide = x_BCHW.float() if x_BCHW.dtype == torch.bfloat16 else x_BCHW
    x_BGCHW = wide.unflatten(1, (norm.num_groups, -1))
    mask_B11HW = mask_B1HW[:, None].to(wide.dtype)
    count = mask_B11HW.sum((1, 2, 3, 4), keepdim=True) * x_BGCHW.shape[2]
    centred = (x_BGCHW - (x_BGCHW * mask_B11HW).sum((2, 3, 4), keepdim=True) / count) * mask_B11HW
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    normed = (centred * (variance + norm.eps).rsqrt()).flatten(1, 2)
    return (normed * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)).to(x_BCHW.dtype)


def without_padding(x_BCHW: Tensor, mask_B1HW: Tensor | None) -> Tensor:
    """Zeros in the padding."""
    return x_BCHW if mask_B1HW is None else x_BCHW * mask_B1HW.to(x_BCHW.dtype)


class Block(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 to four times the width, or without `bottleneck` two of 3 x 3; then the
    input is added, through a convolution of its own where its shape is another."""

    def __init__(
        self,
        channels: int,
        width: int,
        bottleneck: bool,
        norm: Norm,
        eps: float,
        stride: int,
        dilation: int,
    ) -> None:
        super().__init__()
        self.stride = stride
        out_channels = 4 * width if bottleneck else width
        shapes = (
            ((channels, width, 1, 1, 1), (width, width, 3, stride, dilation), (width, out_channels, 1, 1, 1))
            if bottleneck
            else ((channels, width, 3, stride, dilation), (width, width, 3, 1, dilation))
        )
        self.convolutions = nn.ModuleList(
            Convolution(before, after, side, norm, eps, step, gap) for before, after, side, step, gap in shapes
        )
        self.shortcut = None
        if stride != 1 or channels != out_channels:
            self.shortcut = Convolution(channels, out_channels, 1, norm, eps, stride)

    def forward(self, x_BCHW: Tensor, mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
        """mask, out_mask: bool [B, 1, H, W] of input and output, True = no padding."""
        added = x_BCHW if self.shortcut is None else self.shortcut(x_BCHW, out_mask)
        convolutions: Iterable[Any] = self.convolutions
        for number, convolution in enumerate(convolutions):
            if number > 0:
                x_BCHW = F.relu(x_BCHW, inplace=True)
            if convolution.looks_around:
                x_BCHW = without_padding(x_BCHW, mask)
            mask = mask if convolution.conv.stride[0] == 1 else out_mask
            x_BCHW = convolution(x_BCHW, mask)
        return F.relu(x_BCHW + added, inplace=True)


class ResNet(nn.Module):
    """Stem (7 x 7 of stride 2, max-pooling of stride 2) and stages, each of half the resolution of the one before.

    Args:
        widths, num_blocks: of each stage; (64, 128, 256, 512) and (3, 4, 6, 3) with `bottleneck` are ResNet-50.
        dilated: the last stage keeps its resolution; the 3 x 3 convolutions of its blocks after the first look at every
            second position instead ("DC5").
    """

    def __init__(
        self, widths: Sequence[int], num_blocks: Sequence[int], bottleneck: bool, norm: Norm, eps: float, dilated: bool
    ) -> None:
        super().__init__()
        self.stem = Convolution(3, widths[0], 7, norm, eps, stride=2)
        self.stages = nn.ModuleList()
        channels = widths[0]
        for stage, (width, count) in enumerate(zip(widths, num_blocks, strict=True)):
            keeps = stage == 0 or (dilated and stage == len(widths) - 1)
            blocks = nn.ModuleList()
            for number in range(count):
                dilation = 2 if keeps and stage > 0 and number > 0 else 1
                stride = 1 if keeps or number > 0 else 2
                blocks.append(Block(channels, width, bottleneck, norm, eps, stride, dilation))
                channels = 4 * width if bottleneck else width
            self.stages.append(blocks)
        self.out_channels = channels

    @contextmanager
    def folded_once(self) -> Iterator[None]:
        """Within it frozen norms are multiplied into the weights once for all calls, and the product is brought to the
        precision of autocast once."""
        frozen = [each for each in self.modules() if isinstance(each, Convolution)]
        frozen = [each for each in frozen if isinstance(each.norm, FrozenBatchNorm)]
        try:
            for each in frozen:
                weight, shift = each.folded(each.norm)  # type: ignore[arg-type]
                device = weight.device.type
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
                each._folded = weight.to(dtype), shift.to(dtype)
            yield
        finally:
            for each in frozen:
                each._folded = None

    def forward(self, pixels_BCHW: Tensor, sizes_B2: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The last feature map, [B, C, H, W], and the sizes of the pictures in it, int64 [B, 2]; None: no padding.

        sizes_B2: (height, width) of each picture; what lies beyond has no effect.
        """
        height, width = pixels_BCHW.shape[2:]
        if sizes_B2 is not None and bool((sizes_B2 == torch.tensor([height, width], device=sizes_B2.device)).all()):
            sizes_B2 = None
        device = pixels_BCHW.device
        reach = Reach(None if sizes_B2 is None else sizes_B2.to(device, non_blocking=True), height, width)
        x_BCHW = pixels_BCHW
        if reach.mask is not None:
            x_BCHW = x_BCHW.masked_fill(~reach.mask, 0.0)  # not by a product: anything may stand there
        x_BCHW = x_BCHW.contiguous(memory_format=LAYOUT)  # after it, since it would not keep the layout
        reach = reach.halved()
        x_BCHW = without_padding(F.relu(self.stem(x_BCHW, reach.mask), inplace=True), reach.mask)
        x_BCHW = F.max_pool2d(x_BCHW, 3, 2, 1)
        reach = reach.halved()
        for stage in self.stages:
            blocks: Iterable[Any] = stage  # type: ignore[assignment]
            for block in blocks:
                after = reach.halved() if block.stride == 2 else reach
                x_BCHW = block(x_BCHW, reach.mask, after.mask)
                reach = after
        return x_BCHW, reach.sizes_B2


@dataclass(frozen=True)
class Reach:
    """How far pictures reach in a feature map. sizes_B2: int64; None: to its end, all of them."""

    sizes_B2: Tensor | None
    height: int
    width: int

    @cached_property
    def mask(self) -> Tensor | None:
        """bool [B, 1, H, W], True = no padding; None: none anywhere."""
        return None if self.sizes_B2 is None else inside(self.sizes_B2, self.height, self.width)[:, None]

    def halved(self) -> Reach:
        """After a convolution of stride 2 (with padding of half its side), or after the pooling."""
        sizes_B2 = None if self.sizes_B2 is None else (self.sizes_B2 + 1) // 2
        return Reach(sizes_B2, (self.height + 1) // 2, (self.width + 1) // 2)


def inside(sizes_B2: Tensor, height: int, width: int) -> Tensor:
    """bool [B, height, width]: True within each picture."""
    rows_BH, columns_BW = (
        torch.arange(side, device=sizes_B2.device) < sizes_B2[:, axis, None]
        for axis, side in enumerate((height, width))
    )
    return rows_BH[:, :, None] & columns_BW[:, None]
