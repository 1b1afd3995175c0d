"""What a loss would be for a model that learned nothing but how often each label occurs.

A loss alone says little: 6.2 is nothing learned with 512 codes that are equally frequent, and worse than nothing where
one code covers half of the patches. So each loss stands beside its *chance*: the smaller of ln(number of classes) and
the entropy of the label frequencies on the same samples. B samples, N patches, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.objectives.contrastive import contrastive_chance


def entropy(labels: Tensor) -> float:
    """Entropy in nats of the frequencies of int64 labels of any shape; 0 for no labels."""
    counts = torch.unique(labels, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log()).sum())


def binary_entropy(share: float) -> float:
    """Entropy in nats of a label that is true with this probability."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


def chance(labels: Tensor, num_classes: int) -> float:
    """The smaller of ln(num_classes) and the entropy of the labels' frequencies."""
    return min(math.log(num_classes), entropy(labels))


def chances(
    masked_labels: Mapping[str, Tensor],
    num_classes: Mapping[str, int],
    false_share: float,
    contrastive_batch: float,
    sigmoid: bool = False,
) -> dict[str, float]:
    """Chance of the losses that are given.

    Args:
        masked_labels: of "mim", "mlm", "mmm_image", "mmm_text": what stands at the masked positions (see labels_of).
        num_classes: of the same names: codes of the image tokenizer, words of the vocabulary.
        false_share: the recipe's own share of false pairs.
        contrastive_batch: rows of one evaluated batch (their geometric mean, where batches differ); a model that
            knows nothing gives each the same score.
        sigmoid: the contrastive loss asks of every column whether it is the answer, as one in contrastive_batch is.
    """
    masked = {name: chance(labels, num_classes[name]) for name, labels in masked_labels.items()}
    return masked | {
        "itm": binary_entropy(false_share),
        "contrastive": contrastive_chance(contrastive_batch, sigmoid),
    }


def labels_of(batches: Iterable[Any], codes_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """What the masked objectives of FLAVA are asked for on these batches: name -> int64 [masked positions].

    Args:
        batches: training batches: `.images`, `.texts` (ids_BT) and `.targets` with image_mask [B, N],
            selected [B, T] and, for pairs, matched [B]. False pairs are left out, as in the loss.
        codes_of: a batch -> its image codes, int64 [B, N].
    """
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        targets = batch.targets
        pairs = bool(batch.images) and bool(batch.texts)
        matched_B1 = targets["matched"][:, None] if pairs else torch.ones(1, 1, dtype=torch.bool)
        if batch.images:
            name = "mmm_image" if pairs else "mim"
            found.setdefault(name, []).append(codes_of(batch)[targets["image_mask"] & matched_B1])
        if batch.texts:
            name = "mmm_text" if pairs else "mlm"
            found.setdefault(name, []).append(batch.texts[0].ids_BT[targets["selected"] & matched_B1])
    return {name: torch.cat(labels) for name, labels in found.items()}
