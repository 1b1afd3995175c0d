"""The formula of ALBEF's useful FLOPs against a count of every product that a step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trivium.invariance.albef import albef_method, make_batch, random_albef
from trivium.methods.albef import AlbefMethod
from trivium.methods.albef_flops import useful_flops
from trivium.train.protocol import Batch, Key
from trivium.train.step import backward

ROWS = 4


def counted(method: AlbefMethod, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        backward(method.train(), [batch], Key(0, "pairs", 0))
    return counter.get_total_flops()


def even() -> Batch:
    """No pads, and equally many masked words in each row."""
    batch = make_batch(ROWS, padded=False)
    order = torch.rand(batch.targets["selected"].shape).argsort(1)
    batch.targets["selected"] = order < 2
    return batch


@pytest.mark.parametrize(
    ("options", "whole_texts"),
    [
        ({}, 1),
        ({"itc": 0.0, "mlm": 0.0}, 1),
        ({"weights": {"mlm": 0.0}}, 1),
        ({"weights": {"itm": 0.0}}, 4),
        ({"weights": {"itm": 0.0, "mlm": 0.0}}, 4),
    ],
    ids=["all", "no distillation", "no words", "no pairs", "contrastive alone"],
)
def test_the_formula_is_the_count_but_for_small_things(options: dict[str, Any], whole_texts: int) -> None:
    """whole_texts: passes through the last block of a text's tower that compute all of it where the class token alone
    is read: the teacher's, and without pairs the student's, forward and backward."""
    method = albef_method(random_albef(), **{"pool": ROWS} | options)
    batch = even()
    useful, all_products = useful_flops(method.train(), batch), counted(method, batch)
    config, T = method.model.config, batch.texts[0].ids_BT.shape[1]
    D, M, E = config.width, config.mlp_width, config.projection_width
    in_vain = whole_texts * ROWS * (T - 1) * (2 * D * (2 * D + 2 * M) + 4 * D * T)
    scores = 2 * ROWS * (ROWS + len(method.queue_same)) * E  # of ITC: taken again, in place, or to draw false pairs by
    assert abs(all_products - in_vain - useful) <= 8 * scores < 0.02 * useful


def test_each_part_adds_to_it_and_pads_do_not() -> None:
    method, batch = albef_method(random_albef(), pool=ROWS).train(), even()
    method.ramp = 1.0
    whole = useful_flops(method, batch)
    for name in ("itc", "itm", "mlm"):
        assert useful_flops(albef_method(random_albef(), pool=ROWS, weights={name: 0.0}).train(), batch) < whole
    assert useful_flops(method.eval(), batch) < whole  # nothing is distilled
    method.train()
    batch.texts[0].mask_BT[1, -2:] = False
    batch.targets["selected"][1, -2:] = False
    assert useful_flops(method, batch) < whole < useful_flops(method, even(), 64)
