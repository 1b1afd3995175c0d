"""Small heads that several families share. D width, V classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# So few rows are decoded in float32 on a CPU: there the cast of a vocabulary's matrix takes longer than its product.
FEW_ROWS = 64


def decode(rows: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """[..., D] -> [..., V] by a large matrix; under autocast on a CPU few rows are taken in the weight's precision, and
    neither a copy of the matrix nor one of its gradient is made."""
    if rows.device.type == "cpu" and rows.shape[:-1].numel() <= FEW_ROWS:
        with torch.autocast("cpu", enabled=False):
            return F.linear(rows.to(weight_VD.dtype), weight_VD, bias_V)
    return F.linear(rows, weight_VD, bias_V)


class MaskedHead(nn.Module):
    """Linear, GELU, LayerNorm, Linear to V classes: BERT's prediction head. Rows in, rows out: [..., D] -> [..., V]."""

    def __init__(self, width: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.decoder = nn.Linear(width, num_classes)

    def forward(self, rows: Tensor) -> Tensor:
        return decode(self.norm(F.gelu(self.transform(rows))), self.decoder.weight, self.decoder.bias)


class TiedMaskedHead(nn.Module):
    """The same with the word embeddings for the last matrix: given at each call, so that no tensor is held twice."""

    def __init__(self, width: int, num_classes: int, eps: float) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, rows: Tensor, word_VD: Tensor) -> Tensor:
        return decode(self.norm(F.gelu(self.transform(rows))), word_VD, self.bias)


class MatchingHead(nn.Module):
    """Linear, tanh, Linear to two classes: 1 = the picture and the text belong together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.decoder = nn.Linear(width, 2)

    def forward(self, class_BD: Tensor) -> Tensor:
        return self.decoder(self.transform(class_BD).tanh())


class TaskHead(nn.Module):
    """Dropout, Linear, tanh, GELU or ReLU, dropout, Linear to K outputs: with tanh RoBERTa's head for one task (Liu et
    al. 2019), with ReLU and no dropout ALBEF's.

    `hidden` None leaves a dropout and one linear map. [B, D] -> [B, K].
    """

    def __init__(
        self, width: int, hidden: int | None, num_outputs: int, activation: str = "tanh", dropout: float = 0.1
    ) -> None:
        super().__init__()
        activations: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu, "relu": F.relu}
        self.activation = activations[activation]
        self.dropout = nn.Dropout(dropout)
        self.inner = None if hidden is None else nn.Linear(width, hidden)
        self.decoder = nn.Linear(hidden or width, num_outputs)

    def forward(self, rows_BD: Tensor) -> Tensor:
        rows_BD = self.dropout(rows_BD)
        if self.inner is not None:
            rows_BD = self.dropout(self.activation(self.inner(rows_BD)))
        return self.decoder(rows_BD)
