"""One self-contained HTML page of what the data doctor found, with pictures to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trivium.data.decode import DecodeError
from trivium.data.doctor import Diagnosis
from trivium.data.files import Folder, RowSource
from trivium.data.findings import Finding, Rows
from trivium.data.parquet import ParquetFiles
from trivium.data.shards import TarShards
from trivium.data.sources import Concat
from trivium.data.survey import Decode
from trivium.errors import BadSample
from trivium.evaluate import charts
from trivium.evaluate.report import environment
from trivium.manifest import write_whole
from trivium.train.protocol import Source, Stream

THUMBNAIL = 160  # pixels on the longer side
CARDS = 12  # samples of each source on its contact sheet
SHEETS = 6  # of each stream: sources beyond that are not shown
GROUPS = 8  # of each finding: sets of pictures that belong together
IN_GROUP = 6  # pictures of a set
EXAMPLES = 20  # lines of each finding


class Card(NamedTuple):
    picture: str | None  # a data URI
    texts: list[str]
    name: str


@dataclass(frozen=True)
class Sheet:
    """Samples of one source: a file, a folder, some shards."""

    stream: str
    source: str
    rows: int
    cards: list[Card]


def write(path: Path, diagnosis: Diagnosis, streams: Mapping[str, Stream], decode: Decode, command: str) -> None:
    """Write the page whole or not at all. streams: by the names in the diagnosis. Raises TriviumError."""
    cards = {finding.kind + finding.stream: groups(finding, streams, decode) for finding in diagnosis.findings}
    page = (
        environment()
        .get_template("data_report.html")
        .render(
            diagnosis=diagnosis,
            problems=sum(finding.is_problem for finding in diagnosis.findings),
            groups=cards,
            examples=EXAMPLES,
            charts={
                name: charts.histogram(f"{name}: {facts.captions:,} texts", facts.histogram, facts.max_length or 0)
                for name, facts in diagnosis.streams.items()
                if facts.histogram
            },
            sheets=[sheet for name, stream in streams.items() for sheet in sheets(name, stream.source, decode)],
            command=command,
        )
    )
    write_whole(path, page)


def groups(finding: Finding, streams: Mapping[str, Stream], decode: Decode) -> list[list[Card]]:
    """The pictures of a finding that belong together, a few of each set of them."""

    def cards(rows: Rows) -> Iterator[Card]:
        for name, row in rows[:IN_GROUP]:
            card = read(streams[name].source, row, decode)
            if card is not None:
                yield card

    return [list(cards(rows)) for rows in finding.pictures[:GROUPS]]


def sheets(stream: str, source: Source, decode: Decode) -> Iterator[Sheet]:
    """A few samples, evenly spread, of each source that a stream is joined from."""
    for part in (source.sources if isinstance(source, Concat) else [source])[:SHEETS]:
        rows = np.unique(np.arange(CARDS) * len(part) // CARDS).tolist()
        cards = [card for row in rows if (card := read(part, row, decode)) is not None]
        yield Sheet(stream, described(part), len(part), cards)


def read(source: Source, row: int, decode: Decode) -> Card | None:
    """None where the sample cannot be used: it is among the findings."""
    try:
        sample = source.read(row, row)
        picture = charts.webp_uri(decode(sample["image"]), THUMBNAIL) if "image" in sample else None
    except (BadSample, DecodeError):
        return None
    texts = sample.get("texts") or ([sample["text"]] if "text" in sample else [])
    return Card(picture, list(dict.fromkeys(texts)), sample.get("name", f"row {row}"))


def described(source: Source) -> str:
    """How a person would call a source."""
    if isinstance(source, TarShards | ParquetFiles):
        more = len(source.paths) - 1
        return source.paths[0] + (f" and {more} more" if more else "")
    if isinstance(source, Folder):
        return source.root
    return source.where(0)[0] if isinstance(source, RowSource) else "the embedded data"
