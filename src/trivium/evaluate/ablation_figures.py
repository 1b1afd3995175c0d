"""What the ablation measures of a model: as much of vision, language and both together as it was trained for.

Vision: the subgroup of Noto drawings by nearest neighbours and by a linear probe, where no drawing of the same concept
is in the gallery; the category of clip art by both. Language: group and subgroup of things never seen, from the name
alone, by a linear probe; masked words of their names; SST-2, CoLA and RTE by a linear probe, where they are on the
disk. Multimodal: names and pictures both ways, true pairs above false ones.

A probe reads the class token (CLIP's text tower: the end token) after the final norm, frozen. Its C is chosen on a
fifth of its training samples.

B texts, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.data.decode import DecodeError, decode
from trivium.data.embedded import HELD_OUT_STYLE, clipart, concept_numbers, emoji
from trivium.data.glue import GLUE, read_glue
from trivium.data.labelled import Row, Splits
from trivium.errors import BadSample
from trivium.evaluate import embedded, features, knn, linear_probe, matching, metrics, pairs
from trivium.evaluate.datasets.pictures import held_out
from trivium.evaluate.embedded import PROBE_READING, Drawings, Evaluation
from trivium.evaluate.linear_probe import Probe, Solver
from trivium.evaluate.results import Results, mean_of
from trivium.train.protocol import Sample, Source

FOLDS = 5  # of the concepts: a probe is fitted on the others
GLUE_TASKS = {"sst2": "accuracy", "cola": "matthews", "rte": "accuracy"}
MOST_PAIRS = 2_000  # held-out ones, each of another picture, that are matched with a false text too
MOST_SENTENCES = 5_000  # of a task of GLUE to train a probe on, evenly spread


def measure(
    bundle: Bundle,
    abilities: Collection[str],
    false_share: float = 0.5,
    pairs_held_out: Source | None = None,
    root: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Results:
    """The figures that a model can give.

    Args:
        abilities: of "vision", "language", "masked words", "retrieval" and "matching".
        false_share: of the pairs in training (see evaluate/matching.py).
        pairs_held_out: retrieval is measured on them; None: on the embedded drawings.
        root: the folder of GLUE; None: without it.
    """
    found = Evaluation()
    was_training = bundle.model.training
    bundle.model.eval()
    try:
        if "vision" in abilities or ("retrieval" in abilities and pairs_held_out is None):
            say("the drawings")
            noto, gallery = embedded.queries_and_gallery(bundle)
        if "vision" in abilities:
            _subgroups(found, noto, gallery, bundle.device)
            say("the clip art")
            _categories(found, bundle)
        if "language" in abilities:
            say("names alone")
            _names(found, bundle)
            if root is not None:
                for task in GLUE_TASKS:
                    say(task)
                    _glue(found, bundle, task, root)
        if "masked words" in abilities:
            say("masked words")
            _masked_words(found, bundle)
        if "retrieval" in abilities and pairs_held_out is not None:
            say("the held-out pairs")
            both_ways = pairs.run(bundle, pairs_held_out, shortlist=0)
            found.results |= both_ways.results
            for sentence in both_ways.not_applicable:  # what cannot be read, and what is beyond its limit
                say(f"left out: {sentence}")
        elif "retrieval" in abilities:
            say("names and pictures")
            assert noto.of_model.projected is not None
            names_BD = features.of_texts(bundle, [record.name for record in noto.records])
            embedded.retrieve(found, noto, noto.of_model.projected, names_BD)
        if "matching" in abilities and pairs_held_out is not None:
            say("matching of the held-out pairs")
            if not _match_pairs(found, bundle, pairs_held_out, false_share):
                say("no held-out picture has another's caption to be told from, so matching is not measured")
        elif "matching" in abilities:
            say("matching")
            validation = embedded.drawings(bundle, embedded.other_styles("val"), concept_numbers(emoji(HELD_OUT_STYLE)))
            embedded.match(found, bundle, noto, validation, false_share)
    finally:
        bundle.model.train(was_training)
    return found.results


# -------------------------------------------------------------------------------------------------- vision


def _subgroups(found: Evaluation, noto: Drawings, gallery: Drawings, device: torch.device) -> None:
    queries, rows = (getattr(drawn.of_model, PROBE_READING) for drawn in (noto, gallery))
    embedded.votes(found, "knn", noto, gallery, queries, rows)
    queries, rows = queries.to(device), rows.to(device)
    everywhere = concept_numbers(emoji())
    own, theirs = (
        torch.tensor([everywhere[record.codepoints] % FOLDS for record in drawn.records]) for drawn in (noto, gallery)
    )
    _, (labels, answers) = embedded.labels_of("subgroup", noto.records, gallery.records)
    predicted = torch.full_like(labels, -1)
    chosen: Probe | None = None
    for fold in range(FOLDS):
        kept, left_out = ((answers >= 0) & which for which in (theirs != fold, theirs == fold))
        solver = Solver(rows[kept], answers[kept])
        if chosen is None:
            chosen = linear_probe.sweep(solver, rows[left_out], answers[left_out])
        else:
            chosen = solver.solve(chosen.c, chosen)
        predicted[own == fold] = chosen.predict(queries[own == fold]).cpu()
    known = labels >= 0
    right = (predicted == labels)[known].numpy()
    found.results["probe.other_concepts.subgroup"] = mean_of(right, noto.names(known))


def _categories(found: Evaluation, bundle: Bundle) -> None:
    """Of the clip art of the splits "val" and "test", from that of "train"; categories that it has not are left out."""
    train = clipart("train")
    names = sorted({record.category for record in train})
    number = {name: index for index, name in enumerate(names)}
    asked = [record for split in ("val", "test") for record in clipart(split) if record.category in number]
    rows, queries = (
        features.of_pictures(bundle, [decode(record.image) for record in records]).class_token
        for records in (train, asked)
    )
    answers, truths = (torch.tensor([number[record.category] for record in records]) for records in (train, asked))
    units = [f"clip art {record.row}" for record in asked]
    for name, predicted in (
        ("knn", knn.predict(queries, rows, answers)),
        ("probe", _probed(rows, answers, queries, bundle.device)),
    ):
        found.results[f"{name}.category"] = mean_of((predicted == truths).numpy(), units)


def _probed(rows_ND: Tensor, labels_N: Tensor, queries_QD: Tensor, device: torch.device) -> Tensor:
    """Answers to the queries, int64 [Q] on CPU: C by a fifth of each class, then a fit on all of them."""
    held_N = torch.from_numpy(held_out(labels_N.numpy()))
    rows_ND = rows_ND.to(device)
    chosen = linear_probe.sweep(Solver(rows_ND[~held_N], labels_N[~held_N]), rows_ND[held_N], labels_N[held_N])
    return Solver(rows_ND, labels_N).solve(chosen.c, chosen).predict(queries_QD).cpu()


def _match_pairs(found: Evaluation, bundle: Bundle, source: Source, false_share: float) -> bool:
    """Each held-out picture with its first caption, and with the caption of the next that shows something else. Whether
    there is any. As in retrieval, rows that name one picture are one picture: the unit that is drawn again."""
    pixels: list[Tensor] = []
    samples: list[Sample] = []
    known: set[int] = set()  # pictures
    for row in range(len(source)):
        if len(samples) == MOST_PAIRS:
            break
        try:
            sample = source.read(row, row)
            if sample["same_image"] in known:
                continue
            pixels.append(bundle.transform(sample["image"]))
        except (BadSample, DecodeError):  # retrieval has told of it
            continue
        known.add(sample["same_image"])
        samples.append(sample)
    own = [(sample.get("texts") or [sample["text"]])[0] for sample in samples]
    kept, others = [], []
    for place, sample in enumerate(samples):
        around = [*range(place + 1, len(samples)), *range(place)]
        strange = (
            other
            for other in around
            if own[other] != own[place]
            and samples[other]["same_image"] != sample["same_image"]
            and samples[other]["same_text"] != sample["same_text"]
        )
        if (other := next(strange, None)) is not None:
            kept.append(place)
            others.append(own[other])
    if not kept:
        return False
    true_N, false_N = matching.scores(
        bundle, torch.stack([pixels[place] for place in kept]), [own[place] for place in kept], others, false_share
    )
    units = [f"{samples[place].get('name', 'row')}, {place}" for place in kept]
    found.results |= {f"itm.{name}": result for name, result in matching.balanced(true_N, false_N, units).items()}
    return True


# ------------------------------------------------------------------------------------------------ language


def _names(found: Evaluation, bundle: Bundle) -> None:
    """Group and subgroup of the emoji of the splits "val" and "test", from their names alone."""
    named = {record.name: record for record in emoji() if record.group}
    train, asked = (
        [record for record in named.values() if (record.split == "train") == seen] for seen in (True, False)
    )
    rows, queries = (_class_tokens(bundle, [record.name for record in records]) for records in (train, asked))
    for level in ("group", "subgroup"):
        _, (answers, truths) = embedded.labels_of(level, train, asked)
        right = (_probed(rows, answers, queries, bundle.device) == truths).numpy()
        found.results[f"names.{level}"] = mean_of(right, [record.name for record in asked])


@torch.inference_mode()
def _class_tokens(bundle: Bundle, texts: Sequence[str]) -> Tensor:
    """[B, D] on CPU, in the order given. Sorted by length inside: less padding."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    parts = []
    for first in range(0, len(order), features.BATCH):
        some = [texts[index] for index in order[first : first + features.BATCH]]
        parts.append(bundle.encode_text(some, features.BATCH).pooled.float())
    return torch.cat(parts).cpu()[torch.tensor(order).argsort()]


