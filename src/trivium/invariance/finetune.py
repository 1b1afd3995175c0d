"""A tiny BERT of random weights with a head for one task, and a generated batch of labelled texts.

B rows of a batch, T text tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.methods.finetune import FineTuning
from trivium.methods.flava import Pixels
from trivium.models.bert import Bert, BertConfig
from trivium.models.finetuned import FineTuned, Gives, HeadConfig, Reads
from trivium.train.protocol import Batch, Texts

TINY = BertConfig(width=32, num_heads=4, mlp_width=48, num_layers=3, vocab_size=61, max_length=16, dropout=0.0)
ROWS = 16  # of the global batch
TASK = "a task"


def case(dtype: torch.dtype, dropout: float) -> tuple[FineTuning, Batch]:
    """As `trivium.invariance` takes it."""
    model = random_bert(replace(TINY, dropout=dropout), dtype)
    return fine_tuned(model, "text", "class", 3, TINY.width, dropout=dropout).to(dtype), text_batch(ROWS)


def random_bert(config: BertConfig = TINY, dtype: torch.dtype = torch.float64, std: float = 0.05) -> Bert:
    """Every tensor drawn: nothing is zero or one by luck."""
    model = Bert(config).to(dtype)
    _draw(model, std)
    with torch.no_grad():
        model.embeddings.word.weight[config.pad_id] = 0.0
    return model


def fine_tuned(model: Any, reads: Reads, gives: Gives, num_outputs: int, width: int, **changes: Any) -> FineTuning:
    """A model with a head that is drawn whole; in float64. Mean 1/2 and deviation 1/4 are exact in every precision."""
    config = HeadConfig(TASK, reads, gives, width, num_outputs, width, **{"dropout": 0.0} | changes)
    head = config.build()
    _draw(head, 0.05)
    return FineTuning(FineTuned(model, head, config), Pixels((0.5,) * 3, (0.25,) * 3)).double()


def _draw(module: nn.Module, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))


def text_batch(rows: int, gives: Gives = "class", num_outputs: int = 3, length: int = 9) -> Batch:
    """Texts of different lengths with random labels, values or answers."""
    draw = torch.Generator().manual_seed(1)
    mask_BT = torch.arange(length) < torch.randint(3, length + 1, (rows, 1), generator=draw)
    mask_BT[0] = True
    ids_BT = torch.randint(5, TINY.vocab_size, (rows, length), generator=draw).where(mask_BT, TINY.pad_id)
    segments_BT = torch.randint(0, 2, (rows, length), generator=draw)
    row_B = torch.arange(rows)
    targets: dict[Gives, dict[str, Tensor]] = {
        "class": {"label": torch.randint(0, num_outputs, (rows,), generator=draw)},
        "number": {"value": torch.randn(rows, generator=draw)},
        "answers": {"answers": torch.rand(rows, num_outputs, generator=draw)},
    }
    return Batch(TASK, row_B, row_B, (), (Texts(ids_BT, mask_BT, row_B, segments_BT),), targets[gives])
