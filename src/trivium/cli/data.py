"""`trivium data codes` and `trivium data pack`: what is computed of data once, and kept."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from tyro.conf import arg

from trivium.cli.embed import ERRORS_SHOWN, check_can_write
from trivium.cli.overrides import set_overrides
from trivium.errors import TriviumError

if TYPE_CHECKING:
    from torch import Tensor


def codes(
    recipe: str,
    *,
    out: Path,
    size: Annotated[str | None, arg(metavar="SIZE")] = None,
    crops: int = 4,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Cache the image tokenizer's codes of every picture of a run, so that training never runs the tokenizer.

    Give the recipe, --size and the same fields as to pretrain, since they decide what the tokenizer sees:

      trivium data codes flava --size base --data.pairs a.csv --data.image-tokenizer dalle.pt --out codes

      trivium pretrain flava --size base --data.pairs a.csv --data.image-tokenizer dalle.pt --data.codes codes

    Training then chooses among the cached crops of a picture instead of drawing new ones. Run it again to go on after
    an interruption.

    Args:
        recipe: "flava", or a function of your own: my_run.py:shop.
        out: the file to write, .safetensors.
        size: the recipe's one dial, such as tiny, small or base.
        crops: of each picture, beside the whole picture, which validation sees.
        overrides: leaves by their dotted path, such as {"data.pairs": ["a.csv"]}.
    """
    check_can_write(out)
    if crops < 1:
        raise TriviumError(f"--crops {crops}: training needs at least 1 crop of each picture")
    from trivium.data.codes import CodeCache, build
    from trivium.load import image_tokenizer_hash
    from trivium.recipes import RECIPES
    from trivium.recipes.flava import FlavaRecipe
    from trivium.train import config
    from trivium.train.precision import choose_device

    tree = config.build(config.Config(recipe, {} if size is None else {"size": size}, {}), RECIPES)
    tree = set_overrides(tree, overrides or {})
    if not isinstance(tree, FlavaRecipe):
        raise TriviumError(f"the recipe {recipe} uses no image tokenizer, so there are no codes to cache")
    pictures, views, tokenizer = tree.pictures()
    name = image_tokenizer_hash(tokenizer)
    device = choose_device(tree.train.device)
    tokenizer.to(device)

    def encode(pixels_BCHW: Tensor) -> Tensor:
        return tokenizer.encode(pixels_BCHW.to(device).float() / 255)

    given = tree.data
    described = f"{given.pairs} {given.images} {given.validation} {given.image_column}"
    with progress_bar("codes") as progress:
        skipped = build(pictures, views, encode, name, out, crops, source_name=described, progress=progress)
    skipped = list(dict.fromkeys(skipped))  # the same file may serve two streams
    show_skipped(skipped)
    bad = f"; {len(skipped)} could not be read and are left out" if skipped else ""
    print(f"codes of {len(CodeCache(out, views, name))} pictures, {crops} crops each, in {out}{bad}")
    print(f"train with the same fields and --data.codes {out}")


def pack(
    *,
    out: Path,
    pairs: Annotated[tuple[str, ...], arg(name="data.pairs", metavar="PATH [PATH ...]")] = (),
    images: Annotated[tuple[str, ...], arg(name="data.images", metavar="PATH [PATH ...]")] = (),
    text: Annotated[tuple[str, ...], arg(name="data.text", metavar="PATH [PATH ...]")] = (),
    image_column: Annotated[str | None, arg(name="data.image-column", metavar="NAME")] = None,
    text_column: Annotated[str | None, arg(name="data.text-column", metavar="NAME")] = None,
    shortest_side: int = 256,
    quality: int = 90,
    samples_per_shard: int = 1000,
    workers: Annotated[int | None, arg(metavar="N")] = None,
    part: Annotated[str | None, arg(metavar="K/N")] = None,
    engine: Literal["local", "ray"] = "local",
) -> None:
    """Write tar shards, which WebDataset reads too, from pairs, pictures or text in any form that pretrain takes.

      trivium data pack --data.pairs products.csv --out shards

      trivium pretrain flava --data.pairs "shards/*.tar"

    Run it again to go on after an interruption: finished shards stay as they are. A manifest.json with checksums and
    counts is written last, and samples that cannot be used are listed in skipped.jsonl.

    Args:
        out: the folder to write into.
        pairs: captioned pictures: CSV, TSV, JSONL, Parquet, tar shards, or a folder.
        images: pictures alone.
        text: text alone, one line a sample, those over 64 words in windows.
        image_column: in tables, where it has an unusual name.
        text_column: likewise.
        shortest_side: pixels; larger pictures are made that small, others stay byte for byte; 0 keeps every size.
        quality: of the JPEGs that are written anew, 1 to 95.
        samples_per_shard: at most.
        workers: processes; as many as there are cores.
        part: the share of a job array: 3/64 is the third of 64. The part that ends last writes the manifest.
        engine: ray spreads the shards over a Ray cluster whose machines all see the data and the folder.
    """
    given = [(kind, paths) for kind, paths in (("pairs", pairs), ("images", images), ("text", text)) if paths]
    if len(given) != 1:
        raise TriviumError("a folder of shards holds one kind: give one of --data.pairs, --data.images and --data.text")
    share = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    if share is None:
        raise TriviumError(f"--part {part}: write it as 3/64, the third of 64 parts")
    from trivium.data import pack as packing

    kind, paths = given[0]
    settings = packing.Settings(
        cast(Any, kind), paths, image_column, text_column, shortest_side, quality, samples_per_shard
    )
    with progress_bar("shards") as progress:
        done = packing.pack(
            settings,
            out,
            part=(int(share[1]), int(share[2])),
            workers=num_cores() if workers is None else workers,
            engine=engine,
            progress=progress,
        )
    show_skipped([entry["why"] for entry in done.skipped])
    bad = f"; {len(done.skipped)} could not be used" if done.skipped else ""
    were_there = f", {done.of - done.made} of them from before" if done.made < done.of else ""
    print(f"{done.samples} samples in {done.of} shards{were_there}, in {out}{bad}")
    if done.complete:
        print(f'use them with --data.{kind} "{out}/*.tar"')
    else:
        print("other parts are not done yet: the one that ends last writes the manifest")


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def show_skipped(sentences: list[str]) -> None:
    for sentence in sentences[:ERRORS_SHOWN]:
        print(f"  {sentence}", file=sys.stderr)
    if len(sentences) > ERRORS_SHOWN:
        print(f"  and {len(sentences) - ERRORS_SHOWN} more", file=sys.stderr)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing where stderr is a file."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
