"""What one fine-tuning step does with a batch: a trained model and a head for one task, one loss.

B rows, K outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trivium.methods.flava import Pixels
from trivium.models.finetuned import FineTuned
from trivium.objectives.tasks import number, right_class, soft_answers
from trivium.train.protocol import Batch, Key, Method, Rows, Sums

OBJECTIVES = {  # by what the head gives: the target that it needs, and the loss
    "class": ("label", right_class),
    "number": ("value", number),
    "answers": ("answers", soft_answers),
}


class FineTuning(Method):
    """One task. No sample is coupled with another."""

    model: FineTuned
    mean: Tensor
    std: Tensor

    def __init__(self, model: FineTuned, pixels: Pixels) -> None:
        super().__init__()
        self.model = model
        self.target, self.objective = OBJECTIVES[model.config.gives]
        self.weights = {model.config.task: 1.0}
        self.register_buffer("mean", torch.tensor(pixels.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).view(1, 3, 1, 1) * 255, persistent=False)

    def counts(self, batch: Batch) -> Sums:
        return {self.model.config.task: torch.tensor(len(batch))}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        outputs_BK = self.outputs(batch)
        target = self._to(batch.targets[self.target])
        sums = {self.model.config.task: self.objective(outputs_BK, target)}
        if self.target == "label":
            sums["stat/correct"] = (outputs_BK.detach().argmax(-1) == target).sum().double()
        return sums

    def outputs(self, batch: Batch) -> Tensor:
        """Logits or numbers [B, K], as the loss takes them."""
        pixels_BCHW = ids_BT = mask_BT = segments_BT = None
        if batch.images:
            pixels_BCHW = (self._to(batch.images[0].pixels_BCHW) - self.mean) / self.std
        if batch.texts:
            text = batch.texts[0]
            ids_BT = self._to(text.ids_BT)
            # Attention without a mask is the faster one.
            mask_BT = None if bool(text.mask_BT.all()) else self._to(text.mask_BT)
            segments_BT = None if text.segments_BT is None else self._to(text.segments_BT)
        outputs: Tensor = self.model(pixels_BCHW, ids_BT, mask_BT, segments_BT)
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.mean.device, non_blocking=True)