@torch.inference_mode()
def _masked_words(found: Evaluation, bundle: Bundle) -> None:
    """Each token of each name that was never seen, hidden alone: is it the model's first guess?"""
    model: Any = bundle.model
    tokenizer = bundle.tokenizer
    assert tokenizer is not None
    names = sorted({record.name for record in emoji() if record.split != "train"})
    hidden: list[list[int]] = []
    places: list[int] = []
    truths: list[int] = []
    units: list[str] = []
    for name, ids in zip(names, tokenizer.encode(names, bundle.max_length), strict=True):
        for place, token in enumerate(ids):
            if token not in tokenizer.special_ids:
                hidden.append([*ids[:place], tokenizer.mask_id, *ids[place + 1 :]])
                places.append(place)
                truths.append(token)
                units.append(f"{name}, token {place}")
    ids_BT, mask_BT = tokenizer.pad(hidden)
    guesses = []
    for first in range(0, len(hidden), features.BATCH):
        part = slice(first, first + features.BATCH)
        words = model.encode_text(ids_BT[part].to(bundle.device), mask_BT[part].to(bundle.device))
        states_BD = words.tokens[torch.arange(len(words.tokens)), torch.tensor(places[part])]
        guesses.append(model.predict_words(states_BD).argmax(-1).cpu())
    found.results["masked_words"] = mean_of((torch.cat(guesses) == torch.tensor(truths)).numpy(), units)


