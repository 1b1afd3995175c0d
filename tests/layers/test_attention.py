"""Attention and the encoder against their plain forms: values and gradients, float64.

B batch, L positions, Q query positions, D width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trivium.layers import attention
from trivium.layers.attention import CrossAttention, SelfAttention, causal, padded_index, take_rows
from trivium.layers.transformer import PostNormEncoder, PreNormEncoder

B, L, D, HEADS = 3, 7, 24, 4


def plain_attention(module: SelfAttention, x_BLD: Tensor, mask: Tensor | None) -> Tensor:
    """Three projections and a softmax written out, one head at a time."""
    query, key, value = (
        torch.nn.functional.linear(x_BLD, weight, bias)
        for weight, bias in zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True)
    )
    heads = []
    for query_BLE, key_BLE, value_BLE in zip(*(t.chunk(HEADS, dim=-1) for t in (query, key, value)), strict=True):
        scores_BLL = query_BLE @ key_BLE.transpose(1, 2) / math.sqrt(D // HEADS)
        if mask is not None:
            scores_BLL = scores_BLL.masked_fill(~(mask[:, None, :] if mask.ndim == 2 else mask), float("-inf"))
        heads.append(scores_BLL.softmax(-1) @ value_BLE)
    return module.out(torch.cat(heads, dim=-1))


def value_and_gradients(output: Tensor, weight: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad((output * weight).sum(), inputs)]


def assert_all_close(mine: list[Tensor], plain: list[Tensor]) -> None:
    for a, b in zip(mine, plain, strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-10 * max(1.0, float(b.detach().abs().max()))


def random_mask() -> Tensor:
    mask_BL = torch.arange(L) < torch.tensor([L, 2, 5])[:, None]
    assert mask_BL[:, 0].all()
    return mask_BL


@pytest.mark.parametrize("masked", [False, True])
def test_fused_projection_and_kernel_equal_plain_attention(masked: bool) -> None:
    module = SelfAttention(D, HEADS).double()
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    mask_BL = random_mask() if masked else None
    weight, inputs = torch.randn_like(x_BLD), (x_BLD, *module.parameters())
    assert_all_close(
        value_and_gradients(module(x_BLD, mask_BL), weight, *inputs),
        value_and_gradients(plain_attention(module, x_BLD, mask_BL), weight, *inputs),
    )


def test_a_causal_position_sees_itself_and_what_is_before_it() -> None:
    mask_BLL = causal(random_mask())
    real_BL = random_mask()
    for row, query, key in [(b, q, k) for b in range(B) for q in range(L) for k in range(L)]:
        assert bool(mask_BLL[row, query, key]) == (key <= query and bool(real_BL[row, key]))


@pytest.mark.parametrize("one_for_all", [True, False])
@pytest.mark.parametrize("rows", [None, 3, "chosen"])
def test_causal_attention_equals_the_plain_form_also_at_chosen_positions(rows: object, one_for_all: bool) -> None:
    module = SelfAttention(D, HEADS).double()
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    mask = causal(torch.ones(1, L, dtype=torch.bool) if one_for_all else random_mask())
    chosen = torch.tensor([[6, 0], [3, 3], [5, 1]]) if rows == "chosen" else rows
    plain = plain_attention(module, x_BLD, mask)
    plain = plain if chosen is None else take_rows(plain, chosen)
    weight, inputs = torch.randn_like(plain), (x_BLD, *module.parameters())
    assert_all_close(
        value_and_gradients(module(x_BLD, mask, chosen), weight, *inputs), value_and_gradients(plain, weight, *inputs)
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_backward_of_products_equals_that_of_plain_attention(masked: bool) -> None:
    """What a CPU takes in bfloat16, in float64."""
    query, key, value = (torch.randn(B, HEADS, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, L, L))
    mask_B11L = random_mask()[:, None, None] if masked else None
    scores = query @ key.transpose(-2, -1) / math.sqrt(6)
    plain = (scores if mask_B11L is None else scores.masked_fill(~mask_B11L, float("-inf"))).softmax(-1) @ value
    weight = torch.randn_like(plain)
    assert_all_close(
        value_and_gradients(
            attention._WithPlainBackward.apply(query, key, value, mask_B11L), weight, query, key, value
        ),
        value_and_gradients(plain, weight, query, key, value),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_fused_one(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 4, n, 32, dtype=torch.float64, generator=generator).requires_grad_() for n in (50, 60, 60)]
    mask_BL = torch.arange(60) < torch.tensor([60, 41])[:, None] if masked else None
    mask = None if mask_BL is None else mask_BL[:, None, None]
    weight = torch.randn(2, 4, 50, 32, dtype=torch.float64, generator=generator)
    fused = torch.nn.functional.scaled_dot_product_attention
    truth = value_and_gradients(fused(*exact, attn_mask=mask), weight, *exact)
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    theirs = value_and_gradients(fused(*low, attn_mask=mask), weight.bfloat16(), *low)
    out = attention.attend(*low, mask_BL, 0.0)
    assert "WithPlainBackward" in out.grad_fn.name()
    mine = value_and_gradients(out, weight.bfloat16(), *low)
    for true, their, my in zip(truth, theirs, mine, strict=True):
        assert float((my - true).norm()) <= 1.5 * float((their - true).norm())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_who_is_watched_gives_the_same_values_and_gradients(cross: bool, masked: bool, frozen: bool) -> None:
    """Under watch values are weighed the plain way; the weights can be differentiated by, also of frozen layers."""
    module = (CrossAttention(D, 10, HEADS, 0.3) if cross else SelfAttention(D, HEADS, 0.3)).double().eval()
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    memory_BSW = torch.randn(B, L, 10, dtype=torch.float64)
    mask_BL = random_mask() if masked else None
    arguments = (memory_BSW, mask_BL) if cross else (mask_BL,)
    weight, inputs = torch.randn_like(x_BLD), (x_BLD, *module.parameters())
    plain = value_and_gradients(module(x_BLD, *arguments), weight, *inputs)
    with module.watched() as seen:
        watched = value_and_gradients(module(x_BLD, *arguments), weight, *inputs)
        if frozen:
            module.requires_grad_(False)
            x_BLD = x_BLD.detach()
        output = module(x_BLD, *arguments)
    assert_all_close(watched, plain)
    assert len(seen) == 2
    assert torch.allclose(seen[1].sum(-1), torch.ones((), dtype=torch.float64))
    if masked:
        assert float(seen[1].detach()[~mask_BL[:, None, None].expand_as(seen[1])].abs().max()) == 0
    # The derivative by one weight is what its key's value gives to the output.
    [slope] = torch.autograd.grad((output * weight).sum(), seen[1])
    value = module.read(memory_BSW).value_BHSE if cross else module.qkv(x_BLD)[..., 2 * D :].unflatten(-1, (HEADS, -1))
    value_BHLE = value if cross else value.transpose(1, 2)
    through_BHQE = (weight @ module.out.weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert torch.allclose(slope, through_BHQE @ value_BHLE.transpose(-2, -1), atol=1e-12)
    module.requires_grad_(True)
    again = module(x_BLD, *arguments)
    assert len(seen) == 2, "nobody watches any more"
    assert torch.allclose(again, plain[0], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_parts", [2, 3])
def test_parts_of_a_projection_have_their_gradients_side_by_side(num_parts: int, dtype: torch.dtype) -> None:
    together = torch.randn(B, L, num_parts * D, dtype=dtype, requires_grad=True)
    split = together.view(B, L, num_parts, HEADS, D // HEADS)
    arrived: list[Tensor] = []
    split.register_hook(arrived.append)
    parts, plain = attention._parts(split), split.permute(2, 0, 3, 1, 4)
    assert all(torch.equal(part, expected) for part, expected in zip(parts, plain, strict=True))
    grads = [torch.randn_like(part) for part in parts]
    [mine] = torch.autograd.grad(parts, together, grads)
    assert arrived.pop().is_contiguous(), "the projection would copy it once more"
    [expected] = torch.autograd.grad(plain.unbind(0), together, grads)
    assert torch.equal(mine, expected)


def test_masked_positions_change_nothing() -> None:
    module, mask_BL = SelfAttention(D, HEADS).double(), random_mask()
    x_BLD = torch.randn(B, L, D, dtype=torch.float64)
    changed_BLD = torch.where(mask_BL[:, :, None], x_BLD, 100 * torch.randn_like(x_BLD))
    assert torch.equal(module(x_BLD, mask_BL)[mask_BL], module(changed_BLD, mask_BL)[mask_BL])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 3, L, torch.tensor([[0, 6], [1, 0], [4, 2]]), torch.tensor([[5], [5], [0]])])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_encoder_at_some_rows_equals_the_same_rows_of_the_whole(
    num_layers: int, rows: Tensor | int, masked: bool
) -> None:
    encoder = PreNormEncoder(D, num_layers, HEADS, 2 * D, 1e-12).double()
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    mask_BL = random_mask() if masked else None
    whole = take_rows(encoder(x_BLD, mask_BL), rows)
    weight, inputs = torch.randn_like(whole), (x_BLD, *encoder.parameters())
    assert_all_close(
        value_and_gradients(encoder(x_BLD, mask_BL, rows), weight, *inputs),
        value_and_gradients(whole, weight, *inputs),
    )


def test_a_repeated_row_adds_its_gradient_twice() -> None:
    x_BLD = torch.randn(1, L, D, dtype=torch.float64, requires_grad=True)
    take_rows(x_BLD, torch.tensor([[2, 2, 5]])).sum().backward()
    assert x_BLD.grad is not None
    assert x_BLD.grad[0, :, 0].tolist() == [0, 0, 2, 0, 0, 1, 0]


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=6))
def test_padded_index_lists_the_true_positions_in_order_and_then_others(mask: list[list[bool]]) -> None:
    mask_BL = torch.tensor(mask, dtype=torch.bool).view(len(mask), 5)
    index_BQ = padded_index(mask_BL)
    assert index_BQ.shape == (len(mask), max([1, *(sum(row) for row in mask)]))
    for row, index in zip(mask, index_BQ.tolist(), strict=True):
        wanted = [place for place, needed in enumerate(row) if needed]
        assert index[: len(wanted)] == wanted
        assert len(set(index)) == len(index)  # the filling is other positions, never one twice


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("others", [None, [2, 2, 0, 1], []])
@pytest.mark.parametrize("length", [1, 5])
def test_a_memory_read_by_several_equals_each_reading_it_alone(
    times: int, others: list[int] | None, length: int
) -> None:
    module = CrossAttention(D, 10, HEADS).double()
    memory_BSW = torch.randn(B, 6, 10, dtype=torch.float64, requires_grad=True)
    rows = list(range(B)) * times + (others or [])
    x_RQD = torch.randn(len(rows), length, D, dtype=torch.float64, requires_grad=True)
    read = module.read(memory_BSW)
    several = replace(read, times=times, others_O=None if others is None else torch.tensor(others, dtype=torch.int64))
    alone = torch.cat([module(x_RQD[n : n + 1], memory_BSW[row : row + 1]) for n, row in enumerate(rows)])
    weight, inputs = torch.randn_like(alone), (x_RQD, memory_BSW, *module.parameters())
    assert_all_close(
        value_and_gradients(module(x_RQD, several), weight, *inputs), value_and_gradients(alone, weight, *inputs)
    )


def test_post_norm_blocks_that_read_keys_and_values_equal_those_that_read_the_memory() -> None:
    encoder = PostNormEncoder(D, 3, HEADS, 2 * D, 1e-12, memory_width=10).double()
    x_BLD = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    memory_BSW = torch.randn(B, 6, 10, dtype=torch.float64, requires_grad=True)
    memory_mask = torch.arange(6) < torch.tensor([6, 2, 5])[:, None]
    plain = encoder(x_BLD, random_mask(), 2, memory_BSW, memory_mask)
    weight, inputs = torch.randn_like(plain), (x_BLD, memory_BSW, *encoder.parameters())
    assert_all_close(
        value_and_gradients(encoder(x_BLD, random_mask(), 2, encoder.read(memory_BSW), memory_mask), weight, *inputs),
        value_and_gradients(plain, weight, *inputs),
    )
