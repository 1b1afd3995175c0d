"""Re-ranking against the plain loop over queries, pair by pair: the same scores, and exactly the same ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.flava_batches import TINY as TINY_FLAVA
from tests.flava_batches import random_flava
from trivium.bundle import Bundle
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.evaluate import pairs, reranking, retrieval
from trivium.evaluate.reranking import rerank
from trivium.invariance.albef import TINY as TINY_ALBEF
from trivium.invariance.albef import random_albef
from trivium.models.encoded import Matches

WORDS = [*BERT_SPECIALS, "red", "green", "blue", "dog", "cat", "car", "big", "small", "a", "the", "on", "under"]
PICTURES, CAPTIONS = 7, (1, 3, 2, 1, 4, 2, 1)


def bundle_of(family: str) -> Bundle:
    model: torch.nn.Module
    if family == "albef":
        model = random_albef(replace(TINY_ALBEF, vocab_size=len(WORDS)))
    else:
        model = random_flava(replace(TINY_FLAVA, vocab_size=len(WORDS), pads_visible=family == "flava, pads visible"))
    tokenizer = Tokenizer.wordpiece(WORDS)
    return Bundle(family[:5], model.eval(), tokenizer, ImageTransform(size=32), max_length=9)


def shown() -> tuple[list[np.ndarray], list[str], torch.Tensor]:
    """Pictures, captions of different lengths, and whose each caption is."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(PICTURES)]
    captions = [" ".join(rng.choice(WORDS[5:], 1 + (n * 5) % 7)) for n in range(sum(CAPTIONS))]
    return pictures, captions, torch.arange(PICTURES).repeat_interleave(torch.tensor(CAPTIONS))


