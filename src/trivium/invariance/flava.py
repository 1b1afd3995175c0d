"""A tiny FLAVA of random weights, and generated batches for it.

B rows of a batch, N patches, T text tokens, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.methods.flava import FlavaMethod, Pixels
from trivium.methods.retrieval import RetrievalMethod
from trivium.models.flava import Flava, FlavaConfig
from trivium.train.protocol import Batch, Images, Texts

TINY = FlavaConfig(
    width=32, num_heads=4, mlp_width=48, image_layers=2, text_layers=3, multimodal_layers=2, image_size=32,
    patch_size=8, vocab_size=61, max_length=16, num_codes=17, projection_width=24,
)  # fmt: skip
ROWS = 16  # of the global batch


def case(
    stream: str, dtype: torch.dtype, dropout: float, false_rows: Sequence[int] = (), masked: bool = True, **options: Any
) -> tuple[FlavaMethod, Batch]:
    """One stream as `trivium.invariance` takes it. options: of FlavaMethod."""
    method = flava_method(random_flava(replace(TINY, dropout=dropout), dtype=dtype), **options)
    return method, make_batch(stream, ROWS, false_rows=false_rows, masked=masked)


def retrieval_case(dtype: torch.dtype, dropout: float) -> tuple[RetrievalMethod, Batch]:
    """Fine-tuning on retrieval, two rows of one picture among the pairs. As `case`."""
    model = random_flava(replace(TINY, dropout=dropout), dtype=dtype)
    batch = make_batch("pairs", ROWS)
    batch.images[0].same_B = torch.where(batch.rows_B == 5, 0, batch.rows_B)
    return retrieval_method(model, pool=ROWS // 8), batch


def retrieval_method(model: Flava, **options: Any) -> RetrievalMethod:
    method = RetrievalMethod(model, Pixels(mean=(0.5,) * 3, std=(0.25,) * 3), **options)
    return method.to(model.logit_scale.dtype)


def random_flava(config: FlavaConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float64) -> Flava:
    """Every tensor drawn, biases, norms, class tokens and positions too: nothing is zero or one by luck."""
    with torch.device("meta"):
        model = Flava(config).to(dtype)
    draw_weights(model.to_empty(device="cpu"), seed)
    with torch.no_grad():
        model.text.embeddings.word.weight[config.pad_id] = 0.0
    return model


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """N(0, 0.05) in every parameter, but around 1 for the weights of norms and around 2.6 for the logit scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 2.6 if name == "logit_scale" else 0.0
        parameter.copy_(centre + 0.05 * torch.randn(parameter.shape, generator=generator))


def flava_method(model: Flava, **options: Any) -> FlavaMethod:
    """Mean 1/2 and deviation 1/4 are exact in every precision."""
    method = FlavaMethod(model, None, Pixels(mean=(0.5,) * 3, std=(0.25,) * 3), **options)
    return method.to(model.logit_scale.dtype)


def make_batch(
    stream: str,
    rows: int,
    config: FlavaConfig = TINY,
    *,
    length: int = 9,
    seed: int = 0,
    false_rows: Sequence[int] = (),
    padded: bool = True,
    masked: bool = True,
) -> Batch:
    """One global batch with its masks, codes and false pairs in it; every concept stands once.

    Args:
        false_rows: rows of `pairs` that carry a caption of another picture.
        padded: texts of different lengths.
        masked: False = not one patch or token is masked.
    """
    draw = torch.Generator().manual_seed(seed)
    row_B = torch.arange(rows)
    images: tuple[Images, ...] = ()
    texts: tuple[Texts, ...] = ()
    targets: dict[str, Tensor] = {}
    if stream != "text":
        shape = (rows, 3, config.image_size, config.image_size)
        images = (Images(torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw), same_B=row_B),)
        targets["image_mask"] = (torch.rand(rows, config.grid**2, generator=draw) < 0.4) & masked
        targets["image_mask"][:, 3] = masked  # the peer has no number for a mean over nothing
        targets["codes"] = torch.randint(0, config.num_codes, (rows, config.grid**2), generator=draw)
    if stream != "images":
        ids_BT = torch.randint(5, config.vocab_size, (rows, length), generator=draw)
        lengths_B = torch.randint(3, length + 1, (rows,), generator=draw) if padded else torch.full((rows,), length)
        lengths_B[0] = length
        mask_BT = torch.arange(length) < lengths_B[:, None]
        ids_BT = ids_BT.where(mask_BT, torch.tensor(config.pad_id))
        selected_BT = (torch.rand(rows, length, generator=draw) < 0.35) & mask_BT & masked
        selected_BT[:, 1] = masked
        targets["selected"] = selected_BT
        targets["masked_ids"] = ids_BT.masked_fill(selected_BT, 4)
        texts = (Texts(ids_BT, mask_BT, same_B=row_B.clone()),)
    if stream == "pairs":
        targets["matched"] = ~torch.isin(row_B, torch.tensor(list(false_rows), dtype=torch.int64))
        texts[0].same_B[~targets["matched"]] += rows  # a caption of something that no picture here shows
    return Batch(stream, row_B, row_B.clone(), images, texts, targets)
