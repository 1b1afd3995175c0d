"""Retrieval on captioned pictures of one's own, several captions to a picture.

Text to image: each caption against all pictures. Image to text: each picture against all captions; the best placed of
its own counts. Ties count against us. Pictures that share a number (`same_image`) are right answers for each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.data.decode import DecodeError
from trivium.errors import BadSample, TriviumError
from trivium.evaluate import features, retrieval
from trivium.evaluate.embedded import Evaluation
from trivium.train.protocol import Source


def run(bundle: Bundle, source: Source, limit: int = 5000) -> Evaluation:
    """Retrieval both ways over the first `limit` rows of a source.

    Raises:
        TriviumError: no row can be read.
    """
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
                pixels_CHW = bundle.transform(sample["image"])
            except (BadSample, DecodeError) as error:
                bad.append(str(error))
                continue
            concepts.append(sample["same_image"])
            texts = sample.get("texts") or [sample["text"]]
            captions.extend(texts)
            caption_concepts.extend([sample["same_text"]] * len(texts))
            names.append(sample.get("name", f"row {row}"))
            caption_names.extend(f"{names[-1]}, caption {number}" for number in range(1, len(texts) + 1))
            yield pixels_CHW
        if not concepts:
            first = bad[0] if bad else "no row"
            raise TriviumError(f"none of the captioned pictures could be read; the first: {first}")

    images_BD = features.projected(bundle, pixels())
    texts_BD = features.of_texts(bundle, captions)
    image_labels, text_labels = torch.tensor(concepts), torch.tensor(caption_concepts)
    found = Evaluation()
    for name, asked, candidates, labels, candidate_labels, queries in (
        ("text_to_image", texts_BD, images_BD, text_labels, image_labels, caption_names),
        ("image_to_text", images_BD, texts_BD, image_labels, text_labels, names),
    ):
        ranks = retrieval.ranks_by_cosine(asked, candidates, labels, candidate_labels)
        found.results |= retrieval.summary(ranks, f"retrieval.pairs.{name}", queries)
        right = (labels[:, None] == candidate_labels).sum(1)
        for cutoff in retrieval.CUTOFFS:
            chance = retrieval.chance_recall(right, len(candidates), cutoff)
            found.chance[f"retrieval.pairs.{name}_r{cutoff}"] = chance
    if len(source) > limit:
        found.not_applicable.append(f"pairs beyond the first {limit:,} of {len(source):,}")
    found.not_applicable += [f"a pair that cannot be read: {sentence}" for sentence in bad]
    return found
