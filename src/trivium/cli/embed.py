"""``trivium embed``: the embeddings of a folder as a Parquet file."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.bundle import Bundle
    from trivium.search.table import Row

SECONDS_BETWEEN_SAVES = 60.0
ERRORS_SHOWN = 10


def embed(
    path: Path,
    folder: Path,
    *,
    out: Path,
    text: bool = False,
    image_size: Annotated[int | None, arg(metavar="N")] = None,
) -> None:
    """Write one embedding per picture of a folder tree, or per line of a text file.

    The Parquet file has the columns file, sha256, embedding (float32, length 1) and error; a file that cannot be
    read has no embedding and says why. Embeddings lie in the space that pictures and texts share; those of a model
    that has none, as a DINO or a BERT, are what it pools. Run it again to go on after an interruption or to take
    up new and changed files: the others are not computed again.

    Args:
        path: the model: a run folder, a model folder, or weights of another library.
        folder: pictures, in folders at any depth; with --text a text file, one text a line.
        out: the Parquet file to write, or to bring up to date.
        text: read a text file instead of pictures.
        image_size: pixels on the side of a picture, where not the model's own: its positions are interpolated.
    """
    check_can_write(out)
    if text and image_size is not None:
        raise TriviumError("--image-size is of pictures: leave it out with --text")
    from trivium.search import embedding

    if text and not folder.is_file():
        raise TriviumError(f"{folder}: there is no such text file")
    files = None if text else embedding.find_pictures(folder)
    bundle = open_model(path, image_size)
    rows = list(embed_into(out, bundle, folder, files))
    show_errors(rows)
    good = sum(row.embedding is not None for row in rows)
    print(f"{good} embeddings in {out}" + (f", {len(rows) - good} could not be read" if good < len(rows) else ""))


def open_model(path: Path, image_size: int | None = None, device: str = "auto") -> Bundle:
    """image_size: of the pictures that it is to see; None: its own. Raises TriviumError for one that it cannot see."""
    from trivium.load import load
    from trivium.recipes import limits
    from trivium.train.precision import choose_device

    if image_size is not None and image_size < 1:
        raise TriviumError(f"--image-size {image_size}: this must be a number of pixels of 1 or more")
    bundle = load(path, choose_device(device))
    patch = getattr(bundle.model.config, "patch_size", None)
    if image_size is not None and isinstance(patch, int):  # else it reads no pictures, which is told where one comes
        limits.check_patches(image_size, patch, "--image-size")
        bundle.transform = bundle.transform.at(image_size)
    return bundle


def check_can_write(out: Path) -> None:
    """Before any work is done rather than after it."""
    if out.is_dir():
        raise TriviumError(f"{out} is a folder: name the file to write")
    if not out.absolute().parent.is_dir():
        raise TriviumError(f"{out}: there is no folder {out.parent} to write into")


def embed_into(out: Path, bundle: Bundle, folder: Path, files: list[str] | None) -> list[Row]:
    """Embed pictures (`files` in `folder`) or lines (`folder` is the text file) and keep the table as it grows."""
    from trivium.data.files import TEXT_LIMIT
    from trivium.search.embedding import embed_lines, embed_pictures
    from trivium.search.table import Table, fingerprint

    model = fingerprint(bundle)
    root = str(folder.resolve())
    known: dict[str, Row] = {}
    if out.exists():
        before = Table.read(out)
        if before.model != model:
            raise TriviumError(
                f"{out} holds embeddings of another model or another size of pictures, or is from an older trivium,"
                f" which named models otherwise ({before.model}, not {model}): name a new file"
            )
        known = {row.file: row for row in before.rows if row.embedding is not None}
        if before.folder != root and not is_moved(before.folder, known, folder, files):
            raise TriviumError(f"{out} holds the embeddings of {before.folder}, not of {root}: name a new file")

    rows: list[Row] = []
    cut: list[str] = []

    def save(complete: bool) -> None:
        reached = {row.file for row in rows}
        kept = [] if complete else [row for file, row in known.items() if file not in reached]
        if kept or any(row.embedding is not None for row in rows):
            Table(model, root, rows + kept).write(out)

    coming = embed_lines(bundle, folder, known, cut) if files is None else embed_pictures(bundle, folder, files, known)
    saved = time.monotonic()
    try:
        for row in with_progress(coming, None if files is None else len(files), "embedding"):
            rows.append(row)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                save(complete=False)
                saved = time.monotonic()
    except KeyboardInterrupt:
        save(complete=False)
        raise
    if not any(row.embedding is not None for row in rows):
        show_errors(rows)
        raise TriviumError(f"{folder}: not one of {len(rows)} could be read, so nothing was written")
    save(complete=True)
    if cut:
        warnings.warn(
            f"{len(cut):,} lines are longer than the {bundle.max_length} tokens, or {TEXT_LIMIT:,} characters, that"
            f" this model reads, and are cut there; the first: {cut[0]}",
            stacklevel=1,
        )
    return rows


def is_moved(before: str, known: Iterable[str], folder: Path, files: list[str] | None) -> bool:
    """Whether what a table was made of lies in another place now: gone from where it was, most of its names here."""
    there = set(files or ())
    found = [name.rpartition(":")[0] == folder.name if files is None else name in there for name in known]
    return not Path(before).exists() and 2 * sum(found) > len(found)


def with_progress(rows: Iterator[Row], total: int | None, what: str) -> Iterator[Row]:
    """A bar on a terminal, nothing where stderr is a file."""
    if not sys.stderr.isatty():
        yield from rows
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(rows, what, total, console=Console(stderr=True), transient=True)


def show_errors(rows: list[Row]) -> None:
    """What could not be used, on stderr: the first few by name, then how many more."""
    bad = [row for row in rows if row.error is not None]
    for row in bad[:ERRORS_SHOWN]:
        print(f"  {row.file}: {row.error}", file=sys.stderr)
    if len(bad) > ERRORS_SHOWN:
        print(f"  and {len(bad) - ERRORS_SHOWN} more; the column `error` has them all", file=sys.stderr)
