"""The formula of CLIP's useful FLOPs against a count of every product, and against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trivium.invariance.clip import clip_method, make_batch, random_clip
from trivium.methods.clip import ClipMethod
from trivium.methods.clip_flops import useful_flops
from trivium.methods.pixels import Pixels
from trivium.models.clip import Clip, ClipConfig
from trivium.train.protocol import Batch, Images, Key, Texts
from trivium.train.step import backward


def counted(method: ClipMethod, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backward(method.train(), [batch], Key(0, "pairs", 0))
    return counter.get_total_flops()


def test_the_formula_is_the_count_but_for_scores_that_the_causal_mask_hides() -> None:
    method = clip_method(random_clip())
    config, batch = method.model.config, make_batch(4)
    T = batch.texts[0].ids_BT.shape[1]
    batch.texts[0].ids_BT[:] = 1
    batch.texts[0].ids_BT[:, -1] = config.end_id if config.end_id is not None else config.vocab_size - 1
    hidden = 3 * 4 * config.text_width * 4 * (config.text_layers - 1) * T * (T - 1) / 2
    scores = 2 * 4**2 * config.projection_width  # taken again in the backward pass of the tiled loss
    assert abs(counted(method, batch) - hidden - useful_flops(method, batch)) <= scores


def test_what_stands_behind_the_end_token_is_not_useful() -> None:
    method = clip_method(random_clip())
    config, batch = method.model.config, make_batch(4)
    end = config.end_id if config.end_id is not None else config.vocab_size - 1
    ids_BT = batch.texts[0].ids_BT
    ids_BT[:] = 1
    ids_BT[:, -1] = end
    whole = useful_flops(method, batch)
    ids_BT[2, -3] = end
    assert useful_flops(method, batch) < whole
    assert useful_flops(method, batch, 64) > useful_flops(method, batch)  # columns of the global batch


def test_figure_of_the_published_model() -> None:
    """ViT-B/16 at 224 pixels: 35.1 GFLOP a picture whose last block reads everything, 2.4 less for its class token;
    text of 77 tokens under 5.96: half of its scores are hidden."""
    with torch.device("meta"):
        model = Clip(ClipConfig())
    method = ClipMethod(model, Pixels((0.5,) * 3, (0.25,) * 3))
    row_B = torch.arange(1)
    ids_BT = torch.ones(1, 77, dtype=torch.int64)
    ids_BT[:, -1] = 49407
    texts = (Texts(ids_BT, torch.ones(1, 77, dtype=torch.bool), row_B),)
    images = (Images(torch.zeros(1, 3, 224, 224, dtype=torch.uint8), row_B),)
    batch = Batch("pairs", row_B, row_B, images, texts, {"matched": torch.ones(1, dtype=torch.bool)})
    patches = 2 * 196 * 768 * 768 / 1e9
    assert useful_flops(method, batch) / 1e9 == pytest.approx(3 * (32.7 + 5.5) - patches, rel=0.02)
