"""The official normal form of an answer: every rule and every oddity of it."""

from __future__ import annotations

import hashlib

import pytest

from trivium.data.answers import CONTRACTIONS, agreement, normalized, soft_scores


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red Car", "red car"),
        ("a an the", ""),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("twenty-one", "twenty 1"),  # a mark that touches no blank becomes one
        ("yes, sir", "yes sir"),  # one that does is dropped
        ("1,000", "1000"),
        ("yes/no, 1,000", "yesno 1000"),  # with a comma between digits all marks are dropped
        ("3.5", "3.5"),
        ("end.", "end"),
        ("5.", "5"),  # a digit before a full stop does not keep it
        (".5", ".5"),
        ("a.b.c", "abc"),
        ("it's", "it's"),
        ("its", "its"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # with two apostrophes missing it is not known
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("10:30", "10:30"),
        ("what?!", "what"),
        ("[left] {right}", "left right"),
        ("tab\tand\nline", "tab and line"),
        ("ÉCLAIR", "éclair"),
        ("." * 40 + "x", "." * 8 + "x"),
        ("1, 000", "1 000"),  # no comma between digits
        ("1,a", "1"),
        ("10,000.50", "10000.50"),
        ("1,2 it-is", "12 itis"),
        ("\u0663,\u0664 a-b", "\u0663\u0664 ab"),  # digits of any script
        ("5.a .5", "5a .5"),
        ("10:30 p.m.", "10:30 pm"),
        ("A.M.", "am"),  # a full stop is dropped before articles are: "a" would be one
        ("the,cat", "cat"),
        ("an-other", "other"),
        ("none of the above", "0 of above"),
        ("two's", "two's"),
        ("DONT dont", "don't don't"),
        ("couldn'tve.", "couldn't've"),
        ("'ow'sat", "'ow's'at"),
        ("Id've", "id've"),  # a contraction with a capital, which no word has any more
        ("#1 $5 50%", "#1 $5 50%"),
        ("\u00a0a\u00a0", ""),
    ],
)
def test_normal_form(answer: str, normal: str) -> None:
    assert normalized(answer) == normal


def test_the_table_of_contractions_has_its_official_size() -> None:
    """120 there, of which 5 hold a capital and can never match a word in small letters, and one is its own value."""
    assert len(CONTRACTIONS) == 114
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())


def test_the_tables_are_the_official_ones() -> None:
    """By a hash of all contractions there, word by word, that can match."""
    pairs = "\n".join(f"{key} {word}" for key, word in sorted(CONTRACTIONS.items()))
    assert hashlib.sha256(pairs.encode()).hexdigest() == (
        "f2c800b1132e79302dd72686ce8bba16120f1873f98a85561222e89317336e7a"
    )
    words = "zero one two three four five six seven eight nine ten"
    assert normalized(words) == "0 1 2 3 4 5 6 7 8 9 10"
    assert normalized(words.replace(" ", "s ")) == words.replace(" ", "s ").replace("ten", "10")


@pytest.mark.parametrize("mark", ';/[]"{}()=+\\_-><@`,?!')
def test_every_official_mark_is_dropped_beside_a_blank_and_else_becomes_one(mark: str) -> None:
    assert [normalized(f"b{mark}c"), normalized(f"b{mark} c"), normalized(f"b {mark}c")] == ["b c", "b c", "b c"]
    assert normalized(f"b{mark}c d{mark} e") == "bc d e", "beside a blank anywhere in the answer"
    assert normalized(f"1,0 b{mark}c") == "10 bc"


@pytest.mark.parametrize("mark", "':#$%&*~^|")
def test_every_other_mark_stays(mark: str) -> None:
    assert normalized(f"b{mark}c") == f"b{mark}c" and normalized(f"b {mark} c") == f"b {mark} c"


def test_soft_scores_of_ten_people() -> None:
    scores = soft_scores(["Red", "red", "the red", "blue", "Blue!", "2", "two", "two", "two", "none"])
    assert scores == pytest.approx({"red": 0.9, "blue": 0.6, "2": 1.0, "0": 0.3})
    assert agreement(0, 10) == 0
