"""One attention function for every model.

B batch, H heads, Q query positions, L key positions, D width, E width of a head, S memory positions, W their
width; R rows that read B memories, O of them in an order of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.layers.packing import Packing


def attend(query_BHQE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V (Vaswani et al. 2017, Eq. 1).

    mask: bool, True = may be attended: [B, L] by every query, or [B, Q, L] by each; a B of 1 stands for all.
    """
    mask_B1QL = None if mask is None else mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    if (
        query_BHQE.device.type == "cpu"
        and query_BHQE.dtype == torch.bfloat16
        and not dropout
        and torch.is_grad_enabled()
    ):
        out: Tensor = _WithPlainBackward.apply(query_BHQE, key_BHLE, value_BHLE, mask_B1QL)
        return out
    return F.scaled_dot_product_attention(query_BHQE, key_BHLE, value_BHLE, attn_mask=mask_B1QL, dropout_p=dropout)


def attention_weights(query_BHQE: Tensor, key_BHLE: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask), the plain way, [B, H, Q, L]: what `attend` weighs the values with and never
    holds. float32 at least. mask: as there."""
    scores_BHQL = query_BHQE @ key_BHLE.transpose(-2, -1) * query_BHQE.shape[-1] ** -0.5
    if mask is not None:
        mask_B1QL = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        scores_BHQL = scores_BHQL.masked_fill(~mask_B1QL, float("-inf"))
    return scores_BHQL.softmax(-1, dtype=torch.promote_types(scores_BHQL.dtype, torch.float32))


class Attention(nn.Module):
    """What self- and cross-attention share: how they attend, and whether somebody watches."""

    dropout: float
    _seen: list[Tensor] | None = None  # where the weights of each call are kept while somebody watches

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Within it values are weighed the plain way, without dropout, and the weights [B, H, Q, L] of each call are
        kept in the list: with a gradient recorded they are part of its graph, so that whatever comes after can be
        differentiated by them (Grad-CAM)."""
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def attend(self, query_BHQE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor, mask: Tensor | None) -> Tensor:
        if self._seen is None:
            return attend(query_BHQE, key_BHLE, value_BHLE, mask, self.dropout if self.training else 0.0)
        weights_BHQL = attention_weights(query_BHQE, key_BHLE, mask)
        if torch.is_grad_enabled() and not weights_BHQL.requires_grad:  # of frozen layers
            weights_BHQL.requires_grad_()
        self._seen.append(weights_BHQL)
        return weights_BHQL.to(value_BHLE.dtype) @ value_BHLE


class _WithPlainBackward(torch.autograd.Function):
    """The fused attention, with a backward pass made of whole matrix products.

    On a CPU in bfloat16 the fused backward is slow: with AMX, 12 heads and 215 positions take 40 ms where the products
    take 14, and 17 positions of 4 heads ten times as long. Nothing but queries, keys and values is kept, as there.
    """

    @staticmethod
    def forward(ctx: Any, query_BHQE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor, mask_B1QL: Tensor | None) -> Tensor:
        ctx.save_for_backward(query_BHQE, key_BHLE, value_BHLE, mask_B1QL)
        return F.scaled_dot_product_attention(query_BHQE, key_BHLE, value_BHLE, attn_mask=mask_B1QL)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BHQE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_BHQE, key_BHLE, value_BHLE, mask_B1QL = ctx.saved_tensors
        scaled_BHQE = query_BHQE * query_BHQE.shape[-1] ** -0.5
        key_BHLE, value_BHLE, grad_BHQE = key_BHLE.contiguous(), value_BHLE.contiguous(), grad_BHQE.contiguous()
        scores_BHQL = scaled_BHQE @ key_BHLE.transpose(-2, -1)
        if mask_B1QL is not None:
            scores_BHQL.masked_fill_(~mask_B1QL, float("-inf"))
        share_BHQL = scores_BHQL.softmax(-1)
        grad_value_BHLE = share_BHQL.transpose(-2, -1) @ grad_BHQE
        grad_share_BHQL = grad_BHQE @ value_BHLE.transpose(-2, -1)
        grad_scores_BHQL = torch.ops.aten._softmax_backward_data(grad_share_BHQL, share_BHQL, -1, share_BHQL.dtype)
        grad_query_BHQE = (grad_scores_BHQL @ key_BHLE).mul_(query_BHQE.shape[-1] ** -0.5)
        grad_key_BHLE = grad_scores_BHQL.transpose(-2, -1) @ scaled_BHQE
        return grad_query_BHQE, grad_key_BHLE, grad_value_BHLE, None


