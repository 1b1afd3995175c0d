"""What every source of samples shares, and the two plainest: a folder of pictures and a file of text lines.

Row and number. Image and text of one true row always get the same number (``same_image == same_text``), so a false pair
is one whose numbers differ. Rows that show the same picture file, or the same bytes in a table or a shard, share their
number; every other row has its own. Equal captions of different pictures are not merged: that would have to merge their
pictures too.
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import numpy as np
import pyarrow as pa

from trivium.data.remote import RemoteFile, is_remote
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.train.protocol import Blocks, Sample, hash64

Kind = Literal["pairs", "images", "text"]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
INDEX_SUFFIX = ".tar.index.parquet"  # of the sidecars of tar shards, which are no data
TEXT_LIMIT = 65_536  # characters of one text that are read; `cut_texts` counts the longer ones
PICTURE_LIMIT = 256 * 2**20  # bytes of one encoded picture
WINDOW = 64  # words of a long line that make one sample, where nothing says how much of it a model reads
BLOCK = 1024  # rows to a block where nothing in the files suggests another number
OPEN_FILES = 128  # that a process keeps: more than an ``Order`` mixes, and of the system's 1,024 a small part


class RowSource(ABC):
    """A ``Source`` whose rows have a picture, captions, or both. Subclasses say where these are."""

    kind: Kind

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, row: int) -> tuple[str, str]:
        """File, and line or member inside it, of a row: how messages name it."""

    @abstractmethod
    def picture(self, row: int) -> bytes:
        """The encoded picture. Raises BadSample."""

    @abstractmethod
    def captions(self, row: int) -> list[str]:
        """Its captions as they stand in the file. Raises BadSample."""

    def identity(self, row: int) -> str:
        """What the number of a row is made from: equal only where the picture is the same."""
        return "\n".join((os.path.abspath(self.where(row)[0]), self.where(row)[1]))

    def picture_path(self, row: int) -> str | None:
        """The file that holds its picture and nothing else; None where it stands inside another. Raises BadSample."""
        return None

    def label(self, row: int) -> int | None:
        """The class of the picture, where it has one."""
        return None

    def blocks(self) -> Sequence[range]:
        return Blocks(np.append(np.arange(0, len(self), BLOCK), len(self)))

    def lengths(self) -> Sequence[int] | None:
        return None

    def cut_texts(self) -> int:
        """How many texts are longer than TEXT_LIMIT characters, and therefore read only up to there."""
        lengths = self.lengths()
        return 0 if lengths is None else int((np.asarray(lengths) > TEXT_LIMIT).sum())

    def read(self, image_row: int, text_row: int) -> Sample:
        """The picture of one row with the text of another. Raises BadSample."""
        sample: Sample = {}
        if self.kind != "text":
            sample["image"] = self.picture(image_row)
            sample["same_image"] = self._number(image_row)
            label = self.label(image_row)
            if label is not None:
                sample["label"] = label
        if self.kind != "images":
            texts = self._texts(text_row)
            if len(texts) == 1:
                sample["text"] = texts[0]
            else:
                sample["texts"] = texts
            sample["same_text"] = self._number(text_row)
        sample["name"] = self._name(text_row if self.kind == "text" else image_row)
        if image_row != text_row and self.kind == "pairs":
            sample["name"] += f" with the text of {self._name(text_row)}"
        return sample

    def _number(self, row: int) -> int:
        return hash64(readable(self.identity(row))) >> 1  # 63 bits: it must fit into an int64

    def _texts(self, row: int) -> list[str]:
        texts = [text[:TEXT_LIMIT].strip() for text in self.captions(row)]
        texts = [text for text in texts if text]
        if not texts:
            raise self.bad(row, "its text is empty")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:  # JSON can spell half a character
            raise self.bad(row, "its text is no Unicode (a lone surrogate)") from None
        return texts

    def _name(self, row: int) -> str:
        file, where = self.where(row)
        return f"{file} ({where})" if where else file

    def bad(self, row: int, why: str) -> BadSample:
        return BadSample(*self.where(row), why)

    def picture_file(self, row: int, path: str) -> bytes:
        """The bytes of the picture file that a row names. Raises BadSample in the name of the row."""
        named = "" if self.where(row)[0] == readable(path) else f" {readable(path)}"
        try:
            facts = os.stat(path)
            if not stat.S_ISREG(facts.st_mode):
                raise self.bad(row, f"its picture{named} is no ordinary file")
            if facts.st_size > PICTURE_LIMIT:
                raise self.bad(row, f"its picture{named} has {facts.st_size:,} bytes, more than {PICTURE_LIMIT:,}")
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise self.bad(row, f"its picture{named} does not exist") from None
        except OSError as error:
            raise UnreadableNow(*self.where(row), f"its picture{named} cannot be read: {error}") from None
        except ValueError as error:  # a path with a zero byte in it
            raise self.bad(row, f"its picture{named} cannot be read: {error}") from None
        if not data:
            raise self.bad(row, f"its picture{named} has zero bytes")
        return data

    def bytes_of(self, row: int, file: RandomFile, start: int, stop: int) -> bytes:
        """A range of the file that a row stands in. Raises BadSample in the name of the row."""
        try:
            return file.read(start, stop)
        except OSError as error:
            raise UnreadableNow(*self.where(row), f"it cannot be read: {error}") from None

    def utf8(self, row: int, data: bytes) -> str:
        """Text of a row. Raises BadSample where it is not UTF-8."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"byte 0x{data[error.start]:02x} at position {error.start}"
            raise self.bad(row, f"its text is not UTF-8 ({what}); convert the file to UTF-8") from None


