"""One step on written answers, and one of text assignment, against the plain reading of each. float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.flava_batches import assert_close, gradients, split
from trivium.invariance.albef import TINY, make_batch, random_albef
from trivium.methods.answers import Answering
from trivium.methods.finetune import FineTuning
from trivium.methods.momentum import SoftTargets
from trivium.methods.pixels import Pixels
from trivium.methods.text_assignment import TextAssignment
from trivium.models.albef_heads import AnswerDecoder, TwoPictures, decoder_config
from trivium.models.finetuned import FineTuned, HeadConfig
from trivium.train.protocol import Batch, Key
from trivium.train.step import backward, step

KEY = Key(0, "a task", 3)


def made(method: type[FineTuning], config: HeadConfig, alpha: float = 0.0) -> Any:
    model, head = random_albef(), config.build().double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    found = method(FineTuned(model, head, config), Pixels((0.5,) * 3, (0.25,) * 3), SoftTargets(alpha=alpha), 10, 1)
    if found.teacher is not None:
        with torch.no_grad():
            for parameter in found.teacher.parameters():
                parameter.mul_(1.1)
        found.schedule(5)
    return found.double()


def answering(alpha: float = 0.0) -> Answering:
    config = HeadConfig("a task", "states", "text", TINY.width, 3, blocks=decoder_config(TINY))
    return made(Answering, config, alpha)  # type: ignore[no-any-return]


def questions(rows: int = 4) -> Batch:
    """One to three answers to a question, of one to three words."""
    batch = make_batch(rows)
    draw = torch.Generator().manual_seed(2)
    ids_BAT, weight_BA = torch.zeros(rows, 3, 5, dtype=torch.int64), torch.zeros(rows, 3)
    for row in range(rows):
        for place in range(1 + row % 3):
            words = int(torch.randint(1, 4, (1,), generator=draw))
            ids_BAT[row, place, : words + 2] = torch.tensor(
                [2, *torch.randint(5, 60, (words,), generator=draw).tolist(), 3]
            )
            weight_BA[row, place] = 1 / (1 + row % 3)
    return replace(batch, targets={"answer_ids": ids_BAT, "answer_weight": weight_BA})


def plain(method: Answering, model: nn.Module, teacher: nn.Module | None, batch: Batch) -> Tensor:
    """Question after question, answer after answer, word after word."""
    total = torch.zeros((), dtype=torch.float64)
    text = batch.texts[0]
    pixels = method._inputs(batch)[0]
    assert pixels is not None
    for row, (ids_AT, weight_A) in enumerate(
        zip(batch.targets["answer_ids"], batch.targets["answer_weight"], strict=True)
    ):
        ids_1T = text.ids_BT[row : row + 1, text.mask_BT[row]]
        for ids, weight in zip(ids_AT.tolist(), weight_A.tolist(), strict=True):
            kept = [each for each in ids if each]
            for end in range(1, len(kept) if weight else 0):
                logs = []
                for each in (model, teacher) if teacher is not None else (model,):
                    fused = each.fused(pixels[row : row + 1], ids_1T, None)  # type: ignore[union-attr, operator]
                    head: Any = each.head  # type: ignore[union-attr]
                    states, _ = head.states(torch.tensor([kept[:end]]), head.read(fused))
                    logs.append(head.predict_words(states[0, -1]).log_softmax(-1))
                hard = -logs[0][kept[end]]
                soft = -(logs[1].detach().exp() * logs[0]).sum() if teacher is not None else hard
                total = total + weight * (0.6 * hard + 0.4 * soft)
    return total / len(batch)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_step_is_the_plain_sum_over_words(alpha: float) -> None:
    method, batch = answering(alpha), questions()
    method.train()
    sums, counts, _ = backward(method, [batch], KEY)
    mine = gradients(method.model)
    method.zero_grad(set_to_none=True)
    expected = plain(method, method.model, None if method.teacher is None else method.teacher.copy, batch)
    expected.backward()
    assert float(sums["a task"] / counts["a task"]) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert_close(mine, gradients(method.model), 1e-9)


def test_micro_batches_come_to_the_whole_and_validation_has_no_teacher() -> None:
    method, batch = answering(0.4), questions(8)
    whole, _, _ = backward(method.train(), [batch], KEY)
    expected = {name: grad.clone() for name, grad in gradients(method.model).items()}
    method.zero_grad(set_to_none=True)
    sums, _, _ = backward(method, split(batch, 4), KEY)
    assert_close(sums, whole, 1e-12)
    assert_close(gradients(method.model), expected, 1e-10)
    with torch.no_grad():
        hard = method.eval().separate(batch, None, None, {}, KEY)["a task"]  # type: ignore[arg-type]
    assert float(hard) == pytest.approx(8 * float(plain(method, method.model, None, batch).detach()), rel=1e-12)


def test_the_writer_starts_as_the_fusion_and_the_words_of_the_model() -> None:
    model, writer = random_albef(), AnswerDecoder(decoder_config(TINY)).double()
    writer.start(model)
    assert torch.equal(writer.embeddings.word.weight, model.text.embeddings.word.weight)
    own, of_model = writer.encoder.state_dict(), model.fusion.state_dict()
    assert own.keys() == of_model.keys() and all(torch.equal(own[name], of_model[name]) for name in own)
    assert writer.mlm_head is not None and torch.equal(writer.mlm_head.bias, model.mlm_head.bias)


def assigning(pool: int = 64) -> TextAssignment:
    config = HeadConfig("a task", "two_pictures", "class", TINY.width, 3, None, "relu", 0.0,
                        blocks=decoder_config(TINY), num_pictures=2)  # fmt: skip
    method: TextAssignment = made(TextAssignment, config)
    assert isinstance(method.model.head, TwoPictures)
    method.model.head.start(method.model.backbone)  # type: ignore[arg-type]
    method.pool = pool
    return method


def test_assignment_is_the_judgement_of_the_pictures_that_were_drawn() -> None:
    method, batch = assigning(), make_batch(9, alike=((0, 5),))
    sums, counts, _ = backward(method.train(), [batch], KEY)
    mine = gradients(method.model)
    method.zero_grad(set_to_none=True)
    pixels, ids, mask = method._inputs(batch)[:3]
    assert pixels is not None and ids is not None
    with torch.no_grad():
        left, right, label = method._drawn(batch, method.model.backbone.encode_image(pixels).projected, KEY)  # type: ignore[operator]
    same = batch.images[0].same_B
    assert set(label.tolist()) == {0, 1, 2}
    for row, (one, other, of) in enumerate(zip(left.tolist(), right.tolist(), label.tolist(), strict=True)):
        assert one != other
        assert [one == row, other == row] == [of == 0, of == 1]
        assert all(same[n] != same[row] for n in (one, other) if n != row)
    # Whole pictures twice through the tower, as the model is used.
    logits = method.model(torch.cat([pixels[left], pixels[right]]), ids, mask)
    expected = F.cross_entropy(logits, label)
    expected.backward()
    assert float(sums["a task"] / counts["a task"]) == pytest.approx(float(expected.detach()), rel=1e-12)
    theirs = gradients(method.model)
    assert mine.keys() == theirs.keys()
    assert_close(mine, theirs, 1e-9)
    with torch.no_grad():
        for parameter in method.model.head.decoder.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    sums, counts, _ = backward(method, [batch], KEY)
    assert float(sums["a task"] / counts["a task"]) == pytest.approx(method.chance(counts)["a task"], rel=1e-12)


def test_rows_without_two_other_pictures_are_left_out_and_pools_are_kept_apart() -> None:
    method, batch = assigning(pool=4), make_batch(8, alike=((0, 1), (0, 2)))
    assert int(method.counts(batch)["a task"]) == 5  # three of the first pool show one thing, and one is beside them
    sums, counts, _ = backward(method.train(), [batch], KEY)
    assert float(sums["stat/left_out"]) == 3
    whole = {name: grad.clone() for name, grad in gradients(method.model).items()}
    method.zero_grad(set_to_none=True)
    again, _, _ = backward(method, split(batch, 2), KEY)
    assert_close({"a task": again["a task"]}, {"a task": sums["a task"]}, 1e-12)
    assert_close(gradients(method.model), whole, 1e-10)
    alone = make_batch(1)
    assert step(method, [alone], KEY, torch.optim.SGD(method.parameters(), lr=0.1)).accepted  # nothing to learn
    assert all(float(p.grad.abs().max()) == 0 for p in method.model.head.parameters() if p.grad is not None)
    assert counts["a task"] == 5


def test_draws_are_by_likeness() -> None:
    """Of three other pictures one is the text's own but for noise: it is drawn nearly always."""
    method, batch = assigning(), make_batch(4)
    rows_BD = F.normalize(torch.tensor([[1.0, 0.0], [0.99, 0.1], [-1.0, 0.1], [0.0, -1.0]], dtype=torch.float64), dim=1)
    drawn = []
    for number in range(60):
        left, right, label = method._drawn(batch, rows_BD, replace(KEY, step=number))
        drawn.append(int(right[0] if label[0] == 0 else left[0]))
    assert drawn.count(1) >= 58
