"""Computing the activation again in the backward pass: the plain block's values and gradients, no product twice.

B batch, L positions, D width, M width of the feed-forward's inside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trivium.layers import transformer
from trivium.layers.activations import ACTIVATIONS
from trivium.layers.transformer import PreNormBlock

B, L, D, M = 2, 5, 24, 40


def values(block: Callable[[Tensor], Tensor], parameters: list[Tensor], autocast: Any = nullcontext) -> list[Tensor]:
    x_BLD = torch.linspace(-1, 1, B * L * D, dtype=parameters[0].dtype).sin().view(B, L, D).requires_grad_()
    with autocast():
        output = block(x_BLD)
    wanted = [x_BLD, *(parameter for parameter in parameters if parameter.requires_grad)]
    return [output, *torch.autograd.grad(output.float().square().sum(), wanted)]


@pytest.fixture
def recompute(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda wanted: monkeypatch.setattr(transformer, "RECOMPUTE_FROM", 0 if wanted else D + 1)


@pytest.mark.parametrize("frozen", [(), ("mlp_out.weight",), ("mlp_out.weight", "mlp_out.bias"), ("mlp_in.weight",)])
@pytest.mark.parametrize("precision", ["float64", "float32", "autocast"])
def test_values_and_gradients_are_those_of_the_plain_block(
    precision: str, frozen: tuple[str, ...], recompute: Callable[[bool], None]
) -> None:
    block = PreNormBlock(D, 4, M, 1e-12).to(torch.float64 if precision == "float64" else torch.float32)
    for name in frozen:
        block.get_parameter(name).requires_grad_(False)
    autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "autocast" else nullcontext
    found = []
    for wanted in (False, True):
        recompute(wanted)
        found.append(values(block, list(block.parameters()), autocast))
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


def test_a_weight_used_again_within_autocast_keeps_both_gradients(recompute: Callable[[bool], None]) -> None:
    """Autocast keeps its copy of a weight: one made without a graph would swallow the second use's gradient."""
    block = PreNormBlock(D, 4, M, 1e-12)
    x_BLD, hidden_BM = torch.randn(B, L, D), torch.randn(B, M)
    found = []
    for wanted in (False, True):
        recompute(wanted)
        with torch.autocast("cpu", torch.bfloat16):
            both = block(x_BLD).float().sum() + block.mlp_out(hidden_BM).float().square().sum()
        found.append(torch.autograd.grad(both, [block.mlp_out.weight, block.mlp_out.bias]))
    for plain, again in zip(*found, strict=True):
        assert float((plain - again).abs().max()) <= 2e-2 * float(plain.abs().max())


@pytest.mark.parametrize("precision", ["float64", "autocast"])
def test_quick_gelu_recomputed_is_that_of_the_plain_block(precision: str, recompute: Callable[[bool], None]) -> None:
    """Its slope cancels in the gradient that is written out: equal but for the rounding."""
    block = PreNormBlock(D, 4, M, 1e-12, activation="quick_gelu")
    block = block.double() if precision == "float64" else block
    autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "autocast" else nullcontext
    found = []
    for wanted in (False, True):
        recompute(wanted)
        found.append(values(block, list(block.parameters()), autocast))
    for plain, again in zip(*found, strict=True):
        of_largest = 1e-12 if precision == "float64" else 2e-2
        assert float((plain - again).detach().abs().max()) <= of_largest * float(plain.detach().abs().max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_formula_and_its_gradient_that_of_autograd(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    formula = x * torch.sigmoid(1.702 * x) if name == "quick_gelu" else x * torch.special.ndtr(x)
    grad = torch.linspace(-1, 2, 101, dtype=torch.float64)
    found = ACTIVATIONS[name].forward(x)
    torch.testing.assert_close(found, formula, rtol=1e-12, atol=1e-14)
    [expected] = torch.autograd.grad(formula, x, grad)
    for given in (torch.autograd.grad(found, x, grad)[0], ACTIVATIONS[name].backward(grad, x.detach())):
        torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_finite_differences(activation: str, recompute: Callable[[bool], None]) -> None:
    recompute(True)
    block = PreNormBlock(8, 2, 12, 1e-12, activation=activation).double()
    assert torch.autograd.gradcheck(block, (torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_compiled_block_gives_the_same(activation: str, recompute: Callable[[bool], None]) -> None:
    recompute(True)
    block = PreNormBlock(D, 4, M, 1e-12, activation=activation).double()
    plain = values(block, list(block.parameters()))
    compiled = values(torch.compile(block, backend="aot_eager"), list(block.parameters()))
    torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=1e-12)


def test_gelu_is_computed_again_and_no_product_is(recompute: Callable[[bool], None]) -> None:
    block = PreNormBlock(D, 4, M, 1e-12)
    calls: list[dict[str, int]] = []
    for wanted in (False, True):
        recompute(wanted)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            values(block, list(block.parameters()))
        calls.append({event.key: event.count for event in found.key_averages()})
    for product in ("aten::addmm", "aten::mm"):
        assert calls[0].get(product) == calls[1].get(product)
    assert (calls[0]["aten::gelu"], calls[1]["aten::gelu"]) == (1, 2)
