"""Blocks without pads give what they give with them, in value and gradient, at every position that is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.flava_batches import flava_method, make_batch, random_flava
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


@pytest.mark.parametrize("stream", ["text", "pairs"])
def test_a_step_of_flava_is_the_same(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, packed = [], []
    pack = Packing.pack
    monkeypatch.setattr(Packing, "pack", lambda self, x: (packed.append(1), pack(self, x))[1])
    for worth_it in (0.0, 2.0):
        monkeypatch.setattr(packing, "WORTH_IT", worth_it)
        method = flava_method(random_flava())
        packed.clear()
        sums, _, _ = backward(method, [make_batch(stream, 16, false_rows=(1,))], Key(0, stream, 0))
        assert bool(packed) == (worth_it == 0)
        found.append((sums, {name: p.grad for name, p in method.named_parameters() if p.grad is not None}))
    for mine, yours in zip(*found, strict=True):
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, yours[name], rtol=0, atol=1e-12 * max(1.0, float(yours[name].norm())))