KeyValue = tuple[Tensor, Tensor]  # [B, H, L, E] each


class SelfAttention(Attention):
    """Multi-head self-attention with one fused projection for queries, keys and values (in that order)."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not a multiple of {num_heads} heads"
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask: Tensor | Packing | None = None, rows: Tensor | int | None = None) -> Tensor:
        """Attention output at every position, or only at the query positions `rows`.

        Args:
            mask: bool, True = may be attended: [B, L], or [B or 1, L, L] where each position sees others (`causal`). A
                Packing: x and the result are packed, [N, D].
            rows: None; an int n, the first n positions; or int64 [B, Q], the positions of each sample. Keys and
                values come from all positions, so the result is exact.
        """
        D = x_BLD.shape[-1]
        H, E = self.num_heads, D // self.num_heads  # spelled out: an empty batch leaves -1 ambiguous
        if isinstance(mask, Packing):
            assert rows is None, "rows are counted in what is padded"
            together_BLX = mask.unpack(self.qkv(x_BLD))
            query, key, value = _parts(together_BLX.unflatten(2, (3, H, E)))
            attended = self.attend(query, key, value, mask.mask_BL)
            return self.out(mask.pack(attended.transpose(1, 2).flatten(2)))
        B, L, _ = x_BLD.shape
        if rows is None:
            query, key, value = _parts(self.qkv(x_BLD).view(B, L, 3, H, E))
        else:
            weight_q, weight_kv = self.qkv.weight.split([D, 2 * D])
            bias_q, bias_kv = self.qkv.bias.split([D, 2 * D])
            query = F.linear(take_rows(x_BLD, rows), weight_q, bias_q)
            query = query.view(B, query.shape[1], H, E).transpose(1, 2)
            key, value = _parts(F.linear(x_BLD, weight_kv, bias_kv).view(B, L, 2, H, E))
            if mask is not None and mask.ndim == 3:
                mask = take_rows(mask.expand(B, -1, -1), rows)
        attended = self.attend(query, key, value, mask)
        return self.out(attended.transpose(1, 2).flatten(2))

    def after(self, x_BQD: Tensor, before: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Causal attention of positions that come after others, whose keys and values were kept.

        Args:
            before: of the L positions in front, [B, H, L, E] each; None: there are none.

        Returns:
            the output [B, Q, D], and keys and values of all L + Q positions.
        """
        B, Q, D = x_BQD.shape
        H, E = self.num_heads, D // self.num_heads
        query, key, value = _parts(self.qkv(x_BQD).view(B, Q, 3, H, E))
        if before is not None:
            key, value = (torch.cat([old, new], dim=2) for old, new in zip(before, (key, value), strict=True))
        L = key.shape[2]
        mask = None if Q == 1 else torch.ones(1, Q, L, dtype=torch.bool, device=x_BQD.device).tril(L - Q)
        attended = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2)), (key, value)

    def maps(self, x_BLD: Tensor) -> Tensor:
        """What `forward` weighs the values with, [B, H, L, L], for whoever wants to look at it."""
        B, L, D = x_BLD.shape
        H, E = self.num_heads, D // self.num_heads
        query, key, _ = _parts(self.qkv(x_BLD).view(B, L, 3, H, E))
        return attention_weights(query, key)


@dataclass(frozen=True)
class Memory:
    """Keys and values that cross-attention reads, computed once for all the sequences that read them.

    The sequences, [R, Q, D], are `times` batches of B, of which each reads the B memories in order, and then one that
    reads the memories of the rows `others_O` (R = times * B + O).
    """

    key_BHSE: Tensor
    value_BHSE: Tensor
    times: int = 1
    others_O: Tensor | None = None  # int64


