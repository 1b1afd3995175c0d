"""Folders, tables and text files of one's own, whole and broken."""

from __future__ import annotations

import csv
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trivium.data.files import TEXT_LIMIT, WORD, Folder, TextLines, words_within
from trivium.data.parquet import ParquetFiles
from trivium.data.sources import Concat, open_source
from trivium.data.tables import Csv, Jsonl
from trivium.errors import BadSample, TriviumError, UnreadableNow
from trivium.train.protocol import Source

PICTURE = b"stands for an encoded picture: sources never look inside "


def bad(source: Source, row: int = 0) -> str:
    """The sentence of a bad sample, which also survives the way out of a worker."""
    with pytest.raises(BadSample) as caught:
        source.read(row, row)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


def covers(source: Source) -> None:
    rows = [row for block in source.blocks() for row in block]
    assert rows == list(range(len(source)))


def lengths(source: Source) -> list[int]:
    known = source.lengths()
    assert known is not None
    return np.asarray(known).tolist()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in ("b/2.PNG", "a/1.png", "a/10.jpg", "c.webp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PICTURE + name.encode())
    return folder


# --------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_pictures_in_order_of_path(pictures: Path) -> None:
    (pictures / "a" / "._1.png").write_bytes(b"macOS")
    (pictures / "notes.md").write_text("no picture")
    (pictures / "a" / "loop").symlink_to(pictures, target_is_directory=True)
    source = open_source("images", [pictures])
    assert [source.read(row, row)["image"][len(PICTURE) :] for row in range(len(source))] == [
        *(b"a/1.png", b"a/10.jpg", b"b/2.PNG", b"c.webp")
    ]
    assert source.read(0, 0).keys() == {"image", "same_image", "name"}
    assert source.read(2, 2)["name"] == f"{pictures}/b/2.PNG"
    covers(source)


def test_classes_are_folder_names(pictures: Path) -> None:
    with pytest.raises(TriviumError, match=r"c.webp lies in no class folder"):
        Folder(pictures, "images", classes=True)
    (pictures / "c.webp").unlink()
    source = Folder(pictures, "images", classes=True)
    assert source.class_names == ["a", "b"]
    assert [source.read(row, row)["label"] for row in range(3)] == [0, 0, 1]


def test_a_caption_stands_beside_its_picture(pictures: Path) -> None:
    with pytest.raises(TriviumError, match=r"no picture in .* has a caption: photo.txt must stand beside photo.jpg"):
        open_source("pairs", [pictures])
    (pictures / "a" / "1.txt").write_text("\ufeffa mug\n\nein Becher\n", encoding="utf-8")
    (pictures / "b" / "2.txt").write_bytes(b"caf\xe9")
    (pictures / "c.txt").write_text("  \n")
    source = open_source("pairs", [pictures])
    assert source.read(0, 0)["texts"] == ["a mug", "ein Becher"]
    assert "has no caption" in bad(source, 1)
    assert "a/10.txt does not exist" in bad(source, 1)
    assert "b/2.PNG: its text is not UTF-8 (byte 0xe9 at position 3)" in bad(source, 2)
    assert "c.webp: its text is empty" in bad(source, 3)


def test_a_name_that_is_not_utf8_costs_nothing(pictures: Path) -> None:
    odd = pictures / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    for name in (b"th\xe9.png", b"gone.png"):
        (odd / os.fsdecode(name)).write_bytes(PICTURE)
    (odd / os.fsdecode(b"th\xe9.txt")).write_text("a cup of tea")
    source = Folder(pictures, "pairs")
    sample = source.read(5, 5)
    assert sample["image"] == PICTURE and sample["text"] == "a cup of tea"
    assert sample["name"] == rf"{pictures}/caf\udce9/th\udce9.png"
    assert bad(source, 4).endswith(r"caf\udce9/gone.txt does not exist")
    (odd / os.fsdecode(b"th\xe9.png")).write_bytes(b"")
    assert bad(source, 5).endswith(r"th\udce9.png: its picture has zero bytes")
    (pictures / "c.webp").unlink()
    classes = Folder(pictures, "images", classes=True)
    assert classes.class_names == ["a", "b", r"caf\udce9"] and classes.read(3, 3)["label"] == 2


def test_a_caption_of_ten_megabytes_is_cut_and_counted(pictures: Path) -> None:
    (pictures / "c.txt").write_text("größer " * 1_500_000, encoding="utf-8")
    (pictures / "a" / "1.txt").write_text("short")
    source = open_source("pairs", [pictures])
    assert isinstance(source, Folder)
    assert source.cut_texts() == 1
    text = source.read(3, 3)["text"]
    assert TEXT_LIMIT - 8 < len(text) <= TEXT_LIMIT
    assert set(text.split()) <= {"größer", "g", "gr", "grö", "größ", "größe"}
    (pictures / "a" / "1.txt").write_text("short\n" * 50_000)  # more bytes than are read, in lines that are not cut
    assert source.cut_texts() == 2


def test_an_empty_a_missing_and_a_mistaken_folder(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TriviumError, match=r"empty holds no picture \(.jpg"):
        open_source("images", [tmp_path / "empty"])
    with pytest.raises(TriviumError, match=r"empty holds no .txt file"):
        open_source("text", [tmp_path / "empty"])
    with pytest.raises(TriviumError, match=r"nowhere does not exist: check the path"):
        open_source("images", [tmp_path / "nowhere"])
    with pytest.raises(TriviumError, match=r"\*.parquet matches no file"):
        open_source("images", [tmp_path / "*.parquet"])
    with pytest.raises(TriviumError, match=r"c.webp is a single picture: name the folder"):
        open_source("images", [pictures / "c.webp"])
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    with pytest.raises(TriviumError, match=r"data.xlsx has a suffix we do not know; .*\.csv, \.tsv, \.jsonl"):
        open_source("pairs", [tmp_path / "data.xlsx"])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "empty" / "train-0.parquet")
    with pytest.raises(TriviumError, match=r'no picture but .parquet files: .* as in ".*/empty/train-\*.parquet"'):
        open_source("pairs", [tmp_path / "empty"])
    with pytest.raises(TriviumError, match=r"no path is given for --data.pairs"):
        open_source("pairs", [])


