"""Every list of the test split gives the same pictures with the same five captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.evaluate.datasets.miniatures import encoded, red, save
from trivium.errors import TriviumError
from trivium.evaluate.datasets.captions import BY_NAME, find_captions

CAPTIONS = [[f"picture {label}, caption {number}" for number in range(5)] for label in range(3)]
FLICKR, COCO = BY_NAME["Flickr30K retrieval"], BY_NAME["COCO retrieval"]


def karpathy(table: Path, names: list[str], filepath: str | None) -> None:
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in CAPTIONS[label]]}
        | ({} if filepath is None else {"filepath": filepath})
        for label, name in enumerate(names)
        for split in ("test",)
    ]
    images.insert(1, {**images[0], "split": "train", "filename": "train.jpg"})
    table.write_text(json.dumps({"images": images, "dataset": "x"}))


def flickr(root: Path, form: str) -> None:
    folder, names = root / "flickr30k", [f"{1000 + label}.jpg" for label in range(3)]
    for label, name in enumerate(names):
        save(folder / "flickr30k-images" / name, label)
    if form == "karpathy":
        karpathy(folder / "dataset_flickr30k.json", names, None)
    elif form == "albef":
        entries = [
            {"image": f"flickr30k-images/{name}", "caption": CAPTIONS[label]} for label, name in enumerate(names)
        ]
        (folder / "flickr30k_test.json").write_text(json.dumps(entries))
    else:
        lines = [f'{name},"{text}"' for label, name in enumerate(names) for text in CAPTIONS[label]]
        (folder / "flickr30k_test_karpathy.txt").write_text("\n".join(["image,caption", *lines]) + "\n")


def coco(root: Path, form: str) -> None:
    folder, names = root / "coco", [f"COCO_val2014_{label:012d}.jpg" for label in range(3)]
    for label, name in enumerate(names):
        save(folder / "val2014" / name, label)
    if form == "karpathy":
        karpathy(folder / "dataset_coco.json", names, "val2014")
    elif form == "albef":
        entries = [{"image": f"val2014/{name}", "caption": CAPTIONS[label]} for label, name in enumerate(names)]
        (folder / "coco_test.json").write_text(json.dumps(entries))
    else:
        content = {
            "images": [{"id": label, "file_name": name} for label, name in enumerate(names)],
            "annotations": [{"image_id": label, "caption": t} for label in range(3) for t in CAPTIONS[label]],
        }
        (folder / "coco_test_karpathy.json").write_text(json.dumps(content))


@pytest.mark.parametrize("form", ["karpathy", "albef", "flat"])
@pytest.mark.parametrize("layout", [FLICKR, COCO], ids=["flickr30k", "coco"])
def test_lists(layout, form: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert find_captions(layout, tmp_path) is None
    (flickr if layout is FLICKR else coco)(tmp_path, form)
    found = find_captions(layout, tmp_path)
    assert found is not None
    assert [list(captions) for captions in found.captions] == CAPTIONS
    for label in range(3):
        assert abs(int(found.pictures.read(label)[-1, 0, 0]) - red(label)) <= 3
    assert found.notes == (f"3 pictures where the published scores rest on {layout.pictures:,}",)


def test_a_sixth_caption_is_left_out_aloud(tmp_path: Path) -> None:
    coco(tmp_path, "albef")
    table = tmp_path / "coco" / "coco_test.json"
    entries = json.loads(table.read_text())
    entries[1]["caption"].append("a sixth")
    entries[2]["caption"].pop()
    table.write_text(json.dumps(entries))
    found = find_captions(COCO, tmp_path)
    assert found is not None
    assert [len(captions) for captions in found.captions] == [5, 5, 4]
    assert found.notes[:2] == (
        "1 pictures have more than 5 captions, of which the first 5 are kept", "1 pictures have fewer than 5 captions",
    )  # fmt: skip


def test_captions_of_a_picture_that_stands_in_several_entries_are_collected(tmp_path: Path) -> None:
    """The captions of twelve pictures one an entry, and not side by side, are those of the same file with lists."""
    folder, names = tmp_path / "flickr30k", [f"flickr30k-images/{2000 - label}.jpg" for label in range(12)]
    for label, name in enumerate(names):
        save(folder / name, label % 8)
    table = folder / "flickr30k_test.json"
    texts = {name: [f"{name}, caption {number}" for number in range(5)] for name in names}
    table.write_text(json.dumps([{"image": name, "caption": texts[name]} for name in names]))
    lists = find_captions(FLICKR, tmp_path)
    table.write_text(json.dumps([{"image": name, "caption": texts[name][n]} for n in range(5) for name in names]))
    single = find_captions(FLICKR, tmp_path)
    assert lists is not None and single is not None
    assert single.captions == lists.captions == tuple(map(tuple, texts.values()))
    assert single.notes == lists.notes
    assert [single.pictures.name(row) for row in range(len(single.pictures))] == [Path(name).name for name in names]
    # Karpathy's form likewise, where a picture is listed again for its last captions.
    table.unlink()
    images = [
        {"filename": Path(name).name, "split": "test", "sentences": [{"raw": text} for text in texts[name][part]]}
        for part in (slice(0, 3), slice(3, 5))
        for name in names
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    again = find_captions(FLICKR, tmp_path)
    assert again is not None and again.captions == lists.captions and again.notes == lists.notes


def test_tar_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "wds_flickr30k" / "test"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as archive:
        for label in range(3):
            for suffix, data in (("webp", encoded(label)), ("txt", "\n".join(CAPTIONS[label]).encode())):
                member = tarfile.TarInfo(f"s{label:07d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    found = find_captions(FLICKR, tmp_path)
    assert found is not None
    assert [list(captions) for captions in found.captions] == CAPTIONS
    assert int(found.pictures.read(2)[-1, 0, 0]) == red(2)


def test_what_is_wrong_is_one_sentence(tmp_path: Path) -> None:
    flickr(tmp_path, "albef")
    table = tmp_path / "flickr30k" / "flickr30k_test.json"
    table.write_text("[")
    with pytest.raises(TriviumError, match=r"flickr30k_test\.json \(entry 0\) is no JSON"):
        find_captions(FLICKR, tmp_path)
    table.write_text(json.dumps([{"image": "elsewhere/9.jpg", "caption": ["a"]}]))
    with pytest.raises(TriviumError, match=r"names elsewhere/9.jpg, which is not below"):
        find_captions(FLICKR, tmp_path)
    table.write_text("[]")
    with pytest.raises(TriviumError, match="holds no picture of the test split"):
        find_captions(FLICKR, tmp_path)
    table.write_text(json.dumps([{"image": "1000.jpg", "caption": []}]))
    with pytest.raises(TriviumError, match=r'flickr30k_test\.json \(entry 0\): its "caption" is an empty list'):
        find_captions(FLICKR, tmp_path)


@pytest.mark.parametrize("form", ["karpathy", "albef", "flat"])
@pytest.mark.parametrize("layout", [FLICKR, COCO], ids=["flickr30k", "coco"])
def test_a_list_that_is_damaged_is_said(layout, form: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (flickr if layout is FLICKR else coco)(tmp_path, form)
    [table] = [path for path in (tmp_path / layout.folders[0]).iterdir() if path.is_file()]
    half = table.read_bytes()[: table.stat().st_size // 2] if table.suffix == ".json" else b""  # lines have no end mark
    wrong = [b"", half, b"[1]", b"{}", b'{"images": [{}]}', b'[{"image": 3, "caption": [1]}]', b"\xff"]
    for damaged in wrong:
        table.write_bytes(damaged)
        with pytest.raises(TriviumError, match=table.name):
            find_captions(layout, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"caption": None}, r'coco_test\.json \(entry 1\): it has no "caption"'),
        ({"caption": ["a dog", 3]}, r'\(entry 1\): its "caption" is neither a text nor a list of texts'),
        ({"caption": ["a dog", " \t"]}, r'coco_test\.json \(entry 1\): its "caption" is blank \(text 2 of 2\)'),
        ({"caption": "  "}, r'coco_test\.json \(entry 1\): its "caption" is blank \(text 1 of 1\)'),
        ({"image": 7}, r'\(entry 1\): its "image" holds no text'),
    ],
)
def test_an_entry_of_albefs_list_that_is_wrong_is_named(change: dict[str, object], says: str, tmp_path: Path) -> None:
    coco(tmp_path, "albef")
    table = tmp_path / "coco" / "coco_test.json"
    entries = json.loads(table.read_text())
    table.write_text(json.dumps([entries[0], {**entries[1], **change}]))
    with pytest.raises(TriviumError, match=says):
        find_captions(COCO, tmp_path)
    table.write_text(json.dumps([{**entries[0], "caption": "one alone"}]))
    found = find_captions(COCO, tmp_path)
    assert found is not None and found.captions == (("one alone",),)


def test_a_blank_caption_of_a_flat_list_is_named(tmp_path: Path) -> None:
    flickr(tmp_path, "flat")
    table = tmp_path / "flickr30k" / "flickr30k_test_karpathy.txt"
    lines = table.read_text().splitlines()
    for blank in ("", ' "" '):
        lines[2] = f"1000.jpg,{blank}"
        table.write_text("\n".join(lines) + "\n")
        with pytest.raises(TriviumError, match=r"karpathy\.txt \(line 3\): the caption after its comma is blank"):
            find_captions(FLICKR, tmp_path)
    coco(tmp_path, "flat")
    table = tmp_path / "coco" / "coco_test_karpathy.json"
    content = json.loads(table.read_text())
    content["annotations"][4]["caption"] = " "
    table.write_text(json.dumps(content))
    with pytest.raises(TriviumError, match=r'karpathy\.json \(annotation 4\): its "caption" is blank'):
        find_captions(COCO, tmp_path)


def test_a_picture_of_karpathys_list_that_is_wrong_is_named(tmp_path: Path) -> None:
    flickr(tmp_path, "karpathy")
    table = tmp_path / "flickr30k" / "dataset_flickr30k.json"
    content = json.loads(table.read_text())
    del content["images"][2]["sentences"][1]["raw"]
    table.write_text(json.dumps(content))
    with pytest.raises(TriviumError, match=r'dataset_flickr30k\.json \(image 2\): it has no "raw"'):
        find_captions(FLICKR, tmp_path)
