"""What one CLIP training step does with a batch of pairs (Radford et al. 2021, figure 3): both towers, one loss.

A pair whose caption was rotated onto another picture has no right answer: its rows stay as columns of the others, and
give no loss of their own. CLIP's recipe has no such pairs; data that has them is not a mistake.

B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trivium.methods.pixels import MethodOfPictures, Pixels
from trivium.models.clip import MAX_LOGIT_SCALE, Clip
from trivium.objectives.contrastive import START_LOGIT_BIAS, Scope, contrastive, contrastive_chance
from trivium.train.protocol import Batch, Key, Rows, Sums


class ClipMethod(MethodOfPictures):
    """CLIP's one objective.

    Args:
        scope, num_ranks: what a row sees of the batch, and gives gradient to (see objectives/contrastive.py).
        contrastive_form: "softmax" is the paper; "sigmoid" is SigLIP's loss, whose bias no use of the model needs: it
            belongs to the method.
    """

    model: Clip
    logit_bias: nn.Parameter | None

    def __init__(
        self,
        model: Clip,
        pixels: Pixels,
        scope: Scope = "global",
        num_ranks: int = 1,
        contrastive_form: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__(pixels)
        self.model = model
        self.weights = {"contrastive": 1.0}
        self.scope: Scope = scope
        self.num_ranks = num_ranks
        sigmoid = contrastive_form == "sigmoid"
        self.register_parameter("logit_bias", nn.Parameter(torch.tensor([START_LOGIT_BIAS])) if sigmoid else None)

    def counts(self, batch: Batch) -> Sums:
        return {"contrastive": batch.targets["matched"].sum(), "all/contrastive": torch.tensor(len(batch))}

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        images, text = batch.images[0], batch.texts[0]
        image = self.model.encode_image(self.pixels(images.pixels_BCHW), pooled_only=True)
        words = self.model.encode_text(self._to(text.ids_BT), pooled_only=True)
        marks = {
            "row": batch.rows_B,
            "kept": batch.targets["matched"],
            "same_image": images.same_B,
            "same_text": text.same_B,
        }
        rows = {"image": image.projected, "text": words.projected}
        return Rows(rows, {name: self._to(mark) for name, mark in marks.items()}), None

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        loss = contrastive(
            mine.rows["image"],
            mine.rows["text"],
            everyone.rows["image"],
            everyone.rows["text"],
            self.model.logit_scale,
            mine.marks["row"],
            everyone.marks["row"],
            kept_B=mine.marks["kept"],
            same_image_B=mine.marks["same_image"],
            same_text_B=mine.marks["same_text"],
            same_image_G=everyone.marks["same_image"],
            same_text_G=everyone.marks["same_text"],
            logit_bias=self.logit_bias,
            scope=self.scope,
            num_ranks=self.num_ranks,
        )
        return {"contrastive": loss}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        return {}

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        for value, low, high in self.clamped().values():
            value.clamp_(low, high)

    def clamped(self) -> dict[str, tuple[Tensor, float, float]]:
        return {"logit_scale": (self.model.logit_scale, 0.0, MAX_LOGIT_SCALE)}

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Equal scores for all columns that a row has."""
        columns = counts["all/contrastive"] / (self.num_ranks if self.scope == "local" else 1)
        return {"contrastive": contrastive_chance(max(1.0, columns), self.logit_bias is not None)}
