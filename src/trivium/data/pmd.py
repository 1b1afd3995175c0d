"""PMD, the public multimodal data sets that FLAVA is trained on (Singh et al. 2022, section 4 and Table 2), one subset
at a time, from the annotation files that their owners publish.

    pmd/
      pmd.json              figures of every subset that is there beside the published ones, and the sha256 of what they
                            were made from and of each shard
      cc3m/
        subset.json         the same of one subset; written after pairs.parquet and again after the shards
        pairs.parquet       url, caption, names, box, file, entry: every pair that the annotation files give
        left_out.jsonl      entries that are broken, each with file, line or entry, and reason
        urls.parquet        url, caption: pictures that are still to be downloaded, each once; img2dataset reads it
        joined.parquet      the pairs whose pictures are on the disk, and where these are
        missing.jsonl       the pairs whose pictures are not
        shards/             what data/pack.py makes of joined.parquet

Every file is written whole or not at all and is a function of what is given, so a build that was interrupted is run
again, and its bytes are those of one that was not.
"""

from __future__ import annotations

import difflib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trivium.data import pack
from trivium.data.pictures import JOINED, PicturePairs, Pictures
from trivium.data.pmd_annotations import (
    Dropped,
    Entry,
    Pair,
    Reader,
    captioned,
    coco,
    conceptual_3m,
    conceptual_12m,
    held_out_pictures,
    localized_narratives,
    redcaps,
    visual_genome,
    wikipedia,
    yfcc,
)
from trivium.errors import TriviumError
from trivium.manifest import HALF_WRITTEN, NAME, file_beside, make_folder, sha256, write_whole
from trivium.train.protocol import hash64

FORMAT = 1  # of what a build writes: another number reads the annotations anew
ROWS = 10_000  # in a row group
TABLE_SUFFIXES = (".csv", ".csv.gz", ".parquet")  # no owner's form: read as (url, caption), whatever the subset
URLS = pa.schema([("url", pa.string()), ("caption", pa.string())])
PAIRS = pa.schema(
    [
        *URLS,
        ("names", pa.list_(pa.string())),
        ("box", pa.list_(pa.float64())),
        ("file", pa.string()),
        ("entry", pa.string()),
    ]
)


@dataclass(frozen=True)
class Subset:
    title: str
    published_pairs: float  # millions (Table 2)
    published_words: float  # mean length of a caption
    reader: Reader
    files: str  # what is to be given
    resized: bool = True  # downloaded pictures may be made small: no part of them is cut out


SUBSETS = {
    "coco": Subset("COCO", 0.9, 12.4, coco, "captions_train2014.json captions_val2014.json"),
    "sbu": Subset("SBU Captions", 1.0, 12.1, captioned, "sbu-captions-all.json, or a table"),
    "localized-narratives": Subset("Localized Narratives", 1.9, 13.8, localized_narratives, "*_captions.jsonl"),
    "cc3m": Subset("Conceptual Captions", 3.1, 10.3, conceptual_3m, "Train_GCC-training.tsv"),
    "visual-genome": Subset(
        "Visual Genome", 5.4, 5.1, visual_genome, "region_descriptions.json image_data.json", False
    ),
    "wit": Subset("Wikipedia Image Text", 4.8, 12.8, wikipedia, "wit_v1.train.all-*.tsv.gz, or a table"),
    "cc12m": Subset("Conceptual Captions 12M", 11.0, 17.3, conceptual_12m, "cc12m.tsv"),
    "redcaps": Subset("Red Caps", 11.6, 9.5, redcaps, "annotations/*.json"),
    "yfcc": Subset("YFCC100M, filtered", 30.3, 12.7, yfcc, "a table of url, description and title"),
}
HELD_OUT_IN = ("coco", "localized-narratives", "visual-genome")  # subsets with pictures of COCO
PUBLISHED_PAIRS = 70.0  # millions, the sum of the above
PUBLISHED_IMAGES = 68.0  # millions
PUBLISHED_WORDS = 12.1  # as printed; the rows of the table give 12.2


