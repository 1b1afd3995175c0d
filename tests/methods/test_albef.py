"""ALBEF's step: what is made cheaper equals the plain form, queues equal lists, and false pairs are false."""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.invariance import split
from trivium.invariance.albef import TINY, albef_method, make_batch, random_albef
from trivium.methods import albef as module
from trivium.methods.albef import AlbefMethod, Distillation
from trivium.methods.false_pairs import allowed, numbers
from trivium.methods.pixels import Pixels
from trivium.models.albef import Albef, Negatives
from trivium.models.encoded import Encoded
from trivium.objectives.distillation import distilled_prediction
from trivium.train.monitors import health
from trivium.train.protocol import Batch, Key, Rows
from trivium.train.step import backward, measure, step

KEY = Key(seed=1, stream="pairs", step=7)


def method_of(rows: int = 8, **options: Any) -> AlbefMethod:
    return albef_method(random_albef(), **{"pool": rows} | options)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------- cheaper, exactly


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("parts", ["all", "pairs", "words", "every position"])
def test_one_pass_of_fusion_equals_four(parts: str, padded: bool) -> None:
    """Keys and values of a picture are computed once and read four times; value and gradient of the plain form."""
    model, batch = random_albef(), make_batch(5, padded=padded)
    text = batch.texts[0]
    mask_BT = text.mask_BT if padded else None
    negatives = Negatives(torch.tensor([3, 3, 0, 1, 2]), torch.tensor([1, 4, 4, 0, 0]))
    index_BQ = None if parts == "every position" else torch.tensor([[1, 3], [2, 0], [1, 2], [1, 2], [0, 3]])
    pixels = (batch.images[0].pixels_BCHW - 127.5) / 63.75

    def passes(together: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        image = model.encode_image(pixels.double())
        words = model.encode_text(text.ids_BT, mask_BT)
        hidden = model.encode_text(batch.targets["masked_ids"], mask_BT)
        masked, texts = (None if parts == "pairs" else hidden), (None if parts == "words" else words)
        found: list[Tensor] = []
        if together:
            read, judged = model.fuse_pairs(image, masked, index_BQ, texts, None if texts is None else negatives)
            found = [each.states for each in (read, judged) if each is not None]
        else:
            if masked is not None:
                found.append(model.fuse(image, masked, index_BQ).states)
            if texts is not None:
                other_mask = None if mask_BT is None else mask_BT[negatives.text_B]
                other_text = Encoded(words.states[negatives.text_B], other_mask, torch.nn.Identity(), None)
                other_image = Encoded(image.states[negatives.image_B], None, model.image.norm, None)
                three = [model.fuse(image, words), model.fuse(image, other_text), model.fuse(other_image, words)]
                found.append(torch.cat([each.states[:, :1] for each in three]))
        model.zero_grad()
        torch.stack([(x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in found]).sum().backward()
        return found, gradients(model)

    (mine, my_grads), (plain, plain_grads) = passes(True), passes(False)
    for one, other in zip(mine, plain, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert my_grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        assert float((my_grads[name] - grad).abs().max()) <= 1e-11 * max(1.0, float(grad.abs().max())), name


def test_each_key_and_value_is_computed_once() -> None:
    method, rows = method_of(4), []
    for block in method.model.fusion.blocks:
        block.cross_attention.key_value.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    method.train()
    backward(method, [make_batch(4)], KEY)
    assert rows == [4] * TINY.fusion_layers


@pytest.mark.parametrize("padded", [True, False])
def test_text_and_masked_text_in_one_pass_equal_two(padded: bool) -> None:
    method, batch = method_of(), make_batch(4, padded=padded)
    text, model = batch.texts[0], method.model
    together = method._encode_texts(model, batch, True)
    apart = [model.encode_text(ids, text.mask_BT) for ids in (text.ids_BT, batch.targets["masked_ids"])]
    grads = []
    for found in (together, apart):
        model.zero_grad()
        (sum((each.states * text.mask_BT[:, :, None]).square().sum() for each in found if each is not None)).backward()  # type: ignore[union-attr]
        grads.append(gradients(model))
    for one, other in zip(together, apart, strict=True):
        assert one is not None
        assert torch.allclose(one.states[text.mask_BT], other.states[text.mask_BT], atol=1e-13)
        assert torch.allclose(one.projected, other.projected, atol=1e-13)
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-12) for name in grads[1])


def test_words_at_masked_positions_alone_equal_those_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the soft labels' axis at the vocabulary the published way of computing them gives the same."""

    def everywhere(logits_BTV: Tensor, places_M: Tensor, target_M: Tensor, teacher: Tensor, alpha: float) -> Any:
        flat, theirs = logits_BTV.flatten(0, 1)[places_M], teacher.flatten(0, 1)[places_M]
        return distilled_prediction(flat, target_M, theirs, alpha)

    monkeypatch.setattr(module, "published_prediction", everywhere)
    found = []
    for soft_labels in ("vocabulary", "positions"):
        method = method_of(soft_labels=soft_labels)
        method.train()
        sums, _, _ = backward(method, [make_batch(8)], KEY)
        found.append((sums, gradients(method.model)))
    (sums, grads), (all_sums, all_grads) = found
    for name, total in all_sums.items():
        torch.testing.assert_close(sums[name], total, rtol=1e-13, atol=1e-15, msg=name)
    assert all(torch.allclose(grads[name], all_grads[name], atol=1e-12) for name in all_grads)


def test_no_pass_reads_a_number_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device numbers do not exist: whatever would wait for a GPU raises here."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which it lacks
    method, batch = method_of(4), make_batch(4, alike=((0, 1),))
    method.train().to("meta")
    counts = method.divisors(method.counts(batch))
    rows, states = method.embed(batch)
    sums = method.couple(rows, rows) | method.separate(batch, rows, states, counts, KEY)
    torch.stack([value for name, value in sums.items() if not name.startswith("stat/")]).sum().backward()
    assert all(value.is_meta for value in sums.values())
    stats = {name: value for name, value in sums.items() if name.startswith("stat/")}
    assert {"stat/mlm_words", "stat/mlm_kl"} <= stats.keys()
    with torch.no_grad():
        method.after_step(0, rows, stats)


# --------------------------------------------------------------------------------------------------- queues


def test_the_queue_is_a_list_of_the_last_rows() -> None:
    """100 rows, batches of 48, 7 steps: the length need not be a multiple of the batch."""
    method = method_of(queue=100)
    D = TINY.projection_width
    expected = [(method.image_queue[n], method.text_queue[n], method.queue_same[n]) for n in range(100)]
    expected = expected[98:] + expected[:98]  # the pointer stands at 98, the oldest
    for number in range(7):
        draw = torch.Generator().manual_seed(number)
        order = torch.randperm(48, generator=draw)  # rows may come in any order: it goes by their number
        image, text = (torch.randn(48, D, dtype=torch.float64, generator=draw) for _ in range(2))
        same = torch.randint(0, 9, (48, 2), generator=draw)
        marks = {"row": order, "teacher_image": image[order], "teacher_text": text[order], "same": same[order]}
        method._enqueue(marks)
        expected = [*expected, *zip(image, text, same, strict=True)][-100:]  # type: ignore[list-item]
        start = int(method.queue_pointer)
        for place, (image_D, text_D, same_2) in enumerate(expected):
            at = (start + place) % 100
            assert torch.equal(method.image_queue[at], image_D)
            assert torch.equal(method.text_queue[at], text_D)
            assert torch.equal(method.queue_same[at], same_2)
    assert start == (98 + 7 * 48) % 100


def test_of_a_batch_longer_than_the_queue_its_end_is_kept() -> None:
    method, D = method_of(queue=5), TINY.projection_width
    image, text = torch.randn(2, 12, D, dtype=torch.float64)
    row = torch.arange(12)
    method._enqueue({"row": row, "teacher_image": image, "teacher_text": text, "same": torch.stack([row, row], 1)})
    order = [(int(method.queue_pointer) + n) % 5 for n in range(5)]
    assert torch.equal(method.image_queue[order], image[-5:])
    assert method.queue_same[order, 0].tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("queue", [0, 12])
def test_a_step_without_and_with_a_queue(queue: int) -> None:
    method = method_of(queue=queue)
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    before = method.image_queue.clone()
    found = step(method, [make_batch(8)], KEY, optimizer)
    assert found.accepted and found.losses["itc"] > 0
    assert queue == 0 or not torch.equal(before, method.image_queue)


@pytest.mark.parametrize("broken", ["itm_head.bias", "text_projection.bias"])  # behind and before the draw of pairs
def test_a_skipped_step_changes_nothing(broken: str) -> None:
    method = method_of()
    with torch.no_grad():
        method.model.get_parameter(broken)[0] = torch.nan
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    assert not step(method, [make_batch(8)], KEY, optimizer).accepted
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == f"model.{broken}", name


def test_the_queue_starts_with_unit_rows_that_nobody_shows() -> None:
    pixels = Pixels((0.5,) * 3, (0.25,) * 3)
    methods = [AlbefMethod(random_albef(), pixels, Distillation(), 10, 5, 6, seed=seed) for seed in (3, 3, 4)]
    first, again, other = (method.image_queue for method in methods)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, methods[0].text_queue)
    assert torch.allclose(first.norm(dim=1), torch.ones(6))
    assert (methods[0].queue_same == -1).all()


