"""DINO's losses against double loops over rows and pairs, written from the paper's equations. float64, 1e-12."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trivium.objectives.dino import centred, crop_loss, entropy, koleo, masked_patches, num_pairs, sinkhorn

V, B, K = 5, 4, 7


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def pair_by_pair(student: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """Equation 3: every pair of a teacher's and another of the student's crops, row by row."""
    total, terms = student.new_zeros(()), 0
    for teacher_crop in range(2):
        for crop in range(len(student)):
            if crop == teacher_crop:
                continue
            terms += 1
            for row in range(student.shape[1]):
                log_p = F.log_softmax(student[crop, row] / temperature, dim=-1)
                for prototype in range(student.shape[2]):
                    total = total - shares[teacher_crop, row, prototype] * log_p[prototype]
    assert terms == num_pairs(len(student))
    return total / terms


@pytest.mark.parametrize("crops", [2, 3, V])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_crop_loss_is_the_mean_over_pairs(crops: int, temperature: float) -> None:
    shares = drawn(2, B, K, scale=3).softmax(-1)
    student = drawn(crops, B, K).requires_grad_()
    mine = crop_loss(student, shares, temperature)
    [grad] = torch.autograd.grad(3 * mine, student)
    plain = pair_by_pair(student, shares, temperature)
    [expected] = torch.autograd.grad(3 * plain, student)
    assert mine.item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.allclose(grad, expected, rtol=0, atol=1e-12)


def test_the_crop_loss_of_large_logits_stays_finite() -> None:
    student = (1e3 * drawn(V, B, K)).float().requires_grad_()
    loss = crop_loss(student, drawn(2, B, K).softmax(-1).float(), 0.1)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_equal_answers_cost_the_logarithm_of_their_number() -> None:
    loss = crop_loss(torch.zeros(V, B, K), torch.full((2, B, K), 1 / K), 0.1)
    assert float(loss) == pytest.approx(B * math.log(K))
    assert entropy(torch.full((B, K), 1 / K)) == pytest.approx([math.log(K)] * B)
    assert entropy(torch.eye(K)).tolist() == [0.0] * K


def test_a_centre_moves_shares_and_carries_no_gradient() -> None:
    outputs, center = drawn(2, B, K).requires_grad_(), drawn(K)
    shares = centred(outputs, center, 0.04)
    assert not shares.requires_grad
    for crop in range(2):
        for row in range(B):
            scores = [math.exp((outputs[crop, row, k].item() - float(center[k])) / 0.04) for k in range(K)]
            assert shares[crop, row].tolist() == pytest.approx([score / sum(scores) for score in scores], rel=1e-9)


def test_sinkhorn_is_the_published_iteration() -> None:
    """As the paper of SwAV writes it: a matrix of exponentials, columns and rows scaled in turn."""
    outputs, rows = drawn(9, K, scale=0.2), 9
    Q = (outputs / 0.05).exp().t()
    Q = Q / Q.sum()
    for _ in range(3):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / rows
    assert torch.allclose(sinkhorn(outputs, 0.05), (Q * rows).t(), rtol=1e-10, atol=0)


@given(st.integers(2, 40), st.floats(0.02, 1.0), st.integers(0, 1000))
def test_sinkhorn_uses_prototypes_alike(rows: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    shares = sinkhorn(drawn(rows, K), temperature, iterations=300)
    assert shares.isfinite().all()
    assert torch.allclose(shares.sum(1), torch.ones(rows, dtype=torch.float64))
    if rows >= K and temperature > 0.3:  # sharper ones converge more slowly
        assert torch.allclose(shares.sum(0), torch.full((K,), rows / K, dtype=torch.float64), rtol=0.02)


def test_hidden_patches_count_by_their_picture() -> None:
    student, shares, weight = drawn(6, K).requires_grad_(), drawn(6, K).softmax(-1), torch.rand(6).double()
    mine = masked_patches(student, shares, weight, 0.1)
    plain = torch.stack([-weight[m] * (shares[m] * F.log_softmax(student[m] / 0.1, -1)).sum() for m in range(6)]).sum()
    [grad], [expected] = torch.autograd.grad(mine, student), torch.autograd.grad(plain, student)
    assert mine.item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.allclose(grad, expected, atol=1e-12)


def test_koleo_finds_the_nearest_other() -> None:
    everyone = drawn(8, 5).requires_grad_()
    rows = torch.arange(8)
    mine = koleo(everyone[2:5], everyone, rows[2:5], rows)
    unit = F.normalize(everyone, dim=-1)
    plain = torch.stack(
        [-(min((unit[i] - unit[j]).norm() for j in range(8) if j != i) + 1e-8).log() for i in range(2, 5)]
    ).sum()
    [grad], [expected] = torch.autograd.grad(mine, everyone), torch.autograd.grad(plain, everyone)
    assert mine.item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.allclose(grad, expected, atol=1e-10)


def test_koleo_of_equal_rows_is_finite_and_of_one_row_is_nothing() -> None:
    same = torch.ones(3, 4, requires_grad=True)
    loss = koleo(same, same, torch.arange(3), torch.arange(3))
    [grad] = torch.autograd.grad(loss, same)
    assert loss.isfinite()
    assert grad.isfinite().all()
    one = torch.ones(1, 4, requires_grad=True)
    alone = koleo(one, one, torch.arange(1), torch.arange(1))
    assert alone.item() == 0
    assert torch.autograd.grad(alone, one)[0].abs().sum() == 0