@dataclass(frozen=True)
class Facts:
    """What is known of a subset: the content of its subset.json."""

    subset: str
    given: dict[str, Any]  # the annotation files with bytes and sha256, those held out too; the format
    pairs: int
    unique_images: int  # pictures, or parts of pictures, that differ
    mean_words: float  # of a caption, between blanks
    entries: int  # of the annotation files
    left_out: int  # broken entries
    dropped: dict[str, int]  # entries that a rule leaves out, by the rule
    without_url: int  # pairs whose picture has no web address
    missing: int | None = None  # pairs whose pictures were looked for and are not there
    packed: int | None = None  # pairs in the shards
    skipped: int | None = None  # pairs whose pictures could not be used
    shards: dict[str, Any] = field(default_factory=dict)  # bytes, sha256 and samples of each file in shards/


@dataclass(frozen=True)
class Built:
    facts: Facts
    folder: Path
    sentences: list[str]  # on single entries and pictures, in the order they were met
    to_download: int  # rows of urls.parquet


def find_subset(name: str) -> Subset:
    """Raises TriviumError with the nearest name."""
    if name not in SUBSETS:
        near = difflib.get_close_matches(name, SUBSETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUBSETS)}"
        raise TriviumError(f"PMD has no subset {name}: {hint}")
    return SUBSETS[name]


