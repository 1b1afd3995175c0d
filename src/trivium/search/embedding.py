"""The embeddings of every picture in a folder, or of every line of a text file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trivium.bundle import Bundle
from trivium.data.decode import DecodeError
from trivium.data.files import PICTURE_SUFFIXES, TEXT_LIMIT, readable, walk
from trivium.errors import TriviumError
from trivium.models.encoded import Encoded
from trivium.search.index import unit_rows
from trivium.search.table import Row

T = TypeVar("T")

BATCH = 64
DECODERS = 4  # threads: decoding frees Python's lock


def find_pictures(folder: Path) -> list[str]:
    """Pictures below a folder, relative to it, sorted. Raises TriviumError where there is no folder or no picture."""
    if not folder.exists():
        raise TriviumError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise TriviumError(f"{folder} is a file, not a folder of pictures")
    files = sorted(file for file in walk(str(folder)) if file.lower().endswith(PICTURE_SUFFIXES))
    if not files:
        raise TriviumError(f"{folder} holds no picture, nor does a folder below it ({', '.join(PICTURE_SUFFIXES)})")
    return files


def embed_pictures(bundle: Bundle, folder: Path, files: Sequence[str], known: Mapping[str, Row]) -> Iterator[Row]:
    """A row for each file, in order; a file that cannot be used gives a row with an error. So does one whose name is
    not UTF-8: a table could not lead back to it.

    known: rows of an earlier run by file; taken over where the bytes are the same.
    """

    def prepare(file: str) -> Row | tuple[str, str, Tensor]:
        if readable(file) != file:
            return Row(readable(file), "", None, "its name is not UTF-8: rename it")
        try:
            content = (folder / file).read_bytes()
        except OSError as error:
            return Row(file, "", None, f"cannot be read: {error.strerror}")
        sha256 = hashlib.sha256(content).hexdigest()
        if file in known and known[file].sha256 == sha256:
            return known[file]
        try:
            return file, sha256, bundle.transform(content)
        except DecodeError as error:
            return Row(file, sha256, None, str(error))

    with ThreadPoolExecutor(DECODERS) as decoders:
        for some in _batches(files):
            prepared = list(decoders.map(prepare, some))
            yield from _encoded(prepared, lambda pixels: _vectors_of(bundle, pixels))


def embed_lines(bundle: Bundle, path: Path, known: Mapping[str, Row], cut: list[str]) -> Iterator[Row]:
    """A row for each line of a UTF-8 text file, named "file:line" with lines counted from 1. `known`: as above.

    cut: takes up the names of the lines whose end is not read, known ones too.
    """
    limit, tokenizer = bundle.max_length, bundle.tokenizer

    def prepare(number: int, line: bytes) -> Row | tuple[str, str, str]:
        name, line = f"{readable(path.name)}:{number}", line.strip()
        sha256 = hashlib.sha256(line).hexdigest()
        if not line:
            return Row(name, sha256, None, "the line is empty")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            return Row(name, sha256, None, f"not UTF-8 at byte {error.start} of the line")
        if tokenizer is not None:  # else `encode_text` says what is missing
            ids, nothing = tokenizer.encode([text[:TEXT_LIMIT], ""], limit + 1)
            if ids == nothing:
                return Row(name, sha256, None, "the line holds only marks that this model leaves out")
            if len(ids) > limit or len(text) > TEXT_LIMIT:
                cut.append(name)
        if name in known and known[name].sha256 == sha256:
            return known[name]
        return name, sha256, text[:TEXT_LIMIT]

    with path.open("rb") as lines:
        for some in _batches(enumerate(lines, start=1)):
            prepared = [prepare(number, line) for number, line in some]
            yield from _encoded(prepared, lambda texts: unit_vectors(bundle.encode_text(texts)))


def _vectors_of(bundle: Bundle, pixels: list[Tensor]) -> np.ndarray:
    if len({one.shape for one in pixels}) == 1:
        return unit_vectors(bundle.encode_image(torch.stack(pixels), batch=BATCH))
    # A model that reads pictures of any shape: each by itself, so that none depends on its neighbours.
    return np.concatenate([unit_vectors(bundle.encode_image(one[None])) for one in pixels])


def unit_vectors(encoded: Encoded) -> np.ndarray:
    """float32 [B, D] of length 1, in the space that pictures and texts share; of a model without one, pooled."""
    vectors_BD = encoded.projected if encoded.is_projected else encoded.pooled
    return unit_rows(vectors_BD.detach().float().cpu().numpy())


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while some := list(islice(rest, BATCH)):
        yield some


def _encoded(prepared: Sequence[Row | tuple[str, str, T]], encode: Callable[[list[T]], np.ndarray]) -> Iterator[Row]:
    """Rows that are done as they are, the others from the model, in order."""
    waiting = [one[2] for one in prepared if not isinstance(one, Row)]
    vectors = iter(encode(waiting)) if waiting else iter(())
    for one in prepared:
        if isinstance(one, Row):
            yield one
        else:
            file, sha256, _ = one
            vector = next(vectors)
            finite = bool(np.isfinite(vector).all())
            yield Row(file, sha256, vector if finite else None, None if finite else "the model gave no number")
