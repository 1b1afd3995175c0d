"""FLAVA's method against its plain form: every position through every encoder, losses as the paper writes them.

float64: values and gradients within 1e-10. B rows, N patches, T text tokens, V classes.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.flava_batches import TINY, flava_method, gradients, make_batch, random_flava, split
from trivium.methods.flava import LOSSES, FlavaMethod, Pixels
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.flava import Flava
from trivium.models.patch_codebook import PatchCodebook
from trivium.train.protocol import Batch, Key, Rows
from trivium.train.step import backward


def plain_losses(model: Flava, batch: Batch, chosen: list[int] | None = None) -> dict[str, Tensor]:
    """Means over the batch, without any trick. chosen: rows that take the masked pass; None = all."""
    targets = batch.targets
    if batch.images:
        pixels_BCHW = (batch.images[0].pixels_BCHW.double() / 255 - 0.5) / 0.25
    if batch.stream == "images":
        tokens = model.encode_image(pixels_BCHW, targets["image_mask"]).tokens[:, 1:]
        logits_BNV = model.mim_head(tokens)
        return {"mim": F.cross_entropy(logits_BNV[targets["image_mask"]], targets["codes"][targets["image_mask"]])}
    text = batch.texts[0]
    if batch.stream == "text":
        logits_BTV = model.mlm_head(model.encode_text(targets["masked_ids"], text.mask_BT).tokens)
        return {"mlm": F.cross_entropy(logits_BTV[targets["selected"]], text.ids_BT[targets["selected"]])}

    matched_B = targets["matched"]
    kept_B = matched_B | ~matched_B.any()
    image_BD = F.normalize(model.image_projection(model.encode_image(pixels_BCHW).tokens[:, 0]), dim=-1)
    text_BD = F.normalize(model.text_projection(model.encode_text(text.ids_BT, text.mask_BT).tokens[:, 0]), dim=-1)
    logits_BB = model.logit_scale.exp() * image_BD @ text_BD.T
    answer_B = torch.arange(len(batch))
    both = [F.cross_entropy(logits[kept_B], answer_B[kept_B]) for logits in (logits_BB, logits_BB.T)]
    losses = {"contrastive": (both[0] + both[1]) / 2}

    row = torch.arange(len(batch)) if chosen is None else torch.tensor(chosen)
    masked_RN, selected_RT, kept_R = targets["image_mask"][row], targets["selected"][row], kept_B[row]
    image = model.encode_image(pixels_BCHW[row], masked_RN)
    words = model.encode_text(targets["masked_ids"][row], text.mask_BT[row])
    tokens = model.fuse(image, words).tokens
    N = masked_RN.shape[1]
    losses["itm"] = F.cross_entropy(model.itm_head(tokens[:, 0]), matched_B[row].long())
    patches_RN, words_RT = masked_RN & kept_R[:, None], selected_RT & kept_R[:, None]
    image_logits, text_logits = model.mmm_image_head(tokens[:, 2 : 2 + N]), model.mmm_text_head(tokens[:, 2 + N :])
    losses["mmm_image"] = F.cross_entropy(image_logits[patches_RN], targets["codes"][row][patches_RN])
    losses["mmm_text"] = F.cross_entropy(text_logits[words_RT], text.ids_BT[row][words_RT])
    return losses


def assert_equals_plain(method: FlavaMethod, batch: Batch, chosen: list[int] | None = None) -> None:
    sums, counts, _ = backward(method, [batch], Key(0, batch.stream, 0))
    mine = {name: value / counts[name] for name, value in sums.items()}
    my_grads = {name: grad.clone() for name, grad in gradients(method.model).items()}
    method.zero_grad(set_to_none=True)
    plain = {n: v for n, v in plain_losses(method.model, batch, chosen).items() if method.weights[n]}
    torch.stack([method.weights[name] * value for name, value in plain.items()]).sum().backward()
    assert set(mine) == set(plain)
    for name, value in plain.items():
        assert float(mine[name]) == pytest.approx(value.item(), rel=1e-10), name
    plain_grads = gradients(method.model)
    assert set(my_grads) == set(plain_grads), set(my_grads) ^ set(plain_grads)
    for name, grad in plain_grads.items():
        assert float((my_grads[name] - grad).abs().max()) <= 1e-10 * max(1.0, float(grad.abs().max())), name


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("stream", "false_rows"),
    [
        ("images", ()),
        ("text", ()),
        ("pairs", ()),
        ("pairs", (0, 4)),
        ("pairs", (0, 1, 2, 4, 5)),
        ("pairs", tuple(range(6))),
    ],
)
def test_only_the_needed_rows_are_computed_and_nothing_changes(
    stream: str, false_rows: tuple[int, ...], padded: bool
) -> None:
    assert_equals_plain(flava_method(random_flava()), make_batch(stream, 6, false_rows=false_rows, padded=padded))


def test_pads_that_the_multimodal_encoder_sees() -> None:
    assert_equals_plain(flava_method(random_flava(replace(TINY, pads_visible=True))), make_batch("pairs", 6))


def test_a_share_of_the_pairs_takes_the_masked_pass_and_all_take_the_contrastive_one() -> None:
    batch = make_batch("pairs", 8, false_rows=(1, 5))
    assert_equals_plain(flava_method(random_flava(), masked_share=0.5), batch, chosen=[1, 3, 5, 7])


@pytest.mark.parametrize("dropped", [name for name in LOSSES if name not in ("mim", "mlm")])
def test_a_loss_of_weight_zero_is_not_computed_and_the_others_are_as_before(dropped: str) -> None:
    method = flava_method(random_flava(), weights={dropped: 0.0, "itm": 0.25} | {dropped: 0.0})
    assert_equals_plain(method, make_batch("pairs", 6, false_rows=(2,)))


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])  # of six rows, the last leaves none
def test_both_passes_at_once_are_the_passes_one_after_the_other(
    at_once: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over the towers where there is a graph and no dropout; else two. Either equals the plain form."""
    method, batch = flava_method(random_flava(), masked_share=share), make_batch("pairs", 6, false_rows=(1, 5))
    calls = []
    plain = method.model.encode_pairs_twice
    monkeypatch.setattr(method.model, "encode_pairs_twice", lambda *given: (calls.append(1), plain(*given))[1])
    if not at_once:
        monkeypatch.setattr(method, "_both_at_once", lambda: False)
    chosen = method.train()._masked_rows(batch).tolist()
    if chosen:
        assert_equals_plain(method, batch, chosen)
    else:
        backward(method, [batch], Key(0, "pairs", 0))
    assert bool(calls) == at_once
    with torch.no_grad():
        assert not method._both_at_once()
    assert not flava_method(random_flava(replace(TINY, dropout=0.1)))._both_at_once()


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.data())
def test_the_share_is_even_and_no_micro_batch_changes_who_is_in_it(
    rows: int, share: float, data: st.DataObject
) -> None:
    method = flava_method(random_flava(), masked_share=share)
    parts = data.draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
    batch = Batch("pairs", torch.arange(rows), torch.arange(rows))
    chosen = [int(part.rows_B[row]) for part in split(batch, parts) for row in method._masked_rows(part)]
    assert chosen == method._masked_rows(batch).tolist()
    assert abs(len(chosen) - rows * share) < 1
    for first in range(rows):  # any window holds its share of rows, give or take one
        inside = sum(first <= row < first + 10 for row in chosen)
        assert abs(inside - min(10, rows - first) * share) < 1 + 1e-9 + share
    assert method.eval()._masked_rows(batch).tolist() == list(range(rows))  # what is measured takes every pair


