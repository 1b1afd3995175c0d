"""The pre-norm and the post-norm transformer block, and a stack of each.

B batch, L positions, Q query positions, D width, M width of the feed-forward's inside, S positions of a memory that
cross-attention reads, W their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.layers.activations import ACTIVATIONS
from trivium.layers.attention import CrossAttention, KeyValue, Memory, SelfAttention, take_rows
from trivium.layers.packing import Packing

# From this width on the backward pass computes the activation again instead of keeping its output, a quarter of what a
# block keeps: about 2 % of the time at width 768, but 5 % at 128, where there is memory to spare.
RECOMPUTE_FROM = 512


class PreNormBlock(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)). activation: a name in `layers.activations`."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        eps: float,
        dropout: float = 0.0,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.attention_norm = nn.LayerNorm(width, eps)
        self.attention = SelfAttention(width, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, mask: Tensor | Packing | None = None, rows: Tensor | int | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D], or [B, Q, D] at the positions `rows` alone (see SelfAttention)."""
        attended = self.attention(self.attention_norm(x_BLD), mask, rows)
        x_BQD = (x_BLD if rows is None else take_rows(x_BLD, rows)) + self.dropout(attended)
        hidden_BQM = self.mlp_in(self.mlp_norm(x_BQD))
        return x_BQD + self.dropout(activation_then(hidden_BQM, self.mlp_out, self.activation))


