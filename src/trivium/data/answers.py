"""Answers of VQAv2 in the official normal form, and how much each of several human answers is worth.

The rules are those of the data set's own evaluation code (GT-Vision-Lab/VQA, state of March 2021), oddities included:

* a punctuation mark is dropped where it touches a blank, or where the text has a comma between digits; else it becomes
  a blank. Apostrophes and colons stay;
* a full stop is dropped unless a digit follows (the code means to look before it too, and does not), at most 32 times;
* "none" is 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
ARTICLES = ("a", "an", "the")
# Words that people write without their apostrophe; of those with two of them or more, one may be missing.
_WITH_APOSTROPHE = """
    'twas ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""
CONTRACTIONS = (
    {"somebody'd": "somebodyd"}
    | {  # the one that is the wrong way round there
        word[:at] + word[at + 1 :]: word
        for word in _WITH_APOSTROPHE.split()
        for at, letter in enumerate(word)
        if letter == "'"
    }
)
_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def trimmed(answer: str) -> str:
    """Without line breaks, tabs and blanks at its ends: what is compared where all annotators agree."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalized(answer: str) -> str:
    """The normal form of an answer."""
    answer = trimmed(answer)
    text = answer
    has_comma = _COMMA.search(answer) is not None
    for mark in PUNCTUATION:
        touches_blank = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if touches_blank or has_comma else " ")
    text = _PERIOD.sub("", text, count=32)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """What each normalised answer of several annotators is worth as a training target: min(1, number / 3) in the mean
    over leaving one of them out, which for ten is 0.3, 0.6, 0.9 and 1 (Teney et al. 2018, section 3.7)."""
    counts = Counter(normalized(answer) for answer in answers)
    return {answer: agreement(number, len(answers)) for answer, number in counts.items()}


def agreement(matching: int, annotators: int) -> float:
    """The score of an answer that so many of the annotators gave: leaving each of them out once."""
    others_left_out = (annotators - matching) * min(1.0, matching / 3)
    return (others_left_out + matching * min(1.0, (matching - 1) / 3)) / annotators