def test_a_folder_that_cannot_be_read_is_not_passed_over(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        TriviumError, match=r"photos/b cannot be read \(Permission denied\): change its rights, or name"
    ):
        open_source("images", [pictures])


def test_what_a_pattern_matches_is_taken_as_if_it_were_named(tmp_path: Path) -> None:
    (tmp_path / "texts" / "below").mkdir(parents=True)
    for name in ("a.txt", "below/b.txt", "c.txt"):
        (tmp_path / "texts" / name).write_text(name)
    source = open_source("text", [tmp_path / "texts" / "*"])
    assert [source.read(row, row)["text"] for row in range(3)] == ["a.txt", "below/b.txt", "c.txt"]
    (tmp_path / "texts" / "d.txt").symlink_to(tmp_path / "gone.txt")
    for path in ("*", "d.txt"):
        with pytest.raises(TriviumError, match=r"texts/d.txt is a link to nothing: remove it"):
            open_source("text", [tmp_path / "texts" / path])


def test_a_list_that_windows_wrote(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mug")
    for content in (b"# of two lines\r\na.txt\r\n", b"a.txt\r\n"):
        (tmp_path / "all.list").write_bytes(b"\xef\xbb\xbf" + content)
        assert open_source("text", [tmp_path / "all.list"]).read(0, 0)["text"] == "mug"


@pytest.mark.parametrize("line", ["*", "mor?.list", "more.list", "all.list"])
def test_a_list_names_no_list_and_least_of_all_itself(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.txt").write_text("mug")
    (tmp_path / "all.list").write_text("a.txt")
    (tmp_path / "more.list").write_text(line)
    with pytest.raises(TriviumError, match=r"more.list lists a list \(.*\.list\): name the files themselves"):
        open_source("text", [tmp_path / "more.list"])


def test_pictures_that_vanish_or_are_empty(pictures: Path) -> None:
    source = open_source("images", [pictures])
    (pictures / "a" / "1.png").unlink()
    (pictures / "a" / "10.jpg").write_bytes(b"")
    (pictures / "b" / "2.PNG").unlink()
    os.mkfifo(pictures / "b" / "2.PNG")  # a read of it would never return
    assert bad(source, 0) == f"{pictures}/a/1.png: its picture does not exist"
    assert bad(source, 1) == f"{pictures}/a/10.jpg: its picture has zero bytes"
    assert bad(source, 2) == f"{pictures}/b/2.PNG: its picture is no ordinary file"


# ------------------------------------------------------------------------------------------------------ text


def test_text_lines_and_windows(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    long = " ".join(f"w{number}" for number in range(10))
    file.write_bytes(f"\ufefferste Zeile\r\n\n  \n{long}\n木の上\nlast".encode())
    source = open_source("text", [file], window=4)
    assert isinstance(source, TextLines)
    texts = [source.read(row, row)["text"] for row in range(len(source))]
    assert texts == ["erste Zeile", "w0 w1 w2", "w3 w4 w5", "w6 w7 w8 w9", "木の上", "last"]
    assert source.long_lines == 1
    assert source.read(2, 2)["name"] == f"{file} (line 4, window 2)"
    assert source.read(5, 5)["name"] == f"{file} (line 6)"
    assert source.read(0, 0).keys() == {"text", "same_text", "name"}
    covers(source)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), max_size=9)), st.integers(1, 5)
)
def test_windows_hold_every_word_once_and_in_order(tmp_path: Path, words: list[str], window: int) -> None:
    words = [word for word in words if word.strip()]
    (tmp_path / "words.txt").write_text(" ".join(["start", *words]) + "\n", encoding="utf-8")
    source = TextLines(tmp_path / "words.txt", window)
    texts = [source.read(row, row)["text"] for row in range(len(source))]
    assert "".join(" ".join(texts).lstrip("\ufeff").split()) == "".join(["start", *words])
    lengths = [len(WORD.findall(text.encode())) for text in texts]
    assert max(lengths) <= window and max(lengths) - min(lengths) <= 1
    assert len(texts) == -(-sum(lengths) // window)


def test_scripts_without_spaces_are_cut_into_windows_too(tmp_path: Path) -> None:
    japanese, thai = "赤いマグカップが木の机の上にある。" * 3, "แก้วสีแดง" * 4
    (tmp_path / "words.txt").write_text(f"{japanese}\n{thai}\na don’t-split naïve word 東京 end\n", encoding="utf-8")
    source = TextLines(tmp_path / "words.txt", 16)
    texts = [source.read(row, row)["text"] for row in range(len(source))]
    assert texts[-1] == "a don’t-split naïve word 東京 end"
    assert [len(text) for text in texts[:-1]] == [12, 13, 13, 13, 12, 12, 12]
    assert "".join(texts[:-1]) == japanese + thai
    assert source.long_lines == 2


def test_a_window_is_half_of_what_is_read() -> None:
    assert [words_within(tokens) for tokens in (3, 16, 32, 77, 512)] == [1, 7, 15, 37, 255]


def test_ten_megabytes_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("word " * 2_000_000)
    source = TextLines(tmp_path / "words.txt", 64)
    assert (len(source), source.long_lines, source.cut_texts()) == (31_250, 1, 0)
    (tmp_path / "no_spaces.txt").write_text("é" * 3_000_000 + "\nshort\n", encoding="utf-8")
    source = TextLines(tmp_path / "no_spaces.txt", 64)
    assert (len(source), source.cut_texts()) == (2, 1)
    assert source.read(0, 0)["text"] == "é" * TEXT_LIMIT


def test_a_line_that_is_not_utf8_is_bad_alone(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"good\ncaf\xe9\nalso good\n")
    source = open_source("text", [file])
    assert bad(source, 1).startswith(f"{file} (line 2): its text is not UTF-8 (byte 0xe9 at position 3)")
    assert source.read(2, 2)["text"] == "also good"
    file.write_bytes(b"\n \n")
    with pytest.raises(TriviumError, match=r"latin.txt holds no text"):
        open_source("text", [file])
    with pytest.raises(TriviumError, match=r"latin.txt is plain text and has no pictures: give it to --data.text"):
        open_source("pairs", [file])


def test_of_many_text_files_few_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.data.files.OPEN_FILES", 3)
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"line {number}")
    source = open_source("text", [tmp_path])
    for row in [*range(8), *range(8)]:
        assert source.read(row, row)["text"] == f"line {row}"
    handles = [os.path.realpath(handle) for handle in Path("/proc/self/fd").iterdir()]
    assert len([path for path in handles if path.startswith(str(tmp_path))]) == 3


