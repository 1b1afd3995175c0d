"""The terms of the discrete VAE against torch's distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Laplace, SigmoidTransform, TransformedDistribution, kl_divergence
from torch.nn import functional as F

from trivium.models.dvae import map_pixels
from trivium.objectives.dvae import gumbel_softmax, kl_to_uniform, logit_laplace


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def test_the_likelihood_is_that_of_a_laplace_variable_through_a_sigmoid() -> None:
    location, log_scale = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5)
    mapped = map_pixels(torch.rand(2, 3, 4, 5, dtype=torch.float64))
    density = TransformedDistribution(Laplace(location, log_scale.exp()), [SigmoidTransform()])
    expected = -density.log_prob(mapped).sum()
    loss = logit_laplace(location, log_scale, mapped)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (location, log_scale)),
        torch.autograd.grad(expected, (location, log_scale)),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-11, atol=1e-12)


def test_the_density_of_a_pixel_integrates_to_one() -> None:
    pixel = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    one = torch.ones_like(pixel)
    density = [
        math.exp(-float(logit_laplace(one[:1] * 0.3, one[:1] * -0.7, pixel[n : n + 1])))
        for n in range(0, len(pixel), 200)
    ]
    assert sum(density) / len(density) == pytest.approx(1.0, abs=2e-3)


def test_the_kl_term_is_that_of_two_categorical_distributions() -> None:
    logits = drawn(3, 7, 2, 4)
    q = Categorical(logits=logits.permute(0, 2, 3, 1))
    expected = kl_divergence(q, Categorical(logits=torch.zeros_like(q.logits))).sum()
    loss = kl_to_uniform(logits)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (mine,), (theirs,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13)


@given(num_codes=st.integers(2, 40), positions=st.integers(1, 6))
def test_the_kl_term_lies_between_knowing_nothing_and_certainty(num_codes: int, positions: int) -> None:
    unknown = torch.full((1, num_codes, positions, 1), 3.0, dtype=torch.float64)
    assert float(kl_to_uniform(unknown)) == pytest.approx(0.0, abs=1e-12)
    certain = 1e3 * F.one_hot(torch.arange(positions) % num_codes, num_codes).double().t()[None, :, :, None]
    assert float(kl_to_uniform(certain)) == pytest.approx(positions * math.log(num_codes), rel=1e-12)


def test_relaxed_codes_are_those_of_torch() -> None:
    logits = drawn(2, 5, 3, 3)
    torch.manual_seed(3)
    expected = F.gumbel_softmax(logits, tau=0.3, dim=1)
    torch.manual_seed(3)
    noise = -torch.empty_like(logits).exponential_().log()
    assert torch.equal(gumbel_softmax(logits, noise, 0.3), expected)


def test_the_likeliest_relaxed_code_is_drawn_as_often_as_its_share() -> None:
    """The Gumbel-max trick: what a low temperature comes near to is a draw from softmax(logits)."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])[None, :, None, None].expand(20_000, -1, 1, 1)
    noise = -torch.empty(logits.shape).exponential_().log()
    soft = gumbel_softmax(logits, noise, 1 / 16)
    share = soft.argmax(1).flatten().bincount(minlength=4) / len(soft)
    assert torch.allclose(share, logits[0, :, 0, 0].softmax(0), atol=0.01)
    assert float(soft.max(1).values.mean()) > 0.9