def test_codes_come_from_the_tokenizer_where_the_batch_has_none() -> None:
    class ThirdPixel:
        num_codes, stride = TINY.num_codes, 8

        def encode(self, pixels_BCHW: Tensor) -> Tensor:
            assert float(pixels_BCHW.min()) >= 0 and float(pixels_BCHW.max()) <= 1
            return (pixels_BCHW[:, 0, ::8, ::8] * 16).long().flatten(1)

    batch = make_batch("images", 4)
    online, cached = flava_method(random_flava()), flava_method(random_flava())
    online.image_tokenizer = ThirdPixel()
    codes_BN = ThirdPixel().encode(batch.images[0].pixels_BCHW.double() / 255)
    without = replace(batch, targets={"image_mask": batch.targets["image_mask"]})
    with_codes = replace(batch, targets=batch.targets | {"codes": codes_BN})
    sums, _, _ = backward(online, [without], Key(0, "images", 0))
    expected, _, _ = backward(cached, [with_codes], Key(0, "images", 0))
    assert torch.equal(sums["mim"], expected["mim"])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("stream", ["images", "pairs"])
def test_codes_are_made_once_and_before_the_towers_that_keep_their_activations(
    stream: str, parts: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, events = flava_method(random_flava(replace(TINY, dropout=dropout)), masked_share=0.5), []
    made, embed_patches = method.codes, method.model.image.patches.forward
    monkeypatch.setattr(method, "codes", lambda *given: (events.append("codes"), made(*given))[1])

    def patches(pixels_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # the first pass of GradCache keeps nothing
            events.append("tower")
        return embed_patches(pixels_BCHW)

    monkeypatch.setattr(method.model.image.patches, "forward", patches)
    backward(method.train(), split(make_batch(stream, 6), parts), Key(0, stream, 0))
    towers = 2 if dropout and stream == "pairs" else 1  # with dropout the two passes over pairs stay two
    assert events == ["codes", *["tower"] * towers] * parts


def test_chance_is_that_of_the_pairs_in_the_masked_pass() -> None:
    """Rows 1, 3, 5 and 7 take it, one of them false."""
    method = flava_method(random_flava(), masked_share=0.5)
    batch = make_batch("pairs", 8, false_rows=(0, 2, 5))
    counts = {name: float(value) for name, value in method.counts(batch).items()}
    found = method.chance(counts)
    assert found["itm"] == pytest.approx(float(F.binary_cross_entropy(torch.tensor(0.75), torch.tensor(0.75))))
    assert found["contrastive"] == pytest.approx(math.log(8))
    assert method.chance({"mim": 5.0}) == {}
    sigmoid = flava_method(random_flava(), contrastive_form="sigmoid").chance(counts)["contrastive"]
    assert sigmoid == pytest.approx(-math.log(1 / 8) - 7 * math.log(7 / 8))


def test_the_contrastive_loss_of_a_scope_is_that_of_clip_s_method_and_leaves_the_others_alone() -> None:
    batch = make_batch("pairs", 6, false_rows=(1,))
    found = {}
    for scope in ("global", "local_gradient", "local"):
        method = flava_method(random_flava(), contrastive_scope=scope, num_ranks=1 if scope == "global" else 2)
        sums, counts, _ = backward(method, [batch], Key(0, "pairs", 0))
        found[scope] = sums
        numbers = {name: float(value) for name, value in counts.items()}
        assert method.chance(numbers)["contrastive"] == pytest.approx(math.log(3 if scope == "local" else 6))
    for name in ("itm", "mmm_image", "mmm_text"):
        assert found["global"][name] == found["local_gradient"][name] == found["local"][name]
    assert float(found["local_gradient"]["contrastive"]) == pytest.approx(float(found["global"]["contrastive"]))
    rows, _ = method.embed(batch)
    halves = [Rows(*({n: v[part] for n, v in parts.items()} for parts in (rows.rows, rows.marks)))
              for part in (slice(0, 3), slice(3, 6))]  # fmt: skip
    whole = flava_method(method.model)
    alone = sum(float(whole.couple(half, half)["contrastive"].detach()) for half in halves)
    assert float(found["local"]["contrastive"]) == pytest.approx(alone, rel=1e-12)


def test_an_unknown_loss_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="clip"):
        flava_method(random_flava(), weights={"clip": 1.0})


def test_products_in_bfloat16_leave_the_codes_alone() -> None:
    codebook = PatchCodebook.fit(torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8), 64, 8, iterations=1)
    codebook.centres.mul_(0.02).add_(0.9)  # close to each other, as patches that are nearly white
    method = FlavaMethod(Flava(TINY), codebook, Pixels((0.5,) * 3, (0.25,) * 3))
    batch = make_batch("images", 4)
    del batch.targets["codes"]
    plain = method.codes(batch, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert method.codes(batch, torch.arange(4)).equal(plain)
        assert not codebook.encode(batch.images[-1].pixels_BCHW / 255).equal(plain), "bfloat16 would have changed none"


@pytest.mark.parametrize("weights", [{}, {"contrastive": 0.0}, {"mmm_image": 0.0, "itm": 0.0}])
@pytest.mark.parametrize("stream", ["pairs", "images", "text"])
@pytest.mark.parametrize("cached", [True, False], ids=["codes in the batch", "codes from the tokenizer"])
def test_no_pass_reads_a_number_back_from_the_device(
    stream: str, weights: dict[str, float], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device numbers do not exist: whatever would wait for a GPU raises here. Nor does autocast there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    config = replace(TINY, image_size=32, patch_size=8)
    tokenizer = DVae(DVaeConfig(width=8, num_groups=2, num_codes=TINY.num_codes)).frozen()
    method = FlavaMethod(random_flava(config, dtype=torch.float32), tokenizer, Pixels((0.5,) * 3, (0.25,) * 3), weights)
    method.masked_share = 0.5
    batch = make_batch(stream, 4, config, false_rows=(1,))
    if not cached and batch.images:
        half = torch.nn.functional.avg_pool2d(batch.images[0].pixels_BCHW.float(), 4).to(torch.uint8)
        batch.images += (replace(batch.images[0], pixels_BCHW=half),)
        del batch.targets["codes"]
    method.to("meta")
    counts = method.divisors(method.counts(batch))
    rows, states = method.embed(batch)
    sums = method.separate(batch, rows, states, counts, Key(0, stream, 0))
    if rows.rows:
        sums = sums | method.couple(rows, rows)
    parts = [*sums.values(), *[rows_BD.sum() for rows_BD in rows.rows.values()]]
    torch.stack(parts).sum().backward()
    assert all(value.is_meta for value in (*parts, *rows.marks.values()))
    assert all(grad.is_meta for grad in gradients(method).values())
