"""The floor of the contrastive loss beside a search over all scores, with the objective that a run uses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trivium.data.loss_floor import contrastive_floor
from trivium.objectives.contrastive import contrastive


def searched(pictures_B: np.ndarray, captions_B: np.ndarray, same_B: np.ndarray) -> float:
    """The smallest loss over scores that are free but for this: what is equal has equal ones."""
    one, other = one_way(pictures_B, captions_B, same_B), one_way(captions_B, pictures_B, same_B)
    return (one + other) / 2


def one_way(queries_B: np.ndarray, answers_B: np.ndarray, same_B: np.ndarray) -> float:
    _, query_B = np.unique(queries_B, return_inverse=True)
    _, answer_B = np.unique(answers_B, return_inverse=True)
    hidden_BB = torch.from_numpy((same_B[:, None] == same_B[None, :]) & ~np.eye(len(same_B), dtype=bool))
    scores = torch.zeros(query_B.max() + 1, answer_B.max() + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=1000, line_search_fn="strong_wolfe", tolerance_change=1e-13)
    value = 0.0

    def loss() -> float:
        nonlocal value
        optimizer.zero_grad()
        logits_BB = scores[query_B][:, answer_B].masked_fill(hidden_BB, -math.inf)
        found = F.cross_entropy(logits_BB, torch.arange(len(query_B)))
        found.backward()  # type: ignore[no-untyped-call]
        value = float(found.detach())
        return value

    optimizer.step(loss)
    loss()
    return value


def test_it_is_what_a_search_over_scores_finds() -> None:
    rng = np.random.default_rng(0)
    above = 0
    for _ in range(60):
        size = int(rng.integers(2, 12))
        pictures_B, captions_B = (rng.integers(0, rng.integers(1, size + 1), size) for _ in range(2))
        same_B = rng.integers(0, rng.integers(1, 2 * size), size)
        floor = contrastive_floor(pictures_B, captions_B, same_B)
        assert floor == pytest.approx(searched(pictures_B, captions_B, same_B), abs=1e-3)
        above += floor > 0.01
    assert above > 30


def test_no_model_falls_below_it_and_one_reaches_it() -> None:
    """The objective itself: embeddings trained freely, one for each picture and each caption that can be told apart."""
    pictures_B = np.array([0, 1, 2, 3, 4, 5, 5, 6, 7, 8])
    captions_B = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
    same_B = np.array([0, 1, 2, 3, 3, 4, 5, 6, 7, 8])  # rows 3 and 4 are one concept
    floor = contrastive_floor(pictures_B, captions_B, same_B)
    assert floor == pytest.approx((3 * math.log(3) + 2 * math.log(2)) / 10)

    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(2, 9, 16, dtype=torch.float64))
    scale = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = torch.optim.Adam([table, scale], lr=0.05)
    row, same = torch.arange(10), torch.from_numpy(same_B)
    kept, losses = torch.ones(10, dtype=torch.bool), []
    for _ in range(400):
        image = F.normalize(table[0][torch.from_numpy(pictures_B)], dim=1)
        text = F.normalize(table[1][torch.from_numpy(captions_B)], dim=1)
        loss = contrastive(
            *(image, text, image, text, scale, row, row), kept_B=kept,
            same_image_B=same, same_text_B=same, same_image_G=same, same_text_G=same,
        )  # fmt: skip
        optimizer.zero_grad()
        (loss / 10).backward()
        optimizer.step()
        losses.append(float(loss.detach()) / 10)
    assert min(losses) > floor
    assert losses[-1] == pytest.approx(floor, abs=0.01)


def test_what_is_all_different_costs_nothing_and_what_is_all_equal_costs_chance() -> None:
    rows = np.arange(500)
    assert contrastive_floor(rows, rows, rows) == pytest.approx(0, abs=1e-9)
    for equal in ((rows, 0 * rows), (0 * rows, rows), (0 * rows, 0 * rows)):
        assert contrastive_floor(*equal, rows) == pytest.approx(math.log(500))
        assert contrastive_floor(*equal, 0 * rows) == pytest.approx(0, abs=1e-9)
