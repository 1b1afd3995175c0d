"""What one step of UniT does with a batch: the head of one task (Hu & Singh 2021, section 3.4).

A stream of the mixture is a task, and bears its name. Nothing couples samples. Losses are named by task and part:
"coco.class", "coco.box", "coco.giou", "vg.attributes", "sst2". What they are divided by comes from labels alone and
is summed over the global batch: the public code divides attributes by the boxes of one process whose loss is not zero.

Parameters that only other tasks use get no gradient in a step, so the optimizer leaves them and their moments alone. In
the public code the tokens of all tasks are one table, whose other rows keep moving by their fading moments; here each
is a parameter of its own.

B rows of a micro-batch, U different pictures in it, L decoder layers, K classes, M objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trivium.methods.pixels import MethodOfPictures, Pixels
from trivium.models.encoded import Encoded
from trivium.models.unit import Unit, UnitTask
from trivium.objectives import detection, tasks
from trivium.objectives.detection import Objects
from trivium.train.protocol import Batch, Images, Key, Rows, Sums

Labels = Literal["label", "answers"]  # one right class, or answers that are more or less right
OBJECTIVES = {"label": tasks.right_class, "answers": tasks.soft_answers}
PARTS = {"class": 1.0, "box": 5.0, "giou": 2.0, "attributes": 1.0}  # published weights of the losses of detection


class UnitMethod(MethodOfPictures):
    """Several tasks, one of them a step.

    Args:
        targets: of each task of labels, what its batches hold.
        parts: weights of the losses of detection.
        guesses: of tasks of labels, the loss of a model that knows only how often each label occurs.
    """

    model: Unit

    def __init__(
        self,
        model: Unit,
        pixels: Pixels,
        targets: Mapping[str, Labels],
        parts: Mapping[str, float] = PARTS,
        guesses: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(pixels)
        self.model = model
        self.targets = dict(targets)
        self.guesses = dict(guesses or {})
        self.weights = {}
        for task in model.config.tasks:
            if task.kind == "labels":
                self.weights[task.name] = 1.0
            else:
                has = {part: part != "attributes" or task.num_attributes is not None for part in parts}
                self.weights |= {f"{task.name}.{part}": weight for part, weight in parts.items() if has[part]}

    def counts(self, batch: Batch) -> Sums:
        task = self.model.task(batch.stream)
        if task.kind == "labels":
            return {task.name: torch.tensor(len(batch))}
        objects = self.objects(batch, task)
        found = detection.counts(objects, len(batch), task.num_queries)
        return {f"{task.name}.{part}": count for part, count in found.items() if self._has(task, part)}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        task = self.model.task(batch.stream)
        if task.kind == "detection":
            return self._boxes(batch, task)
        logits_BK = self.logits(batch)
        name = self.targets[task.name]
        target = self._to(batch.targets[name])
        sums = {task.name: OBJECTIVES[name](logits_BK, target)}
        if name == "label":
            sums["stat/correct"] = (logits_BK.detach().argmax(-1) == target).sum().double()
        return sums

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        return self.guesses

    def _boxes(self, batch: Batch, task: UnitTask) -> Sums:
        objects = self.objects(batch, task)
        objects.check(len(batch), task.num_labels, f"stream {batch.stream!r}")
        objects = objects.to(self.mean.device)
        head: Any = self.model.heads[task.name]
        seen = head(self.model.decode(task.name, self.image(batch)))
        matches = detection.match(seen.logits_LBQK, seen.boxes_LBQ4, objects)
        box, giou = detection.box_losses(seen.boxes_LBQ4, matches, objects.box_M4)
        sums = {"class": detection.class_loss(seen.logits_LBQK, matches, objects.label_M), "box": box, "giou": giou}
        if self._has(task, "attributes"):
            assert objects.attributes_MA is not None, f"the task {task.name} has attributes, and this batch none"
            logits_PK = head.attributes(matches.of(seen.hidden_LBQD), objects.label_M[matches.object_P])
            sums["attributes"] = detection.attribute_loss(logits_PK, objects.attributes_MA[matches.object_P])
        return {f"{task.name}.{part}": value for part, value in sums.items() if self._has(task, part)}

    def _has(self, task: UnitTask, part: str) -> bool:
        """Whether a loss of detection counts, so that what it alone depends on is trained."""
        return self.weights.get(f"{task.name}.{part}", 0.0) != 0

    def objects(self, batch: Batch, task: UnitTask) -> Objects:
        """What there is to find in the pictures of a batch, on CPU."""
        targets = batch.targets
        attributes = targets.get("box_attributes") if task.num_attributes is not None else None
        return Objects(targets["box_row"], targets["box_class"], targets["box"], attributes)

    def image(self, batch: Batch) -> Encoded:
        """The pictures, encoded for the batch's task, one that several rows are about once for all of them. Their sizes
        stay on CPU, where the model looks at them."""
        images = batch.images[0]
        first_U, of_B = different(images)
        if len(first_U) == len(of_B):
            return self.model.encode_image(self.pixels(images.pixels_BCHW), images.sizes_B2, batch.stream)
        sizes_U2 = None if images.sizes_B2 is None else images.sizes_B2[first_U]
        encoded = self.model.encode_image(self.pixels(images.pixels_BCHW[first_U]), sizes_U2, batch.stream)
        return encoded.taken(self._to(of_B))

    def logits(self, batch: Batch) -> Tensor:
        """[B, K] of a task of labels."""
        image = self.image(batch) if batch.images else None
        encoded = None
        if batch.texts:
            text = batch.texts[0]
            mask_BT = None if bool(text.mask_BT.all()) else self._to(text.mask_BT)  # without one attention is faster
            segments_BT = None if text.segments_BT is None else self._to(text.segments_BT)
            encoded = self.model.encode_text(self._to(text.ids_BT), mask_BT, segments_BT, batch.stream)
        logits_BK = self.model.label(batch.stream, image, encoded)
        return logits_BK.float() if logits_BK.dtype == torch.bfloat16 else logits_BK

    def answers(self, batch: Batch) -> Tensor:
        """Probabilities of the classes of a task of labels, or how right each answer is, [B, K]."""
        logits_BK = self.logits(batch).float()
        return logits_BK.softmax(-1) if self.targets[batch.stream] == "label" else logits_BK.sigmoid()


def different(images: Images) -> tuple[Tensor, Tensor]:
    """Where each of the U pictures that differ stands first, int64 [U], and which of them each row has, int64 [B].

    Their numbers alone do not tell: rows with the same number may show other parts of one picture.
    """
    place_of: dict[int, int] = {}
    first_B = torch.tensor([place_of.setdefault(number, row) for row, number in enumerate(images.same_B.tolist())])
    shown = [images.pixels_BCHW] if images.sizes_B2 is None else [images.pixels_BCHW, images.sizes_B2]
    for row, first in enumerate(first_B.tolist()):
        if first != row and not all(torch.equal(each[row], each[first]) for each in shown):
            first_B[row] = row
    return torch.unique(first_B, return_inverse=True)
