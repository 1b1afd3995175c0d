"""What one DINO training step does with a batch (Caron et al. 2021, section 3.1 and algorithm 1).

    crops    two global ones through the teacher; all of them through the student; each of the student's is to say what
             the teacher says of the *other* global crops

The teacher is an average of past students; its outputs are centred (or balanced by Sinkhorn-Knopp) and sharpened, which
keeps both from one answer for everything. Options that are off, after DINOv2: KoLeo spreads class tokens, iBOT asks for
hidden patches as well. KoLeo and Sinkhorn look at the whole global batch, so they couple its rows.

Sinkhorn balances class tokens alone: hidden patches are always centred by their mean, where DINOv2 balances them too,
on each device as they come. Over a global batch in parts that would need the teacher's outputs for all of its hidden
patches at once: 32 GB of them at 1,024 pictures, 30 % hidden, and 65,536 prototypes.

A skipped step changes neither teacher nor centre: all of it happens in `after_step`, from sums over the global batch.

B rows, V crops of the student, N patches, M hidden patches, K prototypes, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.methods.momentum import follow, follower
from trivium.methods.pixels import MethodOfPictures, Pixels
from trivium.models.dino import Dino
from trivium.objectives.dino import NUM_GLOBAL, centred, crop_loss, entropy, koleo, masked_patches, sinkhorn
from trivium.train.protocol import Batch, Key, Rows, Sums, Watched, deviation

LOSSES = ("crops", "koleo", "ibot")


@dataclass(frozen=True)
class Distillation:
    """How the teacher teaches. The defaults are those of the published code; shares are of the run's steps."""

    momentum: float = 0.996  # of the teacher at the start, by a cosine to 1 at the end; 0.9995 suits batches of 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04  # after its warm-up
    first_teacher_temperature: float = 0.04  # at the first step
    temperature_warmup: float = 0.3  # share of the run over which the one becomes the other
    center_momentum: float = 0.9
    centring: Literal["mean", "sinkhorn"] = "mean"  # of class tokens; hidden patches keep the mean
    freeze_last_layer: float = 0.01  # share of the run during which the prototypes stay as they are

    def momentum_at(self, step: int, num_steps: int) -> float:
        """Of the teacher at a step: cosine from `momentum` to 1."""
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * min(1.0, step / max(1, num_steps)))) / 2

    def temperature_at(self, step: int, num_steps: int) -> float:
        """Of the teacher at a step: linear, then constant."""
        warmup = self.temperature_warmup * num_steps
        done = min(1.0, step / warmup) if warmup else 1.0
        return self.first_teacher_temperature + done * (self.teacher_temperature - self.first_teacher_temperature)


