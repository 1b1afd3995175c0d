"""The contrastive loss in tiles beside its plain form, and GradCache at a contrastive batch of 8,192.

    python benchmarks/contrastive.py

Time and peak memory of forward and backward, both forms at sizes where the plain one fits; 32,768 rows of width 256 in
tiles alone; and one training step of a tiny FLAVA on 8,192 pairs in micro-batches. Memory is counted above what stood
there before: the rows of the loss, and weights, optimizer state and the batch itself of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import side_by_side
import torch
from flava_pair import make_batches
from torch import Tensor
from torch.nn import functional as F

from trivium.invariance import split
from trivium.methods.flava import FlavaMethod, Pixels
from trivium.models.flava import Flava, FlavaConfig
from trivium.objectives.contrastive import contrastive
from trivium.train import optim
from trivium.train.initial import initialise
from trivium.train.protocol import Key
from trivium.train.step import step

WIDTH = 256
BESIDE_PLAIN = (128, 2048, 8192)
LARGE = 32_768
PAIRS = 8192
MICRO_BATCH = 128


def plain(image_GD: Tensor, text_GD: Tensor, logit_scale: Tensor, same_G: Tensor) -> Tensor:
    """Everything at once, as autograd keeps it; the same false negatives are left out."""
    logits_GG = logit_scale.exp() * image_GD @ text_GD.T
    left_out_GG = (same_G[:, None] == same_G) & ~torch.eye(len(same_G), dtype=torch.bool)
    logits_GG = logits_GG.masked_fill(left_out_GG, float("-inf"))
    answer_G = torch.arange(len(same_G))
    image_to_text, text_to_image = (
        F.cross_entropy(each, answer_G, reduction="sum") for each in (logits_GG, logits_GG.T)
    )
    return 0.5 * (image_to_text + text_to_image)


def tiled(image_GD: Tensor, text_GD: Tensor, logit_scale: Tensor, same_G: Tensor) -> Tensor:
    row_G = torch.arange(len(same_G))
    return contrastive(
        image_GD, text_GD, image_GD, text_GD, logit_scale, row_G, row_G, kept_B=torch.ones_like(row_G).bool(),
        same_image_B=same_G, same_text_B=same_G, same_image_G=same_G, same_text_G=same_G,
    )  # fmt: skip


class Loss:
    """Random rows and what their loss takes."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        drawn = F.normalize(torch.randn(2, rows, WIDTH, generator=generator), dim=-1)
        self.inputs = [*(each.clone().requires_grad_() for each in drawn), torch.tensor([2.6], requires_grad=True)]
        self.same_G = torch.arange(rows) // 2 * 2  # concepts stand twice

    def run(self, form: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = form(*self.inputs, self.same_G)
        return (loss.detach(), *torch.autograd.grad(loss, self.inputs))


def beside_plain(rows: int) -> dict[str, Any]:
    loss = Loss(rows)
    for mine, reference in zip(loss.run(tiled), loss.run(plain), strict=True):
        assert float((mine - reference).norm()) <= 1e-5 * float(reference.norm())
    memory = tuple(side_by_side.peak_memory(partial(loss.run, form)) for form in (tiled, plain))
    times = side_by_side.interleaved(partial(loss.run, tiled), partial(loss.run, plain))
    return side_by_side.row(*times, (memory[0], memory[1]))


def large() -> dict[str, Any]:
    loss = Loss(LARGE)
    started = time.perf_counter()
    memory = side_by_side.peak_memory(partial(loss.run, tiled))
    return {"ours": time.perf_counter() - started, "ours_bytes": memory, "rounds": 1}


def cached_step() -> dict[str, Any]:
    """GradCache: every pair against all 8,192."""
    config = FlavaConfig.of_size("tiny")
    method = FlavaMethod(Flava(config), None, Pixels((0.5,) * 3, (0.25,) * 3))
    initialise(method.model, 0)
    optimizer = optim.build(method, optim.Optim())
    for parameter in method.parameters():  # state and gradients lie there already when the peak is measured
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    batches = split(make_batches(config, PAIRS, None, with_codes=True)["multimodal"], PAIRS // MICRO_BATCH)
    started = time.perf_counter()
    losses: dict[str, float] = {}

    def one() -> None:
        losses.update(step(method, batches, Key(0, "pairs", 0), optimizer).losses)

    memory = side_by_side.peak_memory(one)
    return {"ours": time.perf_counter() - started, "ours_bytes": memory, "rounds": 1, "losses": losses}


def main() -> None:
    side_by_side.refuse_a_busy_machine()
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        **{f"loss, {rows} x {WIDTH}": partial(beside_plain, rows) for rows in BESIDE_PLAIN},
        f"loss, {LARGE} x {WIDTH}": large,
        f"step of tiny, {PAIRS} pairs, micro-batches of {MICRO_BATCH}": cached_step,
    }
    results = {}
    for name, measure in cases.items():
        results[name] = measure()
        print(name, results[name], flush=True)
    side_by_side.write("contrastive", results)


if __name__ == "__main__":
    main()
