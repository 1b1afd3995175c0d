"""What is said of the data as a run begins: once each, and with the place where it is."""

from __future__ import annotations

import csv
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_remote import Served, served
from tests.recipes import test_clip, test_flava
from tests.recipes.shop import LOSSES, drawing, flags
from tests.recipes.shop import trivium as command
from trivium.data import embedded
from trivium.data.files import TEXT_LIMIT, TextLines
from trivium.data.tokenizer import Tokenizer
from trivium.recipes import notices
from trivium.recipes.data import Data, Sources, open_sources
from trivium.recipes.flava import flava
from trivium.recipes.notices import cut_captions, noticed

__all__ = ["served"]  # a fixture


def sources_of(**paths: Path) -> Sources:
    return open_sources(Data(**{name: (str(path),) for name, path in paths.items()}))


def test_what_is_cut_or_left_out_is_said_once_each(tmp_path: Path, shop: Path) -> None:
    (tmp_path / "lines.txt").write_text("short\n" + "word " * 200 + "\nshort too\n" + "x" * (TEXT_LIMIT + 1) + "\n")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        picture = str(shop / "pictures" / "red-circle.png")
        csv.writer(file).writerows([("image", "caption"), *[(picture, "y" * (TEXT_LIMIT + 1))] * 2, (picture, "z")])
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(shop / "pictures" / "red-circle.png", "a.png")
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    sentences = noticed(sources_of(pairs=tmp_path / "a.csv", text=tmp_path / "lines.txt", images=tmp_path / "s.tar"))
    limit = "longer than 65,536 characters and read only up to there"
    assert sentences[:3] == [
        f"data.pairs: 2 texts are {limit}",
        f"{tmp_path / 'lines.txt'}: 1 long line is cut into windows, each a sample",
        f"data.text: 1 text is {limit}",
    ]
    assert [str(tmp_path / "s.tar") in sentence for sentence in sentences[3:]] == [True]


def test_a_table_that_is_slow_to_shuffle_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": [b"a picture"] * 4, "caption": ["a mug"] * 4})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert noticed(sources_of(pairs=tmp_path / "a.parquet")) == []
    monkeypatch.setattr("trivium.data.parquet.CACHE_BYTES", 10)
    [sentence] = noticed(sources_of(pairs=tmp_path / "a.parquet"))
    assert sentence.startswith(f"{tmp_path}/a.parquet: training mixes 2 row groups")


def test_nothing_is_said_where_nothing_is_cut(shop: Path) -> None:
    assert noticed(sources_of(pairs=shop / "goods.csv", images=shop / "pictures", text=shop / "lines.txt")) == []
    assert noticed(open_sources(Data())) == []


def test_a_long_caption_that_is_no_text_does_not_stop_the_notices(tmp_path: Path) -> None:
    for name, caption in (("a", b"fine"), ("b", b"\xff" * (TEXT_LIMIT + 1))):
        drawing("red", "bar").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(caption)
    assert noticed(sources_of(pairs=tmp_path)) == []


