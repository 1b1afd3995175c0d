"""Retrieval on captioned pictures of one's own, several captions to a picture.

Text to image: each caption against all pictures. Image to text: each picture against all captions; the best placed of
its own counts. Ties count against us. Rows that name one picture (`same_image`) are one picture with several captions,
and a row that comes twice, since one path holds another, counts once. Captions of a picture are drawn together for the
interval of a figure.

A model that matches pictures with texts is measured twice, by cosine alone and re-ranked (see reranking.py); one that
says of itself that no loss has reached what it matches by, by cosine alone.

I pictures, T captions, D width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.bundle.untrained import no_cosine
from trivium.data.decode import DecodeError
from trivium.data.task_collate import cut
from trivium.data.tokenizer import UNREAD
from trivium.errors import BadSample, TriviumError
from trivium.evaluate import features, retrieval
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.reranking import SHORTLIST, judges, rerank, untrained
from trivium.evaluate.results import mean_of
from trivium.manifest import write_whole
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
    bundle: Bundle,
    shown: Captioned,
    image_to_text: str,
    text_to_image: str,
    shortlist: int = SHORTLIST,
    folder: Path | None = None,
) -> Evaluation:
    """Recalls and median ranks both ways, under these names; re-ranked under the same with "_reranked" behind, and a
    sentence where that is told to be worse.

    Args:
        shortlist: candidates of each query that are re-ranked; 0: none, as with a model that does not match, or whose
            matching nothing has trained.
        folder: where what each query finds is written, in image_to_text.jsonl and text_to_image.jsonl; None: nowhere.
    """
    found = Evaluation()
    name_of = dict(zip(shown.image_labels.tolist(), shown.names, strict=True))
    pictures = [name_of[label] for label in shown.text_labels.tolist()]  # of each caption
    of_images, of_texts = (shown.names, None), (shown.caption_names, pictures)  # units and their groups
    ways = (
        (image_to_text, shown.images_ID, shown.texts_TD, shown.image_labels, shown.text_labels, of_images),
        (text_to_image, shown.texts_TD, shown.images_ID, shown.text_labels, shown.image_labels, of_texts),
    )
    by_cosine = {}
    for name, asked, candidates, labels, candidate_labels, units in ways:
        ranks = by_cosine[name] = retrieval.ranks_by_cosine(asked, candidates, labels, candidate_labels)
        found.results |= retrieval.summary(ranks, name, *units)
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
    again = None
    if shortlist and isinstance(bundle.model, Matches) and not judges(bundle):
        found.not_applicable.append(f"re-ranking by matching: {untrained(bundle)}")
    elif shortlist and judges(bundle):
        cosine_IT = retrieval.scores(shown.images_ID, shown.texts_TD)
        again = rerank(bundle, shown.picture, shown.captions, cosine_IT, shortlist)
        right_IT = shown.image_labels[:, None] == shown.text_labels
        reranked = {image_to_text: again.image_to_text(right_IT), text_to_image: again.text_to_image(right_IT)}
        for name, wanted, units in ((image_to_text, "texts", of_images), (text_to_image, "pictures", of_texts)):
            ranks = reranked[name]
            found.results |= retrieval.summary(ranks, f"{name}_reranked", *units)
            for cutoff in retrieval.CUTOFFS:
                found.chance[f"{name}_reranked_r{cutoff}"] = found.chance[f"{name}_r{cutoff}"]
            gain = mean_of(retrieval.recalls(ranks) - retrieval.recalls(by_cosine[name]), *units)
            if gain.low is not None and gain.high is not None and gain.high < 0:
                found.headline.append(
                    f"Re-ranking by matching finds fewer {wanted} than the cosine alone: the mean of R@1, 5 and 10 is"
                    f" {-100 * gain.value:.1f} points lower [{-100 * gain.high:.1f}, {-100 * gain.low:.1f}], so rely on"
                    " the cosine here, or train matching longer."
                )
    if folder is not None:
        of_captions = zip(shown.caption_names, shown.captions, pictures, strict=True)
        captions = [{"row": name, "caption": text, "label": picture} for name, text, picture in of_captions]
        try:
            for file, (name, asked, candidates, *_), rows, names in (
                ("image_to_text", ways[0], [{"row": name} for name in shown.names], shown.caption_names),
                ("text_to_image", ways[1], captions, shown.names),
            ):
                orders = {"": (by_cosine[name], retrieval.front_by_cosine(asked, candidates))}
                if again is not None:
                    front = again.texts_in_front() if name == image_to_text else again.pictures_in_front()
                    orders["reranked_"] = reranked[name], front
                write_found(folder / f"{file}.jsonl", rows, names, orders)
        except TriviumError as error:  # the figures are not lost for it
            found.not_applicable.append(f"what each query finds is not written: {error}")
    return found


def write_found(
    path: Path,
    rows: Sequence[Mapping[str, str]],
    names: Sequence[str],
    orders: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """One JSON object a line: a query, the rank of its best right answer and the names of what stands in front.

    Args:
        rows: what is said of each query.
        names: of the candidates.
        orders: what the keys "rank" and "found" begin with, for each order of the candidates -> the ranks, [Q], and the
            numbers of those in front, [Q, FRONT].

    Raises:
        TriviumError: the folder cannot be written to.
    """
    lines = []
    for query, row in enumerate(rows):
        line: dict[str, Any] = dict(row)
        for order, (ranks_Q, front_QF) in orders.items():
            line[f"{order}rank"] = int(ranks_Q[query])
            line[f"{order}found"] = [names[number] for number in front_QF[query].tolist()]
        lines.append(json.dumps(line, ensure_ascii=False))
    write_whole(path, "".join(f"{line}\n" for line in lines))


def run(
    bundle: Bundle,
    source: Source,
    limit: int = 5000,
    *,
    image_to_text: str = "retrieval.pairs.image_to_text",
    text_to_image: str = "retrieval.pairs.text_to_image",
    shortlist: int = SHORTLIST,
    folder: Path | None = None,
) -> Evaluation:
    """Retrieval both ways over a source.

    Args:
        limit: pictures at most: the rows before the first one that names another.
        image_to_text, text_to_image, shortlist, folder: as `measure` takes them.

    Raises:
        TriviumError: no row can be read; nothing has trained what the cosine is taken of.
    """
    if (why := no_cosine(bundle.untrained)) is not None:
        raise TriviumError(f"{why}, so nothing can be found by cosine: train it, as by `trivium finetune retrieval`")
    rows: list[int] = []  # of each picture the first
    pictures: list[int] = []
    names: list[str] = []
    captions: list[str] = []
    picture_of_caption: list[int] = []
    caption_names: list[str] = []
    bad: list[str] = []
    repeated: list[str] = []
    told: set[str] = set()  # names of the rows that were read, from the root
    known: dict[int, str] = {}  # pictures: what is wrong with each, if anything
    end = len(source)
    tokenizer = bundle.tokenizer

    def pixels() -> Iterator[Tensor]:
        nonlocal end
        for row in range(len(source)):
            try:
                sample = source.read(row, row)
            except BadSample as error:
                bad.append(str(error))
                continue
            name, picture = sample.get("name", f"row {row}"), sample["same_image"]
            if (whole_name := os.path.abspath(name)) in told:
                repeated.append(name)
                continue
            told.add(whole_name)
            texts = []
            for number, text in enumerate(sample.get("texts") or [sample["text"]], start=1):
                if tokenizer is None or tokenizer.reads(text):
                    texts.append((number, text))
                else:
                    bad.append(f"{name}, caption {number}: it {UNREAD}")
            if not texts:
                continue
            pixels_CHW = None
            if picture not in known:
                if len(known) >= limit:
                    end = row
                    break
                known[picture] = ""
                try:
                    pixels_CHW = bundle.transform(sample["image"])
                except DecodeError as error:
                    known[picture] = str(error)
            if known[picture]:
                bad.append(f"{name}: {known[picture]}")
                continue
            if pixels_CHW is not None:
                rows.append(row)
                pictures.append(picture)
                names.append(name)
            captions.extend(text for _, text in texts)
            picture_of_caption.extend([picture] * len(texts))
            caption_names.extend(f"{name}, caption {number}" for number, _ in texts)
            if pixels_CHW is not None:
                yield pixels_CHW
        if not pictures:
            first = bad[0] if bad else "no row"
            raise TriviumError(f"none of the captioned pictures could be read; the first: {first}")

    images_ID = features.projected(bundle, pixels())
    shown = Captioned(
        images_ID, features.of_texts(bundle, captions), torch.tensor(pictures), torch.tensor(picture_of_caption), names,
        caption_names, captions, lambda number: source.read(rows[number], rows[number])["image"],
    )  # fmt: skip
    found = measure(bundle, shown, image_to_text, text_to_image, shortlist, folder)
    if end < len(source):
        found.not_applicable.append(f"pairs beyond the first {end:,} of {len(source):,}")
    if repeated:
        found.not_applicable.append(f"rows that come again ({len(repeated):,}, the first: {repeated[0]})")
    found.not_applicable += [f"a pair that cannot be read: {sentence}" for sentence in bad]
    return found
