"""A JSON list of objects as a table: rows found in any layout of the file, and one sentence for what is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trivium.data.json_table import Json
from trivium.data.sources import open_source
from trivium.errors import BadSample, TriviumError

TEXTS = st.text(max_size=12)
OBJECTS = st.dictionaries(
    TEXTS, st.one_of(TEXTS, st.integers(), st.none(), st.lists(TEXTS, max_size=3), st.dictionaries(TEXTS, TEXTS)),
    max_size=3,
)  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(3):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (80 * number, 10, 10)).save(buffer, "PNG")
        (tmp_path / f"{number}.png").write_bytes(buffer.getvalue())
    return tmp_path


def written(folder: Path, content: Any, **layout: Any) -> Path:
    path = folder / "coco.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, **layout), encoding="utf-8")
    return path


@given(st.lists(OBJECTS, max_size=5), st.sampled_from([None, 0, 3]), st.booleans())
def test_every_element_is_found_whatever_stands_in_it(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict], indent: int | None, escaped: bool
) -> None:
    """Brackets, quotes and backslashes in strings, nested objects, any white space."""
    elements = [{"caption": "a"}, *({"caption": "x"} | one for one in objects)]
    path = written(tmp_path_factory.mktemp("json"), elements, indent=indent, ensure_ascii=escaped)
    table = Json(path, "text", text_column="caption")
    assert len(table) == len(elements)
    assert [table._parse(row, table._file.read(int(table._starts[row]), int(table._stops[row])).decode())
            for row in range(len(table))] == elements  # fmt: skip


def test_captions_are_strings_or_lists_and_pictures_paths(pictures: Path) -> None:
    path = written(pictures, [
        {"image": "0.png", "caption": "a red thing"},
        {"image": str(pictures / "1.png"), "caption": ["one", "two"], "image_id": 5},
        {"image": "0.png", "caption": "once more"},
    ])  # fmt: skip
    source = open_source("pairs", [path])
    first, second, third = (source.read(row, row) for row in range(3))
    assert first["text"] == "a red thing" and second["texts"] == ["one", "two"]
    assert first["image"] == (pictures / "0.png").read_bytes()
    assert first["same_image"] == third["same_image"] == third["same_text"] != second["same_image"]
    assert second["name"] == f"{path} (entry 1)"


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"image": "0.png"}, 'it has no "caption"'),
        ({"image": "0.png", "title": "a"}, 'it has no "caption"'),
        ({"caption": "a"}, 'it has no "image"'),
        ({"url": "0.png", "caption": "a"}, 'it has no "image"'),
        ({"image": "9.png", "caption": "a"}, "9.png does not exist"),
        ({"image": "0.png", "caption": []}, "its text is empty"),
        ({"image": "0.png", "caption": ["a", 3]}, 'its column "caption" holds no text'),
        ({"image": None, "caption": "a"}, 'its column "image" names no picture'),
        (["0.png", "a"], "it is no JSON object"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_an_entry_that_is_wrong_costs_itself_alone(
    pictures: Path, entry: Any, sentence: str, number: int, suffix: str
) -> None:
    """The first, too: it does not speak for its file."""
    good = {"image": "0.png", "caption": "good"}
    entries = [good, good, good]
    entries[number] = entry
    path = written(pictures, entries)
    place = f"entry {number}"
    if suffix == ".jsonl":
        path = pictures / "coco.jsonl"
        path.write_text("\n".join(map(json.dumps, entries)))
        place = f"line {number + 1}"
    source = open_source("pairs", [path])
    with pytest.raises(BadSample) as raised:
        source.read(number, number)
    assert sentence in str(raised.value) and f"coco{suffix} ({place})" in str(raised.value)
    assert source.read(2, 2)["text"] == "good"


def test_two_usual_names_in_most_objects_stay_for_the_user_to_choose_from(pictures: Path) -> None:
    """Where one object lacks one of the two, that is no choice."""
    both = {"image": "0.png", "caption": "a", "title": "b"}
    path = written(pictures, [both, {"image": "0.png", "title": "b"}, both])
    with pytest.raises(TriviumError, match=r"more than one column that may be meant \(caption, title\)"):
        open_source("pairs", [path])
    assert open_source("pairs", [path], text_column="caption").read(2, 2)["text"] == "a"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ("[]", "holds no JSON object"),
        ('{"images": []}', "holds no JSON list of objects"),
        ('[{"image": "a", "caption": "b"}', "(entry 1) ends before its list does"),
        ('[{"image": "a", "caption": "b"}, {"image": "c', "(entry 1) ends before its list does"),
        ('[{"image": "a", "caption": "b"}, 7]', "(entry 1) is no JSON object"),
        ('[{"image": "a", "caption": "b"}, "x", {}]', "(entry 1) is no JSON object"),
        ('[{"name": "a"}]', "no column image|file"),
        ('[{"image": "http://x/y.jpg", "caption": "b"}]', "by web address"),
    ],
)
def test_a_file_that_is_wrong_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    with pytest.raises(TriviumError) as raised:
        open_source("pairs", [written(tmp_path, content)])
    assert sentence in str(raised.value) and "coco.json" in str(raised.value)


def test_a_mark_of_byte_order_and_bytes_that_are_no_utf8(pictures: Path) -> None:
    path = pictures / "coco.json"
    path.write_bytes(b'\xef\xbb\xbf [{"image": "0.png", "caption": "a"}, {"image": "0.png", "caption": "\xff"}]\n')
    source = open_source("pairs", [path])
    assert source.read(0, 0)["text"] == "a"
    with pytest.raises(BadSample, match=r"entry 1\): its text is not UTF-8"):
        source.read(1, 1)
