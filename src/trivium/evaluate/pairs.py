"""Retrieval on captioned pictures of one's own, several captions to a picture.

Text to image: each caption against all pictures. Image to text: each picture against all captions; the best placed of
its own counts. Ties count against us. Pictures that share a number (`same_image`) are right answers for each other.

A model that matches pictures with texts is measured twice, by cosine alone and re-ranked (see reranking.py).

I pictures, T captions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.data.decode import DecodeError
from trivium.data.task_collate import cut
from trivium.errors import BadSample, TriviumError
from trivium.evaluate import features, retrieval
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.reranking import SHORTLIST, rerank
from trivium.models.encoded import Matches
from trivium.train.protocol import Source


@dataclass(frozen=True)
class Captioned:
    """Encoded pictures and captions that are to find each other."""

    images_ID: Tensor  # in the space that both share
    texts_TD: Tensor
    image_labels: Tensor  # int64 [I] and [T]; equal numbers belong together
    text_labels: Tensor
    names: list[str]  # of each picture and of each caption, kept with their outcomes
    caption_names: list[str]
    captions: list[str]
    picture: Callable[[int], Any]  # of each number below I, what `Bundle.encode_image` takes


def measure(
    bundle: Bundle, shown: Captioned, image_to_text: str, text_to_image: str, shortlist: int = SHORTLIST
) -> Evaluation:
    """Recalls and median ranks both ways, under these names; re-ranked under the same with "_reranked" behind.

    Args:
        shortlist: candidates of each query that are re-ranked; 0: none, as with a model that does not match.
    """
    found = Evaluation()
    ways = (
        (image_to_text, shown.images_ID, shown.texts_TD, shown.image_labels, shown.text_labels, shown.names),
        (text_to_image, shown.texts_TD, shown.images_ID, shown.text_labels, shown.image_labels, shown.caption_names),
    )
    for name, asked, candidates, labels, candidate_labels, units in ways:
        ranks = retrieval.ranks_by_cosine(asked, candidates, labels, candidate_labels)
        found.results |= retrieval.summary(ranks, name, units)
        right = (labels[:, None] == candidate_labels).sum(1)
        for cutoff in retrieval.CUTOFFS:
            chance = retrieval.chance_recall(right, len(candidates), cutoff)
            found.chance[f"{name}_r{cutoff}"] = chance
    assert bundle.tokenizer is not None, "who encodes text has one"
    named = list(zip(shown.caption_names, shown.captions, strict=True))
    found.not_applicable += [
        f"the ends of long captions: {sentence}"
        for sentence in cut("captions", bundle.tokenizer, bundle.max_length, named)
    ]
    if not shortlist or not isinstance(bundle.model, Matches):
        return found
    cosine_IT = retrieval.scores(shown.images_ID, shown.texts_TD)
    again = rerank(bundle, shown.picture, shown.captions, cosine_IT, shortlist)
    right_IT = shown.image_labels[:, None] == shown.text_labels
    for name, ranks, units in (
        (image_to_text, again.image_to_text(right_IT), shown.names),
        (text_to_image, again.text_to_image(right_IT), shown.caption_names),
    ):
        found.results |= retrieval.summary(ranks, f"{name}_reranked", units)
        for cutoff in retrieval.CUTOFFS:
            found.chance[f"{name}_reranked_r{cutoff}"] = found.chance[f"{name}_r{cutoff}"]
    return found


def run(
    bundle: Bundle,
    source: Source,
    limit: int = 5000,
    *,
    image_to_text: str = "retrieval.pairs.image_to_text",
    text_to_image: str = "retrieval.pairs.text_to_image",
    shortlist: int = SHORTLIST,
) -> Evaluation:
    """Retrieval both ways over the first `limit` rows of a source. Other arguments: as `measure` takes them.

    Raises:
        TriviumError: no row can be read.
    """
    rows: list[int] = []
    concepts: list[int] = []
    names: list[str] = []
    captions: list[str] = []
    caption_concepts: list[int] = []
    caption_names: list[str] = []
    bad: list[str] = []

    def pixels() -> Iterator[Tensor]:
        for row in range(min(limit, len(source))):
            try:
                sample = source.read(row, row)
            except BadSample as error:
                bad.append(str(error))
                continue
            name = sample.get("name", f"row {row}")
            try:
                pixels_CHW = bundle.transform(sample["image"])
            except DecodeError as error:
                bad.append(f"{name}: {error}")
                continue
            rows.append(row)
            concepts.append(sample["same_image"])
            texts = sample.get("texts") or [sample["text"]]
            captions.extend(texts)
            caption_concepts.extend([sample["same_text"]] * len(texts))
            names.append(name)
            caption_names.extend(f"{name}, caption {number}" for number in range(1, len(texts) + 1))
            yield pixels_CHW
        if not concepts:
            first = bad[0] if bad else "no row"
            raise TriviumError(f"none of the captioned pictures could be read; the first: {first}")

    images_ID = features.projected(bundle, pixels())
    shown = Captioned(
        images_ID, features.of_texts(bundle, captions), torch.tensor(concepts), torch.tensor(caption_concepts), names,
        caption_names, captions, lambda number: source.read(rows[number], rows[number])["image"],
    )  # fmt: skip
    found = measure(bundle, shown, image_to_text, text_to_image, shortlist)
    if len(source) > limit:
        found.not_applicable.append(f"pairs beyond the first {limit:,} of {len(source):,}")
    found.not_applicable += [f"a pair that cannot be read: {sentence}" for sentence in bad]
    return found
