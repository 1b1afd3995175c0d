"""Compiled blocks compute what plain ones do, and every form that a block is called in is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.flava_batches import STREAMS, TINY, assert_close, flava_method, gradients, make_batch, random_flava
from trivium.methods.flava import FlavaMethod
from trivium.models.unit import Unit, UnitConfig
from trivium.train.compilation import compile_blocks
from trivium.train.protocol import Batch, Key
from trivium.train.step import backward


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def sums_and_gradients(method: FlavaMethod, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    method.zero_grad(set_to_none=True)
    sums, _, _ = backward(method, [batch], Key(0, batch.stream, 0))
    return sums, {name: grad.clone() for name, grad in gradients(method.model).items()}


@pytest.mark.slow  # tracing is what takes the time, however small the model
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("width", [32, 512])  # at 512 GELU is computed again in the backward pass
def test_blocks_stay_compiled_while_lengths_and_masks_vary(width: int) -> None:
    plain = flava_method(random_flava(replace(TINY, width=width)))
    compiled = deepcopy(plain)
    compile_blocks(compiled.model.blocks(), backend="eager")
    graphs = []
    for number, (rows, length) in enumerate([(8, 9), (6, 12), (8, 10), (6, 13), (7, 11)]):
        for stream in STREAMS:
            for padded in (True, False):
                batch = make_batch(stream, rows, length=length, seed=number, padded=padded)
                mine, expected = (sums_and_gradients(method, batch) for method in (compiled, plain))
                assert_close(mine[0], expected[0], 1e-12)
                assert_close(mine[1], expected[1], 1e-9, floor=1e-9)
        graphs.append(counters["stats"]["unique_graphs"])
    assert counters["frames"]["ok"] == counters["frames"]["total"], "a form of a block runs uncompiled"
    assert not counters["graph_break"]
    assert graphs[-1] == graphs[-2] > 8, graphs  # lengths vary, and nothing is compiled any more


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_blocks_of_unit_are_compiled_once_for_whatever_sizes_pictures_have() -> None:
    torch.manual_seed(0)
    plain = Unit(UnitConfig.of_size("tiny")).double()
    compiled = deepcopy(plain)
    compile_blocks(compiled.image.blocks, backend="eager")
    draw = torch.Generator().manual_seed(4)
    sizes_K2 = torch.tensor([(48, 64), (64, 48), (48, 80), (80, 48), (64, 64), (32, 80)])
    graphs = []
    for rows in (5, 6, 7, 8, 5, 6, 7, 8):
        sizes_B2 = sizes_K2[torch.randint(6, (rows,), generator=draw)]
        pixels = torch.randn(rows, 3, 80, 80, generator=draw, dtype=torch.float64)
        found, expected = (model.encode_image(pixels, sizes_B2, "coco").states for model in (compiled, plain))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        found.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert counters["frames"]["ok"] == counters["frames"]["total"], "a form of a block runs uncompiled"
    assert graphs[-1] == graphs[3] > 1, graphs
