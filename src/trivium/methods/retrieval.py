"""What one step of fine-tuning on retrieval does with a batch of pairs, for a model without momentum encoders.

    contrastive    both class tokens, every row against all columns of the global batch
    ITM            true pairs, and for each text and picture a false one that looks alike (ALBEF, section 3.2), drawn
                   within a pool of samples

ALBEF itself is trained by `methods/albef.py`, whose keys come from a teacher and a queue; CLIP, which matches nothing,
by `methods/clip.py`. Nothing is hidden here, other than in FLAVA's pretraining. What shows the same picture is left out
of the contrastive loss, and never taken for false by ITM; nor is what has the same caption.

B rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trivium.methods.albef import FALSE_SHARE
from trivium.methods.false_pairs import allowed
from trivium.methods.pixels import MethodOfPictures, Pixels
from trivium.models.encoded import Encoded
from trivium.models.flava import MAX_LOGIT_SCALE, Flava
from trivium.objectives.contrastive import contrastive
from trivium.objectives.matching import hard_negatives, matching
from trivium.train.protocol import Batch, Key, Rows, Sums


class RetrievalMethod(MethodOfPictures):
    """FLAVA's two objectives that retrieval rests on.

    Args:
        weights: of the losses "contrastive" and "itm".
        negatives: of ITM: "hard" draws them by likeness, "random" evenly.
        pool: rows among which they are drawn. A micro-batch is a whole number of pools, or within one.
    """

    model: Flava

    def __init__(
        self,
        model: Flava,
        pixels: Pixels,
        weights: Mapping[str, float] | None = None,
        negatives: Literal["hard", "random"] = "hard",
        pool: int = 64,
    ) -> None:
        super().__init__(pixels)
        self.model = model
        self.weights = {"contrastive": 1.0, "itm": 1.0} | dict(weights or {})
        self.negatives = negatives
        self.pool = pool

    def counts(self, batch: Batch) -> Sums:
        assert bool(batch.targets["matched"].all()), "false pairs are made here"
        return {"contrastive": torch.tensor(len(batch)), "itm": 3 * allowed(batch, self.pool).any(1).sum()}

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        text = batch.texts[0]
        rows = None if self.weights["itm"] else 1
        image = self.model.encode_image(self.pixels(batch.images[0].pixels_BCHW), rows=rows)
        mask_BT = None if bool(text.mask_BT.all()) else self._to(text.mask_BT)  # without a mask attention is faster
        words = self.model.encode_text(self._to(text.ids_BT), mask_BT, rows=rows, pads=False)
        marks = {"row": self._to(batch.rows_B), "same": self._to(batch.images[0].same_B)}
        return Rows({"image": image.projected, "text": words.projected}, marks), (image, words)

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        if not self.weights["contrastive"]:
            return {}
        same_B, same_G = mine.marks["same"], everyone.marks["same"]
        loss = contrastive(
            mine.rows["image"], mine.rows["text"], everyone.rows["image"], everyone.rows["text"],
            self.model.logit_scale, mine.marks["row"], everyone.marks["row"],
            kept_B=torch.ones_like(same_B, dtype=torch.bool), same_image_B=same_B, same_text_B=same_B,
            same_image_G=same_G, same_text_G=same_G,
        )  # fmt: skip
        return {"contrastive": loss}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        if not self.weights["itm"]:
            return {}
        image, text = states
        allowed_BB = allowed(batch, self.pool)
        image_B, text_B = self._false(batch, rows, self._to(allowed_BB), key)
        images = Encoded.joined([image, image.taken(image_B), image])
        texts = Encoded.joined([text, text, text.taken(text_B)])
        true_3B = torch.arange(3 * len(batch)) < len(batch)
        kept_3B = allowed_BB.any(1).repeat(3)
        logits = self.model.match(self.model.fuse(images, texts, rows=1, pads=False))
        return {
            "itm": matching(logits, self._to(true_3B), self._to(kept_3B)),
            "stat/itm_left_out": self._to((~allowed_BB.any(1)).sum()),
        }

    @torch.no_grad()
    def _false(self, batch: Batch, rows: Rows, allowed_BB: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """For each text a picture, and for each picture a text: rows of the batch, int64 [B]."""
        with torch.autocast(allowed_BB.device.type, enabled=False):
            logits_BB = rows.rows["text"] @ rows.rows["image"].T * self.model.logit_scale.exp()
        if self.negatives == "random":
            logits_BB = torch.zeros_like(logits_BB)
        drawn = []
        for other, likeness_BB in (("image", logits_BB), ("text", logits_BB.T)):
            uniform_B = self._to(key.uniform(f"negative {other}", batch.rows_B))
            drawn.append(hard_negatives(likeness_BB, allowed_BB, uniform_B))
        return drawn[0], drawn[1]

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        for value, low, high in self.clamped().values():
            value.clamp_(low, high)

    def clamped(self) -> dict[str, tuple[Tensor, float, float]]:
        return {"logit_scale": (self.model.logit_scale, 0.0, MAX_LOGIT_SCALE)}

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Of the contrastive loss equal scores for all columns, of ITM the entropy of its labels."""
        itm = -sum(share * math.log(share) for share in (FALSE_SHARE, 1 - FALSE_SHARE))
        return {"contrastive": math.log(max(1.0, counts["contrastive"])), "itm": itm}