def test_captions_that_are_cut_are_counted_and_the_first_is_named(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "long.csv"
    lines = [f"pictures/red-bar.png,{'red ' * (n + 1)}" for n in range(10)]  # n + 1 words and [CLS], with [SEP]
    table.write_text("image,caption\n" + "\n".join([*lines, "pictures/red-bar.png,"]) + "\n")
    pairs = sources_of(pairs=table).pairs
    tokenizer = Tokenizer.wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"])
    assert cut_captions("train", pairs, tokenizer, 12) == []
    assert cut_captions("train", pairs, tokenizer, 9) == [
        f"train: 3 captions have more than 9 tokens and are cut there; the first: {table} (line 9)"
    ]
    [said] = cut_captions("train", pairs, tokenizer.for_captions(), 10)  # which has no [SEP]
    assert said.startswith("train: 1 captions have more than 10 tokens") and "(line 11)" in said
    monkeypatch.setattr(notices, "ROWS_LOOKED_AT", 6)
    [said] = cut_captions("train", pairs, tokenizer, 9)
    assert said.startswith("train: of 6 rows that were looked at, 11 in all, 2 captions have more than 9 tokens")
    assert cut_captions("train", None, tokenizer, 9) == []


def test_notices_stand_at_the_start_of_a_run(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "long.txt").write_text("a circle is round " * 100 + "\n")
    run = ["--data.text", tmp_path / "long.txt", *flags(train__steps=1), "--out", tmp_path / "run"]
    assert command("pretrain", "flava", *run) == 0
    assert capsys.readouterr().err.count("long.txt: 1 long line is cut into windows, each a sample\n") == 1


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_windows_of_a_long_line_are_read_to_their_end(tmp_path: Path, size: str) -> None:
    """A sixth of the windows may be cut, and 3 % of the tokens lost; no word is left out, none comes twice."""
    glosses = embedded.text("train")
    words = " ".join(glosses.read(row, row)["text"] for row in range(0, len(glosses), 40)).split()
    (tmp_path / "long.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    data = replace(flava(size).data, text=(str(tmp_path / "long.txt"),))
    source = open_sources(data).text
    assert isinstance(source, TextLines) and source.long_lines == 1
    windows = [source.read(row, row)["text"] for row in range(len(source))]
    assert " ".join(windows).split() == words
    tokenizer = Tokenizer.wordpiece(embedded.bert_vocabulary())
    lengths = [len(ids) for ids in tokenizer.encode(windows, TEXT_LIMIT)]
    assert sum(length > data.length_alone for length in lengths) < len(windows) / 6
    assert sum(max(0, length - data.length_alone) for length in lengths) < 0.03 * sum(lengths)
    assert sum(lengths) > 0.6 * data.length_alone * len(windows), "and the windows are not much shorter than that"


def test_flava_says_what_is_cut_once_for_each_source(shop: Path) -> None:
    def said(**changes: object) -> list[str]:
        recipe = test_flava.recipe_on(shop, **changes)  # with texts of a table, since those of lines come in windows
        recipe = replace(recipe, data=replace(recipe.data, text=(str(shop / "goods.csv"),)))
        notes = recipe.prepare("flava", {}).notes
        return [note for note in notes if "tokens and are cut there" in note]

    assert said() == []
    pairs, text, validation = said(data__max_length=4)
    assert pairs.startswith("data.pairs: 36 captions have more than 4 tokens and are cut there; the first: ")
    assert "goods.csv (line 2)" in pairs and validation.startswith("data.validation: 36 captions have more than 4")
    assert text.startswith("data.text: 12 texts have more than 4 tokens") and "goods.csv (line 2)" in text
    assert len(said(data__max_length=4, data__text_length=12)) == 2, "texts alone are not cut there"
    without = {f"objectives__{loss}": 0 for loss in LOSSES if loss != "mlm"}
    by_words = said(data__max_length=4, **without)
    assert [note.partition(":")[0] for note in by_words] == ["data.text", "data.validation"], "no pair is read"


def test_clip_says_what_is_cut(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*test_clip.data_of(shop), *test_clip.flags(data__max_length=4, train__steps=1)]
    assert command("pretrain", "clip", "--out", tmp_path / "run", *words) == 0
    told = capsys.readouterr().err
    assert told.count("data.pairs: 12 captions have more than 4 tokens and are cut there; the first: ") == 1
    assert told.count("data.validation: 24 captions have more than 4 tokens and are cut there") == 1


def test_pairs_at_an_address_are_said_to_be_uncounted_and_are_not_read(served: Served, shop: Path) -> None:
    tokenizer = Tokenizer.wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"])
    address = served.address("shard-{000..003}.tar")
    alone = open_sources(Data(pairs=(address,))).pairs
    beside = open_sources(Data(pairs=(address, str(shop / "goods.csv")))).pairs
    asked = len(served.requests)
    [said] = cut_captions("data.pairs", alone, tokenizer, 4)
    assert said == (
        "data.pairs: captions of more than 4 tokens are cut there, and 48 rows at an address were not looked at"
        " (trivium data doctor looks at them)"
    )
    counted, other = cut_captions("data.pairs", beside, tokenizer, 4)
    assert counted.startswith("data.pairs: of 12 rows that were looked at, 60 in all, 12 captions have more than 4")
    assert other == said
    assert not any(how.startswith("GET") for _, how, _ in served.requests[asked:])
