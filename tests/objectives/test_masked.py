"""Masked prediction and matching against plain sums."""

from __future__ import annotations

import math

import pytest
import torch

from trivium.objectives.masked import masked_prediction
from trivium.objectives.matching import matching


def test_masked_prediction_is_a_sum_of_negative_log_probabilities() -> None:
    logits_MV = torch.randn(5, 7, dtype=torch.float64)
    target_M = torch.tensor([0, 6, 3, 3, 1])
    expected = -sum(logits_MV[m].softmax(0)[target].log() for m, target in enumerate(target_M.tolist()))
    assert float(masked_prediction(logits_MV, target_M)) == pytest.approx(float(expected), rel=1e-12)


def test_nothing_masked_gives_zero_and_a_gradient_of_zeros_through_the_head() -> None:
    head = torch.nn.Linear(4, 7)
    loss = masked_prediction(head(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss) == 0
    for parameter in head.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_matching_counts_class_one_as_together_and_sums() -> None:
    logits_B2 = torch.tensor([[0.0, 2.0], [0.0, 2.0], [1.0, 1.0]])
    together, apart = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    loss = matching(logits_B2, torch.tensor([True, False, True]))
    assert float(loss) == pytest.approx(together + apart + math.log(2), rel=1e-6)