def check_glue(root: Path) -> None:
    """Raises TriviumError where one of the tasks is not there, or cannot be read."""
    for task in GLUE_TASKS:
        _splits(task, root)


def _splits(task: str, root: Path) -> Splits:
    return read_glue(task, str(root / "glue" if (root / "glue").is_dir() else root))


def _glue(found: Evaluation, bundle: Bundle, task: str, root: Path) -> None:
    """A task by a linear probe; two sentences as their tokens, the distance and the product of those."""
    splits = _splits(task, root)
    train = list(splits.train.capped(MOST_SENTENCES).good())
    dev = list(splits.held_out[GLUE[task].dev[0]].good())
    rows, queries = (_read(bundle, some) for some in (train, dev))
    answers, truths = (torch.tensor([row.label for row in some]) for some in (train, dev))
    predicted = _probed(rows, answers, queries, bundle.device)
    units = [f"{task} dev {row.where}" for row in dev]
    found.results[f"glue.{task}"] = metrics.measured(GLUE_TASKS[task], predicted.numpy(), truths.numpy(), units)


def _read(bundle: Bundle, rows: Sequence[Row]) -> Tensor:
    one_BD = _class_tokens(bundle, [row.text or "" for row in rows])
    if rows[0].second_text is None:
        return one_BD
    other_BD = _class_tokens(bundle, [row.second_text or "" for row in rows])
    return torch.cat([one_BD, other_BD, (one_BD - other_BD).abs(), one_BD * other_BD], dim=1)
