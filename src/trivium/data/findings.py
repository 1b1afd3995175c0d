"""What a user should know of data: the figures of each stream, and a sentence for each finding with what to do.

Pure functions of what was read (see data/survey.py). From when on a figure is a finding stands in the constants.

A *picture* is one number of a batch's ``same_B``: rows that name the same file, or show the same concept in the
embedded data, are one picture on purpose and no duplicates of each other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trivium.data import duplicates
from trivium.data.duplicates import COLOURS, DISTANCE, Fingerprint
from trivium.data.loss_floor import contrastive_floor
from trivium.data.survey import Looked, Survey

LONG = 0.01  # share of captions above the model's length from which on it is a finding
LABEL_LIKE = 0.2  # distinct captions to a picture at or below which captions are like labels
VERY_REPEATED = 0.01  # share of the pictures that one caption stands beside, from which on it is a finding ...
REPEATED_OFTEN = 10  # ... if those are so many pictures
FEW = 0.01  # share of texts that repeat below which it is no problem
FLOOR = 0.005  # nats of the contrastive loss
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SHOWN = 50  # captions and groups of pictures of a finding that are kept to be shown

Rows = list[tuple[str, int]]  # samples by stream and row


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know of, with what to do about it."""

    kind: str
    stream: str
    sentence: str
    advice: str
    count: int = 0
    is_problem: bool = True  # False: good to know, and nothing to mend
    examples: tuple[str, ...] = ()  # in words
    pictures: tuple[Rows, ...] = ()  # groups of samples to be looked at


@dataclass
class StreamFacts:
    """The figures of one stream; those that it has none of are None."""

    rows: int
    read: int
    unreadable: int
    pictures: int | None = None  # distinct to the pixel
    exact: int | None = None  # pictures that another one equals
    near: int | None = None  # pictures that look like another one and do not equal it
    median_height: int | None = None
    median_width: int | None = None
    captions: int | None = None
    distinct_captions: int | None = None
    captions_per_picture: float | None = None
    tokens: dict[str, int] = field(default_factory=dict)  # quantiles of the length of a caption
    histogram: dict[int, int] = field(default_factory=dict)  # tokens -> captions
    max_length: int | None = None  # tokens of a caption that the model sees
    above_max_length: float | None = None  # share of the captions
    often: dict[str, int] = field(default_factory=dict)  # the captions that stand beside most pictures
    samples_per_second: float | None = None


# ----------------------------------------------------------------------------------------------- one stream


def unreadable(seen: Survey, bad_rate: float) -> list[Finding]:
    """Samples that a run would have to replace by others. bad_rate: their share above which it stops."""
    if not seen.bad:
        return []
    share = len(seen.bad) / seen.num_read
    stops = f": above {_percent(bad_rate)} a run stops" if share > bad_rate else ", which a run replaces by others"
    sentence = f"{_of(len(seen.bad), seen.num_read, 'sample')} cannot be read{stops}"
    advice = "mend or remove them: report.json names each with the reason"
    return [Finding("unreadable", seen.stream, sentence, advice, len(seen.bad), examples=tuple(seen.bad))]


