"""A cache of image-tokenizer codes, so that training never runs the encoder.

Random crops would never come twice, so each picture gets a fixed number of views: view 0 is the whole picture (what
evaluation sees), views 1 to K are crops that are a function of the picture's bytes and the number alone. Training
chooses among the K by place. A picture is known by the sha256 of its bytes, so a cache outlives renamed files and
serves any source that holds the same pictures.

On disk: one safetensors file with ``pictures`` (uint8 [P, 32], sorted) and ``codes`` (uint16 [P, 1 + K, N]); its header
holds the settings that decide the codes, and a cache whose settings differ from the run's is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from trivium.data.decode import DecodeError
from trivium.data.views import Views
from trivium.errors import BadSample, TriviumError
from trivium.manifest import file_beside
from trivium.train.protocol import Source

FORMAT = "trivium-codes-1"


def picture_digest(data: bytes) -> bytes:
    """The sha256 of a picture as stored: its name in the cache."""
    return hashlib.sha256(data).digest()


class CodeCache:
    """Codes by picture and number of the view. Opens its file in each process anew, so it is cheap to pickle."""

    def __init__(self, path: str | Path, views: Views, tokenizer_hash: str) -> None:
        """Raises TriviumError where the file cannot be read or was made with other settings or another tokenizer."""
        self.path = Path(path)
        self.views = views
        self.tokenizer_hash = tokenizer_hash
        header = _read_header(self.path)
        wanted = _settings(views, tokenizer_hash)
        for name, value in wanted.items():
            if header.get(name) != value:
                raise TriviumError(
                    f"the code cache {self.path} was made with {name} = {header.get(name)!r}, but this run has"
                    f" {value!r}: build it again with the run's settings"
                )
        self.crops: int = header["crops"]
        self._file = safe_open(self.path, framework="numpy")
        self._digests = np.ascontiguousarray(self._file.get_tensor("pictures")).view("S32").ravel()
        self._codes = self._file.get_slice("codes")
        self.num_codes_per_view = int(self._codes.get_shape()[2])

    def __reduce__(self) -> tuple[type[CodeCache], tuple[Path, Views, str]]:
        return CodeCache, (self.path, self.views, self.tokenizer_hash)

    def __len__(self) -> int:
        return len(self._digests)

    def lookup(self, digest: bytes, number: int, name: str) -> np.ndarray:
        """Codes of view `number` (0 = whole, 1 to `crops`) of a picture: int64 [N]. name: of the sample.

        Raises BadSample for a picture that the cache does not hold: one of them is replaced like any unreadable
        sample (its caption may have been bad when the cache was built), many of them end the run.
        """
        row = int(np.searchsorted(self._digests, np.bytes_(digest)))
        # As bytes: a single text that numpy takes out of an array has lost the zeros at its end.
        if row == len(self) or self._digests[row : row + 1].tobytes() != digest:
            raise BadSample(name, "", f"the code cache {self.path} does not hold this picture: build it again")
        return self._codes[row : row + 1, number : number + 1].astype(np.int64).reshape(-1)


def build(
    source: Source,
    views: Views,
    encode: Callable[[Tensor], Tensor],
    tokenizer_hash: str,
    out: str | Path,
    crops: int = 4,
    batch: int = 64,
    rows_per_part: int = 256,
    source_name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write the codes of every picture of `source` to `out`; a build that was cut short goes on where it stopped.

    encode: uint8 pixels [B, 3, H, W] -> int64 codes [B, N]. Finished parts wait in a folder beside `out` until all
    are there; then `out` appears at once and the folder goes. source_name: parts that were made from a source of
    another name or length are made again. progress: called with the rows done and all rows after
    each part. Returns one sentence for each picture that could not be read: it is left out of the cache, and training
    will replace its sample.
    """
    out = Path(out)
    settings = _settings(views, tokenizer_hash) | {"crops": crops, "source": source_name, "rows": len(source)}
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(source), rows_per_part):
        rows = range(start, min(start + rows_per_part, len(source)))
        paths.append(parts / f"rows-{rows.start:012d}-{rows.stop:012d}.safetensors")
        if not (paths[-1].exists() and settings.items() <= _read_header(paths[-1]).items()):
            pictures, skipped = _render(source, rows, views, crops)
            codes = _encode(pictures, encode, crops, batch)
            digests = np.frombuffer(b"".join(pictures), dtype=np.uint8).reshape(-1, 32)
            _write(paths[-1], {"pictures": digests, "codes": codes}, settings | {"skipped": skipped})
        if progress is not None:
            progress(rows.stop, len(source))
    skipped = _merge(paths, out, settings)
    for path in parts.iterdir():
        path.unlink()
    parts.rmdir()
    return skipped


