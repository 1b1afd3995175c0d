"""Features of labelled pictures, computed once and kept on the disk.

A file holds the features of PIECE pictures, so what was interrupted goes on where it stopped. Its folder is named after
what the features depend on: the encoder (its weights and its transform) and names, sizes and times of the files that
the pictures are read from. With the features go the fingerprints by which copies are found, since both need the pixels.

N pictures, D width, C = 192 colours of a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trivium.bundle import Bundle
from trivium.bundle.hashes import model_hash
from trivium.data import duplicates
from trivium.data.transforms import resize
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.evaluate.datasets.pictures import Pictures
from trivium.manifest import file_beside
from trivium.models.encoded import EncodesImage, EncodesText

VERSION = 1  # another makes every file anew
PIECE = 4096
BATCH = 128
PIXEL_SIDE = 16


class Encoder(Protocol):
    """What turns pictures into vectors."""

    name: str  # how the notes call it
    hash: str  # of everything that its features depend on

    def __call__(self, pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Readings by name, float32 [B, D] each, of uint8 [H, W, 3]; "pooled" is among them."""
        ...


class ModelEncoder:
    """A Bundle's image tower: "pooled", the class token after the final norm, which FLAVA's and CLIP's probes take, and
    "projected" where the model has a space that images and texts share."""

    def __init__(self, bundle: Bundle) -> None:
        if not isinstance(bundle.model, EncodesImage):
            raise TriviumError(f"{type(bundle.model).__name__} reads no pictures")
        self.bundle = bundle
        self.name = bundle.family
        self.hash = model_hash(bundle)

    def __call__(self, pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
        encoded = self.bundle.encode_image(list(pictures), batch=BATCH)
        readings = {"pooled": encoded.pooled}
        if encoded.is_projected and isinstance(self.bundle.model, EncodesText):
            readings["projected"] = encoded.projected
        return {name: rows.float().cpu() for name, rows in readings.items()}


class PixelEncoder:
    """Pictures of 16 x 16 pixels in place of a model: the floor that it must beat."""

    name = "pixels"
    hash = f"{PIXEL_SIDE} pixels, box"

    def __call__(self, pictures: Sequence[np.ndarray]) -> dict[str, Tensor]:
        small = [resize(picture, PIXEL_SIDE, filter="box").ravel() for picture in pictures]
        return {"pooled": torch.from_numpy(np.stack(small)).float() / 255}


def cache_root() -> Path:
    """Where figures and features are kept: $XDG_CACHE_HOME/trivium/evaluate."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium" / "evaluate"


def make_cache_root() -> Path:
    """`cache_root`, made where it was not there. Raises TriviumError where it can neither be found nor made."""
    try:
        folder = cache_root()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter where nothing says which folder is the user's home
        raise TriviumError(
            f"no folder to keep figures and features in ({error}): set XDG_CACHE_HOME to one that can be written"
        ) from None
    return folder


def identity(pictures: Pictures) -> str:
    """What changes when the pictures do: names in order; names, sizes and times of the files."""
    digest = hashlib.sha256(f"{len(pictures)}".encode())
    for row in range(len(pictures)):
        digest.update(f"\n{pictures.name(row)}".encode())
    for file in sorted({str(file) for file in pictures.files()}):
        digest.update(stamp_of(Path(file)).encode())
    return digest.hexdigest()


def stamp_of(file: Path) -> str:
    """Path, size and time of a file; of one that is not there, that."""
    try:
        facts = file.stat()
    except OSError:
        return f"\n{file.absolute()} missing"
    return f"\n{file.absolute()} {facts.st_size} {facts.st_mtime_ns}"


@dataclass(frozen=True)
class Features:
    """Of the pictures that could be read."""

    readings: dict[str, Tensor]  # float32 [N, D] on CPU
    rows_N: np.ndarray  # which of the pictures these are, int64, rising
    digests: list[bytes]  # sha256 of the pixels
    hashes_N: np.ndarray  # uint64
    colours_NC: np.ndarray  # uint8
    bad: list[str]  # a sentence for each that could not be read
    is_final: bool = True  # False: one of these may be readable another time, so nothing of it is kept

    def __len__(self) -> int:
        return len(self.rows_N)


def features(
    encoder: Encoder,
    pictures: Pictures,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
    wanted: Collection[str] | None = None,
) -> Features:
    """The features of all pictures, read from `folder` as far as they are there, and written to it piece by piece.

    Where it cannot be written, that is said once, and the features are returned all the same.

    Args:
        wanted: readings to return, where the others would fill the memory for nobody; None: all. All are written.

    Raises:
        TriviumError: none of the pictures can be read.
    """
    key = hashlib.sha256(f"{VERSION} {encoder.hash} {identity(pictures)}".encode()).hexdigest()[:32]
    pieces = []
    is_writable = True
    for first in range(0, len(pictures), PIECE):
        rows = range(first, min(first + PIECE, len(pictures)))
        file = folder / key / f"{first:09d}.safetensors"
        piece = _read(file)
        if piece is None:
            say(f"features of {first:,} to {rows[-1] + 1:,} of {len(pictures):,}")
            piece = _encoded(encoder, pictures, rows)
            if piece.is_final and is_writable:
                try:
                    _write(file, piece)
                except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
                    is_writable = False
                    why = getattr(error, "strerror", None) or error
                    say(
                        f"{file} cannot be written ({why}), so a later call makes the features anew: free space, or set"
                        " XDG_CACHE_HOME"
                    )
        readings = {name: found for name, found in piece.readings.items() if wanted is None or name in wanted}
        pieces.append(replace(piece, readings=readings))
    bad = [sentence for piece in pieces for sentence in piece.bad]
    kept = [piece for piece in pieces if len(piece)]
    if not kept:
        raise TriviumError(f"none of the {len(pictures):,} pictures can be read; the first: {bad[0]}")
    return Features(
        {name: torch.cat([piece.readings[name] for piece in kept]) for name in kept[0].readings},
        np.concatenate([piece.rows_N for piece in kept]),
        [digest for piece in kept for digest in piece.digests],
        np.concatenate([piece.hashes_N for piece in kept]),
        np.concatenate([piece.colours_NC for piece in kept]),
        bad,
        all(piece.is_final for piece in pieces),
    )


def _encoded(encoder: Encoder, pictures: Pictures, rows: range) -> Features:
    parts: dict[str, list[Tensor]] = {}
    kept: list[int] = []
    prints: list[duplicates.Fingerprint] = []
    bad: list[str] = []
    is_final = True
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in _decoded(pool, pictures, rows):
            good = [(row, picture, found) for row, picture, found in batch if isinstance(picture, np.ndarray)]
            bad += [str(picture) for _, picture, _ in batch if isinstance(picture, BadSample)]
            is_final &= not any(isinstance(picture, UnreadableNow) for _, picture, _ in batch)
            if not good:
                continue
            for name, values in encoder([picture for _, picture, _ in good]).items():
                parts.setdefault(name, []).append(values)
            kept += [row for row, _, _ in good]
            prints += [found for _, _, found in good if found is not None]
    hashes_N, colours_NC = duplicates.arrays(prints)
    readings = {name: torch.cat(several) for name, several in parts.items()}
    digests = [found.pixels for found in prints]
    return Features(readings, np.array(kept, dtype=np.int64), digests, hashes_N, colours_NC, bad, is_final)


Decoded = tuple[int, np.ndarray | BadSample, duplicates.Fingerprint | None]


def _decoded(pool: ThreadPoolExecutor, pictures: Pictures, rows: range) -> Iterator[list[Decoded]]:
    """A batch after the other; the next is decoded while this one goes through the model."""

    def one(row: int) -> Decoded:
        try:
            picture = pictures.read(row)
        except BadSample as error:
            return row, error, None
        return row, picture, duplicates.fingerprint(picture)

    batches = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
    coming = [pool.submit(one, row) for row in batches[0]]
    for following in [*batches[1:], range(0)]:
        current, coming = coming, [pool.submit(one, row) for row in following]
        yield [future.result() for future in current]


def _write(file: Path, piece: Features) -> None:
    """Raises OSError or SafetensorError."""
    tensors = {f"reading.{name}": rows.contiguous() for name, rows in piece.readings.items()}
    tensors |= {
        "rows": torch.from_numpy(piece.rows_N),
        "digests": torch.frombuffer(bytearray(b"".join(piece.digests)), dtype=torch.uint8).view(-1, 32)
        if piece.digests
        else torch.zeros(0, 32, dtype=torch.uint8),
        "hashes": torch.from_numpy(piece.hashes_N.view(np.int64).copy()),
        "colours": torch.from_numpy(piece.colours_NC.copy()),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_beside(file) as beside:
        save_file(tensors, beside, metadata={"bad": json.dumps(piece.bad)})


def _read(file: Path) -> Features | None:
    """A piece; None where there is none, or it is damaged: then it is made again."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
            bad = json.loads((opened.metadata() or {})["bad"])
        return Features(
            {name.removeprefix("reading."): rows for name, rows in tensors.items() if name.startswith("reading.")},
            tensors["rows"].numpy(),
            [row.tobytes() for row in tensors["digests"].numpy()],
            tensors["hashes"].numpy().view(np.uint64),
            tensors["colours"].numpy(),
            bad,
        )
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
