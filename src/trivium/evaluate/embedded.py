"""The evaluation suite of the embedded drawings: what did a model learn that it can use on drawings it never saw?

Noto, one of four drawing styles, is in no training stream; concepts of the splits "val" and "test" are in none either.

* ``retrieval.style``     concepts seen in training, in the style that was held out: 1,366 queries
* ``retrieval.concepts``  concepts never seen, in that style: 160 queries (split "test")
  Text to image: the CLDR name alone against all 1,678 Noto pictures. Image to text: a Noto picture against all 1,678
  names. Right answers have the same code points or a byte-equal Noto picture.
* ``retrieval.style.image_to_image``  the 1,366 Noto pictures against every train-split picture of the other styles, by
  three readings of the image encoder, beside pictures of 16 x 16 pixels less their mean picture.
  With a model that matches, ``..._reranked`` beside each: its head looks again at the 16 that stand in front.
* ``zero_shot``, ``knn``, ``probe``   group (9) and subgroup (98) of all Noto pictures that have one. Gallery and
  training set: train-split pictures of the other styles; C of the probe is chosen on their val split.
  ``knn.other_concepts`` leaves a query's own concept out of the gallery: then the same thing in another style no
  longer helps, only what looks alike.
* ``itm``                 each val-split picture once with its own name and once with another's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.bundle.untrained import no_cosine
from trivium.data.decode import decode
from trivium.data.embedded import HELD_OUT_STYLE, STYLES, Emoji, concept_numbers, emoji
from trivium.evaluate import features, knn, linear_probe, matching, reconstruction, retrieval, zero_shot
from trivium.evaluate.features import ImageFeatures
from trivium.evaluate.reconstruction import Reconstruction
from trivium.evaluate.reranking import judges, rerank, untrained
from trivium.evaluate.results import Results, mean_of
from trivium.evaluate.walls import Wall, picture_wall, text_wall
from trivium.models.encoded import EncodesText, Matches

PROBE_READING = "class_token"  # of knn and probe, as in the FLAVA paper
SHORTLIST = 16  # of 1,678 candidates: with 32 a tiny FLAVA takes 50 seconds of one core for it, a tiny ALBEF 16


@dataclass(frozen=True)
class Figure:
    """A picture of the report that only one family has: attention maps, say."""

    title: str
    note: str  # what it shows and how to read it
    image: str  # a data: address, as charts.py makes them
    alt: str


@dataclass
class Evaluation:
    """What the suite found, and what a report shows beside the figures."""

    results: Results = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)  # of some of the results: what guessing would give
    walls: list[Wall] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    headline: list[str] = field(default_factory=list)  # sentences that a page begins with, beside those of report.py
    # What is to be known of the figures, before all of these: what held-out rows share with training, say.
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each part, in order
    not_applicable: list[str] = field(default_factory=list)  # a sentence for each thing not measured, with the reason
    is_final: bool = True  # False: a row could not be read that may be another time


@dataclass(frozen=True)
class Drawings:
    """Records with what was computed of their pictures. Tensors have one row per record."""

    records: list[Emoji]
    pixels: list[np.ndarray]  # uint8 [H, W, 3]
    of_model: ImageFeatures
    concepts: Tensor  # int64; equal where code points are equal, or Noto pictures byte for byte

    def split(self, name: str) -> Tensor:
        """bool, True for the rows of this split."""
        return torch.tensor([record.split == name for record in self.records])

    def names(self, rows_B: Tensor) -> list[str]:
        """What outcomes call the records of these rows (bool [B]): the same in every evaluation."""
        chosen = [record for record, taken in zip(self.records, rows_B.tolist(), strict=True) if taken]
        return [_unit(record) for record in chosen]


def run(bundle: Bundle, false_share: float = 0.5, say: Callable[[str], None] = lambda _: None) -> Evaluation:
    """Evaluate a Bundle on the embedded drawings.

    Args:
        false_share: share of false pairs in training, which the log-odds of matching are corrected for.
        say: told the name of each part as it begins.
    """
    found = Evaluation()

    @contextmanager
    def part(name: str) -> Iterator[None]:
        say(name)
        begun = time.perf_counter()
        yield
        found.seconds[name] = time.perf_counter() - begun

    was_training = bundle.model.training
    bundle.model.eval()
    try:
        with part("encoding the drawings"):
            concepts = concept_numbers(emoji(HELD_OUT_STYLE))
            held_out, gallery = queries_and_gallery(bundle)
            validation = drawings(bundle, other_styles("val"), concepts)
        images_BD = held_out.of_model.projected
        if images_BD is not None and isinstance(bundle.model, EncodesText):
            with part("encoding the names"):
                names_BD = features.of_texts(bundle, [record.name for record in held_out.records])
            with part("retrieval"):
                retrieve(found, held_out, images_BD, names_BD)
            if judges(bundle):
                with part("re-ranking"):
                    _reranking(found, bundle, held_out, images_BD, names_BD)
            with part("zero-shot classification"):
                _zero_shot(found, bundle, held_out, images_BD)
            found.walls.append(text_wall(held_out.records, names_BD, images_BD, held_out.concepts))
        else:
            why = no_cosine(bundle.untrained) or f"{type(bundle.model).__name__} reads no texts"
            found.not_applicable.append(f"retrieval by text and zero-shot classification: {why}")
        with part("retrieval by pictures"):
            _image_to_image(found, held_out, gallery)
        with part("nearest neighbours"):
            _knn(found, held_out, gallery)
        with part("linear probe"):
            _probe(found, held_out, gallery, validation)
        with part("image-text matching"):
            match(found, bundle, held_out, validation, false_share)
        with part("pictures for the report"):
            (asked_BD, shown_BD) = (next(iter(drawn.of_model.readings().values())) for drawn in (held_out, gallery))
            found.walls.append(
                picture_wall(held_out.records, asked_BD, held_out.concepts, gallery.records, shown_BD, gallery.concepts)
            )
            shown = torch.nonzero(held_out.split("test"))[:, 0].tolist()[::27]
            found.reconstructions = reconstruction.reconstruct(
                bundle, [held_out.pixels[row] for row in shown], [held_out.records[row].name for row in shown]
            )
    finally:
        bundle.model.train(was_training)
    return found


def queries_and_gallery(bundle: Bundle) -> tuple[Drawings, Drawings]:
    """The held-out style, and the train-split pictures of the others."""
    concepts = concept_numbers(emoji(HELD_OUT_STYLE))
    return drawings(bundle, emoji(HELD_OUT_STYLE), concepts), drawings(bundle, other_styles("train"), concepts)


def _unit(record: Emoji) -> str:
    return f"{record.style} {record.codepoints} {record.name}"


def other_styles(split: str) -> list[Emoji]:
    """The records of a split in the styles that are trained on."""
    return [record for style in STYLES if style != HELD_OUT_STYLE for record in emoji(style, split)]


def drawings(bundle: Bundle, records: list[Emoji], concepts: dict[str, int]) -> Drawings:
    """Records with what a model makes of their pictures.

    concepts: code points -> number; a record without one (Noto does not draw it) has -1, which no query has."""
    pixels = [decode(record.image) for record in records]
    numbers = torch.tensor([concepts.get(record.codepoints, -1) for record in records])
    return Drawings(records, pixels, features.of_pictures(bundle, pixels), numbers)


# ----------------------------------------------------------------------------------------------- retrieval


def retrieve(found: Evaluation, noto: Drawings, images_BD: Tensor, names_BD: Tensor) -> None:
    """Names and pictures of the held-out style, both ways. images_BD, names_BD: of its records, in a common space."""
    for protocol, split in (("style", "train"), ("concepts", "test")):
        queries = noto.split(split)
        for direction, asked_BD, candidates_BD in (
            ("text_to_image", names_BD, images_BD),
            ("image_to_text", images_BD, names_BD),
        ):
            ranks = retrieval.ranks_by_cosine(asked_BD[queries], candidates_BD, noto.concepts[queries], noto.concepts)
            name = f"retrieval.{protocol}.{direction}"
            found.results |= retrieval.summary(ranks, name, noto.names(queries))
            right = (noto.concepts[queries, None] == noto.concepts).sum(1)
            for cutoff in retrieval.CUTOFFS:
                found.chance[f"{name}_r{cutoff}"] = retrieval.chance_recall(right, len(noto.records), cutoff)


def _reranking(found: Evaluation, bundle: Bundle, noto: Drawings, images_BD: Tensor, names_BD: Tensor) -> None:
    """The same ranks, of all records, once the head of matching has looked at those in front."""
    names = [record.name for record in noto.records]
    again = rerank(bundle, noto.pixels.__getitem__, names, retrieval.scores(images_BD, names_BD), SHORTLIST)
    right_BB = noto.concepts[:, None] == noto.concepts
    for direction, ranks_B in (
        ("text_to_image", again.text_to_image(right_BB)),
        ("image_to_text", again.image_to_text(right_BB)),
    ):
        for protocol, split in (("style", "train"), ("concepts", "test")):
            queries, name = noto.split(split), f"retrieval.{protocol}.{direction}"
            found.results |= retrieval.summary(ranks_B[queries], f"{name}_reranked", noto.names(queries))
            for cutoff in retrieval.CUTOFFS:
                found.chance[f"{name}_reranked_r{cutoff}"] = found.chance[f"{name}_r{cutoff}"]


def _image_to_image(found: Evaluation, noto: Drawings, gallery: Drawings) -> None:
    train = noto.split("train")
    queries, query_concepts = noto.of_model[train], noto.concepts[train]
    theirs = gallery.of_model.readings()
    readings = {name: (asked, theirs[name]) for name, asked in queries.readings().items()}
    headline_reading = next(iter(readings))
    gallery_pixels = features.of_pixels(gallery.pixels)
    noto_pixels = features.of_pixels([noto.pixels[row] for row in train.nonzero()[:, 0].tolist()])
    mean = gallery_pixels.mean(dim=0)
    readings["pixels"] = (noto_pixels - mean, gallery_pixels - mean)
    for name, (asked, candidates) in readings.items():
        ranks = retrieval.ranks_by_cosine(asked, candidates, query_concepts, gallery.concepts)
        found.results[f"retrieval.style.image_to_image.{name}_r1"] = mean_of((ranks <= 1).numpy(), noto.names(train))
    headline = found.results[f"retrieval.style.image_to_image.{headline_reading}_r1"]
    found.results["retrieval.style.image_to_image_r1"] = headline
    right = (query_concepts[:, None] == gallery.concepts).sum(1)
    found.chance["retrieval.style.image_to_image_r1"] = retrieval.chance_recall(right, len(gallery.records), 1)


# ------------------------------------------------------------------------------------------ classification


def labels_of(level: str, *sets: Sequence[Emoji]) -> tuple[list[str], list[Tensor]]:
    """Names of the classes (of the first set), and int64 labels of each set; -1 where a record has none of them."""
    names = sorted({getattr(record, level) for record in sets[0]} - {""})
    number = {name: index for index, name in enumerate(names)}
    return names, [torch.tensor([number.get(getattr(record, level), -1) for record in records]) for records in sets]


def _accuracy(found: Evaluation, name: str, predicted: Tensor, labels: Tensor, units: list[str]) -> None:
    found.results[name] = mean_of((predicted == labels).numpy(), units)
    found.chance[name] = float(labels.bincount().max() / len(labels))  # always the commonest class


def _zero_shot(found: Evaluation, bundle: Bundle, noto: Drawings, images_BD: Tensor) -> None:
    for level in ("group", "subgroup"):
        names, (labels,) = labels_of(level, noto.records)
        several = [tuple(part.strip() for part in re.split(r"[&/,]", name)) for name in names]  # "food & drink" is two
        classes_KD = zero_shot.class_vectors(several, lambda texts: features.of_texts(bundle, texts))
        known = labels >= 0
        predicted = zero_shot.predict(images_BD[known], classes_KD)
        _accuracy(found, f"zero_shot.{level}", predicted, labels[known], noto.names(known))


def _knn(found: Evaluation, noto: Drawings, gallery: Drawings) -> None:
    votes(found, "knn", noto, gallery, getattr(noto.of_model, PROBE_READING), getattr(gallery.of_model, PROBE_READING))


def votes(found: Evaluation, name: str, noto: Drawings, gallery: Drawings, queries_BD: Tensor, rows_BD: Tensor) -> None:
    """Group and subgroup of the queries by their neighbours, with and without their own concept in the gallery.

    queries_BD, rows_BD: any features of the pictures of noto and of the gallery.
    """
    # Linked over all styles: a picture of the gallery that equals one of the query's concept is left out as well.
    everywhere = concept_numbers(emoji())
    own, theirs = (torch.tensor([everywhere[r.codepoints] for r in drawn.records]) for drawn in (noto, gallery))
    for level in ("group", "subgroup"):
        _, (labels, gallery_labels) = labels_of(level, noto.records, gallery.records)
        known, usable = labels >= 0, gallery_labels >= 0
        shown, answers = rows_BD[usable], gallery_labels[usable]
        predicted = knn.predict(queries_BD[known], shown, answers)
        _accuracy(found, f"{name}.{level}", predicted, labels[known], noto.names(known))
        predicted = knn.predict(queries_BD[known], shown, answers, left_out=(own[known], theirs[usable]))
        _accuracy(found, f"{name}.other_concepts.{level}", predicted, labels[known], noto.names(known))


def _probe(found: Evaluation, noto: Drawings, gallery: Drawings, validation: Drawings) -> None:
    sets = (noto, gallery, validation)
    queries, rows, checks = (getattr(drawn.of_model, PROBE_READING) for drawn in sets)
    for level in ("group", "subgroup"):
        _, (labels, gallery_labels, check_labels) = labels_of(level, *(drawn.records for drawn in sets))
        known, usable, checked = labels >= 0, gallery_labels >= 0, check_labels >= 0
        solver = linear_probe.Solver(rows[usable], gallery_labels[usable])
        probe = linear_probe.sweep(solver, checks[checked], check_labels[checked])
        _accuracy(found, f"probe.{level}", probe.predict(queries[known]), labels[known], noto.names(known))


# ------------------------------------------------------------------------------------------------ matching


def match(found: Evaluation, bundle: Bundle, noto: Drawings, validation: Drawings, false_share: float) -> None:
    """Each val-split picture with its own name and with another's. validation: those of the other styles."""
    model = bundle.model
    if not isinstance(model, Matches):
        found.not_applicable.append(f"image-text matching: {type(model).__name__} has no `match`")
        return
    if not judges(bundle):
        found.not_applicable.append(f"image-text matching, and re-ranking by it: {untrained(bundle)}")
        return
    records = validation.records + [record for record in noto.records if record.split == "val"]
    pixels = validation.pixels + [noto.pixels[row] for row in noto.split("val").nonzero()[:, 0].tolist()]
    own = [record.name for record in records]
    others = [own[row] for row in false_partners(records)]
    own_N, other_N = matching.scores(bundle, pixels, own, others, false_share)
    balanced = matching.balanced(own_N, other_N, [_unit(record) for record in records])
    found.results |= {f"itm.{name}": result for name, result in balanced.items()}
    found.chance |= {"itm.accuracy": 0.5, "itm.auroc": 0.5}


def false_partners(records: Sequence[Emoji], seed: int = 0) -> list[int]:
    """For each record the row of another whose name is wrong for it: each row stands once where that can be.

    A name is wrong when neither it, nor the concept, nor the picture is the record's own.
    """
    linked = concept_numbers(records)
    order = np.random.default_rng(seed).permutation(len(records)).tolist()
    partners = [0] * len(records)
    for place, row in enumerate(order):
        for step in range(1, len(order)):
            other = order[(place + step) % len(order)]
            mine, theirs = records[row], records[other]
            if linked[mine.codepoints] != linked[theirs.codepoints] and mine.name != theirs.name:
                partners[row] = other
                break
        else:
            raise AssertionError("all of these pictures show one thing: there is no false pair")
    return partners
