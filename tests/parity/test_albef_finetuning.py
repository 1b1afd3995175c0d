"""ALBEF's fine-tuning on retrieval and entailment against the published computation, built out of transformers' parts.

float64, tiny: losses and gradients within 1e-9 of the largest value of each tensor.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_albef import published_from, their_names
from torch import Tensor, nn
from torch.nn import functional as F

from tests.parity.test_albef_published import KEY, TINY, assert_equal, inputs, make
from trivium.invariance import albef
from trivium.methods.finetune import FineTuning
from trivium.methods.momentum import SoftTargets
from trivium.methods.pixels import Pixels
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.albef_heads import AnswerDecoder, TwoPictures, decoder_config
from trivium.models.finetuned import FineTuned, HeadConfig
from trivium.train.step import backward

ALPHA = 0.4


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_retrieval_is_itc_with_shared_answers_and_itm(alpha: float) -> None:
    """No word is hidden, and no batch need say which would be."""
    method, batch = make(duplicates="positive", itc=alpha, weights={"mlm": 0.0})
    idx_B = torch.tensor([0, 1, 0, 3, 4, 1])
    batch.images[0].same_B.copy_(idx_B)
    batch.texts[0].same_B.copy_(idx_B)
    method.queue_same[5:8, 0] = torch.tensor([3, 0, 9])
    method.train()
    peer = published_from(method)
    given = inputs(method, batch, idx_B=idx_B)
    batch = replace(batch, targets={"matched": batch.targets["matched"]})
    sums, counts, _ = backward(method, [batch], KEY)
    found = peer(given, alpha, update=False)
    (found["itc"] + found["itm"]).backward()
    assert_equal({n: sums[n] / counts[n] for n in ("itc", "itm")}, {n: found[n].detach() for n in ("itc", "itm")})
    mine = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in method.model.named_parameters()}
    named = their_names(mine, method.model.config, peer, momentum=False)
    yours = {n: p.grad for n, p in peer.named_parameters(remove_duplicate=False) if p.grad is not None}
    assert_equal({name: named[name] for name in yours}, yours)
    assert {name for name in named if name not in yours} == {n for n in named if ".cls." in n and "decoder.w" not in n}


class PublishedEntailment(nn.Module):
    """ALBEF of models/model_ve.py: the whole text encoder on picture and sentence, a classifier on its class token."""

    def __init__(self, method: FineTuning, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer
        assert method.teacher is not None
        for suffix, ours in (("", method.model.head), ("_m", method.teacher.copy.head)):
            inner, decoder = ours.inner, ours.decoder
            head = nn.Sequential(nn.Linear(*inner.weight.T.shape), nn.ReLU(), nn.Linear(*decoder.weight.T.shape))
            state = {"0.weight": inner.weight, "0.bias": inner.bias, "2.weight": decoder.weight, "2.bias": decoder.bias}
            head.double().load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()})
            setattr(self, f"cls_head{suffix}", head)

    def predict(self, pixels: Tensor, ids: Tensor, mask: Tensor, suffix: str = "") -> Tensor:
        image = self.peer.image_states(pixels, suffix)
        text = getattr(self.peer, f"text_encoder{suffix}")
        return getattr(self, f"cls_head{suffix}")(text.fuse(text.read(ids, mask), mask, image)[:, 0])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, targets: Tensor, alpha: float) -> Tensor:
        prediction = self.predict(pixels, ids, mask)
        with torch.no_grad():
            taught = self.predict(pixels, ids, mask, "_m")
        soft = -torch.sum(F.log_softmax(prediction, dim=1) * F.softmax(taught, dim=1), dim=1).mean()
        return (1 - alpha) * F.cross_entropy(prediction, targets) + alpha * soft


def test_entailment_is_a_classifier_on_the_fused_class_token_taught_by_a_momentum_copy() -> None:
    pretraining, _ = make()
    peer = published_from(pretraining)
    config = HeadConfig("entailment", "fused", "class", TINY.width, 3, TINY.width, "relu", dropout=0.0)
    head = config.build().double()
    pixels = Pixels((0.5,) * 3, (0.25,) * 3)
    soft = SoftTargets(alpha=ALPHA, ramp=0.0)
    method = FineTuning(FineTuned(pretraining.model, head, config), pixels, soft, 100, 10).double().train()
    assert method.teacher is not None
    method.teacher.copy.backbone.load_state_dict(pretraining.teacher.state_dict(), strict=False)
    with torch.no_grad():
        for parameter in method.teacher.copy.head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    method.schedule(0)  # the published alpha is constant in this task
    theirs = PublishedEntailment(method, peer)
    label_B = torch.tensor([0, 2, 1, 1, 0, 2])
    given = albef.make_batch(6)
    given.targets = {"label": label_B}
    sums, counts, _ = backward(method, [given], KEY)
    text = given.texts[0]
    loss = theirs(pretraining.pixels(given.images[0].pixels_BCHW), text.ids_BT, text.mask_BT,
                  label_B, ALPHA)  # fmt: skip
    loss.backward()
    assert float(sums["entailment"] / counts["entailment"]) == pytest.approx(float(loss.detach()), rel=1e-10)
    backbone = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in pretraining.model.named_parameters()}
    named = their_names(backbone, TINY, peer, momentum=False)
    yours = {n: p.grad for n, p in peer.named_parameters(remove_duplicate=False) if p.grad is not None}
    assert_equal({name: named[name] for name in yours}, yours)
    unused = ("vision_proj", "text_proj", "itm_head", "temp", "text_encoder.cls")
    assert all(name.startswith(unused) for name in named.keys() - yours.keys())
    for ours, place in ((head.inner, 0), (head.decoder, 2)):
        assert ours is not None
        for part in ("weight", "bias"):
            expected = getattr(theirs.cls_head[place], part).grad
            torch.testing.assert_close(getattr(ours, part).grad, expected, rtol=1e-9, atol=1e-12)


def test_parameters_are_as_many_as_published() -> None:
    """At 384 pixels; every part that the public models of the two tasks have."""
    with torch.device("meta"):
        model = Albef(replace(AlbefConfig(), image_size=384))
        head = HeadConfig("entailment", "fused", "class", 768, 3, 768, "relu", dropout=0.0).build()
        writer = AnswerDecoder(decoder_config(model.config))
        judge = TwoPictures(decoder_config(model.config), 768, 2)
    counted = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    encoders = counted["image"] + counted["text"] + counted["fusion"]
    heads = counted["image_projection"] + counted["text_projection"] + counted["itm_head"]
    assert encoders + heads + model.temperature.numel() == 209_560_835
    assert encoders + sum(p.numel() for p in head.parameters()) == 209_758_467
    assert encoders + sum(p.numel() for p in writer.parameters()) == 290_336_058
    assert encoders + sum(p.numel() for p in judge.parameters()) == 259_381_250
