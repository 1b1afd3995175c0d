"""Ranks that are cut out of a batch on one process against as many gloo processes that each do what the published
codes do: their own rows, gathered features with or without gradient, and gradients averaged over processes.

R ranks, B rows of each, D width.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from trivium import invariance
from trivium.invariance import Layout, clip
from trivium.objectives.contrastive import Scope
from trivium.train import distributed
from trivium.train.protocol import Key
from trivium.train.step import backward

RANKS = 4
SCOPES: tuple[Scope, ...] = ("global", "local_gradient", "local")


class _SummedInBackward(torch.autograd.Function):
    """All gather whose backward pass sums the gradients of all processes: torch.distributed.nn's, written out."""

    @staticmethod
    def forward(ctx, mine_BD: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        everyone = [torch.empty_like(mine_BD) for _ in range(RANKS)]
        dist.all_gather(everyone, mine_BD.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, grad_GD: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        grad_GD = grad_GD.clone()
        dist.all_reduce(grad_GD)
        return grad_GD.chunk(RANKS)[dist.get_rank()]


def gathered(mine_BD: Tensor, scope: Scope) -> Tensor:
    if scope == "local":
        return mine_BD
    if scope == "global":
        return _SummedInBackward.apply(mine_BD)
    everyone = [torch.empty_like(mine_BD) for _ in range(RANKS)]
    dist.all_gather(everyone, mine_BD.detach().contiguous())
    everyone[dist.get_rank()] = mine_BD  # torchmultimodal's LOCAL: one's own block keeps its gradient
    return torch.cat(everyone)


def as_published(scope: Scope) -> dict[str, Tensor]:
    """Loss and gradients of this process, averaged over processes as DistributedDataParallel does."""
    method, batch = clip.case(torch.float64, 0.0)
    [mine] = invariance.share_of_this_process(invariance.split(batch, RANKS))
    rows, _ = method.embed(mine)
    image_BD, text_BD = rows.rows["image"], rows.rows["text"]
    first = 0 if scope == "local" else distributed.rank() * len(mine)
    target_B = first + torch.arange(len(mine))
    scale = method.model.logit_scale.exp()
    loss = 0.5 * (
        F.cross_entropy(scale * image_BD @ gathered(text_BD, scope).T, target_B)
        + F.cross_entropy(scale * text_BD @ gathered(image_BD, scope).T, target_B)
    )
    loss.backward()
    found = {"loss": loss.detach()} | {f"gradient of {n}": p.grad for n, p in method.named_parameters()}
    for value in found.values():
        dist.all_reduce(value)
        value /= RANKS
    return {f"{scope}: {name}": value for name, value in found.items()}


def on_real_ranks() -> dict[str, Tensor]:
    return {name: value for scope in SCOPES for name, value in as_published(scope).items()}


def on_simulated_ranks(scope: Scope) -> dict[str, Tensor]:
    method, batch = clip.case(torch.float64, 0.0, scope=scope, num_ranks=RANKS)
    sums, counts, _ = backward(method.train(), [batch], Key(0, "pairs", 0))
    found = {"loss": sums["contrastive"] / counts["contrastive"]}
    found |= {f"gradient of {name}": p.grad for name, p in method.named_parameters()}
    return {f"{scope}: {name}": value for name, value in found.items()}


def test_simulated_ranks_are_as_many_real_ones() -> None:
    [real, *_] = invariance.on_processes(RANKS, on_real_ranks)
    simulated = {name: value for scope in SCOPES for name, value in on_simulated_ranks(scope).items()}
    assert real.keys() == simulated.keys()
    for name, expected in real.items():
        if not name.endswith("qkv.bias"):  # the keys' third of it has no gradient but rounding
            error = float((simulated[name] - expected).abs().max())
            assert error <= 1e-11 * float(expected.abs().max()), f"{name}: differs by {error:.3g}"
    # And the scopes are not one and the same by accident.
    weight = "gradient of model.image_projection.weight"
    for one, other in (("global", "local_gradient"), ("global", "local"), ("local_gradient", "local")):
        assert not torch.allclose(real[f"{one}: {weight}"], real[f"{other}: {weight}"], rtol=1e-3, atol=0)
    loss = {scope: float(real[f"{scope}: loss"]) for scope in SCOPES}
    assert loss["local_gradient"] == pytest.approx(loss["global"], rel=1e-12)
    assert loss["local"] < loss["global"]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_means_the_same_in_any_micro_batch(scope: Scope) -> None:
    """Ranks belong to the recipe: neither micro-batches nor (below, marked slow) processes change them."""
    make = partial(clip.case, false_rows=(3,), scope=scope, num_ranks=RANKS)
    whole = invariance.losses_and_gradients(make, Layout(1, 1, 0.0, "float64"))
    for micro_batches in (2, 8):
        found = invariance.losses_and_gradients(make, Layout(1, micro_batches, 0.0, "float64"))
        worst, where = invariance._deviation(found, whole)
        assert worst <= 1e-9, f"{where}: {worst:.3g}"


@pytest.mark.slow
def test_a_scope_means_the_same_on_any_number_of_processes() -> None:
    cases = {scope: partial(clip.case, false_rows=(3,), scope=scope, num_ranks=RANKS) for scope in SCOPES}
    found = invariance.compare(cases, worlds=(1, 2))
    assert all(each.within for each in found), "\n".join(map(str, found))