# ---------------------------------------------------------------------------------------------- false pairs


def drawn(method: AlbefMethod, batch: Batch, key: Key = KEY) -> Negatives:
    rows, _ = method.embed(batch)
    return method._negatives(batch, rows, allowed(batch, method.pool), key)


def test_a_false_pair_never_shows_the_same_and_stays_in_its_pool() -> None:
    method, batch = method_of(4), make_batch(12, alike=((0, 1), (4, 6), (8, 11)))
    text = batch.texts[0]
    for tensor in (text.ids_BT, text.mask_BT):
        tensor[5] = tensor[7]  # two pictures with one caption
    seen: dict[int, set[int]] = {row: set() for row in range(12)}
    for number in range(60):
        negatives = drawn(method, batch, replace(KEY, step=number))
        for picked in (negatives.image_B, negatives.text_B):
            for row, other in enumerate(picked.tolist()):
                seen[row].add(other)
    assert seen[0] == {2, 3} and seen[1] == {2, 3} and seen[2] == {0, 1, 3}
    assert seen[4] == {5, 7} and seen[5] == {4, 6} and seen[8] == {9, 10}


def test_equal_captions_have_one_number_however_they_are_padded() -> None:
    batch = make_batch(6)
    text = batch.texts[0]
    for tensor in (text.ids_BT, text.mask_BT):
        tensor[3] = tensor[2]
    number_B = numbers(batch)[:, 1]
    assert number_B[2] == number_B[3]
    assert len(set(number_B.tolist())) == 5 and (number_B >= 0).all()
    for name in ("ids_BT", "mask_BT"):
        setattr(text, name, torch.nn.functional.pad(getattr(text, name), (0, 4)))
    assert torch.equal(numbers(batch)[:, 1], number_B)
    text.ids_BT[0, :2] = text.ids_BT[0, :2].flip(0)
    assert numbers(batch)[0, 1] != number_B[0]


