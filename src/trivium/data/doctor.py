"""The data doctor: read the streams of a run, and say what a run would suffer from and what to do about it.

data/survey.py reads, data/findings.py measures what was read; the loader is timed here as a run would use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trivium.data.findings import (
    Finding,
    StreamFacts,
    captions,
    leakage,
    long_queue,
    loss_floor,
    pictures,
    unreadable,
)
from trivium.data.survey import Decode, Survey, sample_that_fits, samples_per_second, survey
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError
from trivium.train.protocol import Stream

ALBEF_QUEUE = 65_536
BAD_RATE = 0.01  # a run's own, where it says no other
MOST_SECONDS = 3.0  # of timing the loader, for each stream


@dataclass
class Diagnosis:
    findings: list[Finding]
    streams: dict[str, StreamFacts]
    floor: dict[str, float]  # of the contrastive loss: batches, rows, loss, from_captions, from_pictures, chance
    samples_per_second: float | None  # of the mixture
    notes: list[str]  # what was measured on a sample alone, or could not be measured
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it but the rows that are shown as pictures."""
        content = asdict(self)
        for finding in content["findings"]:
            del finding["pictures"]
        return content


def diagnose(
    train: Sequence[Stream],
    held_out: Sequence[Stream],
    decode: Decode,
    tokenizer: Tokenizer | None,
    *,
    seed: int,
    workers: int,
    threads: int,
    queue: int = ALBEF_QUEUE,
    bad_rate: float = BAD_RATE,
    sample: int | None = None,
    seconds: float = 60.0,
    progress: Callable[[str], None] = lambda part: None,
) -> Diagnosis:
    """Examine the streams of a run.

    Args:
        train: as the mixture has them; one with captions and pictures is named "pairs".
        held_out: what leakage is checked against; one name for each.
        decode: of pictures. tokenizer: None: texts are left alone.
        workers: processes of the loader that is timed. threads: that decode for everything else.
        queue: length of a momentum queue.
        bad_rate: share of unreadable samples above which the run stops.
        sample: rows of each stream to read; None: as many as fit into `seconds` in all.
        progress: is told what is under way.

    Raises:
        TriviumError: a source does.
    """
    begun = time.perf_counter()
    rates, notes = {}, []
    for stream in train:
        progress(f"timing the loader of {stream.name}")
        try:
            rates[stream.name] = samples_per_second(stream, seed, workers, min(MOST_SECONDS, seconds / 20))
        except TriviumError as error:
            notes.append(f"the loader could not be timed: {error}")
    surveys: list[Survey] = []
    streams = [*train, *held_out]
    for number, stream in enumerate(streams):
        progress(f"reading {stream.name}")
        share = max(1.0, begun + seconds - time.perf_counter()) / (len(streams) - number)
        fits = sample or sample_that_fits(stream, decode, tokenizer, seed, share, threads)
        surveys.append(survey(stream, decode, tokenizer, seed, fits, threads))
    progress("comparing")
    found = conclude(surveys[: len(train)], surveys[len(train) :], seed, queue, bad_rate)
    for name, rate in rates.items():
        found.streams[name].samples_per_second = rate
    if len(rates) == len(train):
        ratios = {stream.name: stream.ratio for stream in train}
        whole = sum(ratios.values())
        found.samples_per_second = whole / sum(ratio / rates[name] for name, ratio in ratios.items())
    found.notes += notes
    found.seconds = time.perf_counter() - begun
    return found


def conclude(
    train: Sequence[Survey],
    held_out: Sequence[Survey],
    seed: int = 0,
    queue: int = ALBEF_QUEUE,
    bad_rate: float = BAD_RATE,
) -> Diagnosis:
    """The figures and findings of what was read."""
    findings: list[Finding] = []
    facts: dict[str, StreamFacts] = {}
    floor: dict[str, float] = {}
    notes = []
    for number, each in enumerate([*train, *held_out]):
        facts[each.stream] = StreamFacts(each.num_rows, each.num_read, len(each.bad))
        if each.num_read < each.num_rows:
            notes.append(
                f"{each.stream}: {each.num_read:,} of {each.num_rows:,} samples were read, whole batches spread evenly;"
                " the others were not looked at, and duplicates among them are found in part"
            )
        findings += unreadable(each, bad_rate)
        findings += pictures(each, facts[each.stream])
        findings += captions(each, facts[each.stream])
        if number < len(train) and each.stream == "pairs":
            floor, more = loss_floor(each, seed)
            if floor and len(each.batches[0]) < each.batch:
                notes.append(
                    f"the loss floor is that of {floor['rows']:,} rows; it is higher in a batch of {each.batch:,},"
                    " which takes a larger --sample"
                )
            findings += [*more, *long_queue(each.num_rows, each.batch, queue)]
    for each in held_out:
        findings += leakage(train, each)
    findings.sort(key=lambda finding: not finding.is_problem)
    return Diagnosis(findings, facts, floor, None, notes)
