"""Heads that know from the start how often each answer is asked for.

A head whose bias is the logarithm of the labels' frequencies begins at the loss of a guess from frequencies alone;
without it, a short run spends its first hundreds of steps on learning just that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.data.loader import StreamReader
from trivium.methods.flava import FlavaMethod
from trivium.train import distributed
from trivium.train.protocol import Stream

BATCHES = 16  # of each stream that frequencies are taken from


@torch.no_grad()
def start_at_frequencies(method: FlavaMethod, streams: Sequence[Stream], special_ids: Sequence[int], seed: int) -> None:
    """Set the biases of the masked heads and of the matching head from the first places of each stream.

    Words are counted at every position that a mask could take, codes at every patch. Each answer counts once more than
    it was seen, so that none is impossible. The first process counts for all.
    """
    model = method.model
    heads = (model.mim_head, model.mlm_head, model.mmm_image_head, model.mmm_text_head, model.itm_head)
    biases: list[Tensor] = [head.decoder.bias for head in heads]

    def count() -> list[Tensor]:
        for stream in streams:
            _count(method, stream, special_ids, seed)
        return biases

    for bias, counted in zip(biases, distributed.from_first(count), strict=True):
        bias.copy_(counted)


def _count(method: FlavaMethod, stream: Stream, special_ids: Sequence[int], seed: int) -> None:
    model, reader = method.model, StreamReader(stream, seed)
    batches = [reader.micro_batch(number * stream.batch, 0) for number in range(BATCHES)]
    pairs = bool(batches[0].images) and bool(batches[0].texts)
    if batches[0].images:
        codes = torch.cat([method.codes(batch, torch.arange(len(batch))).flatten() for batch in batches])
        _set((model.mmm_image_head if pairs else model.mim_head).decoder.bias, codes)
    if batches[0].texts:
        words = torch.cat([text.ids_BT[text.mask_BT] for batch in batches for text in batch.texts])
        words = words[~torch.isin(words, torch.tensor(special_ids))]
        _set((model.mmm_text_head if pairs else model.mlm_head).decoder.bias, words)
    if pairs:
        _set(model.itm_head.decoder.bias, torch.cat([batch.targets["matched"] for batch in batches]).long())


def _set(bias: Tensor, labels: Tensor) -> None:
    counts = torch.bincount(labels.cpu(), minlength=len(bias)).to(bias) + 1
    bias.copy_((counts / counts.sum()).log())