def test_false_pairs_are_the_same_in_any_micro_batch_of_whole_pools() -> None:
    method, batch = method_of(4), make_batch(16, alike=((0, 3),))
    whole = drawn(method, batch)
    for parts in (2, 4):
        pieces = split(batch, parts)
        for name in ("image_B", "text_B"):
            found = [getattr(drawn(method, piece), name) + int(piece.rows_B[0]) for piece in pieces]
            assert torch.equal(torch.cat(found), getattr(whole, name))


def test_a_micro_batch_smaller_than_a_pool_is_its_own() -> None:
    method, pieces = method_of(64), split(make_batch(12), 2)  # rows 6 to 11: nothing begins at a multiple of 64
    assert drawn(method, pieces[1]).image_B.max() < 6
    assert allowed(pieces[1], method.pool).sum() == 6 * 5


def test_likely_pictures_are_drawn_oftener_and_random_ones_evenly() -> None:
    method, batch = method_of(8), make_batch(8)
    with torch.no_grad():
        method.model.temperature.fill_(0.002)
    rows, _ = method.embed(batch)
    likeness = (rows.rows["text"] @ rows.marks["teacher_image"].T).fill_diagonal_(-2.0)
    hard = Counter(int(drawn(method, batch, replace(KEY, step=n)).image_B[0]) for n in range(50))
    assert hard.most_common(1)[0] == (int(likeness[0].argmax()), hard[int(likeness[0].argmax())])
    method.negatives = "random"
    evenly = Counter(int(drawn(method, batch, replace(KEY, step=n)).image_B[0]) for n in range(700))
    assert set(evenly) == set(range(1, 8)) and min(evenly.values()) > 60