def _render(source: Source, rows: range, views: Views, crops: int) -> tuple[dict[bytes, np.ndarray], list[str]]:
    """Of each picture in some rows, by digest, all views: uint8 [1 + crops, 3, H, W]. And one sentence for each
    picture that is unreadable."""
    pictures: dict[bytes, np.ndarray] = {}
    skipped = []
    for row in rows:
        try:
            sample = source.read(row, row)
        except BadSample as error:
            skipped.append(str(error))
            continue
        name = sample.get("name", f"row {row}")
        if "image" not in sample:
            skipped.append(f"{name}: has no picture")
            continue
        digest = picture_digest(sample["image"])
        if digest not in pictures:
            try:
                picture_HWC = views.decode(sample["image"])
            except DecodeError as error:
                skipped.append(f"{name}: {error}")
                continue
            height, width, _ = picture_HWC.shape
            chosen = [views.numbered(digest, number, height, width) for number in range(1 + crops)]
            pictures[digest] = np.stack([views.for_codebook(picture_HWC, view) for view in chosen])
    return pictures, skipped


def _encode(
    pictures: dict[bytes, np.ndarray], encode: Callable[[Tensor], Tensor], crops: int, batch: int
) -> np.ndarray:
    """uint16 [P, 1 + crops, N]; [0, 1 + crops, 0] where no picture was readable."""
    if not pictures:
        return np.empty((0, 1 + crops, 0), dtype=np.uint16)
    pixels_BCHW = torch.from_numpy(np.concatenate(list(pictures.values())))
    codes = torch.cat([encode(some_BCHW).cpu() for some_BCHW in pixels_BCHW.split(batch)]).numpy()
    if codes.max() > np.iinfo(np.uint16).max:
        raise TriviumError(f"code {codes.max()} does not fit the cache: it holds codebooks of at most 65,536 codes")
    return codes.astype(np.uint16).reshape(len(pictures), 1 + crops, -1)


def _merge(paths: list[Path], out: Path, settings: dict[str, Any]) -> list[str]:
    """All parts in one file, sorted by digest and each picture once. Returns the sentences about unreadable ones."""
    digests, codes, skipped = [], [], []
    for path in paths:
        skipped += _read_header(path)["skipped"]
        with safe_open(path, framework="numpy") as part:
            if part.get_slice("pictures").get_shape()[0]:
                digests.append(part.get_tensor("pictures"))
                codes.append(part.get_tensor("codes"))
    if not digests:
        raise TriviumError(f"no picture could be read, so there are no codes to write to {out}: {skipped[-1]}")
    every_digest = np.concatenate(digests)
    _, first = np.unique(every_digest.view("S32").ravel(), return_index=True)
    _write(out, {"pictures": every_digest[first], "codes": np.concatenate(codes)[first]}, settings)
    return skipped


def _settings(views: Views, tokenizer_hash: str) -> dict[str, Any]:
    """What decides the codes, as the header of the file holds it."""
    settings = {"format": FORMAT, "tokenizer": tokenizer_hash} | views.codebook_settings()
    return json.loads(json.dumps(settings))  # a tuple comes back from JSON as a list


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get("header", "{}"))
    except (SafetensorError, OSError) as error:
        raise TriviumError(f"the code cache {path} cannot be read ({error}): build it again") from None


def _write(path: Path, tensors: dict[str, np.ndarray], header: dict[str, Any]) -> None:
    """Whole or not at all. The header is one entry: of several, safetensors changes the order from run to run."""
    try:
        with file_beside(path) as beside:
            save_file(tensors, beside, metadata={"header": json.dumps(header)})
    except (SafetensorError, OSError) as error:
        raise TriviumError(f"cannot write {path}: {error}; is the disk full?") from None
