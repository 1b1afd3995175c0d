"""`trivium embed` and `trivium search` from end to end, on a real model folder and real files."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.dino_batches import random_dino
from trivium.cli import main
from trivium.cli.search import show
from trivium.data.tokenizer import BERT_SPECIALS, Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.load import Bundle, load
from trivium.models.bert import Bert, BertConfig
from trivium.models.unit import Unit, UnitConfig, UnitTask
from trivium.search import embedding
from trivium.search.page import Hit
from trivium.search.table import Table, fingerprint


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_embed_agrees_with_the_model(model: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.parquet"
    code, said, _ = run(capsys, "embed", model, pictures, "--out", out)
    assert code == 0
    assert "9 embeddings" in said
    table = pq.read_table(out)
    assert table.column_names == ["file", "sha256", "embedding", "error"]
    assert str(table.schema.field("embedding").type).startswith("fixed_size_list<")
    files = table["file"].to_pylist()
    assert files == sorted(files)
    assert "below/1.jpg" in files
    bundle = load(model)
    expected = bundle.encode_image([pictures / file for file in files]).projected.numpy()
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected, atol=1e-6)


def test_a_second_run_computes_only_what_is_new_or_changed(model, pictures, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "x.parquet"
    run(capsys, "embed", model, pictures, "--out", out)
    first = {row.file: row for row in Table.read(out).rows}
    (pictures / "0.png").write_bytes((pictures / "below" / "3.png").read_bytes())
    Image.new("RGB", (9, 9), "red").save(pictures / "new.png")
    (pictures / "2.webp").unlink()

    encoded = []
    plain = Bundle.encode_image

    def counting(self, pixels, batch=32):
        encoded.append(len(pixels))
        return plain(self, pixels, batch)

    monkeypatch.setattr(Bundle, "encode_image", counting)
    assert run(capsys, "embed", model, pictures, "--out", out)[0] == 0
    assert encoded == [2]
    second = {row.file: row for row in Table.read(out).rows}
    assert set(second) == set(first) - {"2.webp"} | {"new.png"}
    np.testing.assert_array_equal(second["4.jpg"].embedding, first["4.jpg"].embedding)
    np.testing.assert_allclose(second["0.png"].embedding, first["below/3.png"].embedding, atol=1e-6)


def test_bad_files_are_named_and_are_not_fatal(model: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.parquet"
    (pictures / "empty.png").touch()
    whole = (pictures / "0.png").read_bytes()
    (pictures / "half.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "words.jpg").write_text("no picture at all")
    code, said, err = run(capsys, "embed", model, pictures, "--out", out)
    assert code == 0
    assert "9 embeddings" in said
    assert "3 could not be read" in said
    for name in ("empty.png", "half.png", "words.jpg"):
        assert name in err
    rows = {row.file: row for row in Table.read(out).rows}
    assert rows["half.png"].embedding is None
    assert rows["half.png"].error
    assert rows["0.png"].error is None
    # Null rows stand between the others: reading them back must not shift the vectors.
    expected = load(model).encode_image([pictures / "below" / "7.jpg"]).projected[0].numpy()
    np.testing.assert_allclose(rows["below/7.jpg"].embedding, expected, atol=1e-6)


def test_a_name_that_is_not_utf8_is_a_bad_file_and_costs_no_other(model, pictures, tmp_path, capsys) -> None:
    out, page = tmp_path / "x.parquet", tmp_path / "page.html"
    odd = pictures / os.fsdecode(b"caf\xe9.png")
    shutil.copy(pictures / "0.png", odd)
    said = r"caf\udce9.png: its name is not UTF-8: rename it"
    code, out_said, err = run(capsys, "embed", model, pictures, "--out", out)
    assert code == 0 and said in err
    assert "9 embeddings" in out_said and "1 could not be read" in out_said
    assert [row.file for row in Table.read(out).rows if row.error] == [r"caf\udce9.png"]
    code, found, err = run(capsys, "search", model, "--picture", odd, "--images", pictures, "--out", page)
    assert code == 0 and said in err
    assert len(found.splitlines()) == 9 and r"<title>caf\udce9.png" in page.read_text(encoding="utf-8")
    lines = tmp_path / os.fsdecode(b"th\xe9.txt")
    lines.write_text("a cup of tea")
    assert run(capsys, "embed", model, lines, "--text", "--out", tmp_path / "t.parquet")[0] == 0
    assert [row.file for row in Table.read(tmp_path / "t.parquet").rows] == [r"th\udce9.txt:1"]


def test_an_interruption_keeps_what_was_done(model, pictures, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "x.parquet"
    monkeypatch.setattr(embedding, "BATCH", 4)
    plain = Bundle.encode_image
    calls = []

    def interrupted(self, pixels, batch=32):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, pixels, batch)

    monkeypatch.setattr(Bundle, "encode_image", interrupted)
    code, _, err = run(capsys, "embed", model, pictures, "--out", out)
    assert code == 130
    assert err.splitlines() == ["trivium: interrupted"]
    assert len(Table.read(out).rows) == 4
    assert run(capsys, "embed", model, pictures, "--out", out)[0] == 0
    assert calls == [4, 4, 4, 1]
    assert len(Table.read(out).rows) == 9


def test_lines_of_a_text_file(model: Path, tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "texts.txt", tmp_path / "x.parquet"
    path.write_bytes(b"a red mug\n\nthe green tree\n\xff\xfe\nnine yellow birds")
    code, said, err = run(capsys, "embed", model, path, "--text", "--out", out)
    assert code == 0
    assert "3 embeddings" in said
    assert "texts.txt:2: the line is empty" in err
    assert "texts.txt:4: not UTF-8" in err
    code, said, _ = run(capsys, "search", model, "the green tree", "--images", out, "-k", "1")
    assert code == 0
    rank, score, _, file = said.rstrip("\n").split("\t")
    assert (rank, file) == ("1", "texts.txt:3")
    assert float(score) == pytest.approx(1.0, abs=1e-4)


def test_texts_that_are_cut_or_not_read_at_all_are_told(model: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    bundle = load(model)
    bundle.tokenizer = bundle.tokenizer.for_captions()  # leaves out marks, as ALBEF's does
    bundle.save(tmp_path / "model")
    code, said, err = run(capsys, "search", tmp_path / "model", "!!! ???", "--images", pictures)
    assert (code, said) == (2, "")
    assert 'the text to look for "!!! ???" holds nothing that this model reads' in err
    code, said, err = run(capsys, "search", tmp_path / "model", "mug " * 2000, "--images", pictures, "-k", 1)
    assert code == 0 and len(said.splitlines()) == 1
    assert err.startswith("trivium: note: the text to look for is longer than the 16 tokens that this model reads")

    path, out = tmp_path / "texts.txt", tmp_path / "x.parquet"
    path.write_text(f"a red mug\n{'mug ' * 20}\n?!\na{' ' * 65_536}mug\n")
    for _ in ("made", "brought up to date"):
        code, said, err = run(capsys, "embed", tmp_path / "model", path, "--text", "--out", out)
        assert code == 0 and "3 embeddings" in said
        assert err.splitlines() == [
            "trivium: note: 2 lines are longer than the 16 tokens, or 65,536 characters, that this model reads, and are"
            " cut there; the first: texts.txt:2",
            "  texts.txt:3: the line holds only marks that this model leaves out",
        ]


def test_search_by_picture_finds_itself_and_its_copy(model: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    (pictures / "copy.png").write_bytes((pictures / "below" / "3.png").read_bytes())
    out = tmp_path / "page.html"
    query = pictures / "below" / "3.png"
    code, said, _ = run(capsys, "search", model, "--picture", query, "--images", pictures, "-k", "3", "--out", out)
    assert code == 0
    lines = [line.split("\t") for line in said.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert [line[3] for line in lines[:2]] == ["below/3.png", "copy.png"]
    page = out.read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 4  # the query and three hits
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_search_by_text_is_the_exact_order_and_the_same_from_a_table(model, pictures, tmp_path, capsys) -> None:
    out = tmp_path / "x.parquet"
    run(capsys, "embed", model, pictures, "--out", out)
    from_table = run(capsys, "search", model, "a red mug", "--images", out, "-k", "99")
    from_folder = run(capsys, "search", model, "a red mug", "--images", pictures, "-k", "99")
    assert from_table[:2] == from_folder[:2]
    bundle = load(model)
    files = embedding.find_pictures(pictures)
    scores = bundle.encode_image([pictures / f for f in files]).projected @ bundle.encode_text("a red mug").projected[0]
    expected = sorted(zip((-scores).tolist(), files, strict=True))
    assert [line.split("\t")[3] for line in from_table[1].splitlines()] == [file for _, file in expected]


def test_rerank_orders_the_first_by_the_matching_head(model: Path, pictures: Path, capsys) -> None:
    plain = run(capsys, "search", model, "a red mug", "--images", pictures, "-k", "9")[1].splitlines()
    code, said, _ = run(capsys, "search", model, "a red mug", "--images", pictures, "-k", "9", "--rerank", "5")
    assert code == 0
    lines = [line.split("\t") for line in said.splitlines()]
    files = [line[3] for line in lines]
    before = [line.split("\t")[3] for line in plain]
    assert sorted(files[:5]) == sorted(before[:5])
    assert files[5:] == before[5:]
    match = load(model).match([pictures / file for file in files[:5]], "a red mug").tolist()
    assert match == sorted(match, reverse=True)
    assert [float(line[2]) for line in lines[:5]] == pytest.approx(match, abs=1e-4)


def test_a_page_shows_any_query_and_file_name_as_text(model: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "page.html"
    name = "<b>&'.png"
    (pictures / "0.png").rename(pictures / name)
    query = "<script>alert(1)</script>"
    assert run(capsys, "search", model, query, "--images", pictures, "--out", out)[0] == 0
    page = out.read_text(encoding="utf-8")
    assert query not in page
    assert html.escape(query) in page
    assert "<b>&" not in page


def test_a_terminal_shows_a_file_name_letter_by_letter(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["mug [final].jpg", "x[/y].png", ":cat:.png"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show([Hit(rank, name, 0.5) for rank, name in enumerate(names, start=1)])
    said = capsys.readouterr().out
    assert [name for name in names if name in said] == names


def test_thumbnails_are_at_most_256_pixels(tmp_path: Path) -> None:
    import base64
    import io

    from trivium.search.page import thumbnail

    Image.new("RGB", (1000, 500), "blue").save(tmp_path / "wide.png")
    uri = thumbnail(tmp_path / "wide.png")
    assert uri is not None
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (256, 128)
    assert thumbnail(tmp_path / "gone.png") is None


MISTAKES = {
    "no such folder": (["embed", "MODEL", "TMP/none", "--out", "TMP/x.parquet"], "none"),
    "empty folder": (["embed", "MODEL", "TMP/empty", "--out", "TMP/x.parquet"], "holds no picture"),
    "a file for a folder": (["embed", "MODEL", "TMP/a.txt", "--out", "TMP/x.parquet"], "a.txt is a file"),
    "no such model": (["embed", "TMP/gone", "PICTURES", "--out", "TMP/x.parquet"], "gone does not exist"),
    "no folder to write into": (["embed", "MODEL", "PICTURES", "--out", "TMP/no/x.parquet"], "there is no folder"),
    "a folder to write to": (["embed", "MODEL", "PICTURES", "--out", "TMP/empty"], "empty is a folder"),
    "nothing readable": (["embed", "MODEL", "TMP/bad", "--out", "TMP/x.parquet"], "not one of 1 could be read"),
    "no such text": (["embed", "MODEL", "TMP/none.txt", "--text", "--out", "TMP/x.parquet"], "no such text file"),
    "two queries": (["search", "MODEL", "mug", "--picture", "TMP/a.png", "--images", "PICTURES"], "give one query"),
    "no query": (["search", "MODEL", "--images", "PICTURES"], "give one query"),
    "an empty query": (["search", "MODEL", " ", "--images", "PICTURES"], "is empty"),
    "no such picture": (["search", "MODEL", "--picture", "TMP/none.png", "--images", "PICTURES"], "none.png"),
    "not a picture": (["search", "MODEL", "--picture", "TMP/a.txt", "--images", "PICTURES"], "a.txt"),
    "no such table": (["search", "MODEL", "mug", "--images", "TMP/none.parquet"], "none.parquet"),
    "not a table": (["search", "MODEL", "mug", "--images", "TMP/bad.parquet"], "not a table of embeddings"),
    "no multiple": (["embed", "MODEL", "PICTURES", "--out", "TMP/x.parquet", "--image-size", "50"], "--image-size 48"),
    "no size": (["search", "MODEL", "mug", "--images", "PICTURES", "--image-size", "-8"], "--image-size -8: this must"),
    "a size of words": (
        ["embed", "MODEL", "TMP/a.txt", "--text", "--out", "TMP/x.parquet", "--image-size", "48"],
        "leave it out",
    ),
    "k of zero": (["search", "MODEL", "mug", "--images", "PICTURES", "-k", "0"], "counts from 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(mistake, model, pictures, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "bad.parquet").write_text("words")
    before = sorted(tmp_path.rglob("*"))
    words, expected = MISTAKES[mistake]
    places = {"MODEL": str(model), "PICTURES": str(pictures), "TMP": str(tmp_path)}
    words = [re.sub(r"^(MODEL|PICTURES|TMP)", lambda found: places[found[1]], word) for word in words]
    code, said, err = run(capsys, *words)
    assert code == 2
    assert said == ""
    sentences = [line for line in err.splitlines() if not line.startswith("  ")]  # indented: the files that failed
    assert len(sentences) == 1
    assert sentences[0].startswith("trivium: ")
    assert expected in sentences[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_tables_of_two_models_do_not_mix(model, other_model, pictures, tmp_path, capsys) -> None:
    out = tmp_path / "x.parquet"
    run(capsys, "embed", model, pictures, "--out", out)
    content = out.read_bytes()
    for words in (["embed", other_model, pictures, "--out", out], ["search", other_model, "mug", "--images", out]):
        code, _, err = run(capsys, *words)
        assert code == 2
        assert "another model" in err
    assert out.read_bytes() == content


def test_pictures_are_seen_at_another_size_where_asked(model: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    own, large = tmp_path / "own.parquet", tmp_path / "large.parquet"
    assert run(capsys, "embed", model, pictures, "--out", own, "--image-size", 32)[0] == 0
    assert run(capsys, "embed", model, pictures, "--out", large, "--image-size", 48)[0] == 0
    bundle = load(model)
    assert Table.read(own).model == fingerprint(bundle)
    bundle.transform = bundle.transform.at(48)
    assert Table.read(large).model == fingerprint(bundle)
    names, vectors = Table.read(large).found()
    alone = bundle.encode_image([pictures / name for name in names]).projected.numpy()
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    assert float(np.abs(vectors - Table.read(own).found()[1]).max()) > 0.01

    asked = ("search", model, "--picture", pictures / "0.png", "-k", 1, "--image-size", 48, "--images")
    for images in (pictures, large):
        assert run(capsys, *asked, images)[1].split() == ["1", "1.0000", "0.png"]
    for words in (["embed", model, pictures, "--out", large], [*asked, own]):
        code, said, err = run(capsys, *words)
        assert (code, said) == (2, "") and "or another size of pictures" in err


def test_a_table_of_another_folder_stays_and_one_that_moved_is_used(
    model, pictures, tmp_path, capsys, monkeypatch
) -> None:
    out, moved, other = tmp_path / "x.parquet", tmp_path / "moved", tmp_path / "other"
    lines, more = pictures / "lines.txt", tmp_path / "more.txt"
    lines.write_text("a red mug")
    more.write_text("a blue cup")
    other.mkdir()
    shutil.copy(pictures / "0.png", other / "b.png")
    run(capsys, "embed", model, pictures, "--out", out)
    content = out.read_bytes()
    for words in ([other], [lines, "--text"]):
        code, said, err = run(capsys, "embed", model, *words, "--out", out)
        assert (code, said) == (2, "")
        assert f"x.parquet holds the embeddings of {pictures}, not of {words[0]}: name a new file" in err
    pictures.rename(moved)
    assert run(capsys, "embed", model, other, "--out", out)[0] == 2
    assert out.read_bytes() == content
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "encode_image", None)  # nothing is computed again
        assert run(capsys, "embed", model, moved, "--out", out)[0] == 0
    assert Table.read(out).folder == str(moved) and len(Table.read(out).rows) == 9

    texts, lines = tmp_path / "t.parquet", moved / "lines.txt"
    run(capsys, "embed", model, lines, "--text", "--out", texts)
    code, _, err = run(capsys, "embed", model, more, "--text", "--out", texts)
    assert code == 2 and f"holds the embeddings of {lines}, not of {more}" in err
    lines.rename(tmp_path / "lines.txt")
    assert run(capsys, "embed", model, tmp_path / "lines.txt", "--text", "--out", texts)[0] == 0
    assert Table.read(texts).folder == str(tmp_path / "lines.txt")


def test_what_no_tensor_holds_makes_another_model(model: Path) -> None:
    bundle, same = load(model), load(model)
    assert fingerprint(bundle) == fingerprint(same)
    same.model.config = replace(bundle.model.config, num_heads=2)
    assert fingerprint(bundle) != fingerprint(same)
    same.model.config = bundle.model.config
    same.tokenizer = Tokenizer.train(["a violet kettle"] * 3, 120)
    assert fingerprint(bundle) != fingerprint(same)


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_model_folder_is_refused_by_name(damage, model, pictures, tmp_path, capsys) -> None:
    copy, out = tmp_path / "copy", tmp_path / "x.parquet"
    shutil.copytree(model, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 4
    (copy / "model.safetensors").write_bytes(weights if damage == "bit" else weights[:-1000])
    code, _, err = run(capsys, "embed", copy, pictures, "--out", out)
    assert code == 2
    assert "model.safetensors" in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_a_full_disk_leaves_the_old_table(model: Path, pictures: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.parquet"
    run(capsys, "embed", model, pictures, "--out", out)
    content = out.read_bytes()
    for number in range(40):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(pictures / f"new{number}.png")
    # A limit on file size stands for the full disk: the write fails midway in the same manner.
    limited = (
        "import resource, sys\n"
        "from trivium.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(content)},) * 2)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["embed", str(model), str(pictures), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", limited, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"trivium: {out}: the disk is full")
    assert len(done.stderr.splitlines()) == 1
    assert out.read_bytes() == content
    assert not list(tmp_path.glob(".*"))


def test_models_without_a_shared_space_are_used_by_what_they_pool(pictures: Path, tmp_path: Path, capsys) -> None:
    sees = Bundle("dino", random_dino(seed=1, dtype=torch.float32).eval(), None, ImageTransform(32))
    sees.save(tmp_path / "dino")
    table = tmp_path / "x.parquet"
    assert run(capsys, "embed", tmp_path / "dino", pictures, "--out", table)[0] == 0
    names, vectors = Table.read(table).found()
    pooled = sees.encode_image([pictures / name for name in names]).pooled
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(pooled, dim=1), atol=1e-5)
    code, said, _ = run(
        capsys, "search", tmp_path / "dino", "--picture", pictures / "below" / "3.png", "--images", table, "-k", 1
    )
    assert code == 0 and "below/3.png" in said and "1.000" in said
    torch.manual_seed(0)
    reads = Bundle(
        "bert", Bert(BertConfig(32, 4, 64, 2, len(BERT_SPECIALS), 16)).eval(),
        Tokenizer.wordpiece(list(BERT_SPECIALS)), ImageTransform(32), max_length=16,
    )  # fmt: skip
    reads.save(tmp_path / "bert")
    (tmp_path / "lines.txt").write_text("a red mug\nnine birds\n")
    assert (
        run(capsys, "embed", tmp_path / "bert", tmp_path / "lines.txt", "--text", "--out", tmp_path / "t.parquet")[0]
        == 0
    )
    _, vectors = Table.read(tmp_path / "t.parquet").found()
    pooled = reads.encode_text(["a red mug", "nine birds"]).pooled
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(pooled, dim=1), atol=1e-5)


def test_words_do_not_find_pictures_where_there_is_no_shared_space(
    model: Path, pictures: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load(model)
    bundle.model.text_projection = None  # as of a model that was never taught to compare
    monkeypatch.setattr("trivium.load.load", lambda *_: bundle)
    code, _, err = run(capsys, "search", model, "a red mug", "--images", pictures)
    assert code == 2 and "no space that pictures and texts share: look for a picture, with --picture" in err


def test_pictures_of_any_shape_are_embedded_each_as_it_is_alone(tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    config = UnitConfig.of_size("tiny", tasks=(UnitTask("vg", "detection", "image", 4, 0, 4),), text_layers=0)
    transform = ImageTransform(32, crop="shortest", longest=64)
    Bundle("unit", Unit(config).eval(), None, transform, labels_of={"vg": list("abcd")}).save(tmp_path / "unit")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate(((48, 32), (32, 48), (40, 40))):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    table = tmp_path / "x.parquet"
    assert run(capsys, "embed", tmp_path / "unit", folder, "--out", table)[0] == 0
    names, vectors = Table.read(table).found()
    unit = load(tmp_path / "unit")
    for name, vector in zip(names, vectors, strict=True):
        alone = unit.encode_image(folder / name).pooled[0]
        np.testing.assert_allclose(vector, torch.nn.functional.normalize(alone, dim=0), atol=1e-5)
    code, said, _ = run(capsys, "search", tmp_path / "unit", "--picture", folder / "1.png", "--images", folder, "-k", 1)
    assert code == 0 and "1.png" in said