def test_rows_without_a_false_pair_take_no_part_and_are_counted() -> None:
    """Two pools of two; in the second both rows show one thing."""
    method, batch = method_of(2), make_batch(4, alike=((2, 3),))
    method.train()
    sums, counts, _ = backward(method, [batch], KEY)
    assert float(counts["itm"]) == 6 and float(sums["stat/itm_left_out"]) == 2
    grads = gradients(method.model)
    alone, first = method_of(2), split(batch, 2)[0]
    alone.train()
    sums_alone, counts_alone, _ = backward(alone, [first], KEY)
    assert float(sums["itm"]) == pytest.approx(float(sums_alone["itm"]), rel=1e-12)
    assert float(counts_alone["itm"]) == 6
    assert torch.allclose(grads["itm_head.weight"], gradients(alone.model)["itm_head.weight"], atol=1e-14)
    lonely = method_of(1)
    lonely.train()
    sums, counts, _ = backward(lonely, [make_batch(3)], KEY)
    assert float(counts["itm"]) == float(sums["itm"]) == 0 and float(sums["stat/itm_left_out"]) == 3
    assert not gradients(lonely.model)["itm_head.weight"].any()  # zero, not absent


def test_pairs_that_are_false_already_are_refused() -> None:
    method, batch = method_of(), make_batch(4)
    batch.targets["matched"][1] = False
    with pytest.raises(AssertionError, match="makes its false pairs itself"):
        method.counts(batch)


# ------------------------------------------------------------------------------------------------- the rest


def test_schedules_are_the_published_ones() -> None:
    """alpha: 0.4 x min(1, i / steps of an epoch); momentum 0.995."""
    published = Distillation()
    assert [0.4 * published.ramp_at(step, 1000, 200) for step in (0, 50, 200, 900)] == [0.0, 0.1, 0.4, 0.4]
    assert published.momentum(10**6) == pytest.approx(0.995)
    shares = Distillation(ramp=0.5, reach=0.1)
    assert shares.ramp_at(250, 1000, 7) == 0.5 and shares.momentum(1000) == pytest.approx(0.99)
    assert Distillation(ramp=100).ramp_at(25, 1000, 7) == 0.25
    assert Distillation(ramp=0.0).ramp_at(0, 1000, 7) == 1.0
    for batch in (8, 32):  # the same samples are seen when half of them are
        samples = Distillation(ramp_samples=6400).in_steps(batch)
        assert samples.ramp_at(3200 // batch, 10**6, 7) == 0.5
    assert Distillation(ramp_samples=0).in_steps(8).ramp_at(0, 1000, 7) == 1.0
    assert Distillation(ramp_samples=3).in_steps(8).ramp_at(1, 1000, 7) == 1.0  # a step, and no share of the run


def test_validation_has_hard_labels_and_no_teacher_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = method_of(), make_batch(8)
    measured = measure(method, [[batch]], KEY)
    method.train()
    trained, counts, _ = backward(method, [batch], KEY)
    method.distillation = replace(method.distillation, itc=0.0, mlm=0.0)
    hard, _, _ = backward(method, [batch], KEY)
    for name in ("itc", "mlm"):
        assert measured[name] == pytest.approx(float(hard[name] / counts[name]), rel=1e-12)
        assert measured[name] != pytest.approx(float(trained[name] / counts[name]), rel=1e-6)


def test_the_teacher_has_dropout_where_it_is_asked_for() -> None:
    for dropout in (False, True):
        method = albef_method(random_albef(replace(TINY, dropout=0.3)), pool=4, dropout=dropout)
        method.train()
        batch = make_batch(4)
        found = []
        for number in (0, 1):
            replace(KEY, step=number).reseed(0)
            found.append(method.embed(batch)[0])
        taught = [rows.marks["teacher_text"] for rows in found]
        assert torch.equal(*taught) != dropout
        assert not torch.equal(found[0].rows["text"], found[1].rows["text"])


def test_the_temperature_stays_in_its_range() -> None:
    method = method_of()
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.0)
    for start, end in ((3.0, 0.5), (1e-5, 0.001), (0.1, 0.1)):
        with torch.no_grad():
            method.model.temperature.fill_(start)
        step(method, [make_batch(8)], KEY, optimizer)
        assert method.model.temperature.item() == pytest.approx(end)


