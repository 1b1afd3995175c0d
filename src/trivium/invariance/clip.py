"""A tiny CLIP of random weights, and generated pairs for it. B rows of a batch, T text tokens, C, H, W of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from trivium.invariance.flava import ROWS, draw_weights
from trivium.methods.clip import ClipMethod
from trivium.methods.pixels import Pixels
from trivium.models.clip import Clip, ClipConfig
from trivium.train.protocol import Batch, Images, Texts

TINY = ClipConfig(
    image_width=32, image_layers=2, image_heads=4, image_mlp_width=48,
    text_width=24, text_layers=3, text_heads=2, text_mlp_width=40,
    image_size=32, patch_size=8, vocab_size=61, max_length=16, end_id=60, projection_width=20,
)  # fmt: skip
START = 59  # the id that texts begin with


def case(
    dtype: torch.dtype, dropout: float, false_rows: Sequence[int] = (), **options: Any
) -> tuple[ClipMethod, Batch]:
    """One stream as `trivium.invariance` takes it. options: of ClipMethod."""
    method = clip_method(random_clip(replace(TINY, dropout=dropout), dtype=dtype), **options)
    return method, make_batch(ROWS, false_rows=false_rows)


def random_clip(config: ClipConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64) -> Clip:
    """Every tensor drawn, biases, norms, class token and positions too: nothing is zero or one by luck."""
    with torch.device("meta"):
        model = Clip(config).to(dtype)
    draw_weights(model.to_empty(device="cpu"), seed)
    return model


def clip_method(model: Clip, **options: Any) -> ClipMethod:
    """Mean 1/2 and deviation 1/4 are exact in every precision."""
    method = ClipMethod(model, Pixels(mean=(0.5,) * 3, std=(0.25,) * 3), **options)
    return method.to(model.logit_scale.dtype)


def make_batch(
    rows: int,
    config: ClipConfig = TINY,
    *,
    length: int = 9,
    seed: int = 0,
    false_rows: Sequence[int] = (),
) -> Batch:
    """One global batch of pairs; texts of different lengths, from a start to an end token; every concept stands once.

    Args:
        false_rows: rows that carry a caption of something that no picture here shows.
    """
    draw = torch.Generator().manual_seed(seed)
    row_B = torch.arange(rows)
    shape = (rows, 3, config.image_size, config.image_size)
    pixels_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    end_B = torch.randint(2, length, (rows,), generator=draw)
    end_B[0] = length - 1
    ids_BT = torch.randint(1, config.vocab_size - 2, (rows, length), generator=draw)
    position_T = torch.arange(length)
    mask_BT = position_T <= end_B[:, None]
    ids_BT = ids_BT.where(mask_BT, 0)
    ids_BT[:, 0] = START
    ids_BT[row_B, end_B] = config.vocab_size - 1 if config.end_id is None else config.end_id
    matched_B = ~torch.isin(row_B, torch.tensor(list(false_rows), dtype=torch.int64))
    texts = Texts(ids_BT, mask_BT, same_B=row_B.where(matched_B, row_B + rows))
    return Batch("pairs", row_B, row_B.clone(), (Images(pixels_BCHW, row_B.clone()),), (texts,), {"matched": matched_B})