# ----------------------------------------------------------------------------------------------- text tables


def write_csv(file: Path, rows: list[list[str]], **options: object) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, **options).writerows(rows)
    return file


def test_a_csv_with_all_that_a_csv_may_hold(tmp_path: Path, pictures: Path) -> None:
    rows = [
        ["\ufeffImage", "n", "Caption"],
        ["photos/a/1.png", "1", 'a "red" mug,\nstanding'],
        ["photos/b/2.PNG", "2", "ein grüner Becher"],
        [str(pictures / "a" / "1.png"), "3", "the same picture"],
    ]
    source = open_source("pairs", [write_csv(tmp_path / "pairs.csv", rows)])
    samples = [source.read(row, row) for row in range(3)]
    assert [sample["text"] for sample in samples] == [row[2] for row in rows[1:]]
    assert samples[0]["image"] == PICTURE + b"a/1.png"
    assert samples[2]["name"] == f"{tmp_path}/pairs.csv (line 5)"  # the first row takes two lines
    # One picture, however it is named, has one number; the text of a true row has it, too.
    numbers = [sample["same_image"] for sample in samples]
    assert numbers == [sample["same_text"] for sample in samples]
    assert numbers[0] == numbers[2] != numbers[1]
    assert all(0 <= number < 2**63 for number in numbers)
    false_pair = source.read(0, 1)
    assert (false_pair["image"], false_pair["text"]) == (samples[0]["image"], samples[1]["text"])
    assert (false_pair["same_image"], false_pair["same_text"]) == (numbers[0], numbers[1])
    covers(source)