def build(
    name: str,
    files: Sequence[str],
    out: Path,
    *,
    pictures: Sequence[str] = (),
    held_out: Sequence[str] = (),
    shortest_side: int = 256,
    quality: int = 90,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Build a subset into the folder out/name, and bring out/pmd.json up to date.

    Args:
        pictures: folders, tar shards and Parquet files, also those that img2dataset wrote. Without any, the build ends
            with the table of what is to be downloaded.
        held_out: Karpathy's dataset_coco.json, dataset_flickr30k.json: pictures of their val and test are left out of
            the owners' files.
        shortest_side, quality, samples_per_shard, workers, progress: of the shards (data/pack.py).

    Raises:
        TriviumError: an unknown subset, a file that cannot be read, pictures to be held out of a table, no pair or no
            picture that can be used, shards of other pairs or pictures in the folder.
    """
    subset = find_subset(name)
    if not files:
        raise TriviumError(f"no annotation file is given for {name}: name {subset.files}")
    if held_out and name in HELD_OUT_IN and (tables := _tables(files)):  # else they would be trained on unsaid
        raise TriviumError(
            f"{tables[0]} does not say which pictures of COCO or Flickr30k it shows, so --held-out keeps none out of "
            f"it: give {subset.files}, or a table without them and no --held-out"
        )
    folder = out / name
    facts = _read_facts(folder / "subset.json")
    given = {"format": FORMAT, "annotations": _digests(files), "held_out": _digests(held_out)}
    for path in folder.glob(".*"):
        if HALF_WRITTEN.fullmatch(path.name):
            path.unlink(missing_ok=True)
    if facts is None or facts.given != given or not (folder / "pairs.parquet").exists():
        facts = _write_pairs(name, _entries(subset.reader, files, held_out), folder, given)
        _write_facts(folder, facts)
    sentences = [json.loads(line)["why"] for line in (folder / "left_out.jsonl").open(encoding="utf-8")]
    found = Pictures(pictures) if pictures else None
    missing, to_download = _join(folder, found, facts.pairs)
    if found is not None:
        sentences += found.notes
        if missing == facts.pairs:
            raise TriviumError(
                f"not one of {missing:,} pairs of {name} has its picture in {', '.join(pictures)}: see names and "
                f"addresses in {folder / 'missing.jsonl'}"
            )
        joined = str(folder / "joined.parquet")
        settings = pack.Settings(
            "pairs", (joined,), shortest_side=shortest_side, quality=quality, samples_per_shard=samples_per_shard
        )
        source = PicturePairs(joined)
        packed = pack.pack(settings, folder / "shards", source=source, workers=workers, progress=progress)
        sentences += [entry["why"] for entry in packed.skipped]
        shards = json.loads((folder / "shards" / NAME).read_text(encoding="utf-8"))["files"]
        facts = replace(facts, missing=missing, packed=packed.samples, skipped=len(packed.skipped), shards=shards)
        _write_facts(folder, facts)
    write_whole(folder / "pmd.json", json.dumps(_summary(facts_of(out)), indent=1) + "\n")
    (folder / "pmd.json").replace(out / "pmd.json")
    return Built(facts, folder, sentences, to_download)


def facts_of(out: Path) -> dict[str, Facts]:
    """Of every subset that was built into a folder, in the paper's order. Raises TriviumError."""
    found = {name: _read_facts(out / name / "subset.json") for name in SUBSETS}
    return {name: facts for name, facts in found.items() if facts is not None}


def download_command(name: str, folder: Path) -> str:
    """The command of img2dataset that downloads what urls.parquet lists."""
    size = "--resize_mode keep_ratio --resize_only_if_bigger True --image_size 256"
    if not SUBSETS[name].resized:
        size = "--resize_mode no"
    return (
        f"img2dataset --url_list {folder / 'urls.parquet'} --input_format parquet --url_col url --caption_col caption "
        f"--output_format webdataset --output_folder {folder / 'pictures'} {size}"
    )


# ----------------------------------------------------------------------------------------------- annotations


def _tables(files: Sequence[str]) -> list[str]:
    return [file for file in files if file.lower().endswith(TABLE_SUFFIXES)]


def _entries(reader: Reader, files: Sequence[str], held_out: Sequence[str]) -> Iterator[Entry]:
    kept_out = held_out_pictures(held_out)
    tables = [] if reader in (wikipedia, yfcc) else _tables(files)
    official = [file for file in files if file not in tables]
    if official:
        yield from reader(official, kept_out)
    yield from captioned(tables, kept_out)


def _write_pairs(name: str, entries: Iterator[Entry], folder: Path, given: dict[str, Any]) -> Facts:
    """Write pairs.parquet and left_out.jsonl. Raises TriviumError where there is no pair."""
    make_folder(folder)
    dropped: Counter[str] = Counter()
    images = array("Q")
    words = num_entries = left_out = without_url = 0
    first = ""
    with ExitStack() as stack:
        broken = stack.enter_context(
            stack.enter_context(file_beside(folder / "left_out.jsonl")).open("w", encoding="utf-8")
        )
        writer = stack.enter_context(
            pq.ParquetWriter(stack.enter_context(file_beside(folder / "pairs.parquet")), PAIRS)
        )
        rows: list[dict[str, Any]] = []
        for entry in entries:
            num_entries += 1
            if isinstance(entry, Pair):
                words += len(entry.caption.split())
                without_url += entry.url is None
                images.append(hash64(entry.url or entry.names[0], str(entry.box)))
                rows.append({name: getattr(entry, name) for name in PAIRS.names})
            elif isinstance(entry, Dropped):
                dropped[entry.why] += 1
                first = first or entry.why
            else:
                left_out += 1
                first = first or str(entry)
                broken.write(json.dumps({"file": entry.file, "entry": entry.where, "why": str(entry)}) + "\n")
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, PAIRS))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, PAIRS))
        if not images:
            reason = f"the first: {first}" if first else "there is none"
            raise TriviumError(f"not one of {num_entries:,} entries of {name} can be used; {reason}")
    return Facts(
        subset=name,
        given=given,
        pairs=len(images),
        unique_images=len(np.unique(np.frombuffer(images, np.uint64))),
        mean_words=words / len(images),
        entries=num_entries,
        left_out=left_out,
        dropped=dict(sorted(dropped.items())),
        without_url=without_url,
    )


# ---------------------------------------------------------------------------------------------------- pictures


