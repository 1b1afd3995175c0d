"""What one FLAVA training step does with a batch (FLAVA section 3.2 and 3.3).

    pairs    unmasked pass of both towers -> contrastive; masked pass of all three encoders -> MMM x 2, ITM
    images   masked pass of the image tower -> MIM
    text     masked pass of the text tower -> MLM

Only that: the public ports also run an unmasked pass in the unimodal batches, which no loss reads.
False pairs are dropped from the contrastive rows and from MMM, but stay as contrastive columns (the matching gate).
If every pair of the global batch is false, the gate is open and all rows count, as in the public ports.

B rows, N patches, T text tokens, M masked positions of the batch, R rows of the masked pass, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.methods.pixels import MethodOfPictures, Pixels
from trivium.methods.positions import needed, places
from trivium.models.encoded import Encoded
from trivium.models.flava import MAX_LOGIT_SCALE, Flava
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.objectives.contrastive import START_LOGIT_BIAS, Scope, contrastive, contrastive_chance
from trivium.objectives.masked import masked_prediction
from trivium.objectives.matching import matching
from trivium.train.protocol import Batch, Key, Rows, Sums

LOSSES = ("mim", "mlm", "mmm_image", "mmm_text", "itm", "contrastive")


class FlavaMethod(MethodOfPictures):
    """FLAVA's six objectives.

    Args:
        image_tokenizer: frozen; None where batches carry their codes (`targets["codes"]`).
        weights: of each of the six losses; a loss of pairs with weight 0 is not computed. The only loss of a batch of
            one modality always is: leave its stream out instead, as the recipe does.
        masked_share: share of the pairs that go through the masked pass (MMM and ITM). 1 is the paper. Less is
            cheaper and **changes training**: the contrastive loss still sees every pair. In eval mode all do.
        contrastive_form: "softmax" is the paper; "sigmoid" is SigLIP's loss, whose bias no use of the model needs: it
            belongs to the method.
        contrastive_scope, num_ranks: what a row sees of the batch, and gives gradient to (objectives/contrastive.py).
    """

    model: Flava
    image_tokenizer: ImageTokenizer | None
    logit_bias: nn.Parameter | None

    def __init__(
        self,
        model: Flava,
        image_tokenizer: ImageTokenizer | None,
        pixels: Pixels,
        weights: dict[str, float] | None = None,
        masked_share: float = 1.0,
        contrastive_form: Literal["softmax", "sigmoid"] = "softmax",
        contrastive_scope: Scope = "global",
        num_ranks: int = 1,
    ) -> None:
        super().__init__(pixels)
        self.model = model
        self.image_tokenizer = image_tokenizer
        self.weights = dict.fromkeys(LOSSES, 1.0) | (weights or {})
        assert set(self.weights) == set(LOSSES), f"no such loss: {sorted(set(self.weights) - set(LOSSES))}"
        self.masked_share = masked_share
        self.contrastive_scope: Scope = contrastive_scope
        self.num_ranks = num_ranks
        sigmoid = contrastive_form == "sigmoid"
        self.register_parameter("logit_bias", nn.Parameter(torch.tensor([START_LOGIT_BIAS])) if sigmoid else None)

    # What each loss is divided by. "all/..." stands beside what the gate cuts, for the case that it opens.

    def counts(self, batch: Batch) -> Sums:
        targets = batch.targets
        if not batch.texts:
            return {"mim": targets["image_mask"].sum()}
        if not batch.images:
            return {"mlm": targets["selected"].sum()}
        matched_B = targets["matched"]
        masked_R = self._masked_rows(batch)
        patches_R, words_R = targets["image_mask"][masked_R].sum(1), targets["selected"][masked_R].sum(1)
        return {
            "itm": torch.tensor(len(masked_R)),
            "itm/true": matched_B[masked_R].sum(),
            "contrastive": matched_B.sum(),
            "mmm_image": (patches_R * matched_B[masked_R]).sum(),
            "mmm_text": (words_R * matched_B[masked_R]).sum(),
            "all/contrastive": torch.tensor(len(batch)),
            "all/mmm_image": patches_R.sum(),
            "all/mmm_text": words_R.sum(),
            "matched": matched_B.sum(),
        }

    def divisors(self, counts: Sums) -> Sums:
        if "matched" in counts and counts["matched"] == 0:
            return counts | {name: counts[f"all/{name}"] for name in ("contrastive", "mmm_image", "mmm_text")}
        return counts

    # The unmasked pass: only the class tokens leave it.

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        if not (batch.images and batch.texts) or not self.weights["contrastive"]:
            return Rows(), None
        text = batch.texts[0]
        pixels_BCHW = self._to(batch.images[0].pixels_BCHW)
        begun: Any = pixels_BCHW
        codes_RN = None
        if torch.is_grad_enabled() and self.weights["mmm_image"]:  # before the towers keep their activations
            codes_RN = self.codes(batch, self._masked_rows(batch))
        if self._both_at_once():
            (image, words), begun = self._encode_both(batch, pixels_BCHW)
        else:
            image = self.model.encode_image(self.pixels(pixels_BCHW), rows=1)
            words = self.model.encode_text(self._to(text.ids_BT), self._text_mask(text.mask_BT), rows=1, pads=False)
        marks = {
            "row": batch.rows_B,
            "kept": batch.targets["matched"],
            "same_image": batch.images[0].same_B,
            "same_text": text.same_B,
        }
        rows = {"image": image.projected, "text": words.projected}
        return Rows(rows, {name: self._to(mark) for name, mark in marks.items()}), (begun, codes_RN)

    def _both_at_once(self) -> bool:
        """Whether the masked pass goes through the towers together with the unmasked one. The first of the two passes
        of GradCache has no graph and no use for it; and with dropout its draws would be others than the second's."""
        masked = any(self.weights[name] for name in ("itm", "mmm_image", "mmm_text"))
        return masked and torch.is_grad_enabled() and self.model.config.dropout == 0

    def _encode_both(
        self, batch: Batch, pixels_BCHW: Tensor
    ) -> tuple[tuple[Encoded, Encoded], tuple[Encoded, Encoded]]:
        text, masked_R = batch.texts[0], self._masked_rows(batch)
        return self.model.encode_pairs_twice(
            self.pixels(pixels_BCHW),
            self._to(batch.targets["image_mask"][masked_R]),
            None if len(masked_R) == len(batch) else self._to(masked_R),
            self._to(torch.cat([text.ids_BT, batch.targets["masked_ids"][masked_R]])),
            self._text_mask(torch.cat([text.mask_BT, text.mask_BT[masked_R]])),
        )

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        if not mine.rows:
            return {}
        gate_is_open = ~everyone.marks["kept"].any()
        loss = contrastive(
            mine.rows["image"],
            mine.rows["text"],
            everyone.rows["image"],
            everyone.rows["text"],
            self.model.logit_scale,
            mine.marks["row"],
            everyone.marks["row"],
            kept_B=mine.marks["kept"] | gate_is_open,
            same_image_B=mine.marks["same_image"],
            same_text_B=mine.marks["same_text"],
            same_image_G=everyone.marks["same_image"],
            same_text_G=everyone.marks["same_text"],
            logit_bias=self.logit_bias,
            scope=self.contrastive_scope,
            num_ranks=self.num_ranks,
        )
        return {"contrastive": loss}

    # The masked pass.

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        if not batch.texts:
            return self._masked_image(batch)
        if not batch.images:
            return self._masked_text(batch)
        return self._masked_pair(batch, states, gate_is_open=bool(counts["matched"] == 0))

    def _masked_image(self, batch: Batch) -> Sums:
        pixels_BCHW = self.pixels(batch.images[0].pixels_BCHW)  # on their way while the indices are made
        masked_BN = batch.targets["image_mask"]
        codes_BN = self.codes(batch, torch.arange(len(batch)))  # before the tower keeps its activations
        index_BQ, positions = needed(F.pad(masked_BN, (1, 0)))  # the class token stands in front
        image = self.model.encode_image(pixels_BCHW, self._to(masked_BN), self._to(index_BQ))
        codes_M = codes_BN.flatten()[self._to(places(masked_BN))]
        logits_MV = self.model.mim_head(image.tokens.flatten(0, 1)[self._to(positions[0])])
        return {"mim": masked_prediction(logits_MV, codes_M)}

    def _masked_text(self, batch: Batch) -> Sums:
        text, selected_BT = batch.texts[0], batch.targets["selected"]
        index_BQ, positions = needed(selected_BT)
        words = self.model.encode_text(
            self._to(batch.targets["masked_ids"]), self._text_mask(text.mask_BT), None, self._to(index_BQ), pads=False
        )
        logits_MV = self.model.mlm_head(words.tokens.flatten(0, 1)[self._to(positions[0])])
        return {"mlm": masked_prediction(logits_MV, self._to(text.ids_BT[selected_BT]))}

    def _masked_pair(self, batch: Batch, states: Any, gate_is_open: bool) -> Sums:
        """states: of `embed`: pictures and texts encoded already, or pixels that are on the device; and the codes of
        the masked pass, or None. Or nothing at all."""
        wanted = [name for name in ("itm", "mmm_image", "mmm_text") if self.weights[name]]
        masked_R = self._masked_rows(batch)
        if not wanted:
            return {}
        matched_R = batch.targets["matched"][masked_R]
        kept_R = matched_R | gate_is_open
        masked_RN, selected_RT = batch.targets["image_mask"][masked_R], batch.targets["selected"][masked_R]
        begun, codes_RN = states or (batch.images[0].pixels_BCHW, None)
        if codes_RN is None and "mmm_image" in wanted:
            codes_RN = self.codes(batch, masked_R)
        if isinstance(begun, tuple):
            image, words = begun
        else:
            pixels_RCHW = self._rows_of(begun, masked_R)
            image = self.model.encode_image(self.pixels(pixels_RCHW), self._to(masked_RN))
            mask_RT = self._text_mask(batch.texts[0].mask_BT[masked_R])
            words = self.model.encode_text(self._to(batch.targets["masked_ids"][masked_R]), mask_RT, pads=False)
        # Order of the fused sequence: its class token, the image's class token, patches, text.
        class_R1 = torch.ones(len(masked_R), 1, dtype=torch.bool)
        patches_RN, words_RT = masked_RN & kept_R[:, None], selected_RT & kept_R[:, None]
        index_RQ, (class_R, _, patch_M, word_M) = needed(class_R1, ~class_R1, patches_RN, words_RT)
        fused = self.model.fuse(image, words, self._to(index_RQ), pads=False)
        tokens = fused.tokens.flatten(0, 1)
        sums: Sums = {}
        if "itm" in wanted:
            sums["itm"] = matching(self.model.itm_head(tokens[self._to(class_R)]), self._to(matched_R))
        if "mmm_image" in wanted:
            assert codes_RN is not None
            codes_M = codes_RN.flatten()[self._to(places(patches_RN))]
            sums["mmm_image"] = masked_prediction(self.model.mmm_image_head(tokens[self._to(patch_M)]), codes_M)
        if "mmm_text" in wanted:
            ids_M = self._to(batch.texts[0].ids_BT[masked_R][words_RT])
            sums["mmm_text"] = masked_prediction(self.model.mmm_text_head(tokens[self._to(word_M)]), ids_M)
        return sums

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        for value, low, high in self.clamped().values():
            value.clamp_(low, high)

    def clamped(self) -> dict[str, tuple[Tensor, float, float]]:
        return {"logit_scale": (self.model.logit_scale, 0.0, MAX_LOGIT_SCALE)}

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Of matching the entropy of its labels; of the contrastive loss equal scores for all columns a row has."""
        if not counts.get("itm"):
            return {}
        true = counts["itm/true"] / counts["itm"]
        entropy = -sum(share * log(share) for share in (true, 1 - true) if share > 0)
        columns = counts["all/contrastive"] / (self.num_ranks if self.contrastive_scope == "local" else 1)
        return {"itm": entropy, "contrastive": contrastive_chance(max(1.0, columns), self.logit_bias is not None)}

    # Small things of the passes above. Indices are made on CPU, where reading them costs no wait for a device.

    def _masked_rows(self, batch: Batch) -> Tensor:
        """Rows of this micro-batch that take the masked pass: an even share of the global batch, by row number."""
        if self.masked_share == 1.0 or not self.training:  # what is measured needs every pair there is
            return torch.arange(len(batch))
        row_B = batch.rows_B.double()
        chosen_B = ((row_B + 1) * self.masked_share).floor() > (row_B * self.masked_share).floor()
        return chosen_B.nonzero()[:, 0]

    def _rows_of(self, pixels_BCHW: Tensor, rows_R: Tensor) -> Tensor:
        if len(rows_R) == len(pixels_BCHW):
            return pixels_BCHW
        return pixels_BCHW[rows_R.to(pixels_BCHW.device, non_blocking=True)]

    def _text_mask(self, mask_BT: Tensor) -> Tensor | None:
        """None where nothing is padded: attention without a mask is the faster one."""
        return None if bool(mask_BT.all()) else self._to(mask_BT)

    def codes(self, batch: Batch, rows: Tensor) -> Tensor:
        """Codes of the pictures of these rows, int64 [R, N]: from the batch, else from the image tokenizer."""
        if "codes" in batch.targets:
            return self._to(batch.targets["codes"][rows])
        assert self.image_tokenizer is not None, "neither codes in the batch nor an image tokenizer"
        pixels_RCHW = self._to(batch.images[-1].pixels_BCHW[rows])
        # In the precision that it was frozen in: products in bfloat16 would take many a neighbour of the code.
        with torch.no_grad(), torch.autocast(pixels_RCHW.device.type, enabled=False):
            return self.image_tokenizer.encode(pixels_RCHW.to(self.mean.dtype) / 255)
