"""DINO: Emerging Properties in Self-Supervised Vision Transformers (Caron et al., ICCV 2021, arXiv 2104.14294).

A ViT with a projection head; student and teacher are two of these. Easy to get wrong:

* the last layer is weight-normalised and has no bias: its rows have unit length times a gain, which is 1 and fixed
  where `fixed_gain` (the published `norm_last_layer`), learned otherwise;
* what comes before it is scaled to unit length, so logits are cosines and the temperatures alone make them sharp;
* features for any use are the ViT's class token: the head is for training only. The published weights are the teacher.

B batch, N patches, L positions, D width, E width of the bottleneck, K prototypes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.models.encoded import Encoded
from trivium.models.vit import SIZES as TOWERS
from trivium.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class DinoConfig(ViTConfig):
    """ViT-B/16 with the published head by default: 108,937,216 parameters, the gain among them."""

    position_offset: float = 0.1
    head_width: int = 2048  # of the two hidden layers
    bottleneck_width: int = 256
    num_prototypes: int = 65536  # K: outputs of the head; fewer suit small data
    fixed_gain: bool = True  # the published norm_last_layer; False learns better at S/16 and is less stable

    @classmethod
    def of_size(cls, size: str, **changes: Any) -> DinoConfig:
        """`size` is "tiny", "small" or "base", with single fields changed: `patch_size=8` makes S/8 and B/8."""
        return replace(SIZES[size], **changes)


def _with_head(tower: ViTConfig, **head: Any) -> DinoConfig:
    return DinoConfig(**(asdict(tower) | {"position_offset": 0.1} | head))


SIZES = {
    "tiny": _with_head(TOWERS["tiny"], head_width=512, bottleneck_width=64, num_prototypes=1024),
    "small": _with_head(TOWERS["small"], fixed_gain=False),
    "base": _with_head(TOWERS["base"]),
}


class DinoHead(nn.Module):
    """Three linear layers with GELU between, unit length, weight-normalised prototypes (section 3.1 and appendix C)."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.head_width),
            nn.GELU(),
            nn.Linear(config.head_width, config.head_width),
            nn.GELU(),
            nn.Linear(config.head_width, config.bottleneck_width),
        )
        self.prototypes = nn.Parameter(torch.empty(config.num_prototypes, config.bottleneck_width))
        self.gain = nn.Parameter(torch.ones(config.num_prototypes), requires_grad=not config.fixed_gain)
        nn.init.normal_(self.prototypes, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., D] -> logits [..., K]: cosines with the prototypes, times the gain; float32 at least.

        The length of a prototype is divided out of the logits, not of the prototype: exact, and one pass over [K, E]
        less in each direction.
        """
        row_E = self.mlp(rows)
        row_E = F.normalize(row_E.float() if row_E.dtype == torch.bfloat16 else row_E, dim=-1)
        scale_K = self.gain / torch.linalg.vector_norm(self.prototypes, dim=1)
        return F.linear(row_E, self.prototypes) * scale_K


class Dino(nn.Module):
    """The tower and its head."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ViT(config)
        self.head = DinoHead(config)

    def config_dict(self) -> dict[str, Any]:
        """What a model folder's config.json holds beside the family."""
        return asdict(self.config)

    def blocks(self) -> list[nn.Module]:
        """Every transformer block, for compilation and sharding block by block."""
        return self.backbone.blocks()

    def encode_image(
        self, pixels_BCHW: Tensor, masked_BN: Tensor | None = None, rows: Tensor | int | None = None
    ) -> Encoded:
        """As the tower does (see ViT.encode_image)."""
        return self.backbone.encode_image(pixels_BCHW, masked_BN, rows)

    def attention_maps(self, pixels_BCHW: Tensor) -> Tensor:
        """Of the tower's last block, [B, heads, L, L]."""
        return self.backbone.attention_maps(pixels_BCHW)
