"""`trivium data build ...`: the data that FLAVA is trained on, from the files that its owners publish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from trivium.cli.data import num_cores, progress_bar, show_skipped
from trivium.errors import TriviumError

if TYPE_CHECKING:
    from rich.table import Table

    from trivium.data.pmd import Facts

TABLE_WIDTH = 120  # characters, also where the output is a file


def pmd(
    subset: str,
    files: Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]")],
    *,
    out: Path,
    pictures: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]")] = (),
    held_out: Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]")] = (),
    shortest_side: int = 256,
    quality: int = 90,
    samples_per_shard: int = 1000,
    workers: Annotated[int | None, arg(metavar="N")] = None,
) -> None:
    """Build a subset of PMD, the public multimodal data sets, from its annotation files; call it once for each.

    Subsets: coco, sbu, localized-narratives, cc3m, visual-genome, wit, cc12m, redcaps, yfcc.

    First what is to be downloaded, which is left to img2dataset; the command to run is printed:

      trivium data build pmd cc12m cc12m.tsv --out pmd

    Then tar shards of the pairs whose pictures are there:

      trivium data build pmd cc12m cc12m.tsv --pictures pmd/cc12m/pictures --out pmd

      trivium pretrain flava --data.pairs "pmd/*/shards/*.tar"

    Figures of all subsets that are in the folder are shown beside the published ones, and stand in pmd.json. Broken
    entries are listed in left_out.jsonl, pairs without a picture in missing.jsonl. Run it again to go on after an
    interruption.

    Args:
        subset: of PMD.
        files: its annotation files, or tables with the columns url and caption.
        out: the folder to write into; each subset gets a folder inside it.
        pictures: folders of pictures, or what img2dataset wrote.
        held_out: Karpathy's dataset_coco.json and dataset_flickr30k.json: pictures of their val and test stay out
            of the owners' files; a table does not say which these are, and is refused.
        shortest_side: pixels; larger pictures are made that small, others stay byte for byte; 0 keeps every size.
        quality: of the JPEGs that are written anew, 1 to 95.
        samples_per_shard: at most.
        workers: processes; as many as there are cores.
    """
    from trivium.data import pmd as recipe

    with progress_bar("shards") as progress:
        built = recipe.build(
            *(subset, files, out),
            pictures=pictures,
            held_out=held_out,
            shortest_side=shortest_side,
            quality=quality,
            samples_per_shard=samples_per_shard,
            workers=num_cores() if workers is None else workers,
            progress=progress,
        )
    facts = built.facts
    show_skipped(built.sentences)
    _show_table(recipe.facts_of(out))
    print(f"\n{facts.pairs:,} pairs of {facts.entries:,} entries in {built.folder / 'pairs.parquet'}")
    for why, count in facts.dropped.items():
        print(f"  dropped, {why}: {count:,}")
    if facts.left_out:
        print(f"  broken: {facts.left_out:,}, listed in {built.folder / 'left_out.jsonl'}")
    if subset in recipe.HELD_OUT_IN and not held_out:
        print("  no picture is held out: --held-out dataset_coco.json keeps those of COCO's evaluation apart")
    if pictures:
        num_shards = sum(name.endswith(".tar") for name in facts.shards)
        print(f"{facts.packed:,} pairs in {num_shards:,} shards; {facts.skipped:,} pictures are unusable")
        print(f"  missing pictures: {facts.missing:,}, listed in {built.folder / 'missing.jsonl'}")
        print(f'use them with --data.pairs "{built.folder}/shards/*.tar"')
    if facts.without_url:
        print(f"  pairs whose picture has no web address, to be fetched from its owner: {facts.without_url:,}")
    if built.to_download:
        print(f"{built.to_download:,} pictures are to be downloaded (pip install img2dataset):\n")
        print(f"  {recipe.download_command(subset, built.folder)}\n")
        again = f", too; remove {built.folder / 'shards'} before" if pictures else ""
        print(f"then run this command again with that folder under --pictures{again}")


def imagenet(
    folder: str,
    *,
    out: Path,
    shortest_side: int = 256,
    quality: int = 90,
    samples_per_shard: int = 1000,
    workers: Annotated[int | None, arg(metavar="N")] = None,
) -> None:
    """Write tar shards of ImageNet-1k's training pictures, each with the number of its class.

      trivium data build imagenet ILSVRC/Data/CLS-LOC/train --out imagenet

      trivium pretrain flava --data.images "imagenet/*.tar"

    Run it again to go on after an interruption.

    Args:
        folder: train, with a folder for each class.
        out: the folder to write into.
        shortest_side: pixels; larger pictures are made that small, others stay byte for byte; 0 keeps every size.
        quality: of the JPEGs that are written anew, 1 to 95.
        samples_per_shard: at most.
        workers: processes; as many as there are cores.
    """
    from trivium.data import pack as packing
    from trivium.data.imagenet import NUM_CLASSES, NUM_PICTURES, open_imagenet

    source = open_imagenet(folder)
    settings = packing.Settings("images", (folder,), None, None, shortest_side, quality, samples_per_shard)
    with progress_bar("shards") as progress:
        done = packing.pack(
            settings, out, source=source, workers=num_cores() if workers is None else workers, progress=progress
        )
    show_skipped([entry["why"] for entry in done.skipped])
    print(f"{done.samples:,} pictures (published: {NUM_PICTURES:,}) of {len(source.class_names):,} classes", end=" ")
    print(f"({NUM_CLASSES:,}) in {done.of} shards, in {out}; {len(done.skipped):,} could not be used")
    print(f'use them with --data.images "{out}/*.tar"')


def text(
    files: Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]")],
    *,
    out: Path,
    max_length: int = 512,
    vocabulary: str = "bert",
    text_column: str | None = None,
) -> None:
    """Join the documents of running text, such as CCNews and BookCorpus, to sequences of equal length.

      trivium data build text ccnews/*.jsonl books/*.txt --out text.parquet

      trivium pretrain flava --size base --data.text text.parquet --data.vocabulary bert

    A document that fits into a sequence is never cut; a longer one fills the open sequence and goes on in the next. In
    plain text, a blank line ends a document; in a table, a row is one.

    Args:
        files: .txt, or tables (.jsonl, .json, .csv, .tsv, each also .gz, or .parquet).
        out: the Parquet file to write; counts and checksums stand beside it in a .json.
        max_length: tokens of a sequence.
        vocabulary: "bert", or the path of a tokenizer.json.
        text_column: of tables, where it has an unusual name.
    """
    from trivium.cli.embed import check_can_write
    from trivium.data import embedded
    from trivium.data.running_text import pack_text
    from trivium.data.tokenizer import Tokenizer

    check_can_write(out)
    if out.suffix != ".parquet":
        raise TriviumError(f"{out}: name a file that ends in .parquet")
    wordpiece = vocabulary == "bert"
    tokenizer = Tokenizer.wordpiece(embedded.bert_vocabulary()) if wordpiece else Tokenizer.from_file(vocabulary)
    packed = pack_text(files, out, tokenizer, max_length, text_column)
    show_skipped(packed.skipped)
    bad = f"; {len(packed.skipped):,} lines or rows could not be used" if packed.skipped else ""
    print(f"{packed.documents:,} documents, {packed.words:,} words, in {packed.rows:,} sequences in {out}{bad}")
    print(f"use them with --data.text {out} --data.text-length {max_length} --data.vocabulary {vocabulary}")


def _show_table(found: dict[str, Facts]) -> None:
    from rich.console import Console
    from rich.table import Table

    from trivium.data import pmd as recipe

    table = Table(box=None)
    table.add_column("subset")
    for name in ("pairs", "published", "share", "unique images", "mean words", "published", "missing"):
        table.add_column(name, justify="right")
    for name, facts in found.items():
        subset = recipe.SUBSETS[name]
        _add_row(table, subset.title, [facts], subset.published_pairs, subset.published_words)
    if len(found) > 1:
        _add_row(table, "Total", list(found.values()), recipe.PUBLISHED_PAIRS, recipe.PUBLISHED_WORDS)
    Console(width=TABLE_WIDTH).print(table)


def _add_row(table: Table, title: str, found: list[Facts], millions: float, words: float) -> None:
    from trivium.data.pmd import mean_words

    pairs = sum(facts.pairs for facts in found)
    missing = [facts.missing for facts in found if facts.missing is not None]
    table.add_row(
        *(title, f"{pairs:,}", f"{millions:.1f} M", f"{pairs / millions / 1e4:.1f} %"),
        *(f"{sum(facts.unique_images for facts in found):,}", f"{mean_words(found):.1f}", f"{words:.1f}"),
        f"{sum(missing):,}" if missing else "-",
    )
