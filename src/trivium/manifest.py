"""manifest.json: what files a folder holds, so that a cut or a changed one is found before it is used.

    {"files": {"model.safetensors": {"bytes": 1234, "sha256": "..."}, ...}}

A checkpoint has one, and so has every model folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from trivium.errors import TriviumError

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write folder/manifest.json: bytes and sha256 of every other file below the folder. Written beside, renamed."""
    manifest = folder / NAME
    beside = folder / f".tmp-{NAME}"
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in (manifest, beside)
    }
    with beside.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"files": files}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(manifest)


def verify_manifest(folder: Path) -> None:
    """Check every file that folder/manifest.json lists.

    Raises:
        TriviumError: naming the first file that is missing, cut short or changed; or the manifest itself.
    """
    manifest = folder / NAME
    if not manifest.is_file():
        raise TriviumError(f"{folder}: no {NAME}, so this is no complete checkpoint or model folder; use another copy")
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TriviumError(f"{manifest}: damaged; use another checkpoint or copy") from None
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise TriviumError(f"{path}: missing, although {NAME} lists it; use another checkpoint or copy")
        if path.stat().st_size != size:
            raise TriviumError(f"{path}: {path.stat().st_size} bytes where {size} were written; use another copy")
        if _sha256(path) != digest:
            raise TriviumError(f"{path}: its bytes changed since it was written; use another checkpoint or copy")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
