"""Blocks without pads give what they give with them, in value and gradient, at every position that is read."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.flava_batches import TINY, flava_method, make_batch, random_flava
from trivium.invariance import CASES, albef, split
from trivium.layers import packing
from trivium.layers.packing import Packing
from trivium.layers.transformer import PostNormEncoder, PreNormEncoder
from trivium.train.protocol import Key
from trivium.train.step import backward

LENGTHS = (11, 3, 1, 7, 2, 5, 4, 9)
MASK_BL = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
KINDS = ("pre-norm", "post-norm", "post-norm that reads a memory", "post-norm that reads keys and values made before")


def drawn(module: nn.Module) -> Any:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=draw)
    return module.double()


def stack(kind: str) -> tuple[Any, dict[str, Any]]:
    """An encoder, and what it is given beside its input and mask."""
    if kind == "pre-norm":
        return drawn(PreNormEncoder(16, 3, 2, 32, 1e-6)), {}
    if kind == "post-norm":
        return drawn(PostNormEncoder(16, 3, 2, 32, 1e-6)), {}
    encoder = drawn(PostNormEncoder(16, 3, 2, 32, 1e-6, memory_width=8))
    memory_BSW = torch.randn(len(LENGTHS), 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    memory_mask = torch.arange(6) < torch.tensor([6, 5, 4, 3, 2, 1, 6, 2])[:, None]
    if kind.endswith("a memory"):
        return encoder, {"memory": memory_BSW, "memory_mask": memory_mask}
    return encoder, {"memory": encoder.read(memory_BSW)}


def outcome(kind: str, rows: Tensor | int | None, pads: bool) -> tuple[Tensor, list[Tensor]]:
    """What is read of the output, and the gradients of the input and of all weights. A class token alone is read with
    a mask that says so; of a whole output real positions are."""
    encoder, given = stack(kind)
    x_BLD = torch.randn(*MASK_BL.shape, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_BLD = x_BLD.masked_fill(~MASK_BL[:, :, None], 1e3).requires_grad_()  # pads that would be seen at once
    found = encoder(x_BLD, MASK_BL, rows, pads=pads, **given)
    read = found[MASK_BL] if rows is None else found
    weight = torch.randn(read.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = [x_BLD, *encoder.parameters()]
    return read.detach(), list(torch.autograd.grad((read * weight).sum(), wanted))


@pytest.mark.parametrize("rows", [None, 1, torch.tensor([[0], [2], [0], [6], [1], [4], [3], [8]])])
@pytest.mark.parametrize("kind", KINDS)
def test_without_pads_it_is_the_same(kind: str, rows: Tensor | int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    pack = Packing.pack
    monkeypatch.setattr(Packing, "pack", lambda self, x: (taken.append(len(self.index_N)), pack(self, x))[1])
    found, gradients = outcome(kind, rows, pads=False)
    assert set(taken) == {48}  # 42 real positions of 88, and 6 pads up to a multiple of 16
    taken.clear()
    monkeypatch.setattr(packing, "WORTH_IT", 2.0)
    expected, wanted = outcome(kind, rows, pads=False)
    assert not taken
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for mine, yours in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-11 * max(1.0, float(yours.abs().max())))


def test_a_class_token_that_is_a_pad_itself_is_what_it_was() -> None:
    """Of texts whose pads stand in front, as some tokenizers have them: nothing is left out unless somebody says so."""
    encoder, _ = stack("post-norm")
    x_BLD = torch.randn(*MASK_BL.shape, 16, dtype=torch.float64)
    in_front = MASK_BL.flip(1)
    torch.testing.assert_close(encoder(x_BLD, in_front, 1), encoder(x_BLD, in_front)[:, :1], rtol=0, atol=1e-12)


def test_whoever_reads_pads_gets_them() -> None:
    encoder, _ = stack("pre-norm")
    x_BLD = torch.randn(*MASK_BL.shape, 16, dtype=torch.float64)
    whole = encoder(x_BLD, MASK_BL)
    assert (whole[~MASK_BL].abs().amax(-1) > 0).all()
    without = encoder(x_BLD, MASK_BL, pads=False)
    torch.testing.assert_close(without[MASK_BL], whole[MASK_BL])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_all_that_is_real_is_taken_and_comes_back_where_it_was(lengths: list[int]) -> None:
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packed = Packing.of(mask_BL)
    if packed is None:
        assert sum(lengths) + max(16, mask_BL.numel() // 16) > 7 / 8 * mask_BL.numel()
        return
    assert len(packed.index_N) <= 7 / 8 * mask_BL.numel()
    assert len(packed.index_N) % 16 == 0
    assert len(set(packed.index_N.tolist())) == len(packed.index_N)
    x_BLD = torch.randn(*mask_BL.shape, 3)
    again = packed.unpack(packed.pack(x_BLD))
    assert torch.equal(again[mask_BL], x_BLD[mask_BL])


def test_what_says_more_than_who_is_a_pad_is_not_packed() -> None:
    assert Packing.of(None) is None
    assert Packing.of(MASK_BL[:, None] & MASK_BL[:, :, None]) is None
    assert Packing.of(MASK_BL.to("meta")) is None  # nobody waits for a device to know how many there are
    assert Packing.of(torch.ones(4, 9, dtype=torch.bool)) is None
    assert Packing.of(MASK_BL[:0]) is None


def test_what_does_not_fit_is_refused() -> None:
    encoder, given = stack(KINDS[-1])
    x_BLD = torch.randn(*MASK_BL.shape, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="shorter"):
        encoder(x_BLD, MASK_BL, memory=given["memory"][:-1])
    with pytest.raises(AssertionError, match="for all samples at once"):
        stack("pre-norm")[0](x_BLD.repeat(1, 6, 1), (torch.arange(66) < 5)[None], pads=False)


def exactly(mask: Tensor | None) -> Packing | None:
    """Packing.of that leaves every pad out."""
    if mask is None or mask.ndim != 2 or mask.all():
        return None
    return Packing(mask, mask.flatten().nonzero()[:, 0])


def visible(dtype: torch.dtype, dropout: float) -> tuple[Any, Any]:
    """FLAVA as pretrained at first: its multimodal encoder reads pads."""
    return flava_method(random_flava(replace(TINY, pads_visible=True))), make_batch("pairs", 8, false_rows=(1,))


STEPS: dict[str, Any] = {
    **{name: CASES[name] for name in ("FLAVA, pairs", "FLAVA, text", "ALBEF", "retrieval, FLAVA", "UniT, answers")},
    "fine-tuning, BERT": CASES["fine-tuning, BERT"],
    "ALBEF, soft labels as published": partial(albef.case, soft_labels="positions"),
    "FLAVA, pads are visible": visible,
}


READ_PADS = ("ALBEF, soft labels as published", "FLAVA, pads are visible")


@pytest.mark.parametrize("name", STEPS)
def test_no_step_reads_what_was_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pad left out that may be, and in its place, at the end, noise that would be seen at once."""
    packed: list[bool] = []

    def counted(mask: Tensor | None) -> Packing | None:
        found = exactly(mask)
        packed.extend([True] * (found is not None))
        return found

    def noisy(self: Packing, x_ND: Tensor) -> Tensor:
        left_out = torch.full((self.mask_BL.numel(), x_ND.shape[1]), 1e3, dtype=x_ND.dtype)
        return left_out.index_copy_(0, self.index_N, x_ND).unflatten(0, self.mask_BL.shape)

    found = []
    for change in (False, True):
        if change:
            monkeypatch.setattr(Packing, "of", counted)
            monkeypatch.setattr(Packing, "unpack", noisy)
        else:
            monkeypatch.setattr(packing, "WORTH_IT", 2.0)
        method, batch = STEPS[name](torch.float64, 0.0)
        sums, _, _ = backward(method, [batch], Key(0, batch.stream, 0))
        found.append((sums, {name: p.grad for name, p in method.named_parameters() if p.grad is not None}))
    assert bool(packed) == (name not in READ_PADS)
    for expected, mine in zip(*found, strict=True):
        assert mine.keys() == expected.keys()
        for tensor, value in mine.items():
            bound = 1e-9 * float(expected[tensor].double().norm()) + 1e-12
            assert float((value - expected[tensor]).double().norm()) <= bound, tensor


def test_with_dropout_a_step_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes of GradCache draw alike, and so do two processes and one: at a micro-batch the draws are its own."""
    monkeypatch.setattr(
        Packing, "of", lambda mask: None if mask is None else Packing(mask, mask.flatten().nonzero()[:, 0])
    )
    found = []
    for _ in range(2):
        method, batch = albef.case(torch.float64, 0.3)
        sums, _, _ = backward(method.train(), split(batch, 4), Key(0, batch.stream, 0))
        found.append(sums)
    assert {name: value.tolist() for name, value in found[0].items()} == {n: v.tolist() for n, v in found[1].items()}
    with torch.no_grad():
        Key(0, batch.stream, 0).reseed(0)
        first = method.embed(split(batch, 4)[0])[0].rows["text"]
    Key(0, batch.stream, 0).reseed(0)
    again = method.embed(split(batch, 4)[0])[0].rows["text"]
    assert torch.equal(first, again)