class RandomFile:
    """Ranges of a file's bytes: opened at first use, by each process for itself; safe to share between threads.

    A corpus may have more files than a process may have open: the OPEN_FILES that were opened last stay open, and
    another one is opened anew when it is read again.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle: _Handle | None = None

    def read(self, start: int, stop: int) -> bytes:
        """Shorter than asked where the file ends early. Raises OSError."""
        handle = self._handle or self._open()  # held until it is read: another thread may let go of it meanwhile
        return os.pread(handle.descriptor, stop - start, start)

    def _open(self) -> _Handle:
        while len(_opened) >= OPEN_FILES:
            if (oldest := _opened.popleft()()) is not None:
                oldest._handle = None
        self._handle = handle = _Handle(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        _opened.append(weakref.ref(self))
        return handle

    def facts(self) -> tuple[int, str]:
        """Size in bytes, and what changes when the file does. Raises OSError."""
        facts = os.stat(self.path)
        return facts.st_size, str(facts.st_mtime_ns)

    def stream(self) -> BinaryIO:
        """The file from end to end. Raises OSError."""
        return open(self.path, "rb")

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_handle": None}


class _Handle:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


_opened: deque[weakref.ref[RandomFile]] = deque()  # in this order


def open_file(path: str) -> RandomFile | RemoteFile:
    """A file at a path or an address. Nothing is opened yet."""
    return RemoteFile(path) if is_remote(path) else RandomFile(path)


# ----------------------------------------------------------------------------------------------- a folder


class Folder(RowSource):
    """Pictures below a folder, in the order of their paths. Hidden files and other suffixes are no pictures. A name
    that is not UTF-8 is none the worse for it: it is shown as `readable` makes it.

    kind "pairs": the caption of ``a/photo.jpg`` is ``a/photo.txt``, one caption a line. With `classes`, the class of a
    picture is the first folder on its path, by number in ``class_names``.
    """

    def __init__(self, path: str | Path, kind: Kind, classes: bool = False) -> None:
        assert kind != "text"
        self.kind = kind
        self.root = str(path)
        pictures = sorted(file for file in walk(self.root) if file.lower().endswith(PICTURE_SUFFIXES))
        if not pictures:
            raise TriviumError(_no_pictures(self.root))
        self.class_names: list[str] = []
        if classes:
            self.class_names = sorted({_class_of(file) for file in pictures if "/" in file})
            if stray := next((file for file in pictures if "/" not in file), None):
                raise TriviumError(f"{self.root}/{stray} lies in no class folder: move each picture into its class")
        # A million paths stay one compact buffer, of bytes since not every name is text.
        self._pictures = pa.array(map(os.fsencode, pictures), pa.large_binary())
        if kind == "pairs" and not any(os.path.exists(self._caption_file(row)) for row in range(len(self))):
            raise TriviumError(
                f"no picture in {self.root} has a caption: photo.txt must stand beside photo.jpg; for pictures without "
                "captions use --data.images"
            )

    def __len__(self) -> int:
        return len(self._pictures)

    def where(self, row: int) -> tuple[str, str]:
        return readable(self._picture_file(row)), ""

    def picture(self, row: int) -> bytes:
        return self.picture_file(row, self._picture_file(row))

    def picture_path(self, row: int) -> str:
        return self._picture_file(row)

    def captions(self, row: int) -> list[str]:
        path = self._caption_file(row)
        try:
            with open(path, "rb") as file:
                # A character takes at most 4 bytes; what is cut off of the last one is left out.
                data = file.read(4 * TEXT_LIMIT + 4)
        except FileNotFoundError:
            raise self.bad(row, f"it has no caption: {readable(path)} does not exist") from None
        except OSError as error:
            raise self.bad(row, f"its caption cannot be read: {error}") from None
        if len(data) == 4 * TEXT_LIMIT + 4:
            data = data[: 4 * TEXT_LIMIT].decode("utf-8", "ignore").encode()
        return self.utf8(row, data.removeprefix(b"\xef\xbb\xbf")).splitlines()

    def label(self, row: int) -> int | None:
        return self.class_names.index(_class_of(self._inside(row))) if self.class_names else None

    def cut_texts(self) -> int:
        def size(row: int) -> int:
            path = self._caption_file(row)
            return os.path.getsize(path) if os.path.exists(path) else 0

        sizes = {row: size(row) for row in range(len(self) if self.kind == "pairs" else 0)}
        large = [row for row, bytes_ in sizes.items() if bytes_ > TEXT_LIMIT]
        cut = {row: sum(len(line) > TEXT_LIMIT for line in self.captions(row)) for row in large}
        # Of a file above the bytes that are read its end is cut, however short its lines are.
        return sum(max(number, sizes[row] > 4 * TEXT_LIMIT) for row, number in cut.items())

    def _inside(self, row: int) -> str:
        return os.fsdecode(self._pictures[row].as_py())

    def _picture_file(self, row: int) -> str:
        return f"{self.root}/{self._inside(row)}"

    def _caption_file(self, row: int) -> str:
        return os.path.splitext(self._picture_file(row))[0] + ".txt"


def _class_of(file: str) -> str:
    return readable(file.split("/")[0])


def readable(path: str) -> str:
    """A path that can be written down: bytes of a name that are no UTF-8, as out of an old archive, become \\udce9."""
    return path.encode("utf-8", "backslashreplace").decode()


def walk(root: str) -> Iterator[str]:
    """Files below a folder, relative to it, with "/". Links to folders are followed, each folder once.

    Raises TriviumError where one cannot be read: what lies in it would be missing unsaid.
    """

    def unreadable(error: OSError) -> NoReturn:
        raise TriviumError(
            f"{error.filename} cannot be read ({error.strerror}): change its rights, or name the folders beside it"
        )

    visited: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def _no_pictures(root: str) -> str:
    """Why a folder gives no rows, and what may have been meant."""
    for suffix in (".parquet", ".tar", ".csv", ".tsv", ".jsonl"):
        if any(file.endswith(suffix) and not file.endswith(INDEX_SUFFIX) for file in walk(root)):
            return f'{root} holds no picture but {suffix} files: name those you mean, as in "{root}/train-*{suffix}"'
    return f"{root} holds no picture ({', '.join(PICTURE_SUFFIXES)}), nor does any folder below it"


# -------------------------------------------------------------------------------------------- lines of text


def words_within(max_length: int) -> int:
    """Words of plain text that a model of so many tokens reads to their end: half a word a token, beside [CLS] and
    [SEP]. The glosses inside the package have 1.5 of BERT's pieces a word, 1.9 of a vocabulary of 4,096."""
    return max(1, (max_length - 2) // 2)


class TextLines(RowSource):
    """A text file, one sample a line. Blank lines separate and are no samples.

    A line of more than `window` words is cut into windows of no more than these, each a sample; ``long_lines`` counts
    them.
    """

    kind: Kind = "text"

    def __init__(self, path: str | Path, window: int = WINDOW) -> None:
        self._file = RandomFile(str(path))
        self.long_lines = 0
        starts, stops, lines = array("q"), array("q"), array("q")
        offset = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                begin = offset + 3 * (number == 1 and line.startswith(b"\xef\xbb\xbf"))
                stop = offset + len(line)
                if stop - begin < 2 * window:  # too short to hold more words
                    windows = [(begin, stop)] if line.strip() else []
                else:
                    windows = _windows(line, offset, begin, window)
                    self.long_lines += len(windows) > 1
                for start, end in windows:
                    starts.append(start)
                    stops.append(end)
                    lines.append(number)
                offset = stop
        self._starts, self._stops, self._lines = (np.frombuffer(column, np.int64) for column in (starts, stops, lines))
        if not len(self):
            raise TriviumError(f"{path} holds no text: one sample stands on each line")

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, row: int) -> tuple[str, str]:
        first = int(np.searchsorted(self._lines, self._lines[row]))
        more = first != row or (row + 1 < len(self) and self._lines[row + 1] == self._lines[row])
        return readable(self._file.path), f"line {self._lines[row]}" + (f", window {row - first + 1}" if more else "")

    def picture(self, row: int) -> bytes:
        raise AssertionError("text has no pictures")

    def captions(self, row: int) -> list[str]:
        return [self.utf8(row, self._line(row))]

    def lengths(self) -> Sequence[int] | None:
        """In bytes, which are at least as many as characters."""
        return self._stops - self._starts  # type: ignore[return-value]  # an array serves as the sequence

    def cut_texts(self) -> int:
        long = np.flatnonzero(self._stops - self._starts > TEXT_LIMIT)
        texts = (self._line(row) for row in long.tolist())
        return sum(len(text.decode("utf-8", "replace").strip()) > TEXT_LIMIT for text in texts)

    def _line(self, row: int) -> bytes:
        return self.bytes_of(row, self._file, int(self._starts[row]), int(self._stops[row]))


# Thai and Lao, kana and Chinese characters, which stand without spaces, as UTF-8 has them.
_ALONE = rb"(?:\xe0[\xb8-\xbb]|[\xe3-\xe9][\x80-\xbf]|\xf0[\xa0-\xaf][\x80-\xbf])[\x80-\xbf]"
WORD = re.compile(_ALONE + rb"|(?:(?!" + _ALONE + rb")\S)+")


def _windows(line: bytes, offset: int, begin: int, window: int) -> list[tuple[int, int]]:
    """Bounds in the file of as few runs of at most `window` words as hold a line that stands at `offset`, each as long
    as the others but for one word: a rest of a word or two would be no sample. Of scripts without spaces each character
    is a word."""
    words = [(offset + match.start(), offset + match.end()) for match in WORD.finditer(line)]
    if len(words) <= window:
        return [(begin, offset + len(line))] if words else []
    number = -(-len(words) // window)
    bounds = [len(words) * run // number for run in range(number + 1)]
    runs = (words[first:end] for first, end in pairwise(bounds))
    return [(max(begin, run[0][0]), run[-1][1]) for run in runs]
