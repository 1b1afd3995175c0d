"""The discrete VAE of DALL-E (Ramesh et al., arXiv 2102.12092, A.2; layout of openai/DALL-E): pictures to codes.

FLAVA's and BEiT's targets come from it. Easy to get wrong:

* pixels in [0, 1] are mapped to [0.1, 0.9] first; `encode` and `decode` do that themselves;
* each residual path is scaled by 1 / L^2, L the number of blocks of the whole network;
* encoder and decoder blocks mirror each other: 3x3, 3x3, 3x3, 1x1 against 1x1, 3x3, 3x3, 3x3;
* in training the encoder's last and the decoder's first convolution take float32, whatever the precision of the rest.

B batch, C channels, H height, W width, N codes of a picture (row-major), K codes there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOGITS_AT_ONCE = 2**24  # the [rows, K] logits of `encode` are made in pieces of at most so many numbers


@dataclass(frozen=True)
class DVaeConfig:
    """The published tokenizer by default: 53,786,240 parameters in the encoder, 43,829,766 in the decoder."""

    width: int = 256  # of the first group; each next one doubles it
    num_groups: int = 4  # between them the picture is halved
    blocks_per_group: int = 2
    num_codes: int = 8192
    code_width: int = 128  # of a code as the decoder reads it
    decoder: bool = False  # FLAVA's checkpoints carry the encoder alone

    @property
    def stride(self) -> int:
        """Pixels along a side that one code stands for."""
        return 2 ** (self.num_groups - 1)


def conv(width_in: int, width_out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size; weights N(0, 1 / sqrt(width_in * kernel^2)), bias zero."""
    layer = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(width_in * kernel**2))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """shortcut(x) + gain * four convolutions, a ReLU before each. The inner ones have a quarter of the width."""

    def __init__(self, width_in: int, width_out: int, kernels: Sequence[int], gain: float) -> None:
        super().__init__()
        inner = width_out // 4
        widths = (width_in, inner, inner, inner, width_out)
        self.gain = gain
        self.shortcut = conv(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.convs = nn.ModuleList(conv(a, b, k) for a, b, k in zip(widths, widths[1:], kernels, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        path = x
        for layer in self.convs:
            path = layer(F.relu(path))
        return torch.add(self.shortcut(x), path, alpha=self.gain)


def _groups(width_in: int, widths: Sequence[int], kernels: Sequence[int], config: DVaeConfig) -> nn.ModuleList:
    gain = 1 / (config.num_groups * config.blocks_per_group) ** 2
    groups = nn.ModuleList()
    for width in widths:
        blocks = [
            ResidualBlock(width_in if n == 0 else width, width, kernels, gain) for n in range(config.blocks_per_group)
        ]
        groups.append(nn.Sequential(*blocks))
        width_in = width
    return groups


class DVaeEncoder(nn.Module):
    """Mapped pixels -> logits over the codes."""

    def __init__(self, config: DVaeConfig) -> None:
        super().__init__()
        widths = [config.width * 2**n for n in range(config.num_groups)]
        self.stem = conv(3, config.width, 7)
        self.groups = _groups(config.width, widths, (3, 3, 3, 1), config)
        self.head = conv(widths[-1], config.num_codes, 1)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, width, H / stride, W / stride], what `head` reads."""
        x = self.stem(pixels_BCHW)
        for n, group in enumerate(self.groups):
            x = group(x if n == 0 else F.max_pool2d(x, 2))
        return F.relu(x)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, K, H / stride, W / stride]."""
        return self.head(self.features(pixels_BCHW))


class DVaeDecoder(nn.Module):
    """Codes -> location and log-scale of a logit-Laplace distribution over mapped pixels, three channels each."""

    def __init__(self, config: DVaeConfig) -> None:
        super().__init__()
        widths = [config.width * 2**n for n in reversed(range(config.num_groups))]
        self.stem = conv(config.num_codes, config.code_width, 1)  # its columns are the codebook
        self.groups = _groups(config.code_width, widths, (1, 3, 3, 3), config)
        self.head = conv(widths[-1], 6, 1)

    def forward(self, codes_BKHW: Tensor) -> Tensor:
        """One-hot or soft codes [B, K, h, w] -> [B, 6, h * stride, w * stride]."""
        return self.from_vectors(self.stem(codes_BKHW))

    def from_vectors(self, x: Tensor) -> Tensor:
        """The vectors of codes, [B, code_width, h, w] -> [B, 6, h * stride, w * stride]."""
        for n, group in enumerate(self.groups):
            x = group(x if n == 0 else F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.head(F.relu(x))


class DVae(nn.Module):
    """An image tokenizer. One code covers stride x stride pixels of its own view of a picture (see `input_size`)."""

    kind = "dvae"

    def __init__(self, config: DVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.num_codes = config.num_codes
        self.stride = config.stride
        self.encoder = DVaeEncoder(config)
        self.decoder = DVaeDecoder(config) if config.decoder else None

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def input_size(self, picture_size: int, patch_size: int) -> int:
        """Side of the tokenizer's view, so that one code covers one patch of the model's: 224 / 16 * 8 = 112."""
        return picture_size // patch_size * self.stride

    # Training: codes are not one-hot yet, and gradients flow.

    def features(self, mapped_BCHW: Tensor) -> Tensor:
        """Mapped pixels -> what logits are made of, [B, D, H / stride, W / stride]."""
        features_BDhw = self.encoder.features(mapped_BCHW.to(memory_format=torch.channels_last))
        return features_BDhw.to(mapped_BCHW.dtype)

    def logits_of(self, features_BDhw: Tensor) -> Tensor:
        """-> logits [B, K, h, w]; this last convolution in the precision of what comes in."""
        with torch.autocast(features_BDhw.device.type, enabled=False):
            return self.encoder.head(features_BDhw)

    def logits(self, mapped_BCHW: Tensor) -> Tensor:
        """Mapped pixels -> logits [B, K, H / stride, W / stride], the last convolution in full precision."""
        return self.logits_of(self.features(mapped_BCHW))

    def distribution(self, codes_BKHW: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot or soft codes -> location and log-scale of mapped pixels' logits, [B, 3, H, W] each; the first
        convolution in full precision."""
        assert self.decoder is not None, "this tokenizer came without a decoder"
        with torch.autocast(codes_BKHW.device.type, enabled=False):
            vectors = self.decoder.stem(codes_BKHW)
        location_BCHW, log_scale_BCHW = self.decoder.from_vectors(vectors).to(codes_BKHW.dtype).chunk(2, dim=1)
        return location_BCHW, log_scale_BCHW

    # Use.

    def frozen(self, dtype: torch.dtype = torch.float32) -> DVae:
        """This tokenizer made ready to be used and not trained: no gradients, channels last, in `dtype`.

        float32 gives the exact codes. bfloat16 changes those whose two best logits nearly tie: only where measured
        to be faster.
        """
        self.requires_grad_(False).eval().to(dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels in [0, 1], H and W multiples of the stride -> codes int64 [B, N], row-major."""
        head = self.encoder.head
        x_BCHW = map_pixels(pixels_BCHW).to(head.weight.dtype, memory_format=torch.channels_last)
        features = self.encoder.features(x_BCHW).permute(0, 2, 3, 1)
        B, h, w, width = features.shape
        rows = features.reshape(B * h * w, width)
        weight = head.weight.reshape(self.num_codes, width)
        pieces = rows.split(max(1, LOGITS_AT_ONCE // self.num_codes))
        return torch.cat([F.linear(piece, weight, head.bias).argmax(1) for piece in pieces]).view(B, h * w)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor | None:
        """Codes [B, N] of square pictures, or [B, h, w] -> pixels in [0, 1], [B, 3, H, W]. None without a decoder."""
        if self.decoder is None:
            return None
        if codes_BN.ndim == 2:
            side = math.isqrt(codes_BN.shape[1])
            assert side**2 == codes_BN.shape[1], f"{codes_BN.shape[1]} codes make no square: pass [B, h, w]"
            codes_BN = codes_BN.view(-1, side, side)
        stem = self.decoder.stem
        assert stem.bias is not None
        vectors = F.embedding(codes_BN, stem.weight[:, :, 0, 0].t()) + stem.bias  # a 1x1 convolution of one-hot rows
        return unmap_pixels(torch.sigmoid(self.decoder.from_vectors(vectors.permute(0, 3, 1, 2))[:, :3].float()))


def map_pixels(pixels: Tensor) -> Tensor:
    """[0, 1] -> [0.1, 0.9], away from the ends, where the logit-Laplace density has no value."""
    return 0.8 * pixels + 0.1


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The way back, clamped to [0, 1]."""
    return ((mapped - 0.1) / 0.8).clamp(0, 1)
