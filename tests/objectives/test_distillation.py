"""ITC and MLM with soft labels against plain constructions, float64: values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trivium.objectives.contrastive import contrastive
from trivium.objectives.distillation import distilled_contrastive, distilled_prediction, published_prediction

B, G, Q, D = 4, 7, 9, 6


def unit_rows(rows: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(drawn, dim=-1)


def plain(
    query_BD: Tensor, teacher_BD: Tensor, keys: Tensor, tau: Tensor, answer: list[int], same: Tensor, alpha: float,
    duplicates: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Row by row, every column named, targets written out."""
    losses, entropies = [], []
    for row in range(len(query_BD)):
        columns = [
            column
            for column in range(len(keys))
            if duplicates != "mask" or column == answer[row] or not same[row, column]
        ]
        labels = torch.zeros(len(columns), dtype=torch.float64)
        for place, column in enumerate(columns):
            is_answer = column == answer[row] or (duplicates == "positive" and bool(same[row, column]))
            labels[place] = float(is_answer)
        labels = labels / labels.sum()
        log_p = (keys[columns] @ query_BD[row] / tau[0]).log_softmax(0)
        q = (keys[columns] @ teacher_BD[row] / tau[0]).softmax(0).detach()
        losses.append(-((alpha * q + (1 - alpha) * labels) * log_p).sum())
        entropies.append(-(q * q.log()).sum() if alpha else torch.zeros((), dtype=torch.float64))
    return torch.stack(losses), torch.stack(entropies)


@pytest.mark.parametrize(
    ("duplicates", "alpha", "queue", "tile"),
    list(itertools.product(("mask", "ignore", "positive"), (0.0, 0.4, 1.0), (0, Q), (1, 20, 1 << 22))),
)
def test_value_and_gradient_are_those_of_the_plain_form(duplicates: str, alpha: float, queue: int, tile: int) -> None:
    query_BD, teacher_BD = unit_rows(B, 0).requires_grad_(), unit_rows(B, 1)
    key_GD, queue_QD = unit_rows(G, 2), unit_rows(queue, 3)
    tau = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    answer = torch.tensor([5, 0, 3, 6])
    same = torch.rand(B, G + queue, generator=torch.Generator().manual_seed(4)) < 0.4
    same[0] = True  # whatever stands there shows the same
    weight = torch.tensor([0.5, -1.0, 2.0, 0.7], dtype=torch.float64)
    mine, entropy = distilled_contrastive(
        query_BD,
        teacher_BD,
        (key_GD, queue_QD),
        tau,
        answer,
        same.split([G, queue], 1),
        alpha,
        duplicates,
        tile,  # type: ignore[arg-type]
    )
    yours, expected = plain(
        query_BD, teacher_BD, torch.cat([key_GD, queue_QD]), tau, answer.tolist(), same, alpha, duplicates
    )
    assert torch.allclose(mine, yours, rtol=1e-12, atol=1e-13)
    assert torch.allclose(entropy, expected, rtol=1e-12, atol=1e-13)
    assert not entropy.requires_grad
    grads = torch.autograd.grad((mine * weight).sum(), (query_BD, tau))
    for grad, other in zip(grads, torch.autograd.grad((yours * weight).sum(), (query_BD, tau)), strict=True):
        assert torch.allclose(grad, other, rtol=1e-11, atol=1e-12)


