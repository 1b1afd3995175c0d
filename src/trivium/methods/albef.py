"""What one ALBEF pretraining step does with a batch of pairs (ALBEF, section 3).

    ITC    class tokens of both towers, against the global batch and the queue as the momentum copy reads them
    ITM    true pairs, and for each text and picture a false one that looks alike, drawn within a pool of samples
    MLM    words hidden, read beside the picture

The teacher is an average of past students; what it says of a pair is a share `alpha` of the targets of ITC and MLM.
Easy to get wrong:

* the teacher follows *after* the update, which is the published order: there it follows at the head of the next step;
* student and teacher are divided by one temperature, the student's;
* ITM never takes for false what shows the same picture or bears the same caption; a row that is left without any false
  pair takes no part in ITM;
* validation has hard labels and no dropout.

A skipped step changes neither teacher nor queues: all of it happens in `after_step`.

B rows, G rows of the global batch, Q rows of a queue, T text tokens, M masked positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.methods.false_pairs import alike, allowed, numbers
from trivium.methods.momentum import Teaching, follow, follower
from trivium.methods.pixels import MethodOfPictures, Pixels
from trivium.methods.positions import needed, places
from trivium.models.albef import TEMPERATURES, Albef, Negatives
from trivium.models.encoded import Encoded
from trivium.objectives.distillation import (
    Duplicates,
    distilled_contrastive,
    distilled_prediction,
    published_prediction,
)
from trivium.objectives.masked import masked_prediction
from trivium.objectives.matching import hard_negatives, matching
from trivium.train.protocol import Batch, Key, Rows, Sums, Watched, deviation, hash64

LOSSES = ("itc", "itm", "mlm")
FALSE_SHARE = 2 / 3  # of the pairs that ITM is asked about: beside each true one a false picture and a false text
FOLLOWED = ("image", "text", "fusion", "mlm_head", "image_projection", "text_projection")  # by the teacher


@dataclass(frozen=True)
class Distillation(Teaching):
    """How the teacher teaches. The defaults are the published ones but for its dropout."""

    itc: float = 0.4  # its share in the targets of ITC, after the ramp; 0: it makes the keys alone
    mlm: float = 0.4  # in those of MLM; 0: no masked word is read by it
    soft_labels: Literal["vocabulary", "positions"] = "vocabulary"  # "positions": normalised as first published


class AlbefMethod(MethodOfPictures):
    """Student, teacher and queues.

    Args:
        model: the student. The teacher starts as its copy.
        num_steps, epoch_steps: of the whole run and of one epoch, which schedules are shares of.
        queue: rows of each queue; it starts with random ones, which nobody shows.
        seed: of those.
        weights: of the losses "itc", "itm" and "mlm".
        duplicates: what other rows of the same picture or caption are in ITC: left out ("mask"), negatives ("ignore",
            the published pretraining), or those of the same picture are answers too and equal captions of others are
            negatives ("positive", the published fine-tuning on retrieval).
        negatives: "hard" draws them by likeness, "random" evenly.
        pool: rows among which they are drawn. A micro-batch is a whole number of pools, or within one.
    """

    model: Albef
    teacher: Albef
    image_queue: Tensor
    text_queue: Tensor
    queue_same: Tensor
    queue_pointer: Tensor
    word_deviation: Tensor

    def __init__(
        self,
        model: Albef,
        pixels: Pixels,
        distillation: Distillation,
        num_steps: int,
        epoch_steps: int,
        queue: int,
        *,
        seed: int = 0,
        weights: dict[str, float] | None = None,
        duplicates: Duplicates = "mask",
        negatives: Literal["hard", "random"] = "hard",
        pool: int = 64,
    ) -> None:
        super().__init__(pixels)
        self.model = model
        self.teacher = follower(model)
        del self.teacher.itm_head, self.teacher.temperature  # it judges no pair, and has the student's temperature
        self.distillation = distillation
        self.num_steps, self.epoch_steps = num_steps, epoch_steps
        self.weights = dict.fromkeys(LOSSES, 1.0) | (weights or {})
        assert set(self.weights) == set(LOSSES), f"no such loss: {sorted(set(self.weights) - set(LOSSES))}"
        self.duplicates: Duplicates = duplicates
        self.negatives = negatives
        self.pool = pool
        for name in ("image_queue", "text_queue"):
            draw = torch.Generator().manual_seed(hash64(seed, name) % 2**63)
            rows_QD = torch.randn(queue, model.config.projection_width, generator=draw)
            self.register_buffer(name, F.normalize(rows_QD, dim=1))
        self.register_buffer("queue_same", torch.full((queue, 2), -1))  # numbers of picture and caption; -1: nobody's
        self.register_buffer("queue_pointer", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("word_deviation", torch.full((), torch.nan), persistent=False)  # of the last step
        self.schedule(0)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.train(mode and self.distillation.dropout)
        return self

    def schedule(self, step: int) -> None:
        self.ramp = self.distillation.ramp_at(step, self.num_steps, self.epoch_steps)

    def alpha(self, loss: Literal["itc", "mlm"]) -> float:
        """The teacher's share in the targets."""
        return self.ramp * getattr(self.distillation, loss) if self.training else 0.0

    # What each loss is divided by.

    def counts(self, batch: Batch) -> Sums:
        assert bool(batch.targets["matched"].all()), "ALBEF makes its false pairs itself"
        counts = {"itc": torch.tensor(len(batch)), "itm": 3 * allowed(batch, self.pool).any(1).sum()}
        return counts | {"mlm": batch.targets["selected"].sum()} if self.weights["mlm"] else counts

    # Both towers, twice.

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        """The text as it stands and the masked text go through a tower as one batch. All of it runs in both passes of
        GradCache: with dropout the draws must be the same."""
        fuses = bool(self.weights["itm"] or self.weights["mlm"])
        pixels_BCHW = self.pixels(batch.images[0].pixels_BCHW)
        image = self.model.encode_image(pixels_BCHW, rows=None if fuses else 1)
        text, masked = self._encode_texts(self.model, batch, bool(self.weights["mlm"]))
        teaches_words = bool(self.weights["mlm"]) and self.alpha("mlm") > 0
        with torch.no_grad():
            shown = self.teacher.encode_image(pixels_BCHW, rows=None if teaches_words else 1)
            read, hidden = self._encode_texts(self.teacher, batch, teaches_words)
            teacher = {"teacher_image": shown.projected, "teacher_text": read.projected}
        marks = {"row": self._to(batch.rows_B), "same": self._to(numbers(batch))}
        rows = Rows({"image": image.projected, "text": text.projected}, marks | teacher)
        return rows, _Seen(image, text, masked, shown, hidden)

    def _encode_texts(self, model: Albef, batch: Batch, masked: bool) -> tuple[Encoded, Encoded | None]:
        text = batch.texts[0]
        mask_BT = None if bool(text.mask_BT.all()) else text.mask_BT  # without a mask attention is faster
        if not masked:
            mask_BT = None if mask_BT is None else self._to(mask_BT)
            return model.encode_text(self._to(text.ids_BT), mask_BT, pads=False), None
        ids_PT = self._to(torch.cat([text.ids_BT, batch.targets["masked_ids"]]))
        mask_PT = None if mask_BT is None else self._to(mask_BT.repeat(2, 1))
        both = model.encode_text(ids_PT, mask_PT, pads=self.distillation.soft_labels == "positions")
        first, second = both.split(len(batch))
        return first, second

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        if not self.weights["itc"]:
            return {}
        row_B, row_G = mine.marks["row"], everyone.marks["row"]
        order_G = row_G.argsort()
        answer_B = order_G[torch.searchsorted(row_G[order_G], row_B)]
        same: tuple[Tensor, ...] = ()
        if self.duplicates != "ignore":
            same_B2, others = mine.marks["same"], (everyone.marks["same"], self.queue_same)
            if self.duplicates == "positive":
                same = tuple(same_B2[:, None, 0] == same_C2[:, 0] for same_C2 in others)
            else:
                same = tuple(alike(same_B2, same_C2) for same_C2 in others)
        alpha = self.alpha("itc")
        both = []
        for asked, key, queue_QD in (("image", "text", self.text_queue), ("text", "image", self.image_queue)):
            both.append(
                distilled_contrastive(
                    mine.rows[asked], mine.marks[f"teacher_{asked}"], (everyone.marks[f"teacher_{key}"], queue_QD),
                    self.model.temperature, answer_B, same, alpha, self.duplicates,
                )
            )  # fmt: skip
        loss, entropy = (torch.stack(each).sum() / 2 for each in zip(*both, strict=True))
        return {"itc": loss, "stat/itc_kl": (loss.detach() - alpha * entropy) / len(row_G)}

    # What is fused.

    def separate(self, batch: Batch, rows: Rows, states: _Seen, counts: Sums, key: Key) -> Sums:
        if not (self.weights["itm"] or self.weights["mlm"]):
            return {}
        sums: Sums = {}
        allowed_BB = allowed(batch, self.pool)
        negatives = self._negatives(batch, rows, self._to(allowed_BB), key) if self.weights["itm"] else None
        published = self.distillation.soft_labels == "positions"
        index, masked_M = None, torch.empty(0, dtype=torch.int64)
        if self.weights["mlm"] and published:
            masked_M = places(batch.targets["selected"])
        elif self.weights["mlm"]:
            index_BQ, (masked_M,) = needed(batch.targets["selected"])
            index = self._to(index_BQ)
        words, pairs = self.model.fuse_pairs(
            states.image, states.masked, index, None if negatives is None else states.text, negatives
        )
        if pairs is not None:
            true_3B = torch.arange(3 * len(batch)) < len(batch)
            kept_3B = allowed_BB.any(1).repeat(3)
            sums["itm"] = matching(self.model.match(pairs), self._to(true_3B), self._to(kept_3B))
            sums["stat/itm_left_out"] = self._to((~allowed_BB.any(1)).sum())
        if words is not None:
            ids_M = self._to(batch.texts[0].ids_BT[batch.targets["selected"]])
            found = self._masked_words(words, index, self._to(masked_M), ids_M, states, published)
            whole = counts["mlm"].clamp(min=1).to(ids_M.device)
            sums |= {name: value if name == "mlm" else value / whole for name, value in found.items()}
        return sums

    def _masked_words(
        self, words: Encoded, index: Tensor | None, masked_M: Tensor, ids_M: Tensor, states: _Seen, published: bool
    ) -> Sums:
        """The loss of masked words, and the sums that it is in the form with divergences and of their states."""
        alpha = self.alpha("mlm")
        words_MD = words.states.flatten(0, 1)[masked_M]
        full = torch.promote_types(words_MD.dtype, torch.float32)
        stats = {"stat/mlm_words": F.normalize(words_MD.detach().to(full), dim=1).sum(0)}
        if states.hidden is None or not alpha:
            return {"mlm": masked_prediction(self.model.predict_words(words_MD), ids_M)} | stats
        with torch.no_grad():
            taught = self.teacher.fuse(states.shown, states.hidden, index, pads=published).states
        if published:
            logits_BTV, teacher_BTV = self.model.predict_words(words.states), self.teacher.predict_words(taught)
            loss, entropy = published_prediction(logits_BTV, masked_M, ids_M, teacher_BTV, alpha)
        else:
            logits_MV = self.model.predict_words(words_MD)
            with torch.no_grad():
                teacher_MV = self.teacher.predict_words(taught.flatten(0, 1)[masked_M])
            loss, entropy = distilled_prediction(logits_MV, ids_M, teacher_MV, alpha)
        return {"mlm": loss, "stat/mlm_kl": loss.detach() - alpha * entropy} | stats

    @torch.no_grad()
    def _negatives(self, batch: Batch, rows: Rows, allowed_BB: Tensor, key: Key) -> Negatives:
        """For each text a picture and for each picture a text. A function of the seed, the step, the row and the
        likenesses; no number of it leaves the device."""
        drawn = []
        for asked, other in (("text", "image"), ("image", "text")):
            with torch.autocast(allowed_BB.device.type, enabled=False):
                logits_BB = rows.rows[asked] @ rows.marks[f"teacher_{other}"].T / self.model.temperature
            if self.negatives == "random":
                logits_BB = torch.zeros_like(logits_BB)
            uniform_B = self._to(key.uniform(f"negative {other}", batch.rows_B))
            drawn.append(hard_negatives(logits_BB, allowed_BB, uniform_B))
        return Negatives(image_B=drawn[0], text_B=drawn[1])

    # Once per accepted step.

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        for name in FOLLOWED:
            follow(getattr(self.teacher, name), getattr(self.model, name), self.distillation.momentum(self.num_steps))
        self._enqueue(everyone.marks)
        self.model.temperature.clamp_(*TEMPERATURES)
        if "stat/mlm_words" in stats:
            self.word_deviation.copy_(deviation(stats["stat/mlm_words"]))

    def _enqueue(self, marks: Mapping[str, Tensor]) -> None:
        """The global batch in the order of its rows, over the oldest; of a batch longer than the queue its end."""
        Q = len(self.queue_same)
        order_G = marks["row"].argsort()
        place_G = self.queue_pointer + torch.arange(len(order_G), device=order_G.device)
        if Q:
            order, place = order_G[-Q:], place_G[-Q:] % Q
            self.image_queue[place] = marks["teacher_image"][order].to(self.image_queue)
            self.text_queue[place] = marks["teacher_text"][order].to(self.text_queue)
            self.queue_same[place] = marks["same"][order]
            self.queue_pointer.copy_((self.queue_pointer + len(order_G)) % Q)

    def clamped(self) -> dict[str, tuple[Tensor, float, float]]:
        return {"temperature": (self.model.temperature, *TEMPERATURES)}

    def watched(self) -> dict[str, Watched]:
        """How far the states of masked words lie from one another behind fusion. In post-norm blocks what all of them
        have in common may win, and then no word is told from another, whatever the losses of class tokens do."""
        return {
            "word_deviation": Watched(
                self.word_deviation, 0.2, 1.0,
                "behind fusion the states of all masked words are nearly one, so that no word, answer or place can be"
                " learned from them: lower --optim.lr or --init-blocks, or warm up longer",
            )
        } if self.weights["mlm"] else {}  # fmt: skip

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Of ITC equal scores for all columns, of ITM the entropy of its labels."""
        itm = -sum(share * math.log(share) for share in (FALSE_SHARE, 1 - FALSE_SHARE))
        return {"itc": math.log(max(1.0, counts["itc"]) + len(self.queue_same)), "itm": itm}


@dataclass(frozen=True)
class _Seen:
    """What student and teacher made of a batch."""

    image: Encoded
    text: Encoded
    masked: Encoded | None
    shown: Encoded  # to the teacher
    hidden: Encoded | None  # masked texts, to the teacher