def _join(folder: Path, pictures: Pictures | None, num_pairs: int) -> tuple[int, int]:
    """Write urls.parquet and, where there are pictures, joined.parquet and missing.jsonl.

    Returns the pairs without a picture and the addresses to download. Raises TriviumError.
    """
    once = _first_of_each_url(folder / "pairs.parquet", num_pairs)
    missing = to_download = row = 0
    with ExitStack() as stack:

        def table(name: str, schema: pa.Schema) -> tuple[Path, pq.ParquetWriter]:
            path = stack.enter_context(file_beside(folder / name))
            return path, stack.enter_context(pq.ParquetWriter(path, schema))

        _, urls = table("urls.parquet", URLS)
        if pictures is not None:
            beside, joined = table("joined.parquet", JOINED)
            lines = stack.enter_context(file_beside(folder / "missing.jsonl"))
            absent = stack.enter_context(lines.open("w", encoding="utf-8"))
        for batch in pq.ParquetFile(folder / "pairs.parquet").iter_batches(ROWS):
            there, wanted = [], []
            for pair in batch.to_pylist():
                place = None if pictures is None else pictures.find(pair["url"], pair["names"])
                if place is not None:
                    kept = {"caption": pair["caption"], "annotation": pair["file"], "entry": pair["entry"]}
                    there.append({**kept, **place._asdict(), "box": pair["box"]})
                else:
                    missing += 1
                    if pictures is not None:
                        facts = {name: pair[name] for name in ("file", "entry", "url", "names")}
                        absent.write(json.dumps(facts, ensure_ascii=False) + "\n")
                    if pair["url"] is not None and once[row]:
                        wanted.append({"url": pair["url"], "caption": pair["caption"]})
                row += 1
            to_download += len(wanted)
            urls.write_table(pa.Table.from_pylist(wanted, URLS))
            if pictures is not None:
                joined.write_table(pa.Table.from_pylist(there, JOINED))
        if pictures is not None:
            joined.close()
            _refuse_other_pairs(folder, beside)
    return missing, to_download


def _refuse_other_pairs(folder: Path, new: Path) -> None:
    """Raises TriviumError where shards were begun from other pairs, or other pictures, than those of now."""
    before = folder / "joined.parquet"
    if (folder / "shards").exists() and before.exists() and sha256(before) != sha256(new):
        raise TriviumError(
            f"{folder / 'shards'} were begun from other annotations or pictures than those given now: remove that "
            "folder to make them anew, or name another --out"
        )


def _first_of_each_url(pairs: Path, num_pairs: int) -> np.ndarray:
    """[pairs] bool: no row before has this address."""
    hashes = np.zeros(num_pairs, np.uint64)
    row = 0
    for batch in pq.ParquetFile(pairs).iter_batches(ROWS, columns=["url"]):
        for url in batch["url"].to_pylist():
            hashes[row] = hash64("url", str(url))
            row += 1
    first = np.zeros(num_pairs, bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first


# ------------------------------------------------------------------------------------------------------- facts


def _digests(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Raises TriviumError."""
    try:
        return {file: {"bytes": os.path.getsize(file), "sha256": sha256(Path(file))} for file in files}
    except OSError as error:
        raise TriviumError(f"{error.filename} cannot be read ({error.strerror}): check the path") from None


def _write_facts(folder: Path, facts: Facts) -> None:
    write_whole(folder / "subset.json", json.dumps(asdict(facts), indent=1, ensure_ascii=False) + "\n")


def _read_facts(path: Path) -> Facts | None:
    if not path.exists():
        return None
    try:
        return Facts(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise TriviumError(f"{path} is damaged: remove it and build the subset again") from None


def _summary(found: dict[str, Facts]) -> dict[str, Any]:
    return {
        "subsets": {
            name: {
                **asdict(facts),
                "published_pairs": round(SUBSETS[name].published_pairs * 1e6),
                "published_mean_words": SUBSETS[name].published_words,
            }
            for name, facts in found.items()
        },
        "total": {
            "pairs": sum(facts.pairs for facts in found.values()),
            "unique_images": sum(facts.unique_images for facts in found.values()),
            "mean_words": mean_words(found.values()),
            "published_pairs": round(PUBLISHED_PAIRS * 1e6),
            "published_unique_images": round(PUBLISHED_IMAGES * 1e6),
            "published_mean_words": PUBLISHED_WORDS,
        },
    }


def mean_words(found: Collection[Facts]) -> float:
    """Of a caption of some subsets together."""
    return sum(facts.mean_words * facts.pairs for facts in found) / max(1, sum(facts.pairs for facts in found))
