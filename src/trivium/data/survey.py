"""Reading many samples of a source once, as the data doctor does: which rows, what is kept of each, and how fast.

Of a picture its fingerprint is kept, of a text its tokens as the model would see them. A sample that a run could not
use is named.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy as np

from trivium.data.collate import TextCollate, TextInput
from trivium.data.decode import DecodeError
from trivium.data.duplicates import Fingerprint, fingerprint
from trivium.data.files import TEXT_LIMIT
from trivium.data.loader import PREFETCH, StreamReader, micro_batches
from trivium.data.order import WINDOW, Order
from trivium.data.tokenizer import Tokenizer
from trivium.errors import BadSample
from trivium.train.protocol import Sample, Source, Stream

Decode = Callable[[bytes], np.ndarray]  # an encoded picture to uint8 [H, W, 3]; raises DecodeError

MOST_BATCHES = 256  # that are laid out as a run would draw them
CHUNK = 64  # rows that are read before their pictures are decoded on several threads
TRIED = 64  # rows whose time is measured to see how many fit into a budget
ROWS = 32  # samples of a micro-batch, where the loader is timed


class Caption(NamedTuple):
    text: str
    tokens: bytes  # digest of the ids that a model of this length sees: equal captions have equal ones
    whole: bytes  # digest of all ids: equal texts have equal ones, whatever is cut
    length: int  # tokens of the whole text, [CLS] and [SEP] among them


class Looked(NamedTuple):
    """What is kept of a sample that could be read."""

    row: int
    name: str
    same: int  # equal number = the same picture or concept, as a batch would say
    picture: Fingerprint | None
    captions: tuple[Caption, ...]  # as the source has them: one that is repeated is drawn more often


@dataclass
class Survey:
    """What was seen of one stream."""

    stream: str
    batch: int  # rows of a run's global batch
    num_rows: int
    num_read: int  # rows that were tried
    samples: list[Looked]  # by row
    bad: list[str]  # one sentence for each row that no run could use
    batches: list[np.ndarray]  # rows of some global batches of a run; of those of a sample, as many as it holds
    max_length: int  # tokens of a text that the model sees; 0 where it sees none
    alone: bool  # whether it reads texts without their pictures


def max_length_of(stream: Stream) -> int:
    """Tokens of a text of this stream that the model sees; 0 where it sees none."""
    texts = getattr(stream.collate, "texts", None)
    return texts.max_length if isinstance(texts, TextInput) else 0


def survey(stream: Stream, decode: Decode, tokenizer: Tokenizer | None, seed: int, sample: int, threads: int) -> Survey:
    """Read all rows of a stream, or about `sample` of them: whole batches of the first epoch, evenly spread over it.

    decode: of the pictures. tokenizer: None: texts are left alone. threads: that decode.
    """
    rows, batches = rows_of(stream, seed, sample)
    samples: list[Looked] = []
    bad: list[str] = []
    max_length, alone = max_length_of(stream), isinstance(stream.collate, TextCollate)
    for outcome in look(stream.source, rows, decode, tokenizer, max_length, threads):
        if isinstance(outcome, BadSample):
            bad.append(str(outcome))
        else:
            samples.append(outcome)
    return Survey(stream.name, stream.batch, len(stream.source), len(rows), samples, bad, batches, max_length, alone)


def rows_of(stream: Stream, seed: int, sample: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The rows to read, rising, and those of each batch: int64. All rows where `sample` is as many."""
    num_rows = len(stream.source)
    order = Order(num_rows, stream.source.blocks(), seed, stream.name, stream.window or WINDOW)
    if sample >= num_rows:
        starts = np.arange(max(1, num_rows // stream.batch))[:MOST_BATCHES] * stream.batch
        batches = [order.rows(start + np.arange(stream.batch)) for start in starts]
        return np.arange(num_rows), batches
    batch = min(stream.batch, sample)
    number = sample // batch
    starts = np.arange(number) * num_rows // number
    batches = [order.rows(start + np.arange(batch)) for start in starts]
    return np.unique(np.concatenate(batches)), batches[:MOST_BATCHES]


def sample_that_fits(
    stream: Stream,
    decode: Decode,
    tokenizer: Tokenizer | None,
    seed: int,
    seconds: float,
    threads: int,
) -> int:
    """About how many rows can be read in `seconds`, told from a few of them; at least those few."""
    rows, _ = rows_of(stream, seed, TRIED)
    begun = time.perf_counter()
    for _ in look(stream.source, rows, decode, tokenizer, max_length_of(stream), threads):
        pass
    return max(TRIED, int(seconds * len(rows) / (time.perf_counter() - begun)))


def look(
    source: Source, rows: np.ndarray, decode: Decode, tokenizer: Tokenizer | None, max_length: int, threads: int
) -> Iterator[Looked | BadSample]:
    """Each of the rows, in order, with what is kept of it, or why it cannot be used."""
    known: dict[bytes, Fingerprint] = {}  # of pictures that stand in several rows, by their bytes

    def picture(sample: Sample) -> Fingerprint | DecodeError | None:
        if "image" not in sample:
            return None
        digest = hashlib.sha256(sample["image"]).digest()
        if digest not in known:
            try:
                known[digest] = fingerprint(decode(sample["image"]))
            except DecodeError as error:
                return error
        return known[digest]

    with ThreadPoolExecutor(threads) as pool:  # decoding and hashing free Python's lock; a source is read by one thread
        for start in range(0, len(rows), CHUNK):
            read = [_read(source, row) for row in rows[start : start + CHUNK].tolist()]
            good = [sample for sample in read if not isinstance(sample, BadSample)]
            seen = pool.map(picture, good)
            captions = iter(_captions(good, tokenizer, max_length))
            for row, sample in zip(rows[start : start + CHUNK].tolist(), read, strict=True):
                if isinstance(sample, BadSample):
                    yield sample
                    continue
                found, texts = next(seen), next(captions)
                if isinstance(found, DecodeError):
                    yield BadSample(sample["name"], "", str(found))
                else:
                    same = sample["same_image"] if "image" in sample else sample["same_text"]
                    yield Looked(row, sample["name"], same, found, texts)


def _read(source: Source, row: int) -> Sample | BadSample:
    """Marks that a source leaves out are those of the loader (see ``loader.read``)."""
    try:
        return {**Sample(name=f"row {row}", same_image=row, same_text=row), **source.read(row, row)}
    except BadSample as error:
        return error


def _captions(samples: Sequence[Sample], tokenizer: Tokenizer | None, max_length: int) -> list[tuple[Caption, ...]]:
    if tokenizer is None or not max_length:
        return [()] * len(samples)
    texts = [sample.get("texts") or ([sample["text"]] if "text" in sample else []) for sample in samples]
    encoded = iter(tokenizer.encode([text for each in texts for text in each], TEXT_LIMIT))

    def caption(text: str) -> Caption:
        ids = next(encoded)
        end = ids[-1:] if ids[-1] == tokenizer.sep_id else []  # captions of ALBEF have none
        seen = np.array([*ids[: max_length - len(end)], *end] if len(ids) > max_length else ids, dtype=np.int64)
        return Caption(text, _digest(seen), _digest(np.array(ids, dtype=np.int64)), len(ids))

    return [tuple(caption(text) for text in each) for each in texts]


def _digest(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def samples_per_second(stream: Stream, seed: int, workers: int, seconds: float) -> float:
    """What the loader gives of a stream on this machine, by `workers` processes, over about `seconds`.

    Batches that are read while the workers start are not counted. Raises TriviumError as the loader does.
    """
    stream = replace(stream, batch=ROWS, micro_batch=ROWS)
    reader = StreamReader(stream, seed)

    def numbers() -> Iterator[tuple[str, int, int]]:
        return ((stream.name, place, 0) for place in count(0, ROWS))

    batches = micro_batches({stream.name: reader}, numbers, workers)
    begun = time.perf_counter()
    for _ in range(1 + workers * PREFETCH):
        next(batches)
        if time.perf_counter() - begun > 2 * seconds:
            break
    begun, number = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        next(batches)
        number += ROWS
    return number / (time.perf_counter() - begun)
