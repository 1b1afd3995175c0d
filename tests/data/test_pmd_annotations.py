"""Annotation files in their owners' form: the exact pairs, and one sentence for each broken entry."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import pmd_files
from tests.data.pmd_files import write_json, write_lines
from trivium.data import pmd_annotations, records
from trivium.data.english import is_english
from trivium.data.pmd_annotations import Dropped, Pair
from trivium.errors import BadSample, TriviumError

NONE = frozenset[str]()


def shown(entries: Any) -> list[Any]:
    """A pair as (entry, caption, url, names), a dropped entry as its reason, a broken one as its sentence."""
    forms = {
        Pair: lambda pair: (pair.entry, pair.caption, pair.url, pair.names),
        Dropped: lambda dropped: dropped.why,
        BadSample: str,
    }
    return [forms[type(entry)](entry) for entry in entries]


# --------------------------------------------------------------------------------------------- each owner's form


def test_coco(tmp_path: Path) -> None:
    file = pmd_files.coco_captions(tmp_path / "captions_train2014.json")
    first, second = (
        (f"http://images.cocodataset.org/train2014/COCO_train2014_{n}.jpg", (f"COCO_train2014_{n}", n))
        for n in ("000000057870", "000000384029")
    )
    assert shown(pmd_annotations.coco([file], NONE)) == [
        ("annotation 0", "A restaurant has modern wooden tables and chairs.", *first),
        ("annotation 1", "A man preparing desserts in a kitchen.", *second),
        ("annotation 2", "A long restaurant table.", *first),
    ]
    splits = pmd_files.karpathy(tmp_path / "dataset_coco.json", "coco", {57870: "test", 384029: "restval"})
    found = shown(pmd_annotations.coco([file], pmd_annotations.held_out_pictures([splits])))
    kept = ("annotation 1", "A man preparing desserts in a kitchen.", *second)
    assert found == ["held out for evaluation", kept, "held out for evaluation"]


def test_visual_genome(tmp_path: Path) -> None:
    files = pmd_files.visual_genome(tmp_path)
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/{}.jpg"
    pairs = list(pmd_annotations.visual_genome(files[::-1], frozenset({"coco 511"})))
    assert shown(pairs) == [
        ("entry 0, region 0", "the clock is green", url.format(1), ("1",)),
        ("entry 0, region 1", "a long shadow", url.format(1), ("1",)),
        "held out for evaluation",
    ]
    # In shares of the picture; a region that reaches outside ends at the edge.
    assert [pair.box for pair in pairs if isinstance(pair, Pair)] == [(0.5, 0.0, 1.0, 0.5), (0.0, 0.25, 1.0, 1.0)]
    for given, lacking in ((files[:1], "image_data.json"), (files[1:], "region_descriptions.json")):
        with pytest.raises(TriviumError, match=f"two files and {lacking} is not given"):
            list(pmd_annotations.visual_genome(given, NONE))


def test_visual_genome_in_the_names_of_its_first_version(tmp_path: Path) -> None:
    regions, pictures = (json.loads(Path(file).read_text()) for file in pmd_files.visual_genome(tmp_path))
    newer = list(pmd_annotations.visual_genome(pmd_files.visual_genome(tmp_path), NONE))
    for picture in regions:
        for region in picture["regions"]:
            region["id"], region["image"] = region.pop("region_id"), region.pop("image_id")
    for picture in pictures:
        picture["id"] = picture.pop("image_id")
    files = [write_json(tmp_path / "region_descriptions.json", regions), write_json(tmp_path / "i.json", pictures)]
    assert list(pmd_annotations.visual_genome(files, NONE)) == newer
    assert len(newer) == 3


def test_localized_narratives_are_cut_into_sentences(tmp_path: Path) -> None:
    file = pmd_files.localized_narratives(tmp_path / "a.jsonl")
    coco = ("http://images.cocodataset.org/train2017/000000000139.jpg", ("000000000139",))
    dog = "https://open-images-dataset.s3.amazonaws.com/train/000b0f4d98b3f4ee.jpg"
    assert shown(pmd_annotations.localized_narratives([file], NONE)) == [
        ("line 1", "In this image there is a table.", *coco),
        ("line 1", "On the table, I can see a vase.", *coco),
        ("line 1", "It is blue", *coco),
        ("line 2", "A dog runs.", dog, ("000b0f4d98b3f4ee",)),
        ("line 3", "We see an airport.", None, ("ADE_train_00000001",)),
        ("line 4", "Two men stand.", None, ("1000092795",)),
    ]
    splits = [
        pmd_files.karpathy(tmp_path / "c.json", "coco", {139: "val"}),
        pmd_files.karpathy(tmp_path / "f.json", "flickr30k", {1000092795: "test"}),
    ]
    held_out = shown(pmd_annotations.localized_narratives([file], pmd_annotations.held_out_pictures(splits)))
    assert [type(entry) for entry in held_out] == [str, tuple, tuple, str]


def test_redcaps(tmp_path: Path) -> None:
    [pair] = shown(pmd_annotations.redcaps([pmd_files.redcaps(tmp_path / "airplants_2019.json")], NONE))
    url = "https://i.redd.it/ho0wntksivy21.jpg"
    assert pair == ("annotation 0", "Found on a friend’s property in the Keys FL.", url, ("bpzj7r",))


def test_conceptual_captions_in_both_orders(tmp_path: Path) -> None:
    """A quote is a plain character there: it must not swallow the lines that follow."""
    small = write_lines(tmp_path / "Train_GCC-training.tsv", ['a "big dog\thttp://a/1.jpg', "a cat\thttp://a/2.jpg"])
    large = write_lines(tmp_path / "cc12m.tsv", ['http://a/1.jpg\t"big" dog', "http://a/2.jpg\ta cat"])
    headed = write_lines(tmp_path / "headed.tsv", ["caption\turl", "a cat\thttp://a/2.jpg"])
    cat = ("line 2", "a cat", "http://a/2.jpg", ())
    assert shown(pmd_annotations.conceptual_3m([small], NONE)) == [("line 1", 'a "big dog', "http://a/1.jpg", ()), cat]
    assert shown(pmd_annotations.conceptual_12m([large], NONE)) == [("line 1", '"big" dog', "http://a/1.jpg", ()), cat]
    assert shown(pmd_annotations.conceptual_12m([headed, large], NONE)) == [
        cat, ("line 1", '"big" dog', "http://a/1.jpg", ()), cat
    ]  # fmt: skip
    swapped = shown(pmd_annotations.conceptual_3m([large], NONE))
    assert swapped[1] == f'{large} (line 2): its url "a cat" is no web address'


def test_sbu_as_its_owners_publish_it_and_as_tables(tmp_path: Path) -> None:
    rows = [("http://a/1.jpg", 'He said "no", twice'), ("http://a/2.jpg", "two\nlines")]
    urls, captions = zip(*rows, strict=True)
    files = [
        write_json(tmp_path / "sbu-captions-all.json", {"image_urls": urls, "captions": captions, "user_ids": [1, 2]}),
        write_json(tmp_path / "a.json", [{"url": url, "caption": caption} for url, caption in rows]),
        write_lines(tmp_path / "a.jsonl", [json.dumps({"URL": url, "TEXT": caption}) for url, caption in rows]),
        write_lines(
            tmp_path / "a.csv", ["url,caption", *(f'{u},"{c.replace(chr(34), chr(34) * 2)}"' for u, c in rows)]
        ),
        write_lines(
            tmp_path / "a.tsv", ["url\tcaption", *(f'{u}\t"{c.replace(chr(34), chr(34) * 2)}"' for u, c in rows)]
        ),
    ]
    pq.write_table(pa.table({"caption": captions, "url": urls}), tmp_path / "a.parquet")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for file in [*files, str(tmp_path / "a.parquet"), str(tmp_path / "b.csv.gz")]:
        found = [entry[1:3] for entry in shown(pmd_annotations.captioned([file], NONE))]
        assert found == [(caption, url) for url, caption in rows], file


def test_wit_keeps_english_reference_descriptions(tmp_path: Path) -> None:
    columns = ["language", "page_url", "image_url", "page_title", "caption_reference_description"]
    rows = [
        ["en", "p", "https://upload.wikimedia.org/a.jpg", "A", '"The ""Scream"" by Munch"'],
        ["fr", "p", "https://upload.wikimedia.org/b.jpg", "B", "La tour"],
        ["en", "p", "https://upload.wikimedia.org/c.jpg", "C", ""],
    ]
    file = tmp_path / "wit_v1.train.all-00000-of-00010.tsv.gz"
    file.write_bytes(gzip.compress("\n".join("\t".join(row) for row in [columns, *rows]).encode()))
    assert shown(pmd_annotations.wikipedia([str(file)], NONE)) == [
        ("line 2", 'The "Scream" by Munch', "https://upload.wikimedia.org/a.jpg", ()),
        "not English",
        "no reference description",
    ]
    table = write_lines(
        tmp_path / "a.csv", ["url,caption", "http://a/1.jpg,The tower of it", "http://a/2.jpg,La tour de la"]
    )
    assert shown(pmd_annotations.wikipedia([table], NONE)) == [
        ("line 2", "The tower of it", "http://a/1.jpg", ()),
        "not English",
    ]


@pytest.mark.parametrize(
    ("description", "title", "expected"),
    [
        ("A dog on the beach", "My holiday trip", "A dog on the beach"),  # description before title
        ("", "My holiday trip", "My holiday trip"),
        ("Nice dog", "My holiday trip", "My holiday trip"),  # two words are not more than two
        ("Der Hund ist am Strand", "A dog on the beach", "A dog on the beach"),
        ("A+dog%27s+life+in+the+sun", "x", "A dog's life in the sun"),  # as the owners' files write it
        ("A dog & <b>a cat</b> \n run", "", "A dog & <b>a cat</b> run"),  # nothing else is filtered
        ("Der Hund ist am Strand", "", "not English"),
        ("Der Hund ist am Strand", "IMG 1", "not English"),
        ("Nice dog", "IMG 1234 5678", "two words or fewer"),  # numbers are no words
        ("", "", "no text"),
    ],
)
def test_yfcc_takes_the_description_else_the_title(tmp_path: Path, description: str, title: str, expected: str) -> None:
    row = {"photoid": 6, "downloadurl": "http://a/1.jpg", "title": title, "description": description}
    [found] = shown(pmd_annotations.yfcc([write_lines(tmp_path / "a.jsonl", [json.dumps(row)])], NONE))
    assert found == (expected if " " in expected and expected.endswith(("English", "fewer", "text")) else (
        "line 1", expected, "http://a/1.jpg", ("6",)
    ))  # fmt: skip


def test_a_language_column_decides(tmp_path: Path) -> None:
    rows = [{"url": "http://a/1.jpg", "caption": "Der Hund am Strand", "language": name} for name in ("en", "de")]
    file = write_lines(tmp_path / "a.jsonl", list(map(json.dumps, rows)))
    assert [type(entry) for entry in pmd_annotations.yfcc([file], NONE)] == [Pair, Dropped]


@pytest.mark.parametrize(
    ("caption", "english"),
    [
        ("Man in boat", True), ("Golden Gate Bridge", True), ("The café de Paris in the rain", True),
        ("Mon chat dort sur le lit", False), ("Vamos a la playa", False), ("Hund und Katze", False),
        ("Een man op de fiets", False), ("En katt på taket", False), ("東京 タワー の 夜景", False),
        ("Красная площадь ночью", False), ("12 34 56", False),
    ],
)  # fmt: skip
def test_the_rule_of_english(caption: str, english: bool) -> None:
    assert is_english(caption) == english


# ------------------------------------------------------------------------------------------------------- broken


def test_a_broken_entry_costs_itself_alone_and_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps({"dataset_id": "ADE20k_train", "image_id": "a", "caption": "Good."}).encode()
    bad = [
        b"{", b"7", b'{"dataset_id": "ADE20k_train", "image_id": "a"}',
        b'{"dataset_id": "x", "image_id": 1, "caption": 3}',
        b'{"dataset_id": "x", "image_id": 1, "caption": "\\ud800"}',
        b"\xff", b'{"dataset_id": "mscoco_train2017", "image_id": "x1", "caption": "a"}',
    ]  # fmt: skip
    file.write_bytes(b"\n".join([good, *bad, b"", good]))
    assert shown(pmd_annotations.localized_narratives([str(file)], NONE)) == [
        ("line 1", "Good.", None, ("a",)),
        f"{file} (line 2): it is no JSON object",
        f"{file} (line 3): it is no record of named fields",
        f'{file} (line 4): it has no "caption"',
        f'{file} (line 5): its "caption" holds no text',
        f'{file} (line 6): its "caption" is no Unicode (a lone surrogate)',
        f"{file} (line 7): it is not UTF-8",
        f'{file} (line 8): its image_id "x1" is no number of COCO',
        ("line 10", "Good.", None, ("a",)),
    ]


def test_broken_entries_of_json_files(tmp_path: Path) -> None:
    coco = json.loads(Path(pmd_files.coco_captions(tmp_path / "c.json")).read_text())
    coco["annotations"] = [{"image_id": 5, "caption": "a"}, {"image_id": 57870}, {"caption": "a"}]
    file = write_json(tmp_path / "c.json", coco)
    assert shown(pmd_annotations.coco([file], NONE)) == [
        f"{file} (annotation 0): it is of image 5, which the file does not describe",
        f'{file} (annotation 1): it has no "caption"',
        f'{file} (annotation 2): it has no "image_id"',
    ]
    with pytest.raises(TriviumError, match=r'c.json: it has no "annotations": is it the file you mean'):
        list(pmd_annotations.redcaps([write_json(tmp_path / "c.json", {"info": {}})], NONE))
    regions, pictures = pmd_files.visual_genome(tmp_path)
    broken = [
        {"id": 1, "regions": [{"image_id": 1, "phrase": "a", "x": 90, "y": 0, "width": 5, "height": 5}]},
        {"id": 2},
    ]
    assert shown(pmd_annotations.visual_genome([write_json(Path(regions), broken), pictures], NONE)) == [
        f"{regions} (entry 0, region 0): its region is empty or outside the picture",
        f'{regions} (entry 1): it has no "regions"',
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", b'[{"url": 1}, {"url"', r"a.json \(entry 1\) is no JSON .*: is the file whole\?"),
        ("a.json", b"7", "a.json holds no JSON array"),
        (
            "a.json",
            b'{"url": ["a"], "caption": []}',
            "a.json holds neither a list of records nor columns of one length",
        ),
        ("a.json", b'["\xff"]', "a.json is not UTF-8"),
        ("a.csv", b'url,caption\nx,"a\ny,b\nz,c\n', "a.csv: a quote opened in the row at line 2 never closes"),
        ("a.csv", b'url,caption\n"x,a\ny,b\n', "a.csv: a quote opened in the row at line 2 never closes"),
        ("a.csv.gz", b"no gzip", "a.csv.gz cannot be read"),
        ("a.parquet", b"PAR1", "a.parquet is no readable Parquet file"),
        ("a.xls", b"", "a.xls is no table we know"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TriviumError, match=sentence):
        list(records.records(str(tmp_path / name)))
    with pytest.raises(TriviumError, match="does not exist"):
        list(records.records(str(tmp_path / f"no-{name}" if not name.endswith("xls") else tmp_path / "no.csv")))


def test_rows_of_the_wrong_width(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.csv", ["url,caption", "http://a/1.jpg,a, b", "", "http://a/2.jpg,c"])
    assert shown(pmd_annotations.captioned([file], NONE)) == [
        f"{file} (line 2): it has 3 fields, the header 2", ("line 4", "c", "http://a/2.jpg", ())
    ]  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 64, 2**20])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Pieces end inside characters, strings and numbers."""
    elements = [{"a": "größer 東京 ]", "b": [1.5, {"c": "]"}]}, {}, {"d": '\\"[' * 5}]
    (tmp_path / "a.json").write_text(json.dumps(elements, ensure_ascii=False, indent=1), encoding="utf-8")
    monkeypatch.setattr(records, "CHUNK", chunk)
    assert [record.fields for record in records.json_elements(str(tmp_path / "a.json"))] == elements
