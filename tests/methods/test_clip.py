"""CLIP's step: its one loss, its marks, and what the monitors are told."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from trivium.invariance import split
from trivium.invariance.clip import clip_method, make_batch, random_clip
from trivium.methods.clip import ClipMethod
from trivium.models.clip import MAX_LOGIT_SCALE
from trivium.train.protocol import Key, Rows
from trivium.train.step import backward, measure, step

KEY = Key(0, "pairs", 0)


def loss_of(method: ClipMethod, **batch: object) -> float:
    sums, counts, _ = backward(method, [make_batch(6, **batch)], KEY)  # type: ignore[arg-type]
    return float(sums["contrastive"] / counts["contrastive"])


def test_the_loss_is_that_of_figure_3() -> None:
    model, batch = random_clip(), make_batch(6)
    method = clip_method(model)
    with torch.no_grad():
        image = model.encode_image(method.pixels(batch.images[0].pixels_BCHW)).projected
        text = model.encode_text(batch.texts[0].ids_BT).projected
        logits = model.logit_scale.exp() * image @ text.T
    labels = torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert loss_of(method) == pytest.approx(float(expected), rel=1e-12)


def test_a_false_pair_has_no_loss_of_its_own_but_stays_a_column() -> None:
    method = clip_method(random_clip())
    batch = make_batch(6, false_rows=(2,))
    sums, counts, _ = backward(method, [batch], KEY)
    assert counts["contrastive"] == 5
    rows, _ = method.embed(batch)
    rows.marks["kept"][2] = True
    assert float(method.couple(rows, rows)["contrastive"].detach()) > float(sums["contrastive"])
    without = [row for row in range(6) if row != 2]
    fewer = Rows({n: r[without] for n, r in rows.rows.items()}, {n: m[without] for n, m in rows.marks.items()})
    fewer.marks["row"] = torch.arange(5)
    assert float(method.couple(fewer, fewer)["contrastive"].detach()) < float(sums["contrastive"])


def test_two_pictures_of_one_concept_are_no_negatives_of_each_other() -> None:
    method, batch = clip_method(random_clip()), make_batch(6)
    plain = backward(method, [batch], KEY)[0]["contrastive"]
    for marks in (batch.images[0].same_B, batch.texts[0].same_B):
        marks[4] = 1
    assert float(backward(method, [batch], KEY)[0]["contrastive"]) < float(plain)


def test_a_step_clamps_the_logit_scale_on_both_sides() -> None:
    for start, expected in ((9.0, MAX_LOGIT_SCALE), (-3.0, 0.0)):
        method = clip_method(random_clip())
        with torch.no_grad():
            method.model.logit_scale.fill_(start)
        step(method, [make_batch(6)], KEY, torch.optim.SGD(method.parameters(), lr=1e-6))
        assert method.model.logit_scale.item() == pytest.approx(expected)


def test_the_sigmoid_form_has_a_bias_that_learns_and_no_model_keeps() -> None:
    method = clip_method(random_clip(), contrastive_form="sigmoid")
    backward(method, [make_batch(6)], KEY)
    assert method.logit_bias is not None and method.logit_bias.grad is not None and method.logit_bias.grad.any()
    assert not any("bias" in name for name in method.model.state_dict() if "logit" in name)


@pytest.mark.parametrize(("scope", "columns"), [("global", 6), ("local_gradient", 6), ("local", 3)])
def test_chance_is_equal_scores_for_the_columns_that_a_row_has(scope: str, columns: int) -> None:
    method = clip_method(random_clip(), scope=scope, num_ranks=2)
    counts = {name: float(value) for name, value in method.counts(make_batch(6)).items()}
    assert method.chance(counts) == {"contrastive": pytest.approx(math.log(columns))}
    with torch.no_grad():
        method.model.image_projection.weight.zero_()  # every score is 0
    assert loss_of(method) == pytest.approx(math.log(columns))


@pytest.mark.parametrize(("scope", "columns"), [("global", 6), ("local", 3)])
def test_chance_of_the_sigmoid_form_is_its_own(scope: str, columns: int) -> None:
    """Equal scores, and the bias that fits them best: every column is the answer with a probability of 1 / columns."""
    method = clip_method(random_clip(), scope=scope, num_ranks=2, contrastive_form="sigmoid")
    with torch.no_grad():
        method.model.image_projection.weight.zero_()
        method.logit_bias.fill_(-math.log(columns - 1))  # type: ignore[union-attr]
    counts = {name: float(value) for name, value in method.counts(make_batch(6)).items()}
    assert loss_of(method) == pytest.approx(method.chance(counts)["contrastive"])
    assert method.chance(counts)["contrastive"] > math.log(columns)


def test_validation_takes_all_micro_batches_together() -> None:
    method, batch = clip_method(random_clip()), make_batch(6)
    assert measure(method, [split(batch, 3)], KEY)["contrastive"] == pytest.approx(loss_of(method), rel=1e-12)


def test_no_pass_reads_a_number_back_from_the_device() -> None:
    """On the meta device numbers do not exist: whatever would wait for a GPU raises here."""
    method = clip_method(random_clip()).to("meta")
    rows, _ = method.embed(make_batch(4))  # `couple` asks for autocast, which the meta device lacks
    assert all(value.is_meta for value in (*rows.rows.values(), *rows.marks.values()))
