"""ALBEF's pretraining step against the published computation, built out of transformers' ViT and BERT.

Losses of ITC, ITM and MLM with momentum copy, queue and distillation, the gradient of every parameter, and the state
after several steps. Tiny in float64: within 1e-9 of the largest value of each tensor. Base in float32, one step of two
rows, pictures of 64 pixels, of the published 256 in the long tests: states within 1e-5 x max(1, largest value), losses
1e-5 relative, gradients ||a - b|| <= 1e-4 ||b||. Key biases, whose true gradient is zero, stay below 1e-9 and 1e-6 of
the norm of their key weight's gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from published_albef import Inputs, PublishedAlbef, published_from, their_names
from torch import Tensor

from trivium.invariance import albef
from trivium.methods.albef import FOLLOWED, AlbefMethod
from trivium.models.albef import Albef, AlbefConfig
from trivium.train.protocol import Batch, Key
from trivium.train.step import backward, step

ALPHA = 0.4
KEY = Key(seed=5, stream="pairs", step=50)
TINY = replace(albef.TINY, fusion_layers=2)


def make(
    config: AlbefConfig = TINY,
    rows: int = 6,
    dtype: torch.dtype = torch.float64,
    queue: int = 12,
    std: float = 0.05,
    **options: Any,
) -> tuple[AlbefMethod, Batch]:
    """Weights N(0, 0.05), or smaller at base size, where larger ones make a model that amplifies rounding."""
    model = albef.random_albef(config, dtype=dtype)
    method = albef.albef_method(model, queue, **{"duplicates": "ignore", "pool": rows, "reach": 20.0} | options)
    method.queue_pointer.zero_()
    method.queue_same.fill_(-100)
    if std != 0.05:
        with torch.no_grad():
            for name, parameter in method.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(std / 0.05)
                elif name.endswith("norm.weight"):
                    parameter.sub_(1).mul_(std / 0.05).add_(1)
    return method, albef.make_batch(rows)


def inputs(method: AlbefMethod, batch: Batch, key: Key = KEY, idx_B: Tensor | None = None) -> Inputs:
    selected_BT, text = batch.targets["selected"], batch.texts[0]
    return Inputs(
        method.pixels(batch.images[0].pixels_BCHW), text.ids_BT, text.mask_BT, batch.targets["masked_ids"],
        text.ids_BT.masked_fill(~selected_BT, -100), key.uniform("negative image", batch.rows_B),
        key.uniform("negative text", batch.rows_B), idx_B,
    )  # fmt: skip


def key_biases(grads: dict[str, Tensor]) -> dict[str, float]:
    """The size of each key bias's gradient, in units of the norm of its weight's gradient."""
    names = [name for name in grads if name.endswith(("self.key.bias", "k_proj.bias"))]
    return {name: float(grads[name].norm() / grads[name[:-4] + "weight"].norm()) for name in names}


def both(
    method: AlbefMethod, batch: Batch, peer: PublishedAlbef, idx_B: Tensor | None = None
) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(ours, theirs) of losses and gradients of one batch."""
    method.train()
    sums, counts, _ = backward(method, [batch], KEY)
    ours = {name: sums[name] / counts[name] for name in ("itc", "itm", "mlm")}
    found = peer(inputs(method, batch, idx_B=idx_B), ALPHA, update=False)
    sum(found.values()).backward()  # type: ignore[union-attr]
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in method.model.named_parameters()}
    theirs = {n: p.grad for n, p in peer.named_parameters(remove_duplicate=False) if p.grad is not None}
    return (ours, {n: v.detach() for n, v in found.items()}), (
        their_names(grads, method.model.config, peer, momentum=False),
        theirs,
    )


