"""A tiny DINO of random weights whose teacher is not its student, and generated crops for it.

B rows of a batch, N patches of a global crop, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from trivium.methods.dino import DinoMethod, Distillation
from trivium.methods.pixels import Pixels
from trivium.models.dino import Dino, DinoConfig
from trivium.train.protocol import Batch, Images

TINY = DinoConfig(
    width=32, num_heads=4, mlp_width=48, num_layers=3, image_size=32, patch_size=8, head_width=40, bottleneck_width=16,
    num_prototypes=24, mask_token=True,
)  # fmt: skip
ROWS = 16  # of the global batch


def case(dtype: torch.dtype, dropout: float, num_local: int = 3, **options: Any) -> tuple[DinoMethod, Batch]:
    """As `trivium.invariance` takes it. options: of `dino_method`."""
    config = replace(TINY, dropout=dropout, drop_path=dropout)
    return dino_method(random_dino(config, dtype=dtype), **options), make_batch(ROWS, num_local=num_local)


def random_dino(config: DinoConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64) -> Dino:
    """Every tensor drawn: nothing is zero or one by luck."""
    model = Dino(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith(("norm.weight", "gain")) else 0.0
            parameter.copy_(centre + 0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def dino_method(model: Dino, weights: dict[str, float] | None = None, **distillation: Any) -> DinoMethod:
    """With a teacher and centres of their own, as in the midst of a run. distillation: fields of Distillation."""
    settings = Distillation(**{"temperature_warmup": 0.0, "teacher_temperature": 0.07} | distillation)
    method = DinoMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), settings, num_steps=100, weights=weights)
    dtype = model.head.gain.dtype
    with torch.no_grad():
        other = random_dino(model.config, seed=1, dtype=dtype)
        for mine, theirs in zip(method.teacher.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
        for center_K in (method.center, method.patch_center):
            if center_K is not None:
                center_K.copy_(0.1 * torch.randn(center_K.shape, generator=torch.Generator().manual_seed(2)))
    return method.to(dtype)


def make_batch(rows: int, config: DinoConfig = TINY, *, num_local: int = 3, seed: int = 0) -> Batch:
    """One global batch of crops, local ones at half the size, with hidden patches in some of the global ones."""
    draw = torch.Generator().manual_seed(seed)
    row_B = torch.arange(rows)
    sizes = [config.image_size] * 2 + [config.image_size // 2] * num_local
    images = tuple(
        Images(torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=draw), row_B) for size in sizes
    )
    mask_B2N = torch.rand(rows, 2, config.grid**2, generator=draw) < 0.3
    mask_B2N[::3, 0] = False
    return Batch("crops", row_B, row_B.clone(), images, (), {"patch_mask": mask_B2N})