def pictures(seen: Survey, facts: StreamFacts) -> list[Finding]:
    """Exact and near duplicates within a stream, and pictures with several captions."""
    with_picture = [sample for sample in seen.samples if sample.picture is not None]
    if not with_picture:
        return []
    prints = [sample.picture for sample in with_picture if sample.picture is not None]
    facts.median_height = int(np.median([each.height for each in prints]))
    facts.median_width = int(np.median([each.width for each in prints]))
    exact, near = exact_groups(with_picture), near_groups(with_picture)
    facts.pictures = len({each.pixels for each in prints})
    facts.exact = sum(len(group) - 1 for group in exact)
    facts.near = sum(len(group) - 1 for group in near)
    findings = []
    if exact:
        sentence = (
            f"{_counted(facts.exact, 'picture equals', 'pictures equal')} another one to the pixel, under another name"
            f" ({_counted(len(exact), 'group', 'groups')})"
        )
        advice = "keep one of each" + (", with all its captions as a list" if with_picture[0].captions else "")
        findings.append(_shown("exact-duplicates", seen.stream, sentence, advice, facts.exact, exact))
    if near:
        sentence = (
            f"{_counted(facts.near, 'picture looks', 'pictures look')} like another one without being equal: at most"
            f" {DISTANCE} of 64 bits of their DCT hashes and {COLOURS:g} of 255 in colour apart"
            f" ({_counted(len(near), 'group', 'groups')})"
        )
        advice = "look at them in the report, and keep one of each where they are copies"
        findings.append(_shown("near-duplicates", seen.stream, sentence, advice, facts.near, near))
    by_number: defaultdict[int, set[bytes]] = defaultdict(set)
    for sample in with_picture:
        by_number[sample.same] |= {caption.tokens for caption in sample.captions}
    several = sum(len(texts) > 1 for texts in by_number.values())
    facts.captions_per_picture = (
        sum(map(len, by_number.values())) / len(by_number) if with_picture[0].captions else None
    )
    if several:
        sentence = (
            f"{_of(several, len(by_number), 'picture')} {'has' if several == 1 else 'have'} several captions,"
            f" {facts.captions_per_picture:.1f} on average over all"
        )
        advice = "nothing: one is drawn each time, and they are never each other's negatives"
        findings.append(Finding("several-captions", seen.stream, sentence, advice, several, is_problem=False))
    return findings


def exact_groups(samples: Iterable[Looked]) -> list[list[Looked]]:
    """Samples of different pictures whose pixels are equal: one of each picture, the largest groups first."""
    by_pixels: defaultdict[bytes, dict[int, Looked]] = defaultdict(dict)
    for sample in samples:
        if sample.picture is not None:
            by_pixels[sample.picture.pixels].setdefault(sample.same, sample)
    return sorted(
        (list(group.values()) for group in by_pixels.values() if len(group) > 1), key=lambda group: -len(group)
    )


def near_groups(samples: Iterable[Looked]) -> list[list[Looked]]:
    """Samples of different pictures that look the same: one for each that is distinct to the pixel."""
    distinct, prints = _distinct(samples)
    pairs = duplicates.near_pairs(prints)
    same = np.array([sample.same for sample in distinct], dtype=np.int64)
    pairs = pairs[same[pairs[:, 0]] != same[pairs[:, 1]]]
    return [[distinct[row] for row in group] for group in duplicates.groups(pairs, len(distinct))]