def assert_equal(mine: dict[str, Tensor], yours: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert set(mine) == set(yours), set(mine) ^ set(yours)
    for name, expected in yours.items():
        if not name.endswith(("self.key.bias", "k_proj.bias")):
            error = float((mine[name] - expected).abs().max())
            assert error <= tolerance * float(expected.abs().max()), f"{name}: differs by {error:.3g}"


def assert_close_in_float32(mine: dict[str, Tensor], yours: dict[str, Tensor]) -> None:
    """Gradients at base size, by the norm of each tensor."""
    assert set(mine) == set(yours)
    for name, expected in yours.items():
        if not name.endswith(("self.key.bias", "k_proj.bias")):
            assert float((mine[name] - expected).norm()) <= 1e-4 * float(expected.norm()), name
    for name, size in (key_biases(mine) | key_biases(yours)).items():
        assert size <= 1e-6, f"{name}: {size:.3g}"


@pytest.mark.parametrize("soft_labels", ["vocabulary", "positions"])
def test_losses_and_gradients_of_one_step(soft_labels: str) -> None:
    """The public code normalised over "positions" first, and later over the "vocabulary"."""
    method, batch = make(soft_labels=soft_labels)
    losses, grads = both(method, batch, published_from(method, axis=1 if soft_labels == "positions" else -1))
    assert_equal(*losses)
    assert_equal(*grads)
    for name, size in (key_biases(grads[0]) | key_biases(grads[1])).items():
        assert size <= 1e-9, f"{name}: {size:.3g}"


def test_answers_that_share_the_mass_as_in_the_published_fine_tuning() -> None:
    method, batch = make(duplicates="positive")
    idx_B = torch.tensor([0, 1, 0, 3, 4, 1])
    batch.images[0].same_B.copy_(idx_B)
    batch.texts[0].same_B.copy_(idx_B)
    method.queue_same[5:8, 0] = torch.tensor([3, 0, 9])
    losses, grads = both(method, batch, published_from(method), idx_B)
    assert_equal(*losses)
    assert_equal(*grads)


def test_three_steps_end_with_the_same_student_teacher_and_queue() -> None:
    """The order of things: update, then the teacher follows; the queue takes what the teacher saw before that."""
    method, _ = make()
    peer = published_from(method)
    mine = torch.optim.SGD(method.model.parameters(), lr=0.3)
    yours = torch.optim.SGD([p for p in peer.parameters() if p.requires_grad], lr=0.3)
    for number in range(3):
        batch = albef.make_batch(6, seed=number)
        key = replace(KEY, step=50 + number)
        found = step(method, [batch], key, mine)
        assert found.accepted
        theirs = peer(inputs(method, batch, key), ALPHA, update=number > 0)
        for name, value in found.losses.items():
            assert value == pytest.approx(theirs[name].item(), rel=1e-9)
        yours.zero_grad()
        sum(theirs.values()).backward()
        yours.step()
    peer.update_momentum()  # theirs at the head of the fourth, and so is the clamp
    with torch.no_grad():
        peer.temp.clamp_(0.001, 0.5)
    teacher = {f"teacher.{name}": tensor for name, tensor in method.teacher.state_dict().items()}
    state = their_names({**method.model.state_dict(), **teacher}, method.model.config, peer, momentum=True)
    state |= {"image_queue": method.image_queue.T, "text_queue": method.text_queue.T}
    state["queue_ptr"] = method.queue_pointer
    expected = {name: tensor for name, tensor in peer.state_dict().items() if name != "idx_queue"}
    assert_equal(state, expected, 1e-8)  # three steps multiply the rounding of one
    assert int(method.queue_pointer) == 6  # 18 rows through 12


def test_the_form_with_divergences_is_the_papers() -> None:
    """Eq. 6 and 7: (1 - alpha) CE + alpha / 2 E[KL + KL], and (1 - alpha) CE + alpha KL."""
    method, batch = make()
    method.train()
    sums, counts, _ = backward(method, [batch], KEY)
    with torch.no_grad():
        text, selected_BT = batch.texts[0], batch.targets["selected"]
        pixels = method.pixels(batch.images[0].pixels_BCHW)
        image, words = method.model.encode_image(pixels), method.model.encode_text(text.ids_BT, text.mask_BT)
        shown, read = method.teacher.encode_image(pixels), method.teacher.encode_text(text.ids_BT, text.mask_BT)
        itc = 0.0
        for asked, teacher, key, queue in (
            (image, shown, read, method.text_queue), (words, read, shown, method.image_queue),
        ):  # fmt: skip
            keys = torch.cat([key.projected, queue])
            p = (asked.projected @ keys.T / method.model.temperature).log_softmax(1)
            q = (teacher.projected @ keys.T / method.model.temperature).log_softmax(1)
            divergence = (q.exp() * (q - p)).sum(1).mean()
            itc += float((1 - ALPHA) * -p.diagonal().mean() + ALPHA * divergence) / 2
        ids = batch.targets["masked_ids"]
        p, q = (
            m.predict_words(m.fuse(i, m.encode_text(ids, text.mask_BT)).tokens)[selected_BT].log_softmax(-1)
            for m, i in ((method.model, image), (method.teacher, shown))
        )
        hard = -p.gather(1, text.ids_BT[selected_BT][:, None]).mean()
        mlm = float((1 - ALPHA) * hard + ALPHA * (q.exp() * (q - p)).sum(1).mean())
    assert float(sums["stat/itc_kl"]) == pytest.approx(itc, rel=1e-12)
    assert float(sums["stat/mlm_kl"]) == pytest.approx(mlm, rel=1e-12)
    assert itc < float(sums["itc"] / counts["itc"]) and mlm < float(sums["mlm"] / counts["mlm"])


@pytest.mark.parametrize("side", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_base_agrees_in_float32(side: int) -> None:
    """At 64 pixels, 17 image tokens; at 256, as published, 257."""
    config = replace(AlbefConfig(), dropout=0.0, image_size=side)
    method, batch = make(config, 2, torch.float32, queue=8, std=0.02)
    batch.images[0].pixels_BCHW = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    peer = published_from(method)
    losses, grads = both(method, batch, peer)
    for name, value in losses[0].items():
        assert float(value) == pytest.approx(float(losses[1][name]), rel=1e-5), name
    assert_close_in_float32(*grads)
    with torch.no_grad():
        pixels, text = method.pixels(batch.images[0].pixels_BCHW), batch.texts[0]
        image, words = method.model.encode_image(pixels), method.model.encode_text(text.ids_BT, text.mask_BT)
        image_BND, text_BTD = peer.image_states(pixels), peer.text_encoder.read(text.ids_BT, text.mask_BT)
        fused_BTD = peer.text_encoder.fuse(text_BTD, text.mask_BT, image_BND)
        for ours, theirs in (
            (image.tokens, image_BND), (words.tokens, text_BTD), (method.model.fuse(image, words).tokens, fused_BTD),
        ):  # fmt: skip
            assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_parameters_are_as_many_as_published() -> None:
    with torch.device("meta"):
        model = Albef(AlbefConfig())
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    assert counted["image"] == 85_844_736
    assert counted["text"] + counted["fusion"] + counted["mlm_head"] == 123_697_722
    assert counted["image_projection"] == counted["text_projection"] == 196_864
    assert counted["itm_head"] == 1_538
    assert sum(p.numel() for p in model.parameters()) == 209_937_725
    momentum = sum(counted[name] for name in FOLLOWED)
    assert momentum == 209_936_186
