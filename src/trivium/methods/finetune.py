"""What one fine-tuning step does with a batch: a trained model and a head for one task, one loss.

With momentum distillation a slow copy of both says what half of the target is (ALBEF, section 3.4). It follows after
the update.

B rows, P pictures (B, or 2 B: all the first ones, then all the second), K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.methods.flava import Pixels
from trivium.methods.momentum import SoftTargets, Teacher
from trivium.models.finetuned import FineTuned
from trivium.objectives.tasks import number, right_class, soft_answers, written_answers
from trivium.train.protocol import Batch, Key, Method, Rows, Sums

Objective = Callable[..., Tensor]
# By what the head gives: the target that it needs, the loss, and outputs [B, K] as such a target.
OBJECTIVES: dict[str, tuple[str, Objective, Callable[[Tensor], Tensor]]] = {
    "class": ("label", right_class, lambda outputs_BK: outputs_BK.softmax(-1)),
    "number": ("value", number, lambda outputs_B1: outputs_B1[:, 0]),
    "answers": ("answers", soft_answers, torch.sigmoid),
    "text": ("answer_ids", written_answers, lambda logits_MV: logits_MV.softmax(-1)),  # see methods/answers.py
}


class FineTuning(Method):
    """One task. No sample is coupled with another.

    Args:
        targets: how a momentum copy teaches; with an alpha of 0 there is none.
        num_steps, epoch_steps: of the whole run and of one epoch, which its schedules are shares of.
        guess: the loss of a model that knows only how often each label occurs; None: not known.
    """

    model: FineTuned
    teacher: Teacher | None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: FineTuned,
        pixels: Pixels,
        targets: SoftTargets | None = None,
        num_steps: int = 1,
        epoch_steps: int = 1,
        guess: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.guess = guess
        taught = targets is not None and targets.alpha > 0
        self.teacher = Teacher(model, targets, num_steps, epoch_steps) if taught and targets else None
        self.target, self.objective, self.as_target = OBJECTIVES[model.config.gives]
        self.weights = {model.config.task: 1.0}
        self.register_buffer("mean", torch.tensor(pixels.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).view(1, 3, 1, 1) * 255, persistent=False)

    def counts(self, batch: Batch) -> Sums:
        return {self.model.config.task: torch.tensor(len(batch))}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        inputs = self._inputs(batch)
        outputs_BK = self._outputs(self.model, inputs)
        target = self._to(batch.targets[self.target])
        loss = self.objective(outputs_BK, target)
        if self.teacher is not None and self.training and self.teacher.alpha:
            copy = self.teacher.copy
            assert isinstance(copy, FineTuned)
            with torch.no_grad():
                soft = self.as_target(self._outputs(copy, inputs))
            loss = torch.lerp(loss, self.objective(outputs_BK, soft), self.teacher.alpha)
        sums = {self.model.config.task: loss}
        if self.target == "label":
            sums["stat/correct"] = (outputs_BK.detach().argmax(-1) == target).sum().double()
        return sums

    def schedule(self, step: int) -> None:
        if self.teacher is not None:
            self.teacher.schedule(step)

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        if self.teacher is not None:
            self.teacher.follow(self.model)

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        return {} if self.guess is None else {self.model.config.task: self.guess}

    def outputs(self, batch: Batch) -> Tensor:
        """Logits or numbers [B, K], as the loss takes them."""
        return self._outputs(self.model, self._inputs(batch))

    def _inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """As the model takes them."""
        pixels_PCHW = ids_BT = mask_BT = segments_BT = sizes_P2 = None
        if batch.images:
            pixels_PCHW, sizes_P2 = self._pictures(batch)
        if batch.texts:
            text = batch.texts[0]
            ids_BT = self._to(text.ids_BT)
            # Attention without a mask is the faster one.
            mask_BT = None if bool(text.mask_BT.all()) else self._to(text.mask_BT)
            segments_BT = None if text.segments_BT is None else self._to(text.segments_BT)
        return pixels_PCHW, ids_BT, mask_BT, segments_BT, sizes_P2

    def _pictures(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Normalised; and (height, width) of each where some are padded, on CPU, where the model looks at them."""
        height, width = (max(images.pixels_BCHW.shape[side] for images in batch.images) for side in (2, 3))
        pixels, sizes = [], []
        for images in batch.images:  # the first pictures of a batch may be padded to another size than the second ones
            own_height, own_width = images.pixels_BCHW.shape[2:]
            pixels.append(F.pad(self._to(images.pixels_BCHW), (0, width - own_width, 0, height - own_height)))
            whole_B2 = torch.tensor([own_height, own_width]).expand(len(batch), 2)
            sizes.append(whole_B2 if images.sizes_B2 is None else images.sizes_B2)
        sizes_P2 = torch.cat(sizes)
        is_padded = bool((sizes_P2 != torch.tensor([height, width])).any())
        return (torch.cat(pixels) - self.mean) / self.std, sizes_P2 if is_padded else None

    @staticmethod
    def _outputs(model: FineTuned, inputs: tuple[Tensor | None, ...]) -> Tensor:
        outputs: Tensor = model(*inputs)
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.mean.device, non_blocking=True)
