"""The formula of useful FLOPs against a count of every product that a step takes, and against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.flava_batches import STREAMS, TINY, flava_method, make_batch, random_flava, split
from trivium.methods.flava import FlavaMethod, Pixels
from trivium.methods.flava_flops import useful_flops
from trivium.models.flava import Flava, FlavaConfig
from trivium.train.protocol import Batch, Images, Key, Texts
from trivium.train.step import backward

WIDE = replace(TINY, width=512, num_heads=8, mlp_width=80, image_layers=1)  # GELU is computed again at this width
CONTRASTIVE = dict.fromkeys(("itm", "mmm_image", "mmm_text"), 0.0)


def scores(rows: int) -> int:
    """One product of all rows with all columns: the tiled contrastive loss takes one again in its backward pass, and
    torch does not count the two that are added up in place."""
    return 2 * rows**2 * TINY.projection_width


def counted(method: FlavaMethod, batches: list[Batch]) -> int:
    """Of the products that torch is asked for; attention as the products that it is made of."""
    method.train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backward(method, batches, Key(0, batches[0].stream, 0))
    return counter.get_total_flops()


def even(stream: str, rows: int, config: FlavaConfig = TINY) -> Batch:
    """No pads, and equally many masked patches and words in each row: nothing is computed that isn't read."""
    batch = make_batch(stream, rows, config, padded=False)
    for name, per_row in (("image_mask", 5), ("selected", 3)):
        if name in batch.targets:
            order = torch.rand(batch.targets[name].shape).argsort(1)
            batch.targets[name] = order < per_row
    return batch


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "wide"])
@pytest.mark.parametrize("stream", STREAMS)
def test_the_formula_is_the_count_where_nothing_is_computed_in_vain(stream: str, config: FlavaConfig) -> None:
    method = flava_method(random_flava(config, dtype=torch.float32))
    batch = even(stream, 4, config)
    again = scores(4) if stream == "pairs" else 0
    assert abs(counted(method, [batch]) - useful_flops(method, batch)) <= again


@pytest.mark.parametrize(
    "options", [{"weights": CONTRASTIVE}, {"weights": {"contrastive": 0.0}}, {"masked_share": 0.5}]
)
def test_what_a_step_leaves_out_is_left_out(options: dict[str, Any]) -> None:
    method = flava_method(random_flava(), **options)
    batch = even("pairs", 4)
    whole = useful_flops(flava_method(random_flava()), batch)
    assert abs(counted(method, [batch]) - useful_flops(method.train(), batch)) <= scores(4)
    assert counted(method, [batch]) < whole


@pytest.mark.parametrize("stream", STREAMS)
def test_pads_positions_of_false_pairs_and_what_is_done_again_are_not_useful(stream: str) -> None:
    method = flava_method(random_flava())
    batch = make_batch(stream, 8, false_rows=(2, 5))
    useful = useful_flops(method, batch)
    assert 0.5 * counted(method, [batch]) < useful < counted(method, [batch])
    parts = split(batch, 4)
    assert sum(useful_flops(method, part, len(batch)) for part in parts) == pytest.approx(useful, rel=1e-12)
    if stream == "pairs":  # GradCache takes the unmasked pass twice
        assert counted(method, parts) > counted(method, [batch])


def test_pictures_of_another_size_than_the_config_names() -> None:
    method = flava_method(random_flava())
    batch = even("pairs", 4, replace(TINY, image_size=48))
    assert abs(counted(method, [batch]) - useful_flops(method, batch)) <= scores(4)


def test_pads_count_where_the_model_sees_them() -> None:
    batch = even("text", 4)
    hidden, visible = (flava_method(random_flava(replace(TINY, pads_visible=seen))) for seen in (False, True))
    whole = useful_flops(hidden, batch)
    batch.texts[0].mask_BT[1, -3:] = False
    assert useful_flops(hidden, batch) < useful_flops(visible, batch) == whole


def test_figures_of_the_published_model() -> None:
    """By hand for ViT-B/16 at 224 pixels, BERT-base at 16 tokens, 75 patches and 2 words masked; GFLOPs a sample."""
    config = FlavaConfig()
    with torch.device("meta"):
        model = Flava(config)
    method = FlavaMethod(model, None, Pixels((0.5,) * 3, (0.25,) * 3))
    row_B, patch = torch.arange(1), torch.arange(196)[None] < 75
    images = (Images(torch.zeros(1, 3, 224, 224, dtype=torch.uint8), row_B),)
    words = torch.ones(1, 16, dtype=torch.int64)
    selected = torch.arange(16)[None] < 2
    targets = {"image_mask": patch, "selected": selected, "matched": torch.ones(1, dtype=torch.bool)}
    pair = Batch("pairs", row_B, row_B, images, (Texts(words, words.bool(), row_B),), targets)
    image = Batch("images", row_B, row_B, images, (), targets)
    assert useful_flops(method, pair) / 1e9 == pytest.approx(275.7, rel=0.01)
    assert useful_flops(method, image) / 1e9 == pytest.approx(103.9, rel=0.01)