@pytest.mark.parametrize("kept", ["itc", "itm", "mlm"])
def test_a_loss_of_weight_zero_is_not_computed(kept: str) -> None:
    method = method_of(weights=dict.fromkeys(("itc", "itm", "mlm"), 0.0) | {kept: 1.0})
    method.train()
    for batches in ([make_batch(8)], split(make_batch(8), 2)):
        sums, _, _ = backward(method, batches, KEY)
        assert {name for name in sums if not name.startswith("stat/")} == {kept}


def test_masked_duplicates_are_no_negatives_and_published_ones_are() -> None:
    batch = make_batch(6, alike=((0, 4),))
    losses = {}
    for duplicates in ("mask", "ignore", "positive"):
        method = method_of(queue=0, duplicates=duplicates, itc=0.0, weights={"itm": 0.0, "mlm": 0.0})
        rows, _ = method.embed(batch)
        losses[duplicates] = float(method.couple(rows, rows)["itc"])
    assert losses["mask"] < losses["ignore"]
    assert losses["positive"] != pytest.approx(losses["ignore"], rel=1e-6)


def test_equal_captions_of_other_pictures_are_no_answers_in_the_published_form() -> None:
    batch, alike = make_batch(6), make_batch(6)
    for tensor in (alike.texts[0].ids_BT, alike.texts[0].mask_BT):
        tensor[4] = tensor[0]
    assert torch.equal(numbers(alike)[0, 1:], numbers(alike)[4, 1:])
    assert not allowed(alike, 6)[0, 4] and allowed(batch, 6)[0, 4], "and nothing false in ITM"
    for duplicates, equal in (("ignore", True), ("positive", True), ("mask", False)):
        losses = []
        for alone in ("ignore", duplicates):
            method = method_of(queue=0, duplicates=alone, itc=0.0, weights={"itm": 0.0, "mlm": 0.0})
            rows, _ = method.embed(alike)
            losses.append(float(method.couple(rows, rows)["itc"]))
        assert (losses[0] == pytest.approx(losses[1], rel=1e-9)) == equal, duplicates


def test_chance_is_equal_scores_and_the_entropy_of_labels() -> None:
    chance = method_of(queue=12).chance({"itc": 8.0})
    assert chance["itc"] == pytest.approx(math.log(20))
    assert chance["itm"] == pytest.approx(0.636514, abs=1e-6)


def test_words_that_fusion_makes_one_are_seen_in_what_is_watched() -> None:
    method, batch = method_of(), make_batch(8)
    model = copy.deepcopy(method.model)
    optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
    assert method.word_deviation.isnan()
    step(method, split(batch, 2), KEY, optimizer)
    image = model.encode_image((batch.images[0].pixels_BCHW - 127.5).double() / 63.75)
    hidden = model.encode_text(batch.targets["masked_ids"], batch.texts[0].mask_BT)
    words_MD = model.fuse(image, hidden).states[batch.targets["selected"]]
    deviation = F.normalize(words_MD, dim=1).var(0, correction=0).sum().sqrt()
    assert float(method.word_deviation) == pytest.approx(deviation.item(), rel=1e-12)
    assert not [finding for finding in health(method) if finding.crossed]
    with torch.no_grad():
        method.model.fusion.blocks[-1].mlp_norm.weight.zero_()  # type: ignore[union-attr]
        method.model.fusion.blocks[-1].mlp_norm.bias.fill_(1.0)  # type: ignore[union-attr]
    step(method, [batch], KEY, optimizer)
    [crossed] = [finding for finding in health(method) if finding.crossed]
    assert float(method.word_deviation) < 0.01 and "--init-blocks" in crossed.sentence
    assert not method_of(weights={"mlm": 0.0}).watched()


def test_the_student_is_what_is_kept() -> None:
    method = method_of()
    assert isinstance(method.exported(), Albef) and method.exported() is method.model
    kept = {name.split(".")[0] for name in method.state_dict() if not name.startswith("model.")}
    assert kept == {"teacher", "image_queue", "text_queue", "queue_same", "queue_pointer"}
    assert isinstance(method.embed(make_batch(2))[0], Rows)