def test_paths_below_a_root_and_single_kinds(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "lists").mkdir()
    file = write_csv(tmp_path / "lists" / "p.csv", [["path", "text"], ["a/1.png", "mug"]])
    assert open_source("pairs", [file], root=pictures).read(0, 0)["text"] == "mug"
    assert open_source("images", [file], root=pictures).read(0, 0).keys() == {"image", "same_image", "name"}
    assert open_source("text", [file]).read(0, 0)["text"] == "mug"


def test_columns_by_name_and_the_messages_where_they_fail(tmp_path: Path, pictures: Path) -> None:
    file = write_csv(tmp_path / "c.csv", [["file", "alt", "note"], ["photos/c.webp", "mug", "x"]])
    with pytest.raises(TriviumError) as caught:
        open_source("pairs", [file])
    assert str(caught.value) == (
        f"{file} has no column caption|captions|text|title; its columns are file, alt, note: "
        "name one of them with --data.text-column"
    )
    with pytest.raises(TriviumError, match=r'c.csv has no column "titel"; its columns are file, alt, note'):
        open_source("pairs", [file], text_column="titel")
    assert open_source("pairs", [file], text_column="alt").read(0, 0)["text"] == "mug"
    words = write_csv(tmp_path / "words.csv", [["note", "title"], ["y", "z"]])
    read = [open_source("text", [each], text_column="alt,note").read(0, 0)["text"] for each in (file, words)]
    assert read == ["mug", "y"]  # the first name that a table has
    both = write_csv(tmp_path / "both.csv", [["file", "caption", "title"], ["photos/c.webp", "mug", "x"]])
    with pytest.raises(TriviumError, match=r"more than one column that may be meant \(caption, title\)"):
        open_source("pairs", [both])
    web = write_csv(tmp_path / "web.csv", [["url", "text"], ["https://example.org/1.jpg", "mug"]])
    with pytest.raises(TriviumError, match=r"web.csv names pictures by web address .*: download them"):
        open_source("pairs", [web])


def test_parquet_files_of_several_folders_name_pictures_beside_themselves(tmp_path: Path) -> None:
    """Two folders with a picture of the same name: each table means its own."""
    paths = []
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        picture = tmp_path / folder / "mug.png"
        Image.new("RGB", (8 + number, 8)).save(picture)
        paths.append(tmp_path / folder / "part.parquet")
        pq.write_table(pa.table({"image": ["mug.png"], "caption": [folder]}), paths[-1])
    source = open_source("pairs", paths)
    assert isinstance(source, ParquetFiles)
    for row, folder in enumerate(("a", "b")):
        sample = source.read(row, row)
        assert (sample["image"], sample["text"]) == ((tmp_path / folder / "mug.png").read_bytes(), folder)
    assert source.read(0, 0)["same_image"] != source.read(1, 1)["same_image"]
    rooted = open_source("pairs", paths, root=tmp_path / "b")
    assert rooted.read(0, 0)["image"] == rooted.read(1, 1)["image"] == (tmp_path / "b" / "mug.png").read_bytes()


