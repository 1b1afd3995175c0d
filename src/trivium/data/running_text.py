"""Running text (CCNews, BookCorpus) as sequences of a stated number of tokens, each one row of a Parquet file.

Documents follow one another in a sequence with the separator between them (RoBERTa's FULL-SENTENCES, Liu et al. 2019).
A document that fits into a sequence is never cut; a longer one fills the sequence that is open and goes on in the next.
So the rows are a pure function of the order of the documents.

In plain text a blank line ends a document, in a table a row is one. Blanks and line breaks become single blanks. Tokens
are counted word by word, each with the blank before it and, at the head of a document, the separator: bytes and
SentencePiece have the blank in the word's first piece, and no piece crosses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data.records import opened, records
from trivium.data.tables import TEXT_COLUMNS
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BadSample, TriviumError
from trivium.manifest import file_beside, sha256, write_whole

ROWS = 1000  # in a row group
WORDS_KEPT = 2**20  # whose number of tokens is remembered
ANY = "a"  # stands for the word before another: which one it is changes no count


@dataclass(frozen=True)
class PackedText:
    rows: int
    documents: int
    words: int
    skipped: list[str]  # one sentence for each line or row that could not be used


def pack_text(
    files: Sequence[str], out: Path, tokenizer: Tokenizer, max_length: int = 512, text_column: str | None = None
) -> PackedText:
    """Write `out`, a Parquet file with the column text, and `out`.json with counts and checksums.

    Args:
        files: .txt, or tables (.jsonl, .json, .csv, .tsv, each also .gz, or .parquet).
        max_length: tokens of a row, [CLS] and [SEP] at its ends among them.
        text_column: of tables, where it has an unusual name.

    Raises:
        TriviumError: a file that cannot be read, or no document at all.
    """
    if max_length < 8:
        raise TriviumError(f"a sequence of {max_length} tokens holds no text: give at least 8")
    reader = Words(files, text_column)

    @lru_cache(WORDS_KEPT)
    def num_tokens(word: str, before: str) -> int:
        [whole, alone] = tokenizer.encode([before + word, ANY if before else ""], 2**30)
        return len(whole) - len(alone)

    rows = 0
    with file_beside(out) as beside, pq.ParquetWriter(beside, pa.schema([("text", pa.string())])) as writer:
        texts: list[str] = []
        for sequence in sequences(reader.words(), num_tokens, tokenizer.sep_token, max_length - 2):
            texts.append(" ".join(sequence))
            rows += 1
            if len(texts) == ROWS:
                writer.write_table(pa.table({"text": texts}))
                texts.clear()
        writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
        if not rows:
            raise TriviumError(f"there is no text in {', '.join(files)}{''.join('; ' + s for s in reader.skipped[:1])}")
    packed = PackedText(rows, reader.num_documents, reader.num_words, reader.skipped)
    digests = {file: sha256(Path(file)) for file in files}
    facts = {"given": digests, "max_length": max_length, **asdict(packed), "sha256": sha256(out)}
    write_whole(out.with_name(f"{out.name}.json"), json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return packed


def sequences(
    words: Iterator[str | None], num_tokens: Callable[[str, str], int], separator: str, room: int
) -> Iterator[list[str]]:
    """Words, None after each document -> words of each sequence of at most `room` tokens.

    num_tokens: of a word and of all that stands before it in its row, "" at the row's start, beyond that of ANY.
    """
    following, apart = f"{ANY} ", f"{ANY} {separator} "
    row: list[str] = []
    used = 0
    document: list[str] = []  # words that are read and in no row yet
    length = 0  # of the document in a row of its own
    is_long = False  # part of the document is in a row already
    for word in words:
        if word is None:
            if document:
                joined = length - num_tokens(document[0], "") + num_tokens(document[0], apart)
                if row and used + joined > room:
                    yield row
                    row, used = [], 0
                used += joined if row else length
                row += [separator, *document] if row else document
            document, length, is_long = [], 0, False
            continue
        for piece in _pieces(word, num_tokens, room):
            length += num_tokens(piece, following if document else "")
            document.append(piece)
            if not is_long and length <= room:
                continue
            for each in document:
                before = "" if not row else following if is_long else apart
                if row and used + num_tokens(each, before) > room:
                    yield row
                    row, used, before = [], 0, ""
                row += [separator, each] if before == apart else [each]
                used += num_tokens(each, before)
                is_long = True
            document, length = [], 0
    assert not document, "the last document is ended by None, too"
    if row:
        yield row


def _pieces(word: str, num_tokens: Callable[[str, str], int], room: int) -> Iterator[str]:
    """The word; where not even it fits, such as a data URL, its halves."""
    if num_tokens(word, "") <= room or len(word) == 1:
        yield word
    else:
        yield from _pieces(word[: len(word) // 2], num_tokens, room)
        yield from _pieces(word[len(word) // 2 :], num_tokens, room)


class Words:
    """The words of some files, gone through once, with what was met on the way."""

    def __init__(self, files: Sequence[str], text_column: str | None = None) -> None:
        self.files = list(files)
        self.columns = TEXT_COLUMNS if text_column is None else (text_column.lower(),)
        self.num_documents = self.num_words = 0
        self.skipped: list[str] = []

    def words(self) -> Iterator[str | None]:
        """None ends a document. Raises TriviumError."""
        inside = False
        for file in self.files:
            for words in self._lines(file) if file.removesuffix(".gz").endswith(".txt") else self._rows(file):
                if words:
                    self.num_words += len(words)
                    yield from words
                elif inside:
                    self.num_documents += 1
                    yield None
                inside = bool(words)

    def _lines(self, file: str) -> Iterator[list[str]]:
        """The words of each line; none of a blank one, and none at the end."""
        with opened(file) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode("utf-8").split()
                except UnicodeDecodeError:
                    self.skipped.append(f"{file} (line {number}): it is not UTF-8")
        yield []

    def _rows(self, file: str) -> Iterator[list[str]]:
        for record in records(file):
            try:
                if isinstance(record, BadSample):
                    raise record
                yield record.text(*self.columns).split()
            except BadSample as error:
                self.skipped.append(str(error))
            yield []
