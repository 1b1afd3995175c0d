"""The head of DINO against torch's own weight norm, and its published size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.dino_batches import TINY, random_dino
from trivium.models.dino import Dino, DinoConfig


def plain_head(model: Dino) -> nn.Sequential:
    """As the paper's code has it: torch's weight-normalised linear layer without bias."""
    config = model.config
    last = nn.utils.parametrizations.weight_norm(
        nn.Linear(config.bottleneck_width, config.num_prototypes, bias=False, dtype=torch.float64), dim=0
    )
    weights: nn.Module = last.parametrizations.weight  # type: ignore[union-attr, assignment]
    with torch.no_grad():
        weights.original0.copy_(model.head.gain[:, None])  # type: ignore[operator, union-attr]
        weights.original1.copy_(model.head.prototypes)  # type: ignore[operator, union-attr]

    class Unit(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(x, dim=-1, p=2)

    return nn.Sequential(*model.head.mlp, Unit(), last)


def test_the_head_is_the_published_one() -> None:
    model = random_dino(replace(TINY, fixed_gain=False))
    rows = torch.randn(6, 32, dtype=torch.float64)
    plain = plain_head(model)
    mine, expected = model.head(rows), plain(rows)
    assert torch.allclose(mine, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(mine)
    wanted = [model.head.prototypes, model.head.gain, model.head.mlp[0].weight]
    grads = torch.autograd.grad((mine * weight).sum(), wanted)
    weights = plain[-1].parametrizations.weight
    theirs = torch.autograd.grad(
        (expected * weight).sum(), [weights.original1, weights.original0, model.head.mlp[0].weight]
    )
    for grad, other in zip(grads, theirs, strict=True):
        assert torch.allclose(grad, other.reshape(grad.shape), rtol=0, atol=1e-11)


def test_its_published_size_and_its_fixed_gain() -> None:
    with torch.device("meta"):
        model = Dino(DinoConfig())
    assert sum(parameter.numel() for parameter in model.head.parameters()) == 23_138_560
    assert not model.head.gain.requires_grad
    assert Dino(replace(TINY, fixed_gain=False)).head.gain.requires_grad
    assert DinoConfig.of_size("small").fixed_gain is False
    assert DinoConfig.of_size("base", patch_size=8) == DinoConfig(patch_size=8)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_lengths_of_rows_and_prototypes_do_not_matter(scale: float) -> None:
    model = random_dino()
    rows = torch.randn(3, 32, dtype=torch.float64)
    before = model.head(rows)
    with torch.no_grad():
        model.head.prototypes.mul_(scale)
    assert torch.allclose(model.head(rows), before, rtol=1e-12)
    assert before.abs().max() <= float(model.head.gain.abs().max())
