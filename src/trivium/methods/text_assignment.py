"""Text assignment: which of two pictures does a text belong to, or neither (ALBEF, section 5)?

What a model for two pictures learns before NLVR2, from pairs. For each text a like picture of the batch is drawn, by
the likeness of the class tokens of both; with it the text's own stands first (class 0) or second (class 1), or another
like one does, and the text belongs to neither (class 2). Each of the three a third of the time.

B rows of a batch, K of them that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import torch
from torch import Tensor

from trivium.methods.false_pairs import allowed
from trivium.methods.finetune import FineTuning
from trivium.models.albef import Albef
from trivium.models.albef_heads import TwoPictures
from trivium.objectives.matching import hard_negatives
from trivium.objectives.tasks import right_class
from trivium.train.protocol import Batch, Key, Rows, Sums

LABELS = ("first", "second", "neither")
TEMPERATURE = 0.07  # of the likeness, as published
POOL = 64  # rows among which pictures are drawn


class TextAssignment(FineTuning):
    """Of a model whose head judges two pictures. A row with fewer than two other pictures in its pool is left out.

    A micro-batch is a whole number of pools, or within one.
    """

    pool = POOL

    def counts(self, batch: Batch) -> Sums:
        return {self.model.config.task: self._kept(batch).sum()}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        model, head = self.model.backbone, self.model.head
        assert isinstance(model, Albef) and isinstance(head, TwoPictures)
        pixels_BCHW, ids_BT, mask_BT = self._inputs(batch)[:3]
        assert pixels_BCHW is not None and ids_BT is not None
        image, text = model.encode_image(pixels_BCHW), model.encode_text(ids_BT, mask_BT, pads=False)
        with torch.no_grad():
            left_B, right_B, label_B = self._drawn(batch, image.projected, key)
        kept_B = self._kept(batch)
        outputs_B3 = head.judge(model.fusion, text, image.tokens, torch.cat([left_B, right_B]))
        outputs_B3 = outputs_B3.float() if outputs_B3.dtype == torch.bfloat16 else outputs_B3
        row_K = self._to(kept_B.nonzero()[:, 0])
        outputs_K3, label_K = outputs_B3.index_select(0, row_K), label_B.index_select(0, row_K)
        return {
            self.model.config.task: right_class(outputs_K3, label_K),
            "stat/correct": (outputs_K3.detach().argmax(-1) == label_K).sum().double(),
            "stat/left_out": self._to((~kept_B).sum().double()),
        }

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        return {self.model.config.task: log(len(LABELS))}

    def _drawn(self, batch: Batch, image_BD: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor]:
        """Which picture stands left, which right, and the class, int64 [B] each: functions of the seed, the step, the
        row and the likenesses."""
        allowed_BB = self._to(allowed(batch, self.pool))
        with torch.autocast(image_BD.device.type, enabled=False):
            logits_BB = image_BD @ image_BD.T / TEMPERATURE
        draws = [self._to(key.uniform(name, batch.rows_B)) for name in ("like picture", "other like picture")]
        one_B = hard_negatives(logits_BB, allowed_BB, draws[0])
        other_B = hard_negatives(logits_BB, allowed_BB.scatter(1, one_B[:, None], False), draws[1])
        label_B = self._to((key.uniform("class", batch.rows_B) * 3).long())
        own_B = torch.arange(len(batch), device=label_B.device)
        left_B = torch.where(label_B == 0, own_B, one_B)
        right_B = torch.where(label_B == 0, one_B, torch.where(label_B == 1, own_B, other_B))
        return left_B, right_B, label_B

    def _kept(self, batch: Batch) -> Tensor:
        return allowed(batch, self.pool).sum(1) >= 2
