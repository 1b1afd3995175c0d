"""Re-ranking: the matching head looks again at what stands in front by cosine (ALBEF, section 4.1).

For each picture the k texts of highest cosine, for each text the k pictures, are fused pair by pair, and ordered by the
logit of "belong together". What is on no short list keeps its order by cosine, behind all of those: with k candidates
or more nothing of the cosine is left.

A pair that stands on both lists is fused once, since the logit does not know who asked. Pairs are taken picture by
picture, so that its states, and in ALBEF its keys and values, are computed once for all of its texts, and texts of like
length go in together. The scores are those of a loop over queries.

I pictures, T texts, D width, Q queries, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.bundle.untrained import no_matching
from trivium.evaluate.retrieval import CHUNK, front, ranks
from trivium.models.encoded import Encoded, EncodesText, Matches

# Candidates of a query that are looked at again. In the paper 128 on Flickr30K and 256 on COCO; from 16 on it hardly
# matters there, and what it costs grows with it.
SHORTLIST = 32
TEXTS_AT_ONCE = 256  # beside one picture
PICTURES_AT_ONCE = 64
TEXTS_ENCODED = 512
UNTRAINED = "no loss has trained what this model reads pictures and texts together with"


@dataclass(frozen=True)
class Reranked:
    """Scores of the pairs on either short list, by which the queries of one direction are ranked."""

    cosine_IT: Tensor  # float32
    logit_IT: Tensor  # float32; minus infinity where a pair is on no list
    texts_of_picture_IT: Tensor  # bool, on the short list of the picture
    pictures_of_text_IT: Tensor  # bool, on that of the text

    def image_to_text(self, right_IT: Tensor) -> Tensor:
        """Rank of the best right text of each picture, int64 [I]."""
        return _ranks(self.cosine_IT, self.logit_IT, self.texts_of_picture_IT, right_IT)

    def text_to_image(self, right_IT: Tensor) -> Tensor:
        """Rank of the best right picture of each text, int64 [T]."""
        return _ranks(self.cosine_IT.T, self.logit_IT.T, self.pictures_of_text_IT.T, right_IT.T)

    def texts_in_front(self) -> Tensor:
        """Of each picture, int64 [I, at most FRONT]."""
        return _front(self.cosine_IT, self.logit_IT, self.texts_of_picture_IT)

    def pictures_in_front(self) -> Tensor:
        """Of each text, int64 [T, at most FRONT]."""
        return _front(self.cosine_IT.T, self.logit_IT.T, self.pictures_of_text_IT.T)


def judges(bundle: Bundle) -> bool:
    """Whether a model matches pictures with texts, and nothing says that no loss has reached what it does that with."""
    return isinstance(bundle.model, Matches) and untrained(bundle) is None


def untrained(bundle: Bundle) -> str | None:
    """Why nothing is to be asked of a model that matches; None where nothing says so."""
    return UNTRAINED if bundle.fusion_trained is False else no_matching(bundle.untrained)


@torch.inference_mode()
def rerank(
    bundle: Bundle, picture: Callable[[int], Any], texts: list[str], cosine_IT: Tensor, shortlist: int = SHORTLIST
) -> Reranked:
    """Fuse what stands on the short lists.

    Args:
        bundle: of a model that matches.
        picture: of each number below I what `Bundle.encode_image` takes; asked once for those on a list.
        texts: T of them.
        cosine_IT: float32, of pictures and texts.
    """
    model = bundle.model
    assert isinstance(model, Matches)
    of_picture_IT = _nearest(cosine_IT, shortlist)
    of_text_IT = _nearest(cosine_IT.T, shortlist).T
    wanted_IT = of_picture_IT | of_text_IT
    logit_IT = torch.full_like(cosine_IT, -torch.inf)
    was_training = model.training
    model.eval()
    try:
        kept = _Texts.of(bundle, texts)
        for first in range(0, len(cosine_IT), PICTURES_AT_ONCE):
            several = range(first, min(first + PICTURES_AT_ONCE, len(cosine_IT)))
            images = bundle.encode_image([picture(number) for number in several]).split(1)
            for number, image in zip(several, images, strict=True):
                rows = kept.by_length[wanted_IT[number, kept.by_length]]
                for part in rows.split(TEXTS_AT_ONCE):
                    fused = model.fuse(image, kept.encoded(part, bundle.device), rows=1)
                    logit_IT[number, part] = model.match(fused)[:, 1].float().cpu()
    finally:
        model.train(was_training)
    return Reranked(cosine_IT, logit_IT, of_picture_IT, of_text_IT)


@dataclass(frozen=True)
class _Texts:
    """Encoded texts, kept where they take no memory of the device."""

    parts: list[Encoded]
    part_T: np.ndarray  # of each text, and its row in it
    row_T: np.ndarray
    by_length: Tensor  # int64 [T], the shortest first

    @classmethod
    def of(cls, bundle: Bundle, texts: list[str]) -> _Texts:
        """Encoded in the order of their length in tokens, so that little of what is kept is padding."""
        assert bundle.tokenizer is not None and isinstance(bundle.model, EncodesText)
        lengths = [len(ids) for ids in bundle.tokenizer.encode(texts, bundle.max_length)]
        order = np.argsort(lengths, kind="stable")
        parts = []
        for first in range(0, len(order), TEXTS_ENCODED):
            encoded = bundle.encode_text([texts[number] for number in order[first : first + TEXTS_ENCODED]])
            mask = None if encoded.mask is None else encoded.mask.cpu()
            parts.append(Encoded(encoded.states.cpu(), mask, torch.nn.Identity(), None))
        place_T = np.empty(len(order), dtype=np.int64)
        place_T[order] = np.arange(len(order))
        return cls(parts, place_T // TEXTS_ENCODED, place_T % TEXTS_ENCODED, torch.from_numpy(order.copy()))

    def encoded(self, numbers: Tensor, device: torch.device) -> Encoded:
        """Those of these numbers, in this order, padded to the longest."""
        parts, rows = self.part_T[numbers.numpy()], torch.from_numpy(self.row_T[numbers.numpy()])
        longest = max(self.parts[part].states.shape[1] for part in np.unique(parts))
        states, masks = [], []
        for part in dict.fromkeys(parts.tolist()):
            kept, chosen = self.parts[part], rows[torch.from_numpy(parts == part)]
            pads = longest - kept.states.shape[1]
            states.append(torch.nn.functional.pad(kept.states[chosen], (0, 0, 0, pads)))
            assert kept.mask is not None
            masks.append(torch.nn.functional.pad(kept.mask[chosen], (0, pads)))
        mask_RT = torch.cat(masks)
        longest = int(mask_RT.sum(1).max())
        return Encoded(
            torch.cat(states)[:, :longest].to(device), mask_RT[:, :longest].to(device), torch.nn.Identity(), None
        )


def _nearest(scores_QC: Tensor, shortlist: int) -> Tensor:
    """bool [Q, C], True for the candidates of each query that stand in front."""
    chosen = scores_QC.topk(min(shortlist, scores_QC.shape[1]), dim=1).indices
    return torch.zeros_like(scores_QC, dtype=torch.bool).scatter_(1, chosen, True)


def _ranks(cosine_QC: Tensor, logit_QC: Tensor, listed_QC: Tensor, right_QC: Tensor) -> Tensor:
    return torch.cat([ranks(scores_QC, right_QC[rows]) for rows, scores_QC in _scores(cosine_QC, logit_QC, listed_QC)])


def _front(cosine_QC: Tensor, logit_QC: Tensor, listed_QC: Tensor) -> Tensor:
    return torch.cat([front(scores_QC) for _, scores_QC in _scores(cosine_QC, logit_QC, listed_QC)])


def _scores(cosine_QC: Tensor, logit_QC: Tensor, listed_QC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """By which the candidates are ordered, a chunk of queries at a time."""
    for first in range(0, len(cosine_QC), CHUNK):
        rows = slice(first, first + CHUNK)
        logits, listed = logit_QC[rows].double(), listed_QC[rows]
        # Cosines lie between -1 and 1: less 2, and the lowest logit, all of them stand behind every logit.
        lowest = torch.where(listed, logits, torch.inf).min(1, keepdim=True).values
        yield rows, torch.where(listed, logits, lowest - 2 + cosine_QC[rows])
