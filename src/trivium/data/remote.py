"""Files at an address (http, https, s3, ...), read by ranges through fsspec: the extra ``remote``.

A read that fails is tried again after a pause, each pause twice as long; what is not there is not asked for again. A
connection on which nothing moves for 30 seconds has failed.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from trivium.errors import TriviumError

T = TypeVar("T")

ATTEMPTS = 4
PAUSE = 0.5  # seconds before the second attempt
STALL = 30.0  # seconds in which nothing arrives
LONGEST = 300.0  # seconds of one request
PIECE = 8 * 2**20  # bytes that are asked for at once where a file is read from end to end
PASSING = (408, 425, 429)  # statuses of a request that may succeed later, among those that say it never will


def is_remote(path: str) -> bool:
    return "://" in path


def beside(address: str, suffix: str) -> str:
    """The address of a file whose name goes on with `suffix`. A query, such as a signature, stays at the end."""
    path, mark, query = address.partition("?")
    return path + suffix + mark + query


def without_query(path: str) -> str:
    """How an address is written down and compared: a signature is nobody's business, and changes. A path stays."""
    return path.partition("?")[0] if is_remote(path) else path


class RemoteFile:
    """Ranges of the bytes of a file at an address: opened at first use, by each process for itself.

    Every method raises FileNotFoundError where the server says that there is no such file, and OSError where it gave
    no answer at the last attempt, or serves whole files alone; TriviumError where a package is missing.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = without_query(path)
        self._file: Any = None
        self._process = -1  # what was opened before a fork is the parent's

    def read(self, start: int, stop: int) -> bytes:
        """Shorter than asked where the file ends early."""

        def once() -> bytes:
            file = self._opened()
            file.seek(start)
            return file.read(min(stop, file.size) - start) if start < min(stop, file.size) else b""

        return self._persistently(once)

    def facts(self) -> tuple[int, str]:
        """Size in bytes, and what changes when the file does: its ETag or its date, "" where neither is known."""
        details = self._persistently(lambda: self._opened().details)
        known = [details[name] for name in ("ETag", "Last-Modified", "LastModified", "mtime") if details.get(name)]
        return int(details["size"]), str(known[0]) if known else ""

    def stream(self) -> BinaryIO:
        """The file from end to end, in bounded pieces."""
        return io.BufferedReader(_Ranges(self), PIECE)

    def _opened(self) -> Any:
        if self._file is None or self._process != os.getpid():
            filesystem, path = _filesystem(self.path)
            details = filesystem.info(path)
            if details.get("size") is None or details.get("partial") is False:
                raise self._whole_files_alone()
            self._file = filesystem.open(path, "rb", cache_type="none", size=details["size"])
            self._file.details = details
            self._process = os.getpid()
        return self._file

    def _persistently(self, once: Callable[[], T]) -> T:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                return once()
            except (TriviumError, _WholeFilesAlone):
                raise
            except ValueError:  # fsspec's answer to a whole file where a range was asked for
                raise self._whole_files_alone() from None
            except Exception as error:  # each protocol has types of its own
                self._file = None
                cause = error.__cause__ or error  # fsspec calls whatever befalls its first question "not found"
                status = getattr(cause, "status", None)
                why = f"HTTP {status}" if status is not None else type(cause).__name__
                if isinstance(cause, FileNotFoundError | PermissionError) or (
                    status is not None and 400 <= status < 500 and status not in PASSING
                ):
                    raise FileNotFoundError(f"there is no {self.name} ({why})") from None
        raise OSError(f"{self.name} gave no answer in {ATTEMPTS} attempts, at last {why}")

    def _whole_files_alone(self) -> _WholeFilesAlone:
        return _WholeFilesAlone(f"the server of {self.name} serves whole files alone, no ranges")

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_file": None, "_process": -1}


class _WholeFilesAlone(OSError):
    """Trying again would not help."""


class _Ranges(io.RawIOBase):
    """What ``io.BufferedReader`` asks of a file."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.size, self.position = file.facts()[0], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(self.position, min(self.position + len(buffer), self.size))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the file's name in it. Raises TriviumError."""
    options: dict[str, Any] = {}
    try:
        import fsspec

        if address.startswith(("http://", "https://")):
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(total=LONGEST, sock_connect=STALL, sock_read=STALL)
            }
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        raise TriviumError(
            f"{without_query(address)} cannot be read ({error}): pip install 'trivium[remote]'"
        ) from None
    except ValueError as error:  # a protocol that fsspec does not know
        raise TriviumError(f"{without_query(address)} cannot be read: {error}") from None
