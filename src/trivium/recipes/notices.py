"""What of the data is cut or left out, as sentences for the start of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from trivium.data.files import TEXT_LIMIT, RowSource, TextLines
from trivium.data.parquet import ParquetFiles
from trivium.data.remote import is_remote
from trivium.data.shards import TarShards
from trivium.data.task_collate import cut
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BadSample
from trivium.recipes.data import Sources, captions_of, parts_of, spread
from trivium.train.protocol import Source, Stream

ROWS_LOOKED_AT = 10_000  # of each source of texts, for those that are cut
TEXT_STREAMS = {"pairs": "captions", "text": "texts"}  # what their texts are called


def noticed(sources: Sources) -> list[str]:
    """One sentence for each thing in the data that is cut, left out or slow to read, for the start of a run."""
    sentences = []
    for name, source in (("pairs", sources.pairs), ("text", sources.text), ("validation", sources.validation_pairs)):
        cut = 0
        for part in parts_of(source):
            if isinstance(part, TextLines) and part.long_lines:
                lines = _counted(part.long_lines, "long line is", "long lines are")
                sentences.append(f"{part.where(0)[0]}: {lines} cut into windows, each a sample")
            if isinstance(part, RowSource):
                with suppress(BadSample):  # the loader reports it when its place comes
                    cut += part.cut_texts()
        if cut:
            texts = _counted(cut, "text is", "texts are")
            sentences.append(f"data.{name}: {texts} longer than {TEXT_LIMIT:,} characters and read only up to there")
    for source in (sources.pairs, sources.images, sources.text, sources.validation_pairs):
        parts = (part for part in parts_of(source) if isinstance(part, TarShards | ParquetFiles))
        sentences += [note for part in parts for note in part.notes]
    return list(dict.fromkeys(sentences))


def cut_captions(
    name: str, source: Source | None, tokenizer: Tokenizer, limit: int, kind: str = "captions"
) -> list[str]:
    """A sentence on captions of more tokens than the limit, where there are any, and one on those that nobody counted.

    All captions of ROWS_LOOKED_AT rows, evenly spread: of fewer rows all, so that then the number is exact. Shards at
    an address are left alone, where each row is a request.

    Args:
        name: of these pairs, in the sentences.
        kind: what the texts are, in the plural.
    """
    texts: list[tuple[str, str]] = []
    rows = remote = 0
    for part in parts_of(source):
        assert source is not None
        if isinstance(part, RowSource) and len(part) and is_remote(part.where(0)[0]):
            remote += len(part)
            continue
        for row in spread(part, -(-ROWS_LOOKED_AT * len(part) // len(source))):
            named = "{} ({})".format(*part.where(row)) if isinstance(part, RowSource) else f"row {row}"
            with suppress(BadSample):  # the loader reports it when its place comes
                texts += [(named, caption) for caption in captions_of(part, row)]
            rows += 1
    sentences = cut(kind, tokenizer, limit, texts)
    if sentences and source is not None and rows < len(source):
        sentences = [f"of {rows:,} rows that were looked at, {len(source):,} in all, {sentences[0]}"]
    if remote:
        sentences.append(
            f"{kind} of more than {limit} tokens are cut there, and {remote:,} rows at an address were not looked at"
            " (trivium data doctor looks at them)"
        )
    return [f"{name}: {sentence}" for sentence in sentences]


def cut_in_streams(streams: Sequence[Stream], held_out: Sequence[Stream], tokenizer: Tokenizer | None) -> list[str]:
    """The same of all texts that a run is trained and measured on. What two streams cut alike is told of once."""
    sentences: list[str] = []
    seen: set[tuple[int, int]] = set()
    named = [(f"data.{stream.name}", stream) for stream in streams]
    for name, stream in [*named, *(("data.validation", stream) for stream in held_out)]:
        if stream.name not in TEXT_STREAMS:
            continue
        limit = stream.collate.texts.max_length
        if (id(stream.source), limit) not in seen:
            assert tokenizer is not None, "texts are read"
            seen.add((id(stream.source), limit))
            sentences += cut_captions(name, stream.source, tokenizer, limit, TEXT_STREAMS[stream.name])
    return sentences


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
