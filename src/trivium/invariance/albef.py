"""A tiny ALBEF of random weights whose teacher is not its student, and generated pairs for it.

B rows of a batch, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from trivium.invariance import flava
from trivium.methods.albef import FOLLOWED, AlbefMethod, Distillation
from trivium.methods.pixels import Pixels
from trivium.models.albef import Albef, AlbefConfig
from trivium.train.protocol import Batch

TINY = AlbefConfig(
    width=32, num_heads=4, mlp_width=48, image_layers=2, text_layers=2, fusion_layers=3, image_size=32, patch_size=8,
    vocab_size=61, max_length=16, projection_width=24, dropout=0.0,
)  # fmt: skip
ROWS = flava.ROWS  # of the global batch
POOL = ROWS // 8  # the smallest micro-batch of a comparison
ALIKE = ((0, 5), (9, 14))  # rows that show one thing, in pools of their own


def case(dtype: torch.dtype, dropout: float, **options: Any) -> tuple[AlbefMethod, Batch]:
    """As `trivium.invariance` takes it. options: of `albef_method`."""
    method = albef_method(random_albef(replace(TINY, dropout=dropout), dtype=dtype), **{"pool": POOL} | options)
    return method, make_batch(ROWS, alike=ALIKE)


def random_albef(config: AlbefConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64) -> Albef:
    """Every tensor drawn: nothing is zero or one by luck."""
    model = Albef(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "temperature":
                continue
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + 0.05 * torch.randn(parameter.shape, generator=generator))
        model.text.embeddings.word.weight[config.pad_id] = 0.0
    return model


def albef_method(model: Albef, queue: int = 12, **options: Any) -> AlbefMethod:
    """With a teacher and a queue of its own, as in the midst of a run: the ramp is done.

    options: of AlbefMethod, and fields of Distillation.
    """
    distillation = Distillation(**{n: options.pop(n) for n in list(options) if n in Distillation.__dataclass_fields__})
    pixels = Pixels(mean=(0.5,) * 3, std=(0.25,) * 3)  # exact in every precision
    method = AlbefMethod(model, pixels, distillation, 100, 10, queue, **options)
    method = method.to(model.temperature.dtype)
    other = random_albef(model.config, seed=1, dtype=model.temperature.dtype)
    with torch.no_grad():
        for name in FOLLOWED:
            getattr(method.teacher, name).load_state_dict(getattr(other, name).state_dict())
        draw = torch.Generator().manual_seed(2)
        for queue_QD in (method.image_queue, method.text_queue):
            queue_QD.copy_(F.normalize(torch.randn(queue_QD.shape, generator=draw), dim=1))
        if queue:
            method.queue_same[::4, 0] = 3  # what row 3 shows, seen before
            method.queue_pointer.fill_(queue - 2)
    method.schedule(50)
    return method


def make_batch(
    rows: int, *, alike: Sequence[tuple[int, int]] = (), seed: int = 0, length: int = 9, padded: bool = True
) -> Batch:
    """One global batch of pairs with hidden words. alike: rows of which the second shows what the first does."""
    batch = flava.make_batch("pairs", rows, length=length, seed=seed, padded=padded)
    same_B = batch.rows_B.clone()
    for first, second in alike:
        same_B[second] = same_B[first]
    batch.images[0].same_B, batch.texts[0].same_B = same_B, same_B.clone()
    return batch
