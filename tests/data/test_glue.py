"""GLUE's readers against miniatures of the official files, with the traps of each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trivium.data.glue import GLUE, read_glue
from trivium.errors import BadSample, TriviumError

Files = dict[str, list[str]]  # name of a file -> its lines, a tab shown as |
MNLI = "index|promptID|pairID|genre|binary1|binary2|parse1|parse2|sentence1|sentence2"
MNLI_DEV = f"{MNLI}|label1|label2|label3|label4|label5|gold_label"
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score"
QQP = "id|qid1|qid2|question1|question2|is_duplicate"
MRPC = "#1 ID|#2 ID|#1 String|#2 String"
NLI: Files = {
    "train.tsv": ["index|question|sentence|label", "0|q one|s one|entailment", "1|q two|s two|not_entailment"],
    "dev.tsv": ["index|question|sentence|label", "0|q d|s d|not_entailment"],
    "test.tsv": ["index|question|sentence", "7|q t|s t"],
}
FILES: dict[str, Files] = {
    "cola": {
        "train.tsv": ["gj04|1||A good one.", "gj04|0|*|bad a one"],
        "dev.tsv": ['gj04|0|*|He said "no', "gj04|1||It\u2028holds\x85breaks."],
        "test.tsv": ["index|sentence", "0|tested"],
    },
    "sst2": {
        "train.tsv": ["sentence|label", "fine |1", "awful |0"],
        "dev.tsv": ["sentence|label", "good |1"],
        "test.tsv": ["index|sentence", "3|so so"],
    },
    "mrpc": {
        "train.tsv": [f"\ufeffQuality|{MRPC}", '1|1|2|"A" b|c', "0|3|4|d|e"],
        "dev.tsv": [f"\ufeffQuality|{MRPC}", "1|1|2|x|y"],
        "test.tsv": [f"\ufeffindex|{MRPC}", "5|1|2|x|y"],
    },
    "stsb": {
        "train.tsv": [STSB, "0|a|b|c|d|e|f|one|two|2.500"],
        "dev.tsv": [STSB, "0|a|b|c|d|e|f|x|y|5.000"],
    },
    "qqp": {
        "train.tsv": [QQP, "1|2|3|a|b|1", "4|5|6|c|d|0", "broken|line"],
        "dev.tsv": [QQP, "1|2|3|a|b|0"],
        "test.tsv": ["id|question1|question2", "9|a|b"],
    },
    "mnli": {
        "train.tsv": [f"{MNLI}|label1|gold_label", "0|1|2|g|p|q|r|s|one|two|neutral|neutral"],
        "dev_matched.tsv": [MNLI_DEV, f"0|1|2|g|p|q|r|s|one|two{'|neutral' * 5}|contradiction"],
        "dev_mismatched.tsv": [MNLI_DEV, f"0|1|2|g|p|q|r|s|one|two{'|neutral' * 5}|entailment"],
        "test_matched.tsv": [MNLI, "31|1|2|g|p|q|r|s|one|two"],
    },
    "qnli": NLI,
    "rte": NLI,
}


@pytest.fixture
def glue(tmp_path: Path) -> Callable[[str], str]:
    def write(task: str) -> str:
        folder = tmp_path / GLUE[task].folder
        folder.mkdir()
        for name, lines in FILES[task].items():
            text = "\n".join(lines).replace("|", "\t") + "\n"
            (folder / name).write_text(text, encoding="utf-8", newline="")
        return str(tmp_path)

    return write


@pytest.mark.parametrize("task", GLUE)
def test_every_task_is_read_from_its_own_layout(task: str, glue: Callable[[str], str]) -> None:
    splits = read_glue(task, glue(task))
    assert set(splits.held_out) == {name.removesuffix(".tsv") for name in FILES[task]} - {"train"}
    first = next(splits.train.good())
    last = [list(rows.good())[-1] for name, rows in splits.held_out.items() if name.startswith("dev")]
    expected = {
        "cola": ("A good one.", None, "acceptable"), "sst2": ("fine", None, "positive"),
        "mrpc": ('"A" b', "c", "equivalent"), "stsb": ("one", "two", 2.5), "qqp": ("a", "b", "duplicate"),
        "mnli": ("one", "two", "neutral"), "qnli": ("q one", "s one", "entailment"),
        "rte": ("q one", "s one", "entailment"),
    }[task]  # fmt: skip
    label = splits.labels[first.label] if first.label is not None else first.value
    assert (first.text, first.second_text, label) == expected
    if task == "mnli":
        assert [splits.labels[row.label or 0] for row in last] == ["contradiction", "entailment"]
    if task == "stsb":
        assert (splits.scale, last[0].value) == (5.0, 5.0)
    tests = [rows for name, rows in splits.held_out.items() if name.startswith("test")]
    for rows in tests:
        row = next(rows.good())
        assert not row.is_labelled
        assert row.key.isdigit()


def test_a_quote_is_a_character_and_only_a_line_feed_ends_a_line(glue: Callable[[str], str]) -> None:
    texts = [row.text for row in read_glue("cola", glue("cola")).held_out["dev"].good()]
    assert texts == ['He said "no', "It\u2028holds\x85breaks."]


def test_a_broken_line_keeps_its_place_and_says_where_it_is(glue: Callable[[str], str]) -> None:
    rows = read_glue("qqp", glue("qqp")).train
    with pytest.raises(BadSample, match=r"train.tsv \(line 4\): it has 2 fields where the first line has 6"):
        rows.read(2, 2)


def test_an_unknown_label_is_named(glue: Callable[[str], str], tmp_path: Path) -> None:
    root = glue("rte")
    path = Path(root) / "RTE" / "dev.tsv"
    path.write_text(path.read_text().replace("not_entailment", "contradiction"))
    with pytest.raises(TriviumError, match=r'dev has no usable row; the first: .*its label "contradiction" is none of'):
        read_glue("rte", root).checked()


@pytest.mark.parametrize("score", ["high", "", "nan", "inf", "-0.1", "5.001"])
def test_a_score_that_is_none_is_a_bad_row(score: str, glue: Callable[[str], str]) -> None:
    root = glue("stsb")
    with (Path(root) / "STS-B" / "train.tsv").open("a") as file:
        file.write("1|a|b|c|d|e|f|one|two|0.000\n".replace("|", "\t"))
        file.write(f"2|a|b|c|d|e|f|one|two|{score}\n".replace("|", "\t"))
    rows = read_glue("stsb", root).train
    assert [row.value for row in rows.good()] == [2.5, 0.0]
    with pytest.raises(BadSample, match=rf'train.tsv \(line 4\): its score "{score}" is no number from 0 to 5'):
        rows.read(2, 2)


def test_the_folder_of_a_task_itself_serves_and_another_is_refused(glue: Callable[[str], str], tmp_path: Path) -> None:
    root = glue("sst2")
    assert len(read_glue("sst2", f"{root}/SST-2").train) == 2
    with pytest.raises(TriviumError, match=r"holds no CoLA/train.tsv: give the folder .*gluebenchmark.com"):
        read_glue("cola", root)


@pytest.mark.data
@pytest.mark.parametrize(("task", "train", "dev"), [("sst2", 67_349, 872), ("cola", 8_551, 1_043), ("rte", 2_490, 277)])
def test_the_real_files_have_their_published_sizes(task: str, train: int, dev: int) -> None:
    splits = read_glue(task, os.path.join(os.environ["TRIVIUM_DATA"], "glue")).checked()
    assert (len(list(splits.train.good())), len(list(splits.held_out["dev"].good()))) == (train, dev)
    assert not splits.notes


def test_the_folder_of_another_task_is_one_sentence(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\na fine film\t1\n")
    with pytest.raises(TriviumError, match=r"dev.tsv has 2 columns where CoLA has 4 or more: is it of another"):
        read_glue("cola", str(tmp_path))
