"""Files and folders that are whole: written at once or not at all, and checked before they are used.

manifest.json says what files a folder holds:

    {"files": {"model.safetensors": {"bytes": 1234, "sha256": "..."}, ...}, "sha256": "..."}

The last is the digest of `files` itself: where the manifest is what was damaged, no other file is blamed. A checkpoint
has a manifest, and so has every model folder. Which checkpoint of a run is the newest that is sound is decided here
too, for those who train and for those who load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from trivium.errors import TriviumError

NAME = "manifest.json"
HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{16}")  # names of file_beside, where a killed process left them
_STEP = re.compile(r"step-\d{8}")


@contextmanager
def file_beside(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A name beside `path` to write a file under; it takes its place, synced, when the block ends well.

    A crash leaves the old file or the new one, never a part. Several processes may write the same file at once, on any
    machines. What goes wrong in writing is raised as it is, mostly an OSError; nothing half-written stays.

    Args:
        folder: of that name, on the same file system; None: that of `path`.
    """
    # Drawn, not the number of the process: containers that share a file system often have the same numbers.
    beside = (folder or path.parent) / f".{path.name}.{secrets.token_hex(8)}"
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as the user's umask has it; safetensors writes for the owner alone
        yield beside
        beside.chmod(mode)
        _sync(beside)
        beside.replace(path)
    finally:
        with suppress(OSError):  # it must not hide what went wrong
            beside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all, and the folders that it lies in. Raises TriviumError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TriviumError(f"{path} cannot be written ({error.strerror}): free space or name another folder") from error


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where it is not there. Raises TriviumError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TriviumError(f"{folder} cannot be made a folder ({error.strerror}): name another one") from None


def write_manifest(folder: Path) -> None:
    """Write folder/manifest.json: bytes and sha256 of every other file below the folder."""
    manifest = folder / NAME
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != manifest
    }
    with file_beside(manifest) as beside:
        content = {"files": files, "sha256": digest_of(files)}
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def verify_manifest(folder: Path) -> None:
    """Check every file that folder/manifest.json lists.

    Raises:
        TriviumError: naming the first file that is missing, cut short, changed or not to be read; or the manifest.
    """
    manifest = folder / NAME
    with _read_errors_told(manifest):
        if not manifest.is_file():
            raise TriviumError(
                f"{folder}: no {NAME}, so this is no complete checkpoint or model folder; use another copy"
            )
        text = manifest.read_bytes()
    try:
        content = json.loads(text.decode("utf-8"))
        files = content["files"]
        if content["sha256"] != digest_of(files):
            raise ValueError("not what was written")
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TriviumError(f"{manifest}: damaged; use another checkpoint or copy") from None
    for name, (size, digest) in expected.items():
        path = folder / name
        with _read_errors_told(path):
            if not path.is_file():
                raise TriviumError(f"{path}: missing, although {NAME} lists it; use another checkpoint or copy")
            if path.stat().st_size != size:
                raise TriviumError(f"{path}: {path.stat().st_size} bytes where {size} were written; use another copy")
            if sha256(path) != digest:
                raise TriviumError(f"{path}: its bytes changed since it was written; use another checkpoint or copy")


@contextmanager
def _read_errors_told(path: Path) -> Iterator[None]:
    """A disk that does not give a file is a sentence: an older checkpoint, or a copy, may be sound."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise TriviumError(
            f"{path} cannot be read ({why}): check the disk, or use another checkpoint or copy"
        ) from None


def checkpoints_in(folder: Path) -> list[Path]:
    """Every checkpoint, oldest first, whether it is sound or not. Half-written ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _STEP.fullmatch(path.name))


def newest_checkpoint(folder: Path, say: Callable[[str], None], part: str = ".") -> Path | None:
    """The newest checkpoint that is sound.

    Args:
        say: gets a sentence about each damaged one that was passed over.
        part: what must be sound of it; "model" for those who need no more than that.
    """
    for path in reversed(checkpoints_in(folder)):
        try:
            verify_manifest(path / part)
        except TriviumError as error:
            say(f"{path.name} is damaged and is passed over ({error})")
            continue
        return path
    return None


def digest_of(files: object) -> str:
    """What a manifest states as the digest of its own list of files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place, synced, when the block ends well. A link stays: the folder
    that it leads to is taken for it.

    Raises:
        TriviumError: `folder` holds something already, or cannot be written; nothing half-written stays.
    """
    if folder.is_symlink():  # no folder can be renamed to its name, and it may lead to another disk
        folder = Path(os.path.realpath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TriviumError(f"{folder} exists already and is not empty: name a new folder, or remove it first")
    beside = folder.with_name(f".tmp-{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # left by a killed process
        beside.mkdir()
        yield beside
        mode = beside.stat().st_mode & 0o666  # as the user's umask has it; safetensors writes for the owner alone
        for path in [*beside.rglob("*"), beside]:
            if path.is_file():
                path.chmod(mode)
            _sync(path)
        beside.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError, TriviumError) as error:  # safetensors reports a full disk as an error of its own
        told = str(error).replace(beside.name, folder.name)  # nobody will find the other
        if isinstance(error, TriviumError):
            raise TriviumError(told) from error
        raise TriviumError(
            f"{folder} could not be written ({told}): free some space or check the folder; "
            "what was saved before is untouched"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