class CrossAttention(Attention):
    """Multi-head attention whose keys and values (one fused projection, in that order) come from a memory."""

    entered_apart = True  # `read` is called outside of the forward of the block that holds it (train/sharding.py)

    def __init__(self, width: int, memory_width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not a multiple of {num_heads} heads"
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(memory_width, 2 * width)
        self.out = nn.Linear(width, width)

    def read(self, memory_BSW: Tensor) -> Memory:
        """Its keys and values."""
        B, S, _ = memory_BSW.shape
        H = self.num_heads
        E = self.query.out_features // H
        key, value = _parts(self.key_value(memory_BSW).view(B, S, 2, H, E))
        return Memory(key, value)

    def forward(
        self, x_RQD: Tensor, memory: Tensor | Memory, mask: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """[R, Q, D].

        Args:
            memory: [B, S, W], then R is B; or what `read` made of it.
            mask: bool [B, S], True = may be attended, or [B, Q, S] where each memory is read once. None where memories
                are read in an order of their own.
            packing: x and the result are packed, [N, D].
        """
        if isinstance(memory, Tensor):
            memory = self.read(memory)
        query = self.query(x_RQD) if packing is None else packing.unpack(self.query(x_RQD))
        R, Q, D = query.shape
        query = query.view(R, Q, self.num_heads, D // self.num_heads).transpose(1, 2)
        if memory.times == 1 and memory.others_O is None:
            attended = self.attend(query, memory.key_BHSE, memory.value_BHSE, mask)
        else:
            assert mask is None or (mask.ndim == 2 and memory.others_O is None), "no mask of such a reading is built"
            assert self._seen is None, "whoever watches sees one reader at a time"
            attended = _attend_several(query, memory, mask, self.dropout if self.training else 0.0)
        attended = attended.transpose(1, 2).flatten(2)
        return self.out(attended if packing is None else packing.pack(attended))


def _attend_several(query_RHQE: Tensor, memory: Memory, mask_BS: Tensor | None, dropout: float) -> Tensor:
    """Whoever reads a memory asks it at once: its keys and values are gone through once, and never copied but for
    `others_O`."""
    key, value, times = memory.key_BHSE, memory.value_BHSE, memory.times
    B, Q = len(key), query_RHQE.shape[2]
    asked = query_RHQE[: times * B].unflatten(0, (times, B)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    answered = attend(asked, key, value, mask_BS, dropout)
    attended = answered.unflatten(2, (times, Q)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    if memory.others_O is None:
        return attended
    key, value = (part.index_select(0, memory.others_O) for part in (key, value))
    return torch.cat([attended, attend(query_RHQE[times * B :], key, value, None, dropout)])


def _parts(together: Tensor) -> tuple[Tensor, ...]:
    """[B, L, n, H, E] of a projection -> n of [B, H, L, E]. Taken apart at the axis where they lie, so that the
    backward pass writes the gradients side by side, as the projection wants them, and copies them once, not twice."""
    return tuple(part.transpose(1, 2) for part in together.unbind(2))


def causal(mask_BT: Tensor) -> Tensor:
    """[B, T, T]: each position sees the real tokens up to itself. mask_BT: bool, True = a real token."""
    T = mask_BT.shape[1]
    return mask_BT[:, None] & torch.ones(T, T, dtype=torch.bool, device=mask_BT.device).tril()


def take_rows(x_BLD: Tensor, rows: Tensor | int) -> Tensor:
    """The first n positions (int), or those of an int64 index [B, Q]."""
    if isinstance(rows, int):
        return x_BLD[:, :rows]
    return x_BLD.gather(1, rows[:, :, None].expand(-1, -1, x_BLD.shape[2]))


def padded_index(mask_BL: Tensor) -> Tensor:
    """Positions where a mask is True as a padded int64 index [B, Q], Q the largest number in any row (at least 1).

    The padding repeats whatever positions come next: compute them, then ignore them. Call it on CPU: Q is read.
    """
    num_rows = max([1, *mask_BL.sum(1).tolist()])
    return torch.argsort(mask_BL.to(torch.uint8), dim=1, descending=True, stable=True)[:, :num_rows]
