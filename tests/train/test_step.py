"""A step means the same in one micro-batch and in several; what it skips leaves no trace. float64 throughout."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.flava_batches import STREAMS, TINY, assert_close, flava_method, gradients, make_batch, random_flava, split
from trivium.errors import TriviumError
from trivium.methods.flava import FlavaMethod
from trivium.train import optim
from trivium.train.optim import Optim
from trivium.train.protocol import Batch, Key, Method, Rows, uniform64
from trivium.train.step import backward, measure, step

ROWS = 8


def losses_and_gradients(method: FlavaMethod, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    method.train()
    method.zero_grad(set_to_none=True)
    sums, counts, _ = backward(method, batches, Key(3, batches[0].stream, 5))
    losses = {name: value / counts[name].clamp(min=1) for name, value in sums.items()}
    return losses, {name: grad.clone() for name, grad in gradients(method.model).items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "all losses": {},
    "a share of the pairs": {"masked_share": 0.3},
    "contrastive alone": {"weights": dict.fromkeys(("itm", "mmm_image", "mmm_text"), 0.0)},
    "no contrastive": {"weights": {"contrastive": 0.0, "mmm_text": 0.5}},
}
CASES = [
    *[(stream, (), "all losses") for stream in STREAMS],
    *[("pairs", (1, 6), options) for options in OPTIONS],
    ("pairs", (0, 1, 2, 3, 4, 5, 6), "all losses"),  # whole micro-batches of false pairs
    ("pairs", tuple(range(ROWS)), "all losses"),  # the gate is open
]


@pytest.mark.parametrize(("stream", "false_rows", "options"), CASES)
def test_micro_batches_change_no_loss_and_no_gradient(stream: str, false_rows: tuple[int, ...], options: str) -> None:
    method = flava_method(random_flava(), **OPTIONS[options])
    batch = make_batch(stream, ROWS, false_rows=false_rows)
    losses, grads = losses_and_gradients(method, [batch])
    assert all(value > 0 for value in losses.values())
    for parts in (2, 4, 8):
        found = losses_and_gradients(method, split(batch, parts))
        assert_close(found[0], losses, 1e-9)
        without_key_bias = [{n: g[: len(g) // 3] if n.endswith("qkv.bias") else g for n, g in grads_.items()}
                            for grads_ in (found[1], grads)]  # fmt: skip
        assert_close(without_key_bias[0], without_key_bias[1], 1e-9)


def test_a_batch_of_64_is_the_same_in_micro_batches_of_64_32_8_and_1() -> None:
    method = flava_method(random_flava())
    batch = make_batch("pairs", 64, false_rows=range(0, 64, 5))
    losses, grads = losses_and_gradients(method, [batch])
    for parts in (2, 8, 64):
        found = losses_and_gradients(method, split(batch, parts))
        assert_close(found[0], losses, 1e-9)
        assert_close(found[1], grads, 1e-9)


class Recorded(FlavaMethod):
    """Keeps the rows of every pass."""

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        rows, states = super().embed(batch)
        self.seen.append({name: value.detach().clone() for name, value in rows.rows.items()})
        return rows, states


@pytest.mark.parametrize("parts", [2, 8, 64])
def test_both_passes_of_a_micro_batch_draw_the_same_dropout(parts: int) -> None:
    config = replace(TINY, dropout=0.1)
    method = flava_method(random_flava(config))
    method.__class__ = Recorded
    method.seen = []
    batches = split(make_batch("pairs", 64), parts)
    losses_and_gradients(method, batches)
    assert len(method.seen) == 2 * parts
    for first, again in zip(method.seen[:parts], method.seen[parts:], strict=True):
        for name in ("image", "text"):
            assert torch.equal(first[name], again[name])
    method.eval()
    plain, _ = FlavaMethod.embed(method, batches[0])
    assert not torch.allclose(plain.rows["image"], method.seen[0]["image"])  # there was dropout


def test_cached_gradients_with_dropout_equal_one_graph_over_all_micro_batches() -> None:
    method = flava_method(random_flava(replace(TINY, dropout=0.1)))
    batches = split(make_batch("pairs", ROWS, false_rows=(2,)), 4)
    losses, grads = losses_and_gradients(method, batches)

    method.zero_grad(set_to_none=True)
    key, parts, sums = Key(3, "pairs", 5), [], {}
    total_counts = {n: sum(method.counts(b)[n].double() for b in batches) for n in method.counts(batches[0])}
    for batch in batches:
        key.reseed(batch.number)
        rows, states = method.embed(batch)
        parts.append(rows)
        for name, value in method.separate(batch, rows, states, total_counts, key).items():
            sums[name] = sums.get(name, 0) + value
    everyone = Rows(
        {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows},
        {name: torch.cat([part.marks[name] for part in parts]) for name in parts[0].marks},
    )
    sums |= method.couple(everyone, everyone)
    expected = {name: value / total_counts[name] for name, value in sums.items()}
    torch.stack(list(expected.values())).sum().backward()
    assert_close(losses, {name: value.detach() for name, value in expected.items()}, 1e-9)
    assert_close(grads, gradients(method.model), 1e-9)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_stream_whose_losses_are_all_frozen_is_named(parts: int) -> None:
    method = flava_method(random_flava())
    optimizer = optim.build(method, Optim(freeze=("image.*", "mim_head.*")))
    with pytest.raises(TriviumError, match="a step of stream images trains nothing"):
        step(method, split(make_batch("images", ROWS), parts), Key(0, "images", 0), optimizer)
    assert step(method, split(make_batch("text", ROWS), parts), Key(0, "text", 1), optimizer).accepted


def test_under_frozen_towers_the_logit_scale_trains_alone_in_any_micro_batches() -> None:
    method = flava_method(random_flava(), **OPTIONS["contrastive alone"])
    optim.build(method, Optim(freeze=("image*", "text*", "multimodal*", "*head*")))
    batch = make_batch("pairs", ROWS, false_rows=(1, 6))
    losses, grads = losses_and_gradients(method, [batch])
    assert set(grads) == {"logit_scale"}
    for parts in (2, 8):
        found = losses_and_gradients(method, split(batch, parts))
        assert_close(found[0], losses, 1e-9)
        assert_close(found[1], grads, 1e-9)


# What one step changes, and what a skipped one doesn't.


def state_of(method: FlavaMethod, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {f"model/{name}": value.clone() for name, value in method.state_dict().items()}
    for number, entry in optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{number}/{name}": torch.as_tensor(value).clone() for name, value in entry.items()}
    return state


def assert_equal_states(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(mine) == set(other)
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("poison", ["loss", "one gradient"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(parts: int, poison: str) -> None:
    method = flava_method(random_flava())
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2, weight_decay=0.1)
    batches = split(make_batch("pairs", ROWS), parts)
    assert step(method, batches, Key(0, "pairs", 0), optimizer, clip="global").accepted
    before = state_of(method, optimizer)
    if poison == "loss":
        method.weights["mmm_text"] = math.inf
    else:
        handle = method.model.itm_head.decoder.bias.register_hook(lambda grad: grad * math.nan)
    result = step(method, batches, Key(0, "pairs", 1), optimizer, clip="global")
    assert not result.accepted
    assert_equal_states(state_of(method, optimizer), before)
    assert not gradients(method)
    method.weights["mmm_text"] = 1.0
    if poison != "loss":
        handle.remove()
    assert step(method, batches, Key(0, "pairs", 2), optimizer).accepted
    assert not torch.equal(method.model.itm_head.decoder.bias, before["model/model.itm_head.decoder.bias"])


def test_a_loss_that_is_infinite_with_finite_gradients_is_skipped_too() -> None:
    method = flava_method(random_flava())
    batch = make_batch("text", ROWS)
    with torch.no_grad():  # one word is impossible: -inf goes through softmax without harm, its own loss is infinite
        method.model.mlm_head.decoder.bias[batch.texts[0].ids_BT[batch.targets["selected"]][0]] = -math.inf
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    before = state_of(method, optimizer)
    assert not step(method, [batch], Key(0, "text", 0), optimizer).accepted
    assert_equal_states(state_of(method, optimizer), before)


def test_clipping_agrees_with_torch() -> None:
    batch, norm = make_batch("pairs", ROWS), 0.05
    grads: dict[str, dict[str, Tensor]] = {}
    for clip in ("none", "global", "per_tensor"):
        method = flava_method(random_flava())
        before = deepcopy(method.model.state_dict())
        optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
        result = step(method, [batch], Key(0, "pairs", 0), optimizer, clip=clip, clip_norm=norm)
        grads[clip] = {n: before[n] - p.detach() for n, p in method.model.named_parameters()}
    _, plain = losses_and_gradients(flava_method(random_flava()), [batch])
    assert result.grad_norm == pytest.approx(float(torch.stack([g.norm() for g in plain.values()]).norm()), rel=1e-12)
    assert result.grad_norm > norm  # or else there is nothing to clip

    def clipped(groups: list[list[str]]) -> dict[str, Tensor]:
        parameters = {name: torch.nn.Parameter(torch.zeros_like(grad)) for name, grad in plain.items()}
        for name, parameter in parameters.items():
            parameter.grad = plain[name].clone()
        for group in groups:
            torch.nn.utils.clip_grad_norm_([parameters[name] for name in group], norm)
        return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}

    expected = {"none": plain, "global": clipped([list(plain)]), "per_tensor": clipped([[name] for name in plain])}
    for clip, reference in expected.items():
        for name, grad in reference.items():
            assert torch.allclose(grads[clip][name], grad, rtol=1e-9, atol=1e-12), (clip, name)


def test_the_logit_scale_is_held_below_a_hundred() -> None:
    method = flava_method(random_flava())
    with torch.no_grad():
        method.model.logit_scale.fill_(5.0)
    step(method, [make_batch("pairs", ROWS)], Key(0, "pairs", 0), torch.optim.SGD(method.parameters(), lr=1e-3))
    assert method.model.logit_scale.item() == pytest.approx(math.log(100.0))


# Counts of zero.


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_masked_anywhere_gives_zero_and_gradients_of_zero(stream: str, parts: int) -> None:
    method = flava_method(random_flava())
    losses, grads = losses_and_gradients(method, split(make_batch(stream, ROWS, masked=False), parts))
    heads = {"pairs": ("mmm_image", "mmm_text"), "images": ("mim",), "text": ("mlm",)}[stream]
    for head in heads:
        assert float(losses[head]) == 0
        for name in (n for n, _ in method.model.named_parameters() if n.startswith(f"{head}_head.")):
            assert not grads[name].any(), name
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_step_with_nothing_masked_is_accepted() -> None:
    method = flava_method(random_flava())
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    result = step(method, [make_batch("text", ROWS, masked=False)], Key(0, "text", 0), optimizer, clip="global")
    assert result.accepted and result.losses == {"mlm": 0.0} and result.grad_norm == 0.0


# Validation losses.


@pytest.mark.parametrize("stream", STREAMS)
def test_measure_gives_the_losses_of_a_step_without_its_traces(stream: str) -> None:
    method = flava_method(random_flava(replace(TINY, dropout=0.2)))
    batch = make_batch(stream, ROWS, false_rows=(3,))
    without_dropout = flava_method(random_flava())
    losses, _ = losses_and_gradients(without_dropout, [batch])
    found = measure(method.train(), [split(batch, 2)], Key(0, stream, 0))
    assert found == pytest.approx({name: float(value) for name, value in losses.items()}, rel=1e-9)
    assert method.training and not gradients(method)


def test_measure_weighs_global_batches_by_their_counts() -> None:
    method = flava_method(random_flava())
    batches = [make_batch("text", rows, seed=rows) for rows in (2, 6)]
    parts = [backward(method, [batch], Key(0, "text", 0))[:2] for batch in batches]
    expected = sum(sums["mlm"] for sums, _ in parts) / sum(counts["mlm"] for _, counts in parts)
    assert measure(method, [[batch] for batch in batches], Key(0, "text", 0))["mlm"] == pytest.approx(float(expected))


# Draws are functions of their place.


@given(st.integers(0, 2**40), st.permutations(range(12)), st.integers(0, 12))
def test_a_draw_belongs_to_its_row_whatever_stands_beside_it(seed: int, order: list[int], cut: int) -> None:
    key = Key(seed, "pairs", 7)
    whole = key.uniform("negatives", torch.arange(12))
    found = torch.empty(12, dtype=torch.float64)
    for part in (torch.tensor(order[:cut], dtype=torch.int64), torch.tensor(order[cut:], dtype=torch.int64)):
        found[part] = key.uniform("negatives", part)
    assert torch.equal(found, whole)
    assert ((whole >= 0) & (whole < 1)).all() and len(whole.unique()) == 12
    for other in (Key(seed + 1, "pairs", 7), Key(seed, "text", 7), Key(seed, "pairs", 8)):
        assert not torch.equal(other.uniform("negatives", torch.arange(12)), whole)
    assert not torch.equal(key.uniform("another", torch.arange(12)), whole)


def test_draws_fill_the_unit_interval_evenly_and_rows_are_not_related() -> None:
    drawn = uniform64(12345, np.arange(100_000))
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert (abs(counts - 5000) < 5 * math.sqrt(5000)).all()
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02


def test_reseeding_repeats_the_draws_of_a_micro_batch_and_of_no_other() -> None:
    def draws(key: Key, number: int) -> Tensor:
        key.reseed(number)
        return torch.rand(4)

    first = draws(Key(0, "pairs", 1), 0)
    assert torch.equal(first, draws(Key(0, "pairs", 1), 0))
    for key, number in (
        (Key(0, "pairs", 1), 1),
        (Key(0, "pairs", 2), 0),
        (Key(1, "pairs", 1), 0),
        (Key(0, "text", 1), 0),
    ):
        assert not torch.equal(first, draws(key, number))


class Vectors(Method):
    """States a sum with a dimension, as a centre needs one."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
        self.weights = {"square": 1.0}
        self.rows_BD = torch.tensor(rows)
        self.seen: dict[str, torch.Tensor] = {}

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"square": torch.tensor(len(batch))}

    def separate(self, batch: Batch, *_: object) -> dict[str, torch.Tensor]:
        rows_BD = self.rows_BD[batch.rows_B]
        square = self.model(torch.ones(len(batch), 1)).square().sum()
        return {"square": square, "stat/sum": rows_BD.sum(0), "stat/rows": torch.tensor(float(len(batch)))}

    def after_step(self, step: int, everyone: Rows, stats: dict[str, torch.Tensor]) -> None:
        self.seen = stats


@pytest.mark.parametrize("parts", [1, 2])
def test_a_stat_with_dimensions_reaches_after_step_and_not_the_log(parts: int) -> None:
    method = Vectors([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [0.0, 0.0, 1.0]])
    batch = Batch("numbers", torch.arange(4), torch.arange(4))
    result = step(method, split(batch, parts), Key(0, "numbers", 0), torch.optim.SGD(method.parameters(), 0.1))
    assert result.accepted
    assert method.seen["stat/sum"].tolist() == [12.0, 15.0, 19.0]
    assert result.stats == {"rows": 4.0}
    method.rows_BD[2, 1] = torch.nan
    before = method.model.weight.clone()
    assert not step(method, [batch], Key(0, "numbers", 1), torch.optim.SGD(method.parameters(), 0.1)).accepted
    assert torch.equal(method.model.weight, before)