class DinoMethod(MethodOfPictures):
    """Student, teacher and centre.

    A batch carries the crops of its pictures as `images`: two global ones first, then local ones, those of one size
    side by side; with iBOT also `targets["patch_mask"]`, bool [B, 2, N], the hidden patches of the global ones.

    Args:
        model: the student. The teacher starts as its copy.
        num_steps: of the whole run, which schedules are shares of.
        weights: of the losses "crops" (1), "koleo" and "ibot" (0). iBOT needs a tower with a mask token.
    """

    model: Dino
    teacher: Dino
    center: Tensor
    patch_center: Tensor
    teacher_entropy: Tensor
    prototypes_entropy: Tensor
    feature_deviation: Tensor

    def __init__(
        self,
        model: Dino,
        pixels: Pixels,
        distillation: Distillation,
        num_steps: int,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(pixels)
        self.model = model
        self.teacher = follower(model)
        self.distillation = distillation
        self.num_steps = num_steps
        self.weights = dict.fromkeys(LOSSES, 0.0) | {"crops": 1.0} | (weights or {})
        assert set(self.weights) == set(LOSSES), f"no such loss: {sorted(set(self.weights) - set(LOSSES))}"
        assert not self.weights["ibot"] or model.config.mask_token, "iBOT needs a mask token"
        K = model.config.num_prototypes
        self.register_buffer("center", torch.zeros(K))
        self.register_buffer("patch_center", torch.zeros(K) if self.weights["ibot"] else None)
        for name in ("teacher_entropy", "prototypes_entropy", "feature_deviation"):  # of the last step, to be watched
            self.register_buffer(name, torch.full((), torch.nan), persistent=False)
        self.schedule(0)

    def train(self, mode: bool = True) -> Self:
        """The teacher has neither dropout nor stochastic depth."""
        super().train(mode)
        self.teacher.eval()
        return self

    def exported(self) -> Dino:
        return self.teacher

    def schedule(self, step: int) -> None:
        self.momentum = self.distillation.momentum_at(step, self.num_steps)
        self.temperature = self.distillation.temperature_at(step, self.num_steps)

    def counts(self, batch: Batch) -> Sums:
        rows = torch.tensor(len(batch))
        counts = {"crops": rows}
        if self.weights["koleo"]:
            counts["koleo"] = rows  # the sum over both global crops, as DINOv2's weight of 0.1 takes it
        if self.weights["ibot"]:
            counts["ibot"] = NUM_GLOBAL * rows
        return counts

    # Where rows of the global batch are coupled everything is computed in `embed`, else in `separate`.

    @property
    def _couples(self) -> bool:
        return bool(self.weights["koleo"]) or self.distillation.centring == "sinkhorn"

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        if not self._couples:
            return Rows(), None
        seen = self._look(batch)
        marks = {"row": self._to(batch.rows_B)}
        rows: dict[str, Tensor] = {}
        if self.weights["koleo"]:
            rows |= {f"global_{crop}": seen.class_VBD[crop] for crop in range(NUM_GLOBAL)}
        if self.distillation.centring == "sinkhorn":
            rows["student"] = seen.student_VBK.transpose(0, 1).flatten(1)
            marks["teacher"] = seen.teacher_2BK.transpose(0, 1).contiguous()
        return Rows(rows, marks), seen

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        if not mine.rows:
            return {}
        sums: Sums = {}
        row_B, row_G = mine.marks["row"], everyone.marks["row"]
        if self.weights["koleo"]:
            names = [f"global_{crop}" for crop in range(NUM_GLOBAL)]
            parts = [koleo(mine.rows[name], everyone.rows[name], row_B, row_G) for name in names]
            sums["koleo"] = torch.stack(parts).sum()
        if self.distillation.centring == "sinkhorn":
            teacher_G2K = everyone.marks["teacher"]
            G, _, K = teacher_G2K.shape
            shares_G2K = sinkhorn(teacher_G2K.flatten(0, 1), self.temperature).view(G, NUM_GLOBAL, K)
            mine_B = (row_G == row_B[:, None]).int().argmax(1)  # where my rows stand among all
            student_VBK = mine.rows["student"].view(len(row_B), -1, K).transpose(0, 1)
            sums |= self._crops(student_VBK, shares_G2K[mine_B].transpose(0, 1))
        return sums

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        seen: _Seen = self._look(batch) if states is None else states
        unit_BD = F.normalize(seen.class_VBD[0].detach(), dim=-1)
        sums: Sums = {
            "stat/center": seen.teacher_2BK.sum((0, 1)),
            "stat/features": unit_BD.sum(0),
            "stat/rows": unit_BD.new_tensor(float(len(batch))),
        }
        if self.distillation.centring == "mean":
            sums |= self._crops(seen.student_VBK, centred(seen.teacher_2BK, self.center, self.temperature))
        if self.weights["ibot"]:
            shares_MK = centred(seen.teacher_MK, self.patch_center, self.temperature)
            sums["ibot"] = masked_patches(
                seen.student_MK, shares_MK, seen.weight_M, self.distillation.student_temperature
            )
            sums["stat/patch_center"] = seen.teacher_MK.sum(0)
            sums["stat/patches"] = seen.weight_M.new_tensor(float(len(seen.weight_M)))
        return sums

    def _crops(self, student_VBK: Tensor, shares_2BK: Tensor) -> Sums:
        return {
            "crops": crop_loss(student_VBK, shares_2BK, self.distillation.student_temperature),
            "stat/teacher_entropy": entropy(shares_2BK).sum(),
            "stat/shares": shares_2BK.sum((0, 1)),
        }

    def _look(self, batch: Batch) -> _Seen:
        """Everything through student and teacher: one forward for all crops of a size, one of the head for all."""
        sized = [
            self.pixels(torch.cat([self._to(images.pixels_BCHW) for images in crops]))
            for _, crops in groupby(batch.images, lambda images: images.pixels_BCHW.shape[-1])
        ]
        B = len(batch)
        globals_BCHW = sized[0][: NUM_GLOBAL * B]  # local crops may be of their size
        assert len(globals_BCHW) == NUM_GLOBAL * B, "the first two crops are of one size"
        if self.weights["ibot"]:
            return self._look_at_patches(batch, globals_BCHW, [sized[0][2 * B :], *sized[1:]])
        class_RD = torch.cat([self.model.encode_image(pixels, rows=1).pooled for pixels in sized])
        student_RK = self.model.head(class_RD)
        with torch.no_grad():
            teacher_RK = self.teacher.head(self.teacher.encode_image(globals_BCHW, rows=1).pooled)
        return _Seen(_by_crop(class_RD, B), _by_crop(student_RK, B), _by_crop(teacher_RK, B))

    def _look_at_patches(self, batch: Batch, globals_BCHW: Tensor, local: list[Tensor]) -> _Seen:
        """The same, where the student's global crops have hidden patches that the teacher sees."""
        B = len(batch)
        masked_RN = batch.targets["patch_mask"].transpose(0, 1).flatten(0, 1)  # crop by crop, as pixels are
        places_M = self._to(masked_RN.flatten().nonzero()[:, 0])
        hidden_R = masked_RN.sum(1)
        weight_M = self._to((1 / hidden_R.clamp(min=1).double()).repeat_interleave(hidden_R))
        tokens_RLD = self.model.encode_image(globals_BCHW, self._to(masked_RN)).tokens
        class_RD = torch.cat(
            [tokens_RLD[:, 0]] + [self.model.encode_image(pixels, rows=1).pooled for pixels in local if len(pixels)]
        )
        student_RK = self.model.head(torch.cat([class_RD, tokens_RLD[:, 1:].flatten(0, 1)[places_M]]))
        with torch.no_grad():
            tokens_RLD = self.teacher.encode_image(globals_BCHW).tokens
            teacher_RK = self.teacher.head(torch.cat([tokens_RLD[:, 0], tokens_RLD[:, 1:].flatten(0, 1)[places_M]]))
        M = len(places_M)
        student_RK, student_MK = student_RK.split([len(class_RD), M])
        teacher_RK, teacher_MK = teacher_RK.split([NUM_GLOBAL * B, M])
        return _Seen(
            _by_crop(class_RD, B), _by_crop(student_RK, B), _by_crop(teacher_RK, B),
            student_MK, teacher_MK, weight_M.to(student_MK.dtype),
        )  # fmt: skip

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        follow(self.teacher, self.model, self.momentum)
        rows = stats["stat/rows"]
        if self.distillation.centring == "mean":
            self._move(self.center, stats["stat/center"] / (NUM_GLOBAL * rows))
        if self.weights["ibot"] and stats["stat/patches"] > 0:
            self._move(self.patch_center, stats["stat/patch_center"] / stats["stat/patches"])
        most = math.log(self.model.config.num_prototypes)
        self.teacher_entropy.copy_(stats["stat/teacher_entropy"] / (NUM_GLOBAL * rows) / most)
        self.prototypes_entropy.copy_(entropy(stats["stat/shares"] / (NUM_GLOBAL * rows)) / most)
        self.feature_deviation.copy_(deviation(stats["stat/features"] / rows))

    def _move(self, center_K: Tensor, mean_K: Tensor) -> None:
        center_K.lerp_(mean_K.to(center_K), 1 - self.distillation.center_momentum)

    def watched(self) -> dict[str, Watched]:
        """Both ways to collapse: one answer for every picture, or all answers alike for each."""
        return {
            "teacher_entropy": Watched(
                self.teacher_entropy, 0.0, 0.98,
                "the teacher tells no picture from another (its outputs are nearly uniform): lower"
                " --distillation.teacher-temperature, or take fewer prototypes",
            ),
            "prototypes_entropy": Watched(
                self.prototypes_entropy, 0.2, 1.0,
                "nearly all pictures get the same few prototypes: raise --distillation.momentum, freeze the last layer"
                " longer, or take a larger batch",
            ),
            "feature_deviation": Watched(
                self.feature_deviation, 0.1, 1.0,
                "the class tokens of all pictures are nearly one: lower --optim.lr or warm up longer",
            ),
        }  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """What student and teacher made of a batch; the last three with iBOT alone."""

    class_VBD: Tensor
    student_VBK: Tensor
    teacher_2BK: Tensor
    student_MK: Any = None
    teacher_MK: Any = None
    weight_M: Any = None  # 1 / hidden patches of the same picture


def _by_crop(rows: Tensor, num_rows: int) -> Tensor:
    """[V * B, ...], crop by crop, -> [V, B, ...]."""
    return rows.unflatten(0, (-1, num_rows))
