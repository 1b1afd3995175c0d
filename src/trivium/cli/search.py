"""``trivium search``: the pictures nearest to a text or to another picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.bundle import Bundle
    from trivium.search.page import Hit
    from trivium.search.table import Table


def search(
    path: Path,
    query: Annotated[str | None, arg(metavar="[TEXT]")] = None,
    *,
    images: Path,
    picture: Path | None = None,
    k: Annotated[int, arg(aliases=["-k"])] = 12,
    rerank: int = 0,
    image_size: Annotated[int | None, arg(metavar="N")] = None,
    out: Path | None = None,
) -> None:
    """Print the pictures nearest to a text, or to a picture, best first. Exact: every picture is compared.

    Args:
        path: the model: a run folder, a model folder, or weights of another library.
        query: the text to look for, such as "red mug".
        images: a folder of pictures, or the Parquet file that `trivium embed` made of one.
        picture: look for this picture instead of a text.
        k: how many to show.
        rerank: let the matching head, which reads text and picture together, order the first so many again.
        image_size: pixels on the side of a picture, where not the model's own: as a table of --images was made with.
        out: also write a page with thumbnails here (HTML, nothing outside it).
    """
    if (query is None) == (picture is None):
        raise TriviumError('give one query: a text such as "red mug", or --picture with a file')
    if query is not None and not query.strip():
        raise TriviumError("the text to look for is empty")
    if k < 1 or rerank < 0:
        raise TriviumError("-k counts from 1 and --rerank from 0")
    if picture is not None and not picture.is_file():
        raise TriviumError(f"{picture}: there is no such picture")
    if picture is not None and rerank:
        raise TriviumError("--rerank compares a text with pictures, so it needs a text as the query")
    from trivium.bundle.texts import check_read
    from trivium.bundle.untrained import no_cosine, no_matching
    from trivium.cli.embed import check_can_write, open_model
    from trivium.search.embedding import find_pictures, unit_vectors
    from trivium.search.index import top_k
    from trivium.search.page import Hit, render

    if out is not None:
        check_can_write(out)
    is_table = images.suffix == ".parquet"
    files = None if is_table else find_pictures(images)  # a wrong path is told before the model is read
    bundle = open_model(path, image_size)
    if rerank and not hasattr(bundle.model, "match"):
        raise TriviumError(f"--rerank needs a matching head, and a model of the family {bundle.family} has none")
    if rerank and (why := no_matching(bundle.untrained)) is not None:
        raise TriviumError(f"--rerank needs a matching head, and {why}")
    looked_for = bundle.encode_image([picture]) if picture is not None else bundle.encode_text([query or ""])
    if picture is None and not looked_for.is_projected:
        why = no_cosine(bundle.untrained)
        why = why or f"this model ({bundle.family}) has no space that pictures and texts share"
        raise TriviumError(f"{why}: look for a picture, with --picture")
    if query is not None and bundle.tokenizer is not None:
        check_read(query, bundle.tokenizer, bundle.max_length, "text to look for")
    table = read_table(images, bundle) if files is None else embedded_folder(images, files, bundle)
    names, vectors_ND = table.found()
    scores, indices = top_k(unit_vectors(looked_for), vectors_ND, max(k, rerank))
    hits = [
        Hit(rank, names[index], float(score))
        for rank, (score, index) in enumerate(zip(scores[0], indices[0], strict=True), start=1)
    ]
    if rerank:
        hits = reranked(hits, rerank, query or "", Path(table.folder), bundle)
    hits = hits[:k]
    show(hits)
    if out is not None:
        from trivium.manifest import write_whole

        write_whole(out, render(picture or query or "", hits, Path(table.folder), len(names), table.model))
        print(f"page: {out}", file=sys.stderr)


def read_table(path: Path, bundle: Bundle) -> Table:
    from trivium.search.table import Table, fingerprint

    table, model = Table.read(path), fingerprint(bundle)
    if table.model != model:
        raise TriviumError(
            f"{path} holds embeddings of another model or another size of pictures, or is from an older trivium, which"
            f" named models otherwise ({table.model}, not {model}): make a new file with `trivium embed`, or give"
            " the --image-size that it was made with"
        )
    return table


def embedded_folder(folder: Path, files: list[str], bundle: Bundle) -> Table:
    from trivium.cli.embed import show_errors, with_progress
    from trivium.search.embedding import embed_pictures
    from trivium.search.table import Table

    rows = list(with_progress(embed_pictures(bundle, folder, files, {}), len(files), "embedding"))
    show_errors(rows)
    if not any(row.embedding is not None for row in rows):
        raise TriviumError(f"{folder}: not one of {len(rows)} pictures could be read")
    return Table(bundle.family, str(folder.resolve()), rows)


def reranked(hits: list[Hit], first: int, query: str, folder: Path, bundle: Bundle) -> list[Hit]:
    """The first so many in the order of the matching head's probability, the others after them as they were."""
    from trivium.search.page import Hit

    text = bundle.encode_text([query])
    judged = [(hit, float(bundle.match([folder / hit.file], text))) for hit in hits[:first]]
    judged.sort(key=lambda pair: -pair[1])  # stable: of equal ones the nearer first
    ordered = [(hit, match) for hit, match in judged] + [(hit, None) for hit in hits[first:]]
    return [Hit(rank, hit.file, hit.score, match) for rank, (hit, match) in enumerate(ordered, start=1)]


def show(hits: list[Hit]) -> None:
    """A table on a terminal; rank, score, match and file between tabs for a pipe."""
    if not sys.stdout.isatty():
        for hit in hits:
            match = "" if hit.match is None else f"{hit.match:.4f}"
            print(hit.rank, f"{hit.score:.4f}", match, hit.file, sep="\t")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    judged = any(hit.match is not None for hit in hits)
    shown = Table("rank", "cosine", *(["match"] if judged else []), "file", box=None)
    for hit in hits:
        probability = ["" if hit.match is None else f"{hit.match:.3f}"] if judged else []
        shown.add_row(str(hit.rank), f"{hit.score:.3f}", *probability, Text(hit.file))  # no markup
    Console().print(shown)