def test_without_teacher_and_queue_it_is_the_contrastive_loss_of_clip_and_flava() -> None:
    """Both directions, keys without gradient: every row counts and each is the answer of one. float64."""
    image_BD, text_BD = unit_rows(B, 0).requires_grad_(), unit_rows(B, 1).requires_grad_()
    scale = torch.tensor([1.2], dtype=torch.float64, requires_grad=True)
    row_B, kept_B = torch.arange(B), torch.ones(B, dtype=torch.bool)
    same_image_B, same_text_B = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 2, 0])
    keys = {"image": image_BD.detach(), "text": text_BD.detach()}
    expected = contrastive(
        image_BD, text_BD, keys["image"], keys["text"], scale, row_B, row_B, kept_B=kept_B,
        same_image_B=same_image_B, same_text_B=same_text_B, same_image_G=same_image_B, same_text_G=same_text_B,
    )  # fmt: skip
    ways = (
        (image_BD, "text", same_image_B[:, None] == same_text_B),
        (text_BD, "image", same_text_B[:, None] == same_image_B),
    )
    losses = [
        distilled_contrastive(asked, asked.detach(), (keys[key],), 1 / scale.exp(), row_B, (same_BB,), 0.0)[0]
        for asked, key, same_BB in ways
    ]
    mine = torch.stack(losses).sum() / 2
    assert mine.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = (image_BD, text_BD, scale)
    for grad, other in zip(torch.autograd.grad(mine, wanted), torch.autograd.grad(expected, wanted), strict=True):
        assert torch.allclose(grad, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_gradients_agree_with_finite_differences(alpha: float) -> None:
    """Of the temperature without a teacher alone: its shares depend on it too, and give no gradient."""
    query_BD, tau = unit_rows(B, 0).requires_grad_(), torch.tensor([0.4], dtype=torch.float64, requires_grad=not alpha)
    same = (torch.eye(B, G, dtype=torch.bool), torch.zeros(B, Q, dtype=torch.bool))

    def loss(query_BD: Tensor, tau: Tensor) -> Tensor:
        return distilled_contrastive(
            query_BD, unit_rows(B, 1), (unit_rows(G, 2), unit_rows(Q, 3)), tau, torch.arange(B), same, alpha
        )[0]

    assert torch.autograd.gradcheck(loss, (query_BD, tau))


def test_the_known_numbers_of_torchmultimodal() -> None:
    """Its ImageTextContrastiveLoss on 2 x 3 logits drawn after seed 0: 1.160506, and 1.341230 with alpha 0.4. Scores
    become ours with the identity for keys, since those are linear in the queries."""
    torch.manual_seed(0)
    i2t, t2i, i2t_m, t2i_m = (torch.randn(2, 3) for _ in range(4))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for alpha, expected in ((0.0, 1.160506), (0.4, 1.341230)):
        both = [
            distilled_contrastive(
                asked, taught, (torch.eye(3),), torch.ones(1), torch.arange(2), (nothing,), alpha, "ignore"
            )[0].mean()
            for asked, taught in ((i2t, i2t_m), (t2i, t2i_m))
        ]
        assert float(sum(both)) / 2 == pytest.approx(expected, abs=2e-6)


@given(alpha=st.floats(0, 1), axis=st.sampled_from([-1, 1]))
def test_masked_words_with_soft_labels(alpha: float, axis: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits_BTV, teacher_BTV = (torch.randn(3, 5, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    logits_BTV.requires_grad_()
    ids_BT = torch.randint(0, 8, (3, 5), generator=draw)
    selected_BT = torch.rand(3, 5, generator=draw) < 0.5
    places_M = selected_BT.flatten().nonzero()[:, 0]
    q = teacher_BTV.softmax(-1)[selected_BT]
    hard = F.cross_entropy(logits_BTV[selected_BT], ids_BT[selected_BT], reduction="sum")
    plain = (1 - alpha) * hard - alpha * (q * logits_BTV.log_softmax(axis)[selected_BT]).sum()
    if axis == 1:
        mine, entropy = published_prediction(logits_BTV, places_M, ids_BT[selected_BT], teacher_BTV, alpha)
    else:
        mine, entropy = distilled_prediction(
            logits_BTV.flatten(0, 1)[places_M], ids_BT[selected_BT], teacher_BTV.flatten(0, 1)[places_M], alpha
        )
    assert float(mine) == pytest.approx(float(plain), rel=1e-12)
    assert float(entropy) == pytest.approx(float(-(q * q.log()).sum()), rel=1e-12)
    for grad, other in zip(torch.autograd.grad(mine, logits_BTV), torch.autograd.grad(plain, logits_BTV), strict=True):
        assert torch.allclose(grad, other, atol=1e-13)


def test_no_masked_word_gives_a_gradient_of_zeros() -> None:
    logits_0V = torch.randn(0, 5, requires_grad=True)
    loss, _ = distilled_prediction(logits_0V, torch.zeros(0, dtype=torch.int64), torch.randn(0, 5), 0.4)
    loss.backward()
    assert float(loss) == 0 and logits_0V.grad is not None
