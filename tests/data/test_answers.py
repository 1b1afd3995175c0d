"""The official normal form of an answer: every rule and every oddity of it."""

from __future__ import annotations

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
    ],
)
def test_normal_form(answer: str, normal: str) -> None:
    assert normalized(answer) == normal


def test_the_table_of_contractions_has_its_official_size() -> None:
    """120 there, of which 5 hold a capital and can never match a word in small letters, and one is its own value."""
    assert len(CONTRACTIONS) == 114
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())


def test_soft_scores_of_ten_people() -> None:
    scores = soft_scores(["Red", "red", "the red", "blue", "Blue!", "2", "two", "two", "two", "none"])
    assert scores == pytest.approx({"red": 0.9, "blue": 0.6, "2": 1.0, "0": 0.3})
    assert agreement(0, 10) == 0
