"""A tiny dVAE of random weights whose average is not its newest weights, and generated pictures for it.

B rows of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch

from trivium.methods.dvae import Annealing, DVaeMethod
from trivium.models.dvae import DVae, DVaeConfig
from trivium.train.protocol import Batch, Images

TINY = DVaeConfig(width=8, num_groups=3, blocks_per_group=1, num_codes=13, code_width=6, decoder=True)
ROWS = 16  # of the global batch
SIZE = 12  # pixels of a side: nine codes a picture
NUM_STEPS = 100


def case(dtype: torch.dtype, dropout: float, **options: Any) -> tuple[DVaeMethod, Batch]:
    """As `trivium.invariance` takes it; there is no dropout in a dVAE. options: of DVaeMethod."""
    return dvae_method(random_dvae(dtype=dtype), **options), make_batch(ROWS)


def random_dvae(config: DVaeConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64) -> DVae:
    """Every tensor drawn, biases too. Weights at their own scale: smaller ones would make all codes one."""
    model = DVae(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.05
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def dvae_method(model: DVae, annealing: Annealing | None = None, step: int = 30, **options: Any) -> DVaeMethod:
    """In the midst of a run: half annealed, and with an average of its own."""
    annealing = annealing or Annealing(temperature_length=0.5, kl_length=0.6)
    method = DVaeMethod(model, annealing, NUM_STEPS, **options)
    dtype = model.encoder.head.weight.dtype
    method.average.load_state_dict(random_dvae(model.config, seed=1, dtype=dtype).state_dict())
    method.schedule(step)
    return method.to(dtype)


def make_batch(rows: int, size: int = SIZE, seed: int = 0) -> Batch:
    """One global batch of pictures of coarse noise, some of it white."""
    draw = torch.Generator().manual_seed(seed)
    coarse_BCHW = torch.randint(0, 300, (rows, 3, size // 2, size // 2), generator=draw).clamp(max=255)
    pixels_BCHW = coarse_BCHW.repeat_interleave(2, 2).repeat_interleave(2, 3).to(torch.uint8)
    row_B = torch.arange(rows)
    return Batch("images", row_B, row_B.clone(), (Images(pixels_BCHW, row_B),))
