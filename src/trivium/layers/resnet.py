"""A residual network (He et al., CVPR 2016) for pictures of different sizes in one batch.

A padded picture gives the features that it gives alone. Convolutions carry what lies in the padding over its border,
and there is more than zeros in it after the first norm; so padding is set to zero before every convolution and pooling
that looks at neighbours. How far a picture reaches after a layer of stride 2 follows the convolution's own arithmetic:
half its size, rounded up, each time. GroupNorm counts what is no padding.

Pictures may also come in several runs, of one size each, and then nothing is padded. Their maps are kept as positions,
[P, C], one after the other and row by row: convolutions of 1 x 1 know nothing of neighbours and take all positions as
one matrix, others of stride 1 take small maps side by side (`shelves.py`), the rest go through run by run. Of a single
run the map stays [B, C, H, W].

B batch, n pictures of a run, P positions of all runs, C channels, H height, W width, G groups of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.layers.shelves import in_shelves

Norm = Literal["frozen", "group"]
CHANNELS_OF_A_GROUP = 8
LAYOUT = torch.channels_last  # in memory: what convolutions are fastest with, and how positions lie


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

    def forward(self, x: Tensor, before: Reach, after: Reach) -> Tensor:
        """x and the result: [B, C, H, W], or of several runs [P, C]. before, after: how far pictures reach in them."""
        norm = self.norm
        weight, shift = self.folded(norm, x.dtype) if isinstance(norm, FrozenBatchNorm) else (self.conv.weight, None)
        x = self.convolved(x, before, weight, shift)
        if isinstance(norm, nn.GroupNorm):
            mask = after.mask
            x = together([norm(x_BCHW) if mask is None else group_norm(x_BCHW, mask, norm) for x_BCHW in after.maps(x)])
        return x

    def convolved(self, x: Tensor, before: Reach, weight: Tensor, shift: Tensor | None) -> Tensor:
        """Without the norm."""
        conv = self.conv
        if is_one_product(conv, before):
            return F.linear(x, weight.flatten(1), shift)

        def convolve(x_BCHW: Tensor) -> Tensor:
            return F.conv2d(x_BCHW, weight, shift, conv.stride, conv.padding, conv.dilation)

        maps = before.maps(x)
        if not self.looks_around:
            return together([convolve(x_BCHW) for x_BCHW in maps])
        if conv.stride == (1, 1):
            return together(in_shelves(convolve, maps, int(conv.padding[0])))
        return together([without_narrow_maps(convolve, x_BCHW) for x_BCHW in maps])

    def folded(self, norm: FrozenBatchNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weights that have the norm in them, and the bias, in the precision and the layout of what comes in: once for
        all runs."""
        scale, shift = norm.scale_and_shift()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        return weight.to(dtype=dtype, memory_format=LAYOUT), shift.to(dtype)


def is_one_product(conv: nn.Conv2d, reach: Reach) -> bool:
    """Whether a convolution is one product of matrices for all runs. A single run is left to the library, which has the
    bias and the layout of the weights in the same pass."""
    return len(reach.runs) > 1 and conv.kernel_size == conv.stride == (1, 1)