def captions(seen: Survey, facts: StreamFacts) -> list[Finding]:
    """Captions that are cut, and captions like labels. A caption counts once for each picture."""
    beside: defaultdict[bytes, set[int]] = defaultdict(set)  # tokens -> the pictures (or texts) it stands with
    text_of: dict[bytes, str] = {}
    lengths = []
    for sample in seen.samples:
        for caption in {caption.text: caption for caption in sample.captions}.values():
            beside[caption.tokens].add(sample.same if sample.picture is not None else sample.row)
            text_of.setdefault(caption.tokens, caption.text)
            lengths.append(caption.length)
    if not lengths:
        return []
    what = "caption" if any(sample.picture is not None for sample in seen.samples) else "text"
    quantiles = np.quantile(lengths, QUANTILES, method="higher")
    facts.captions, facts.distinct_captions = len(lengths), len(beside)
    facts.tokens = {f"{100 * q:g} %": int(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    facts.histogram = dict(sorted(Counter(lengths).items()))
    facts.max_length = max_length = seen.max_length
    facts.above_max_length = sum(length > max_length for length in lengths) / len(lengths)
    often = sorted(((len(numbers), tokens) for tokens, numbers in beside.items() if len(numbers) > 1), reverse=True)
    facts.often = {text_of[tokens]: number for number, tokens in often[:SHOWN]}
    findings = []
    if facts.above_max_length >= LONG:
        count = sum(length > max_length for length in lengths)
        sentence = (
            f"{_of(count, len(lengths), what)} {'is' if count == 1 else 'are'} longer than {max_length} tokens and cut"
        )
        fitting = int(np.quantile(lengths, 1 - LONG, method="higher"))
        flag = "--data.text-length" if seen.alone else "--data.max-length"
        advice = f"{flag} {fitting} keeps 99 % whole (--model.max-length must be as large)"
        findings.append(Finding("long-captions", seen.stream, sentence, advice, count))
    examples = tuple(f"{number:,} x {text_of[tokens][:200]}" for number, tokens in often[:SHOWN])
    if what == "text":
        extra = sum(number - 1 for number, _ in often)
        if extra:
            sentence = f"{_of(extra, len(lengths), what)} {'repeats' if extra == 1 else 'repeat'} another one"
            findings.append(
                Finding(
                    "repeated-texts",
                    seen.stream,
                    sentence,
                    "keep one of each",
                    extra,
                    extra >= FEW * len(lengths),
                    examples,
                )
            )
        return findings
    num_pictures = len(set().union(*beside.values()))
    most = often[0][0] if often else 1
    few = len(beside) <= LABEL_LIKE * num_pictures and num_pictures > REPEATED_OFTEN
    if few or (most >= REPEATED_OFTEN and most >= VERY_REPEATED * num_pictures):
        sentence = (
            f"captions are like labels: {len(beside):,} distinct for {num_pictures:,} pictures, the commonest beside"
            f" {_of(most, num_pictures, 'picture')}"
        )
        advice = "say in each caption what sets its picture apart, or train a classifier on them instead"
        findings.append(Finding("label-like-captions", seen.stream, sentence, advice, len(beside), examples=examples))
    return findings


# ------------------------------------------------------------------------------------ batches, queue, splits


def loss_floor(seen: Survey, seed: int) -> tuple[dict[str, float], list[Finding]]:
    """The mean over sampled batches of the smallest contrastive loss that their duplicates allow.

    A caption is drawn for each row, as in a run; a row that could not be read is left out of the mean.
    """
    sample_of = {sample.row: sample for sample in seen.samples if sample.captions and sample.picture is not None}
    rng = np.random.default_rng(seed)
    floors: list[tuple[float, float, float]] = []
    sizes = []
    for rows in seen.batches:
        batch = [sample_of[row] for row in rows.tolist() if row in sample_of]
        if len(batch) < 2:
            continue
        drawn = [sample.captions[rng.integers(len(sample.captions))] for sample in batch]
        picture_B = _numbers([sample.picture.pixels for sample in batch if sample.picture is not None])
        caption_B = _numbers([caption.tokens for caption in drawn])
        same_B = np.array([sample.same for sample in batch], dtype=np.int64)
        alone_B = np.arange(len(batch))  # as if nothing of this kind were equal
        floors.append(
            (
                contrastive_floor(picture_B, caption_B, same_B),
                contrastive_floor(alone_B, caption_B, same_B),
                contrastive_floor(picture_B, alone_B, same_B),
            )
        )
        sizes.append(len(rows))
    if not floors:
        return {}, []
    loss, from_captions, from_pictures = np.mean(floors, axis=0).tolist()
    size = int(np.median(sizes))
    found = {
        "batches": len(floors), "rows": size, "loss": loss, "from_captions": from_captions,
        "from_pictures": from_pictures, "chance": math.log(size),
    }  # fmt: skip
    if loss < FLOOR:
        return found, []
    sentence = (
        f"in batches of {size:,} duplicates alone hold the contrastive loss at {loss:.3f} or more:"
        f" {from_captions:.3f} by equal captions, {from_pictures:.3f} by equal pictures; {math.log(size):.2f} is chance"
    )
    advice = "make captions tell more, remove duplicates, or take a smaller --data.batch"
    return found, [Finding("loss-floor", seen.stream, sentence, advice)]


def long_queue(num_pairs: int, batch: int, queue: int) -> list[Finding]:
    """A queue holds the newest pairs as negatives: where it is long, a pair meets itself. At most a quarter is safe."""
    longest = num_pairs // 4
    if queue <= longest:
        return []
    whole = longest // batch * batch
    cut = f"; a whole number of batches of {batch:,} is {whole:,}" if whole not in (0, longest) else ""
    sentence = (
        f"a momentum queue of {queue:,} is longer than a quarter of these {num_pairs:,} pairs: a pair would stand among"
        " its own negatives"
    )
    advice = f"where a recipe has a queue, as ALBEF does, let it hold at most {longest:,}{cut}"
    return [Finding("long-queue", "pairs", sentence, advice, longest, is_problem=False)]


def leakage(train: Sequence[Survey], held_out: Survey) -> list[Finding]:
    """Pictures and captions of a held-out split that training sees too: exact, near, and word by word."""
    trained, prints = _distinct(sample for each in train for sample in each.samples)
    stream_of = {id(sample): each.stream for each in train for sample in each.samples}
    measured, held_prints = _distinct(held_out.samples)
    first = {each.pixels: sample for each, sample in zip(prints, trained, strict=True)}
    exact = [(first[each.pixels], row) for row, each in enumerate(held_prints) if each.pixels in first]
    leaked = {row for _, row in exact}
    pairs = duplicates.near_pairs([*prints, *held_prints] if held_prints else [])
    near: dict[int, Looked] = {}
    for one, other in pairs[(pairs[:, 0] < len(prints)) & (pairs[:, 1] >= len(prints))].tolist():
        if other - len(prints) not in leaked:
            near.setdefault(other - len(prints), trained[one])
    findings = []

    def shown(kind: str, what: str, advice: str, found: list[tuple[Looked, int]]) -> None:
        if found:
            sentence = f"{_of(len(found), len(measured), 'picture')} of this split {what}"
            groups = tuple([(stream_of[id(one)], one.row), (held_out.stream, measured[row].row)] for one, row in found)
            names = tuple(f"{measured[row].name} and {one.name}" for one, row in found)
            findings.append(Finding(kind, held_out.stream, sentence, advice, len(found), True, names, groups[:SHOWN]))

    are, have = "are" if len(exact) > 1 else "is", "have" if len(near) > 1 else "has"
    advice = "take them out of training: figures on this split are too good otherwise"
    shown("leakage-exact", f"{are} in training too, equal to the pixel", advice, exact)
    advice = "look at them in the report, and take copies out of training"
    shown("leakage-near", f"{have} a near copy in training", advice, [(one, row) for row, one in near.items()])
    known = {caption.whole for each in train for sample in each.samples for caption in sample.captions}
    own = {caption.whole: caption.text for sample in held_out.samples for caption in sample.captions}
    again = [text for whole, text in own.items() if whole in known]
    if again:
        stand = "stands" if len(again) == 1 else "stand"
        sentence = f"{_of(len(again), len(own), 'caption')} of this split {stand} word by word in training"
        advice = "short captions may repeat by chance; whole sentences say that the split was not made by picture"
        findings.append(
            Finding(
                "leakage-captions",
                held_out.stream,
                sentence,
                advice,
                len(again),
                len(again) >= FEW * len(own),
                tuple(again),
            )
        )
    return findings


# ------------------------------------------------------------------------------------------------ in words


def _distinct(samples: Iterable[Looked]) -> tuple[list[Looked], list[Fingerprint]]:
    """The first sample of each picture that is distinct to the pixel, and its fingerprint."""
    first: dict[bytes, Looked] = {}
    for sample in samples:
        if sample.picture is not None:
            first.setdefault(sample.picture.pixels, sample)
    return list(first.values()), [sample.picture for sample in first.values() if sample.picture is not None]


def _numbers(values: Sequence[bytes]) -> np.ndarray:
    """Equal numbers for equal values: int64."""
    number: dict[bytes, int] = {}
    return np.array([number.setdefault(value, len(number)) for value in values], dtype=np.int64)


def _shown(kind: str, stream: str, sentence: str, advice: str, count: int, found: list[list[Looked]]) -> Finding:
    names = tuple(" = ".join(sample.name for sample in group) for group in found)
    rows = tuple([(stream, sample.row) for sample in group] for group in found[:SHOWN])
    return Finding(kind, stream, sentence, advice, count, True, names, rows)


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _of(number: int, whole: int, what: str) -> str:
    return f"{number:,} of {_counted(whole, what, what + 's')} ({_percent(number / whole)})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"