def test_bad_rows_of_a_csv_are_bad_alone(tmp_path: Path, pictures: Path) -> None:
    lines = [
        *(b"image,caption", b"photos/gone.png,mug", b"photos/c.webp,red, mug", b"photos/c.webp,  ", b"photos/c.webp"),
        *(b"photos/c.webp,caf\xe9", b",mug", b"", b'photos/c.webp,"a "red" mug"', b"photos/c.webp,good", b"a\0b,mug"),
    ]
    file = tmp_path / "bad.csv"
    file.write_bytes(b"\r\n".join(lines) + b"\r\n")
    source = open_source("pairs", [file])
    assert bad(source, 0) == f"{file} (line 2): its picture {pictures}/gone.png does not exist"
    assert "(line 3): it has 3 fields, the header 2" in bad(source, 1)
    assert "(line 4): its text is empty" in bad(source, 2)
    assert "(line 5): it has 1 fields, the header 2" in bad(source, 3)
    assert "(line 6): its text is not UTF-8 (byte 0xe9" in bad(source, 4)
    assert '(line 7): its column "image" names no picture' in bad(source, 5)
    assert "(line 9): it is no CSV row" in bad(source, 6)
    assert source.read(7, 7)["text"] == "good"
    assert "(line 11): its picture" in bad(source, 8)
    assert len(source) == 9