class PostNormBlock(nn.Module):
    """BERT's block: LN(x + Attention(x)), then LN(x + MLP(x)), with exact (erf) GELU.

    With `memory_width` there is LN(x + CrossAttention(x, memory)) between the two (ALBEF, section 3.1).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        eps: float,
        dropout: float = 0.0,
        memory_width: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.cross_attention = None
        if memory_width is not None:
            self.cross_attention = CrossAttention(width, memory_width, num_heads, dropout)
            self.cross_attention_norm = nn.LayerNorm(width, eps)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)
        self.mlp_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | Packing | None = None,
        rows: Tensor | int | None = None,
        memory: Tensor | Memory | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D], or [B, Q, D] at the positions `rows` alone (see SelfAttention).

        Args:
            memory: what cross-attention reads, [B, S, W] or its keys and values; None passes it over.
            memory_mask: bool [B, S], True = may be attended.
        """
        attended = self.attention(x_BLD, mask, rows)
        packing = mask if isinstance(mask, Packing) else None
        return self._rest(x_BLD if rows is None else take_rows(x_BLD, rows), attended, memory, memory_mask, packing)

    def after(
        self, x_BQD: Tensor, before: KeyValue | None, memory: Tensor | Memory | None, memory_mask: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        """[B, Q, D] of positions that come after others and see them (see SelfAttention), and what is kept of all."""
        attended, kept = self.attention.after(x_BQD, before)
        return self._rest(x_BQD, attended, memory, memory_mask), kept

    def _rest(
        self,
        x_BQD: Tensor,
        attended: Tensor,
        memory: Tensor | Memory | None,
        memory_mask: Tensor | None,
        packing: Packing | None = None,
    ) -> Tensor:
        x_BQD = self.attention_norm(x_BQD + self.dropout(attended))
        if memory is not None:
            assert self.cross_attention is not None, "this block has no cross-attention to read a memory with"
            read = self.cross_attention(x_BQD, memory, memory_mask, packing)
            x_BQD = self.cross_attention_norm(x_BQD + self.dropout(read))
        return self.mlp_norm(x_BQD + self.dropout(activation_then(self.mlp_in(x_BQD), self.mlp_out, "gelu")))


def activation_then(hidden: Tensor, linear: nn.Linear, activation: str) -> Tensor:
    """linear(activation(hidden)), where it is worth it without keeping the activation for the backward pass. A compiler
    finds by itself what is cheaper to compute again."""
    if linear.out_features < RECOMPUTE_FROM or torch.compiler.is_compiling():
        return linear(ACTIVATIONS[activation].forward(hidden))
    out: Tensor = _ActivationThenLinear.apply(hidden, linear.weight, linear.bias, activation)
    return out


class _ActivationThenLinear(torch.autograd.Function):
    """Linear(activation(x)) that keeps x alone. Autograd would keep the activation too, as the linear map's input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.activation = activation
        # Detached: autocast keeps its low copy of a weight that wants a gradient, and this one would be without a
        # graph; whoever used the same weight next would get it, and no gradient.
        return F.linear(ACTIVATIONS[activation].forward(hidden), weight.detach(), bias.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        activation = ACTIVATIONS[ctx.activation]
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_RD = grad.flatten(0, -2)
        grad_hidden = grad_weight = grad_bias = None
        if wants_hidden:  # under autocast the gradient has the low precision that the product was taken in
            grad_hidden = activation.backward(grad @ weight.to(grad.dtype), hidden)
        if wants_weight:
            grad_DR = grad_RD.t()
            if grad.device.type == "cpu" and grad.dtype == torch.bfloat16:
                # The product reads it faster so: 3072 -> 768 over 1576 rows takes 11 ms instead of 17.
                grad_DR = grad_DR.contiguous()
            grad_weight = (grad_DR @ activation.forward(hidden).flatten(0, -2)).to(weight.dtype)
        if wants_bias:
            grad_bias = grad_RD.sum(0).to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None


def through(
    blocks: nn.ModuleList,
    x_BLD: Tensor,
    mask: Tensor | None,
    rows: Tensor | int | None,
    pads: bool = True,
    beside: Sequence[tuple[Any, ...]] | None = None,
) -> Tensor:
    """A stack of blocks, of which the last computes `rows` alone.

    Args:
        pads: somebody reads what becomes of pads. Where nobody does they are left out if it is worth it
            (`layers.packing`), and what comes out in their place has no meaning.
        beside: what each block is given beside its input and mask.
    """
    x, packing = x_BLD, None if pads else Packing.of(mask)  # x: [B, L, D], or packed [N, D]
    if packing is not None:
        assert packing.mask_BL.shape == x_BLD.shape[:2], "a mask for all samples at once tells no pads apart"
        x = packing.pack(x_BLD)
    for number, (block, given) in enumerate(zip(blocks, beside or [()] * len(blocks), strict=True), start=1):
        if rows is not None and number == len(blocks):  # rows are counted in what is padded
            return block(x if packing is None else packing.unpack(x), mask, rows, *given)
        x = block(x, packing or mask, None, *given)
    return x if packing is None else packing.unpack(x)


class PreNormEncoder(nn.Module):
    """A stack of pre-norm blocks. The final norm belongs to the caller: some want the states before it."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        eps: float,
        dropout: float = 0.0,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PreNormBlock(width, num_heads, mlp_width, eps, dropout, activation) for _ in range(num_layers)
        )

    def forward(
        self, x_BLD: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None, pads: bool = True
    ) -> Tensor:
        """`rows`: the last block computes these positions alone; exact, since its keys still come from all. pads: see
        `through`."""
        return through(self.blocks, x_BLD, mask, rows, pads)

    def both(self, x_BLD: Tensor, mask_BL: Tensor | None, first: int, pads: bool = True) -> tuple[Tensor, Tensor]:
        """Two batches in one pass: the class tokens of the `first` samples, [first, 1, D], and the rest, whole.
        pads: see `through`."""
        x_BLD = through(self.blocks[:-1], x_BLD, mask_BL, None, pads)
        masks = (None, None) if mask_BL is None else (mask_BL[:first], mask_BL[first:])
        return self.blocks[-1](x_BLD[:first], masks[0], 1), self.blocks[-1](x_BLD[first:], masks[1])


class PostNormEncoder(nn.Module):
    """A stack of post-norm blocks. `memory_width`: each of them has cross-attention."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        eps: float,
        dropout: float = 0.0,
        memory_width: int | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PostNormBlock(width, num_heads, mlp_width, eps, dropout, memory_width) for _ in range(num_layers)
        )

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None = None,
        rows: Tensor | int | None = None,
        memory: Tensor | Sequence[Memory] | None = None,
        memory_mask: Tensor | None = None,
        pads: bool = True,
    ) -> Tensor:
        """`rows`: the last block computes these positions alone; exact, since its keys still come from all. pads: see
        `through`.

        memory: what cross-attention reads, [B, S, W] or for each block its keys and values (`read`).
        """
        memories: Sequence[Any] = [memory] * len(self.blocks) if isinstance(memory, Tensor | None) else memory
        beside = [(each, memory_mask) for each in memories]
        return through(self.blocks, x_BLD, mask, rows, pads, beside)

    def read(self, memory_BSW: Tensor) -> list[Memory]:
        """What each block reads of a memory, for `forward`: computed once, read as often as wanted."""
        blocks: Iterable[Any] = self.blocks
        return [block.cross_attention.read(memory_BSW) for block in blocks]
