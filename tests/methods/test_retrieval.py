"""Fine-tuning FLAVA on retrieval: one step against the plain form, and false pairs that are false."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.invariance import split
from trivium.invariance.flava import make_batch, random_flava, retrieval_method
from trivium.methods.false_pairs import allowed
from trivium.methods.retrieval import RetrievalMethod
from trivium.train.protocol import Batch, Key
from trivium.train.step import backward

KEY = Key(seed=3, stream="pairs", step=4)


def pairs(rows: int = 6, alike: tuple[tuple[int, int], ...] = ((0, 4),)) -> Batch:
    batch = make_batch("pairs", rows)
    same_B = batch.rows_B.clone()
    for first, second in alike:
        same_B[second] = first
    batch.images[0].same_B, batch.texts[0].same_B = same_B, same_B.clone()
    return batch


def method_of(**options: Any) -> RetrievalMethod:
    return retrieval_method(random_flava(), **options).train()


def gradients(method: RetrievalMethod) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.model.named_parameters() if p.grad is not None}


def plain(method: RetrievalMethod, batch: Batch, allowed_BB: Tensor) -> Tensor:
    """The whole matrix of scores, one fusion for each pair, negatives drawn row by row."""
    model, text, B = method.model, batch.texts[0], len(batch)
    same_B = batch.images[0].same_B
    pixels = method.pixels(batch.images[0].pixels_BCHW)
    image, words = model.encode_image(pixels), model.encode_text(text.ids_BT, text.mask_BT)
    logits_BB = words.projected @ image.projected.T * model.logit_scale.exp()
    shown_BB = logits_BB.masked_fill((same_B[:, None] == same_B) & ~torch.eye(B, dtype=torch.bool), -torch.inf)
    ids = torch.arange(B)
    loss = (F.cross_entropy(shown_BB, ids) + F.cross_entropy(shown_BB.T, ids)) / 2

    def drawn(likeness_BB: Tensor, name: str) -> list[int]:
        found = []
        for row, uniform in enumerate(KEY.uniform(f"negative {name}", batch.rows_B)):
            share = likeness_BB[row].detach().masked_fill(~allowed_BB[row], -torch.inf).softmax(0).cumsum(0)
            found.append(int(torch.searchsorted(share, uniform * share[-1], right=True)))
        return found

    def match(i: int, t: int) -> Tensor:
        return model.match(model.fuse(image.taken(torch.tensor([i])), words.taken(torch.tensor([t]))))[0]

    pictures, texts = drawn(logits_BB, "image"), drawn(logits_BB.T, "text")
    judged = [match(b, b) for b in range(B)] + [match(pictures[b], b) for b in range(B)]
    judged += [match(b, texts[b]) for b in range(B)]
    return loss + F.cross_entropy(torch.stack(judged), (torch.arange(3 * B) < B).long())


def test_losses_and_gradients_are_those_of_the_plain_form() -> None:
    method, batch = method_of(pool=6), pairs()
    sums, counts, _ = backward(method, [batch], KEY)
    mine = gradients(method)
    method.zero_grad()
    same_B = batch.images[0].same_B
    expected = plain(method, batch, same_B[:, None] != same_B)
    expected.backward()
    total = sums["contrastive"] / counts["contrastive"] + sums["itm"] / counts["itm"]
    assert float(total) == pytest.approx(float(expected.detach()), rel=1e-12)
    theirs = gradients(method)
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        if "qkv.bias" not in name:
            assert float((mine[name] - grad).abs().max()) <= 1e-9 * max(1e-3, float(grad.abs().max())), name


@pytest.mark.parametrize("negatives", ["hard", "random"])
def test_pools_bound_the_negatives_and_nothing_of_the_same_picture_is_false(negatives: Any) -> None:
    method, batch = method_of(pool=4, negatives=negatives), pairs(8, alike=((0, 2), (5, 7)))
    rows, _ = method.embed(batch)
    same_B = batch.images[0].same_B
    for step in range(20):
        for drawn_B in method._false(batch, rows, allowed(batch, method.pool), Key(0, "pairs", step)):
            assert bool((drawn_B // 4 == torch.arange(8) // 4).all())
            assert not bool((same_B[drawn_B] == same_B).any())


def test_a_caption_that_another_picture_has_too_is_never_taken_for_false() -> None:
    method, batch = method_of(pool=4), pairs(4, alike=())
    for tensor in (batch.texts[0].ids_BT, batch.texts[0].mask_BT):
        tensor[2] = tensor[1]  # the likest of all, so hard negatives would seek it
    rows, _ = method.embed(batch)
    for step in range(30):
        for drawn_B in method._false(batch, rows, allowed(batch, method.pool), Key(0, "pairs", step)):
            assert drawn_B[1] != 2 and drawn_B[2] != 1


def test_a_row_without_a_false_pair_is_left_out_and_counted() -> None:
    method, batch = method_of(pool=2), pairs(4, alike=((0, 1),))
    sums, counts, _ = backward(method, [batch], KEY)
    assert float(counts["itm"]) == 6
    assert float(sums["stat/itm_left_out"]) == 2


def test_micro_batches_come_to_the_whole_batch() -> None:
    method, batch = method_of(pool=2), pairs(8, alike=((1, 6),))
    whole, _, _ = backward(method, [batch], KEY)
    expected = gradients(method)
    method.zero_grad(set_to_none=True)
    sums, _, _ = backward(method, split(batch, 4), KEY)
    for name, value in whole.items():
        assert float(sums[name]) == pytest.approx(float(value), rel=1e-10)
    for name, grad in gradients(method).items():
        assert float((grad - expected[name]).abs().max()) <= 1e-10 * max(1.0, float(expected[name].abs().max())), name