def test_files_that_are_no_csv(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    for content, message in (
        (b"", "t.csv is empty: its first line must name the columns"),
        (b"text\n", "t.csv has no rows below its header"),
        ("text\nmug\n".encode("utf-16"), r"t.csv \(line 1\) is not UTF-8"),
        (b'text\ngood\n"never closed\nmore\nmore\n', "a quote opened in the row at line 3 never closes"),
    ):
        file.write_bytes(content)
        with pytest.raises(TriviumError, match=message):
            open_source("text", [file])


def test_a_long_field_is_cut_and_counted_and_the_global_limit_is_left_alone(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    source = open_source("text", [write_csv(tmp_path / "l.csv", [["text"], ["x" * 10_000_000], ["y" * TEXT_LIMIT]])])
    assert isinstance(source, Csv)
    assert [len(source.read(row, row)["text"]) for row in range(2)] == [TEXT_LIMIT, TEXT_LIMIT]
    assert source.cut_texts() == 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("end", ["\r\r\n", "\r\n", "\n"])
def test_a_row_ends_where_the_scan_found_its_end(tmp_path: Path, end: str) -> None:
    """The first of these is what Python writes on Windows to a file that was opened without newline=""."""
    for suffix, mark, two_lines in ((".csv", ",", f'"two{end}lines"'), (".tsv", "\t", '"one line"')):
        lines = [f"n{mark}text", f"1{mark}mug", f"2{mark}{two_lines}", "", f"3{mark}lamp"]
        (tmp_path / f"a{suffix}").write_bytes("".join(line + end for line in lines).encode())
        source = open_source("text", [tmp_path / f"a{suffix}"])
        texts = [source.read(row, row)["text"] for row in range(len(source))]
        assert texts == ["mug", two_lines.strip('"') if suffix == ".csv" else two_lines, "lamp"]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_every_csv_row_is_found_again(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    file = write_csv(tmp_path / "any.csv", [["n", "text"], *map(list, rows)])
    source = open_source("text", [file])
    assert len(source) == len(rows)
    for row, (_, text) in enumerate(rows):
        if text.strip():
            assert source.read(row, row)["text"] == text.strip()
        else:
            assert "empty" in bad(source, row)


def test_a_tsv_knows_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('label\tsentence\n1\t"unbalanced and, odd\n0\tplain\n')
    source = open_source("text", [tmp_path / "t.tsv"], text_column="sentence")
    assert [source.read(row, row)["text"] for row in range(2)] == ['"unbalanced and, odd', "plain"]


def test_jsonl(tmp_path: Path, pictures: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [
        json.dumps({"image": "photos/c.webp", "captions": ["one", " ", "two"]}),
        *('{"image": "photos/c.webp", "captions"', "", "[1, 2]", '{"image": "photos/c.webp"}'),
        *('{"image": 7, "captions": "x"}', '{"image": "photos/c.webp", "captions": [1]}'),
        json.dumps({"image": "photos/c.webp", "captions": "z" * 10_000_000}),
        json.dumps({"image": "photos/c.webp", "captions": None}),
    ]
    file.write_text("\n".join(rows) + "\n")
    source = open_source("pairs", [file])
    assert isinstance(source, Jsonl)
    assert source.read(0, 0)["texts"] == ["one", "two"]
    assert "text" not in source.read(0, 0)
    assert bad(source, 1) == f"{file} (line 2): it is no JSON object"
    assert "(line 4): it is no JSON object" in bad(source, 2)
    assert '(line 5): it has no "captions"' in bad(source, 3)
    assert '(line 6): its column "image" names no picture' in bad(source, 4)
    assert '(line 7): its column "captions" holds no text' in bad(source, 5)
    assert len(source.read(6, 6)["text"]) == TEXT_LIMIT
    assert "(line 9): its text is empty" in bad(source, 7)
    assert source.cut_texts() == 1
    file.write_text("[\n{\n")
    with pytest.raises(TriviumError, match="holds no JSON object: write one to a line"):
        open_source("pairs", [file])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a mug"),
        ("a.csv", "caption\na mug\n"),
        ("a.jsonl", '{"caption": "a mug"}'),
        ("a.json", '[{"caption": "a mug"}]'),
    ],
)
def test_a_text_that_the_disk_does_not_give_may_be_readable_another_time(
    tmp_path: Path, name: str, content: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    source = pickle.loads(pickle.dumps(open_source("text", [file])))  # as a worker has it, which opens the file anew
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(UnreadableNow, match=rf"{name} \(.*\): it cannot be read: "):
        source.read(0, 0)
    (tmp_path / "elsewhere").rename(file)
    assert source.read(0, 0)["text"] == "a mug"


def test_files_whose_path_is_not_utf8_are_read_all_the_same(tmp_path: Path, pictures: Path) -> None:
    odd = pictures.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    shown = rf"{tmp_path}/caf\udce9"
    (odd / "a.txt").write_text("a cup of tea")
    sample = open_source("text", [odd / "a.txt"]).read(0, 0)
    assert (sample["text"], sample["name"]) == ("a cup of tea", f"{shown}/a.txt (line 1)")
    (odd / "a.csv").write_text("image,caption\nc.webp,a mug\ngone.png,nothing\n")
    (odd / "a.jsonl").write_text('{"image": "c.webp", "caption": "a mug"}')
    (odd / "a.json").write_text('[{"image": "c.webp", "caption": "a mug"}]')
    sources = [open_source("pairs", [odd / name]) for name in ("a.csv", "a.jsonl", "a.json")]
    samples = [source.read(0, 0) for source in sources]
    assert [sample["image"] for sample in samples] == [PICTURE + b"c.webp"] * 3
    assert len({sample["same_image"] for sample in samples}) == 1
    names = ["a.csv (line 2)", "a.jsonl (line 1)", "a.json (entry 0)"]
    assert [sample["name"] for sample in samples] == [f"{shown}/{name}" for name in names]
    assert bad(sources[0], 1) == f"{shown}/a.csv (line 3): its picture {shown}/gone.png does not exist"
    shutil.copy(write_parquet(tmp_path), odd)
    with pytest.raises(TriviumError, match=r"a\.parquet: the path of a Parquet file must be UTF-8: rename it"):
        open_source("pairs", [odd / "a.parquet"])


def test_half_a_character_is_a_bad_row(tmp_path: Path) -> None:
    """JSON can spell it, no tokenizer can read it."""
    file = tmp_path / "s.jsonl"
    file.write_text('{"text": "hello \\ud83d"}\n{"text": ["\\ud83d", "\\ude00"]}\n{"text": "\\ud83d\\ude00"}\n')
    source = open_source("text", [file])
    assert bad(source, 0) == f"{file} (line 1): its text is no Unicode (a lone surrogate)"
    assert "(line 2): its text is no Unicode" in bad(source, 1)
    assert source.read(2, 2)["text"] == "\N{GRINNING FACE}"


# --------------------------------------------------------------------------------------------------- parquet


def write_parquet(folder: Path, name: str = "a.parquet", rows: int = 5, **columns: object) -> Path:
    pictures = [PICTURE + bytes([row % 256]) for row in range(rows)]
    table = {"image": pictures, "caption": [f"text {row}" for row in range(rows)], **columns}
    pq.write_table(pa.table(table), folder / name, row_group_size=2)
    return folder / name


def test_parquet_files_row_groups_and_patterns(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train-1.parquet", 5)
    write_parquet(tmp_path, "train-0.parquet", 3)
    (tmp_path / "x.tar.index.parquet").write_bytes(b"a sidecar, not data")
    source = open_source("pairs", [tmp_path / "*.parquet"])
    assert [len(block) for block in source.blocks()] == [2, 1, 2, 2, 1]
    covers(source)
    texts = [source.read(row, row)["text"] for row in range(len(source))]
    assert texts == [f"text {row}" for row in [0, 1, 2, 0, 1, 2, 3, 4]]
    assert source.read(4, 7)["image"] == PICTURE + b"\x01"
    assert source.read(4, 4)["name"] == f"{tmp_path}/train-1.parquet (row 1)"
    numbers = [source.read(row, row)["same_image"] for row in range(8)]
    assert len(set(numbers)) == 5 and numbers[:3] == numbers[3:6]  # both files hold three of the pictures
    assert lengths(source) == [6] * 8


def test_parquet_picture_structs_paths_and_lists_of_captions(tmp_path: Path, pictures: Path) -> None:
    struct = [{"bytes": PICTURE, "path": "x.png"}, {"bytes": None, "path": "photos/c.webp"}, None, {"bytes": b""}]
    captions = [["one", "two three"], ["four"], ["five"], []]
    file = write_parquet(tmp_path, rows=4, image=struct, caption=captions, file=["f"] * 4)
    source = open_source("pairs", [file])  # `file`, too, is a usual name, but `image` holds pictures
    assert source.read(0, 0)["texts"] == ["one", "two three"]
    assert source.read(1, 1)["image"] == PICTURE + b"c.webp"
    assert 'a.parquet (row 2): its column "image" names no picture' in bad(source, 2)
    assert "its picture has zero bytes" in bad(source, 3)
    assert lengths(source) == [9, 4, 4, 0]
    assert "text is empty" in bad(open_source("text", [file]), 3)
    paths = write_parquet(tmp_path, "paths.parquet", 1, image=["photos/c.webp"])
    assert open_source("pairs", [paths]).read(0, 0)["same_image"] == source.read(1, 1)["same_image"]


@pytest.mark.parametrize("in_struct", [True, False])
def test_pictures_inside_a_parquet_file_are_known_by_their_bytes(tmp_path: Path, in_struct: bool) -> None:
    """Beside bytes Hugging Face keeps the last part of a path alone: pictures of several folders then share a name."""
    held = [PICTURE + bytes([row]) for row in (0, 1, 2, 0)]
    names = ["000.png", "000.png", "001.png", "002.png"]
    image = [{"bytes": data, "path": name} for data, name in zip(held, names, strict=True)] if in_struct else held
    source = open_source("pairs", [write_parquet(tmp_path, rows=4, image=image)])
    numbers = [source.read(row, row)["same_image"] for row in range(4)]
    assert len(set(numbers)) == 3 and numbers[0] == numbers[3]
    assert [source.read(0, row)["same_text"] for row in range(4)] == numbers


def test_parquet_that_is_none_or_lacks_a_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path)
    with pytest.raises(TriviumError, match=r'a.parquet has no column "alt"; its columns are image, caption'):
        open_source("pairs", [file], text_column="alt")
    empty = write_parquet(tmp_path, "empty.parquet", 0)
    with pytest.raises(TriviumError, match=r"empty.parquet has no rows"):
        open_source("text", [empty])
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(TriviumError, match=r"a.parquet is no readable Parquet file"):
        open_source("pairs", [file])


def test_a_damaged_row_group_is_bad_alone(tmp_path: Path) -> None:
    file = write_parquet(tmp_path, rows=4)
    facts = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = min(offset for offset in (facts.dictionary_page_offset, facts.data_page_offset) if offset)
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    source = open_source("pairs", [file])
    assert source.read(1, 1)["text"] == "text 1"
    assert f"{file} (row group 1): it cannot be read" in bad(source, 2)


def test_a_damaged_row_group_has_no_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path, rows=4)
    facts = pq.ParquetFile(file).metadata.row_group(1).column(1)
    data = bytearray(file.read_bytes())
    start = min(offset for offset in (facts.dictionary_page_offset, facts.data_page_offset) if offset)
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    assert lengths(open_source("text", [file])) == [6, 6, 0, 0]

    def broken(*_: object, **__: object) -> pa.Table:
        raise OSError(errno.EIO, "Input/output error")

    source = open_source("text", [file])
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", broken)
    with pytest.raises(UnreadableNow, match=r"a\.parquet \(row group 0\): it cannot be read"):
        source.lengths()


@pytest.mark.parametrize("method", ["__init__", "read_row_group"])
def test_a_row_group_that_the_disk_does_not_give_may_be_readable_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    source = open_source("pairs", [write_parquet(tmp_path, rows=4)])

    def broken(*_: object, **__: object) -> pa.Table:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetFile, method, broken)
        with pytest.raises(UnreadableNow, match=r"a\.parquet \(row group 1\): it cannot be read"):
            source.read(2, 2)
    assert source.read(2, 2)["text"] == "text 2"


def test_the_cache_of_row_groups_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.data.parquet.CACHE_BYTES", 10_000)
    big = [bytes([row]) * 3000 for row in range(20)]
    source = ParquetFiles([write_parquet(tmp_path, rows=20, image=big)], "pairs")
    for row in [*range(20), *range(20)]:
        assert source.read(row, row)["image"] == big[row]
        assert sum(values.nbytes for values in source._cache.values()) <= 10_000 or len(source._cache) == 2


def test_row_groups_that_do_not_fit_the_cache_together_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as an order mixes, 16, and of the columns that are read: 2 rows of 3,000 bytes a group, and headers."""
    big = [bytes([row]) * 3000 for row in range(40)]
    file = write_parquet(tmp_path, rows=40, image=big, unread=[picture * 10 for picture in big])
    monkeypatch.setattr("trivium.data.parquet.CACHE_BYTES", 16 * 40_000)
    assert [ParquetFiles([file], "pairs").notes, ParquetFiles([file], "images").notes] == [[], []]
    monkeypatch.setattr("trivium.data.parquet.CACHE_BYTES", 16 * 5_000)
    [note] = ParquetFiles([file], "pairs").notes
    assert note.startswith(f"{file}: training mixes 16 row groups of 0 MB")
    assert note.endswith("write groups of at most 1 rows, or use `trivium data pack`")
    assert ParquetFiles([file], "text").notes == []


# ---------------------------------------------------------------------------------------------------- concat


def test_concat_reads_false_pairs_across_sources(tmp_path: Path, pictures: Path) -> None:
    table = write_csv(tmp_path / "p.csv", [["image", "caption"], ["photos/c.webp", "from a table"]])
    parquet = write_parquet(tmp_path, rows=3)
    source = open_source("pairs", [table, parquet, table])
    assert isinstance(source, Concat)
    assert len(source) == 5
    covers(source)
    sample = source.read(0, 2)
    assert (sample["image"], sample["text"]) == (PICTURE + b"c.webp", "text 1")
    assert sample["same_text"] == source.read(2, 2)["same_image"] != sample["same_image"]
    assert sample["name"] == f"{table} (line 2) with the text of {parquet} (row 1)"
    assert source.read(0, 0)["same_image"] == source.read(4, 4)["same_image"]
    assert source.lengths() is None
    assert lengths(open_source("text", [parquet, parquet])) == [6] * 6


def test_concat_knows_lengths_where_all_do(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "b.txt").write_text("four\n")
    (tmp_path / "t" / "a.txt").write_text("sevenss\nxx\n")
    source = open_source("text", [tmp_path / "t"])
    assert [source.read(row, row)["text"] for row in range(3)] == ["sevenss", "xx", "four"]
    assert np.argsort(np.asarray(source.lengths())).tolist() == [1, 2, 0]
    assert isinstance(source, Concat)


# --------------------------------------------------------------------------------------------------- workers


def test_every_source_is_cheap_to_send_and_reads_the_same_there(tmp_path: Path, pictures: Path) -> None:
    rows = [["photos/c.webp", f"caption {row}"] for row in range(2000)]
    write_csv(tmp_path / "p.csv", [["image", "caption"], *rows])
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"path": a, "text": b}) for a, b in rows))
    (tmp_path / "t.txt").write_text("\n".join(text for _, text in rows))
    shutil.copy(pictures / "c.webp", pictures / "d.webp")
    (pictures / "d.txt").write_text("a caption")
    for kind, path, row in (
        *(("pairs", "p.csv", 1999), ("pairs", "p.jsonl", 7), ("text", "t.txt", 1500), ("pairs", "photos", 4)),
        ("pairs", write_parquet(tmp_path, rows=300).name, 150),
    ):
        source = open_source(kind, [tmp_path / path])  # type: ignore[arg-type]
        expected = source.read(row, row)
        sent = pickle.dumps(source)
        assert len(sent) < 3000 + 30 * len(source)
        assert pickle.loads(sent).read(row, row) == expected