def without_narrow_maps(convolve: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """What a convolution of stride 2 gives of maps that may be narrower than 3. Of those oneDNN (AMX, bfloat16) leaves
    parts of the result and of the weights' gradient unwritten; with zeros beyond their border the first column is the
    same."""
    width = x_BCHW.shape[3]
    return convolve(x_BCHW) if width >= 3 else convolve(F.pad(x_BCHW, (0, 3 - width)))[..., :1]


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


def together(maps: Sequence[Tensor]) -> Tensor:
    """[n, C, H, W] of each run -> [P, C]; a single one stays as it is."""
    return maps[0] if len(maps) == 1 else torch.cat([x_BCHW.permute(0, 2, 3, 1).flatten(0, 2) for x_BCHW in maps])


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

    def forward(self, x: Tensor, before: Reach, after: Reach) -> Tensor:
        """x and the result: [B, C, H, W], or of several runs [P, C]. before, after: how far pictures reach in them."""
        added = x if self.shortcut is None else self.shortcut(x, before, after)
        convolutions: Iterable[Any] = self.convolutions
        for number, convolution in enumerate(convolutions):
            if number > 0:
                x = F.relu(x, inplace=True)
            if convolution.looks_around:
                x = without_padding(x, before.mask)
            reached = before if convolution.conv.stride[0] == 1 else after
            x, before = convolution(x, before, reached), reached
        return F.relu(x + added, inplace=True)


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

    def forward(self, pictures: Sequence[Tensor], sizes_B2: Tensor | None = None) -> tuple[Tensor, Reach]:
        """The last feature map, [B, C, H, W], or of several runs [P, C], and how far pictures reach in it.

        Args:
            pictures: float [n, 3, H, W] of each run.
            sizes_B2: (height, width) of each picture of a single run; what lies beyond has no effect. None: no padding.
        """
        assert sizes_B2 is None or len(pictures) == 1, "several runs have no padding"
        runs = tuple((len(pixels), *pixels.shape[2:]) for pixels in pictures)
        if sizes_B2 is not None and bool((sizes_B2 == torch.tensor(runs[0][1:], device=sizes_B2.device)).all()):
            sizes_B2 = None
        reach = Reach(runs, None if sizes_B2 is None else sizes_B2.to(pictures[0].device, non_blocking=True))
        if reach.mask is not None:  # not by a product: anything may stand there
            pictures = [pixels.masked_fill(~reach.mask, 0.0) for pixels in pictures]
        x = together([pixels.contiguous(memory_format=LAYOUT) for pixels in pictures])
        after = reach.halved()
        x = without_padding(F.relu(self.stem(x, reach, after), inplace=True), after.mask)
        x, reach = together([F.max_pool2d(x_BCHW, 3, 2, 1) for x_BCHW in after.maps(x)]), after.halved()
        for stage in self.stages:
            blocks: Iterable[Any] = stage  # type: ignore[assignment]
            for block in blocks:
                after = reach.halved() if block.stride == 2 else reach
                x, reach = block(x, reach, after), after
        return x, reach


@dataclass(frozen=True)
class Reach:
    """How far pictures reach in feature maps.

    runs: (number, height, width) of the maps of each run. sizes_B2: int64, of the pictures of a single run; None: to
    the end of their maps, all of them.
    """

    runs: tuple[tuple[int, int, int], ...]
    sizes_B2: Tensor | None

    @cached_property
    def mask(self) -> Tensor | None:
        """bool [B, 1, H, W], True = no padding; None: none anywhere."""
        return None if self.sizes_B2 is None else inside(self.sizes_B2, *self.runs[0][1:])[:, None]

    def halved(self) -> Reach:
        """After a convolution of stride 2 (with padding of half its side), or after the pooling."""
        sizes_B2 = None if self.sizes_B2 is None else (self.sizes_B2 + 1) // 2
        return Reach(tuple((number, (h + 1) // 2, (w + 1) // 2) for number, h, w in self.runs), sizes_B2)

    def maps(self, x: Tensor) -> list[Tensor]:
        """[n, C, H, W] of each run. x: [B, C, H, W], or of several runs [P, C]."""
        if len(self.runs) == 1:
            return [x]
        parts = x.split([number * height * width for number, height, width in self.runs])
        return [part.unflatten(0, run).permute(0, 3, 1, 2) for part, run in zip(parts, self.runs, strict=True)]


def inside(sizes_B2: Tensor, height: int, width: int) -> Tensor:
    """bool [B, height, width]: True within each picture."""
    rows_BH, columns_BW = (
        torch.arange(side, device=sizes_B2.device) < sizes_B2[:, axis, None]
        for axis, side in enumerate((height, width))
    )
    return rows_BH[:, :, None] & columns_BW[:, None]
