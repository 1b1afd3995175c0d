"""What one step does with questions whose answers are written (ALBEF, section 5).

Every answer that people gave is written, and costs what its words cost together, times its weight; the sum of these is
divided by the number of questions. A teacher reads the question itself, and says of every word what share of the target
is its own.

B questions, A answers of one, R answers of all, T tokens of an answer, M words that are asked for, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trivium.methods.finetune import FineTuning
from trivium.models.albef_heads import AnswerDecoder
from trivium.models.finetuned import FineTuned
from trivium.objectives.tasks import written_answers
from trivium.train.protocol import Batch, Key, Rows, Sums


class Answers(NamedTuple):
    """Those of a batch, flat."""

    ids_RT: Tensor  # [CLS] and words, without the last token, which nothing follows
    row_R: Tensor  # of which question
    places_M: Tensor  # in [R * T], where a word is asked for
    word_M: Tensor
    weight_M: Tensor


class Answering(FineTuning):
    """Of a model whose head is a writer. Args as FineTuning."""

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        inputs = self._inputs(batch)
        answers = self._answers(batch)
        logits_MV = self._written(self.model, inputs, answers)
        loss = written_answers(logits_MV, answers.word_M, answers.weight_M)
        if self.teacher is not None and self.training and self.teacher.alpha:
            copy = self.teacher.copy
            assert isinstance(copy, FineTuned)
            with torch.no_grad():
                soft_MV = self._written(copy, inputs, answers)
                soft_MV = soft_MV.softmax(-1, dtype=torch.promote_types(soft_MV.dtype, torch.float32))
            soft = written_answers(logits_MV, soft_MV, answers.weight_M)
            loss = torch.lerp(loss, soft, self.teacher.alpha)
        return {self.model.config.task: loss}

    def _answers(self, batch: Batch) -> Answers:
        """Chosen on the CPU, where the batch is: the device is not waited for."""
        ids_BAT, weight_BA = batch.targets["answer_ids"], batch.targets["answer_weight"]
        given_BA = weight_BA > 0
        ids_RT = ids_BAT[given_BA]
        asked_RT = ids_RT[:, 1:]
        assert isinstance(self.model.head, AnswerDecoder)
        real_RT = asked_RT != self.model.head.config.pad_id
        weight_RT = weight_BA[given_BA][:, None].expand_as(real_RT)
        found = (
            ids_RT[:, :-1], given_BA.nonzero()[:, 0], real_RT.flatten().nonzero()[:, 0], asked_RT[real_RT],
            weight_RT[real_RT],
        )  # fmt: skip
        return Answers(*map(self._to, found))

    @staticmethod
    def _written(model: FineTuned, inputs: tuple[Tensor | None, ...], answers: Answers) -> Tensor:
        fused = model.fused(*inputs[:3])
        return model.written(fused, answers.ids_RT, answers.row_R, answers.places_M)
