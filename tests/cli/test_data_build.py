"""`trivium data build`: what it prints, and that a run trains on what it built."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.data import pmd_files
from tests.data.pmd_files import write_json, write_lines
from tests.recipes.shop import THINGS, drawing, flags, lines_of, trivium
from trivium.data.pmd import SUBSETS
from trivium.data.sources import open_source


def test_two_steps_on_what_was_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train2014").mkdir()
    images, annotations = [], []
    for number, (colour, shape) in enumerate(THINGS, start=1):
        name = f"COCO_train2014_{number:012d}"
        images.append(
            {"id": number, "file_name": f"{name}.jpg", "coco_url": f"http://images.cocodataset.org/{name}.jpg"}
        )
        annotations += [
            {"id": 2 * number, "image_id": number, "caption": f"a {colour} {shape}"},
            {"id": 2 * number + 1, "image_id": number, "caption": f"one {shape} on white"},
        ]
        if number > 1:
            drawing(colour, shape).save(tmp_path / "train2014" / f"{name}.jpg")
        (tmp_path / "train" / f"n0144076{number % 4}").mkdir(parents=True, exist_ok=True)
        drawing(colour, shape).save(tmp_path / "train" / f"n0144076{number % 4}" / f"{number}.JPEG")
    coco = write_json(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    out, one = tmp_path / "pmd", ["--workers", 1]
    assert trivium("data", "build", "pmd", "coco", coco, "--out", out, *one) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "COCO 48 0.9 M" in printed
    assert "48 pairs of 48 entries" in printed
    assert "no picture is held out: --held-out dataset_coco.json" in printed
    assert (
        f"24 pictures are to be downloaded (pip install img2dataset): img2dataset --url_list {out}/coco/urls" in printed
    )
    pictures = ["--pictures", tmp_path / "train2014"]
    assert trivium("data", "build", "pmd", "coco", coco, "--out", out, *pictures, *one, "--samples-per-shard", 20) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "46 pairs in 3 shards; 0 pictures are unusable" in printed
    assert f"missing pictures: 2, listed in {out}/coco/missing.jsonl" in printed

    assert trivium("data", "build", "imagenet", tmp_path / "train", "--out", tmp_path / "imagenet", *one) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("24 pictures (published: 1,281,167) of 4 classes (1,000) in 1 shards")
    source = open_source("images", [tmp_path / "imagenet" / "*.tar"])
    assert [source.read(row, row)["label"] for row in range(24)] == [row // 6 for row in range(24)]

    sentences = [json.dumps({"text": f"the {shape} is {colour} and lies on white"}) for colour, shape in THINGS]
    news = write_lines(tmp_path / "news.jsonl", sentences)
    text = tmp_path / "text.parquet"
    assert trivium("data", "build", "text", news, "--out", text, "--max-length", 32) == 0
    assert f"24 documents, 192 words, in 8 sequences in {text}" in capsys.readouterr().out

    run = tmp_path / "run"
    words = [
        "--data.pairs",
        f"{out}/coco/shards/*.tar",
        "--data.images",
        f"{tmp_path}/imagenet/*.tar",
        "--data.text",
        text,
    ]
    lengths = flags(train__steps=6, data__max_length=32, data__vocabulary="bert")
    assert trivium("pretrain", "flava", *words, *lengths, "--out", run) == 0
    lines = [line for line in lines_of(run / "metrics.jsonl") if "stream" in line]
    assert [line["stream"] for line in lines] == ["pairs", "images", "text"] * 2
    assert {name for line in lines for name in line["losses"]} >= {"mim", "mlm", "itm", "contrastive"}
    assert not (run / "skipped.jsonl").exists() or not (run / "skipped.jsonl").read_text()


def test_every_subset_from_the_files_of_its_owners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wit = "language\tpage_url\timage_url\tcaption_reference_description"
    yfcc = {"photoid": 6, "downloadurl": "http://a/6.jpg", "title": "x", "description": "A dog runs here"}
    sbu = {"image_urls": ["http://a/5.jpg"], "captions": ["a dog in the sun"], "user_ids": ["1"]}
    files = {
        "coco": [pmd_files.coco_captions(tmp_path / "captions_train2014.json")],
        "sbu": [write_json(tmp_path / "sbu-captions-all.json", sbu)],
        "localized-narratives": [pmd_files.localized_narratives(tmp_path / "coco_train_captions.jsonl")],
        "cc3m": [write_lines(tmp_path / "Train_GCC-training.tsv", ['a "big dog\thttp://a/1.jpg'])],
        "visual-genome": pmd_files.visual_genome(tmp_path),
        "wit": [write_lines(tmp_path / "wit_v1.train.tsv", [wit, "en\tp\thttps://a/7.jpg\tThe Scream"])],
        "cc12m": [write_lines(tmp_path / "cc12m.tsv", ["http://a/1.jpg\ta cat"])],
        "redcaps": [pmd_files.redcaps(tmp_path / "airplants_2019.json")],
        "yfcc": [write_lines(tmp_path / "yfcc.jsonl", [json.dumps(yfcc)])],
    }
    assert list(files) == list(SUBSETS)
    for subset, official in files.items():
        assert trivium("data", "build", "pmd", subset, *official, "--out", tmp_path / "pmd", "--workers", 1) == 0
    printed = capsys.readouterr().out.splitlines()
    titles = ("Total", *(subset.title for subset in SUBSETS.values()))
    table = [" ".join(line.split()) for line in printed if line.strip().startswith(titles)]
    assert "Visual Genome 3 5.4 M 0.0 % 3 2.7 5.1 -" in table
    assert table[-1].startswith("Total 18 70.0 M")
    facts = json.loads((tmp_path / "pmd" / "pmd.json").read_text())
    assert [each["left_out"] for each in facts["subsets"].values()] == [0] * 9
    for subset, official in files.items():
        given = facts["subsets"][subset]["given"]["annotations"]
        assert {name: each["sha256"] for name, each in given.items()} == {
            name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in official
        }


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*words: object) -> str:
        assert trivium("data", "build", *words) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "did you mean coco?" in complaint("pmd", "cocos", "a.json", "--out", tmp_path / "o")
    assert "there is no verb data build pmm: did you mean data build pmd?" in complaint("pmm")
    (tmp_path / "train" / "cats").mkdir(parents=True)
    drawing("red", "bar").save(tmp_path / "train" / "cats" / "1.png")
    assert "cats is no class of ImageNet" in complaint("imagenet", tmp_path / "train", "--out", tmp_path / "o")
    assert "nowhere is no folder" in complaint("imagenet", tmp_path / "nowhere", "--out", tmp_path / "o")
    text = write_lines(tmp_path / "a.txt", ["a"])
    assert "name a file that ends in .parquet" in complaint("text", text, "--out", tmp_path / "a.csv")
    assert not (tmp_path / "o").exists()