@pytest.mark.parametrize("family", ["albef", "flava"])
@pytest.mark.parametrize("shortlist", [1, 3, 100])
def test_ranks_are_those_of_a_loop_over_queries(family: str, shortlist: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reranking, "TEXTS_ENCODED", 5)  # pieces that do not divide anything
    monkeypatch.setattr(reranking, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(reranking, "PICTURES_AT_ONCE", 3)
    bundle, (pictures, captions, own_T) = bundle_of(family), shown()
    model = bundle.model
    assert isinstance(model, Matches)
    images, texts = bundle.encode_image(pictures), bundle.encode_text(captions)
    cosine_IT = retrieval.scores(images.projected, texts.projected)
    right_IT = torch.arange(PICTURES)[:, None] == own_T
    found = rerank(bundle, pictures.__getitem__, captions, cosine_IT, shortlist)

    def logit(picture: int, text: int) -> float:
        with torch.no_grad():
            fused = model.fuse(bundle.encode_image(pictures[picture]), bundle.encode_text(captions[text]))
            return float(model.match(fused)[0, 1])

    def plain(cosine_C: torch.Tensor, logit_of: dict[int, float], right_C: torch.Tensor) -> tuple[int, list[int]]:
        """Position of the first right one, and all in order: the short list by logit, then all others by cosine."""
        rest = [c for c in cosine_C.argsort(descending=True).tolist() if c not in logit_of]
        order = sorted(logit_of, key=lambda c: -logit_of[c]) + rest
        return 1 + next(place for place, c in enumerate(order) if right_C[c]), order[: max(retrieval.CUTOFFS)]

    expected = []
    for i in range(PICTURES):
        listed = cosine_IT[i].topk(min(shortlist, len(captions))).indices.tolist()
        expected.append(plain(cosine_IT[i], {t: logit(i, t) for t in listed}, right_IT[i]))
        for t in listed:
            assert float(found.logit_IT[i, t]) == pytest.approx(logit(i, t), abs=1e-5)
    assert list(zip(found.image_to_text(right_IT).tolist(), found.texts_in_front().tolist(), strict=True)) == expected
    expected = []
    for t in range(len(captions)):
        listed = cosine_IT[:, t].topk(min(shortlist, PICTURES)).indices.tolist()
        expected.append(plain(cosine_IT[:, t], {i: logit(i, t) for i in listed}, right_IT[:, t]))
    assert (
        list(zip(found.text_to_image(right_IT).tolist(), found.pictures_in_front().tolist(), strict=True)) == expected
    )


def test_a_pair_on_both_lists_is_fused_once_and_a_picture_is_read_once() -> None:
    bundle, (pictures, captions, _) = bundle_of("albef"), shown()
    cosine_IT = retrieval.scores(bundle.encode_image(pictures).projected, bundle.encode_text(captions).projected)
    judged, read, asked = [], [], []
    bundle.model.itm_head.register_forward_hook(lambda _, given, __: judged.append(len(given[0])))
    bundle.model.fusion.blocks[0].cross_attention.key_value.register_forward_hook(
        lambda _, given, __: read.append(len(given[0]))
    )

    def picture(number: int) -> np.ndarray:
        asked.append(number)
        return pictures[number]

    found = rerank(bundle, picture, captions, cosine_IT, 3)
    assert sum(judged) == int((found.texts_of_picture_IT | found.pictures_of_text_IT).sum())
    assert read == [1] * PICTURES and asked == list(range(PICTURES))
    assert bool(found.logit_IT.isfinite().eq(found.texts_of_picture_IT | found.pictures_of_text_IT).all())


@pytest.mark.parametrize("family", ["albef", "flava", "flava, pads visible"])
def test_one_picture_with_several_texts_equals_as_many_copies_of_it(family: str) -> None:
    """Value and gradient of the plain form, which computes keys and values of the picture for each text."""
    model = bundle_of(family).model
    tokenizer = Tokenizer.wordpiece(WORDS)
    ids_BT, mask_BT = tokenizer.pad(tokenizer.encode(["a red dog", "the cat", "big", "a small car on the dog"], 9))
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.float64)

    def passed(copies: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, text = model.encode_image(pixels), model.encode_text(ids_BT, mask_BT)
        fused = model.fuse(image.repeated(len(ids_BT)) if copies else image, text, rows=1)
        logits = model.match(fused)
        model.zero_grad()
        (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (mine, my_grads), (plain, plain_grads) = passed(False), passed(True)
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)
    assert my_grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        assert float((my_grads[name] - grad).abs().max()) <= 1e-11 * max(1.0, float(grad.abs().max())), name


def test_equal_logits_count_against_the_model() -> None:
    cosine = torch.tensor([[0.9, 0.8, 0.1]])
    found = reranking.Reranked(cosine, torch.tensor([[2.0, 2.0, -torch.inf]]), torch.tensor([[True, True, False]]),
                               torch.tensor([[True, True, False]]))  # fmt: skip
    assert found.image_to_text(torch.tensor([[True, False, False]])).tolist() == [2]
    assert found.image_to_text(torch.tensor([[False, False, True]])).tolist() == [3]


def test_both_orders_stand_side_by_side_and_a_model_without_matching_has_one() -> None:
    bundle, (pictures, captions, own_T) = bundle_of("albef"), shown()
    images, texts = bundle.encode_image(pictures), bundle.encode_text(captions)
    names = [f"picture {n}" for n in range(PICTURES)]
    caption_names = [f"caption {n}" for n in range(len(captions))]
    given = pairs.Captioned(
        images.projected, texts.projected, torch.arange(PICTURES), own_T, names, caption_names, captions,
        pictures.__getitem__,
    )  # fmt: skip
    found = pairs.measure(bundle, given, "tr", "ir", shortlist=100).results
    alone = pairs.measure(bundle, given, "tr", "ir", shortlist=0).results
    assert {name for name in found if "reranked" not in name} == alone.keys()
    assert {name.replace("_reranked", "") for name in found} == alone.keys()
    assert (found["tr_reranked_r1"].n, found["ir_reranked_r1"].n) == (PICTURES, len(captions))
    assert all(found[name].value == alone[name].value for name in alone)
    untrained = pairs.measure(replace(bundle, fusion_trained=False), given, "tr", "ir", shortlist=100)
    assert untrained.results.keys() == alone.keys(), "nothing has trained what it would re-rank by"
    [why] = untrained.not_applicable
    assert why.startswith("re-ranking by matching: no loss has trained what this model reads pictures and texts")
    head = bundle.model.itm_head
    with torch.no_grad():  # a head that knows nothing puts every right answer last: ties count against it
        head.weight.zero_()
        head.bias.zero_()
    assert pairs.measure(bundle, given, "tr", "ir", shortlist=100).results["ir_reranked_median_rank"].value == PICTURES


def test_it_is_said_where_the_matching_head_makes_it_worse() -> None:
    bundle, (pictures, captions, own_T) = bundle_of("albef"), shown()
    texts = bundle.encode_text(captions).projected
    first_I = torch.tensor([int((own_T == picture).nonzero()[0]) for picture in range(PICTURES)])
    names = [[f"{what} {n}" for n in range(number)] for what, number in (("p", PICTURES), ("c", len(captions)))]
    given = pairs.Captioned(  # by cosine each picture is where its own captions are
        texts[first_I], texts[first_I][own_T], torch.arange(PICTURES), own_T, *names, captions, pictures.__getitem__
    )
    head = bundle.model.itm_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    found = pairs.measure(bundle, given, "tr", "ir", shortlist=100)
    lost = 100 * (1 - np.mean([found.results[f"tr_reranked_r{cutoff}"].value for cutoff in (1, 5, 10)]))
    worse_texts, worse_pictures = found.headline
    assert worse_texts.startswith("Re-ranking by matching finds fewer texts than the cosine alone")
    assert f"{lost:.1f} points lower [" in worse_texts and "fewer pictures" in worse_pictures
    assert pairs.measure(bundle, given, "tr", "ir", shortlist=0).headline == []
