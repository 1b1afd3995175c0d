from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from trivium.cli.arguments import parse
from trivium.cli.overrides import set_overrides, split_overrides
from trivium.errors import TriviumError


@dataclass(frozen=True)
class Optim:
    lr: float = 1.0
    steps: int | None = None
    clip: Literal["none", "global"] = "none"


@dataclass(frozen=True)
class Run:
    optim: Optim = field(default_factory=Optim)
    names: tuple[str, ...] = ()
    scale: tuple[float, float] = (0.5, 1.0)
    title: str = ""
    fused: bool = False
    micro_batch: int | Literal["auto"] = "auto"


def test_words_after_a_flag_are_its_values() -> None:
    words = ["--optim.lr", "3e-4", "--names", "a.csv", "b.csv", "--title=x = y", "--scale", "-1", "-.5", "--fused"]
    assert split_overrides(words) == {
        "optim.lr": ["3e-4"],
        "names": ["a.csv", "b.csv"],
        "title": ["x = y"],
        "scale": ["-1", "-.5"],
        "fused": ["true"],
    }


@dataclass(frozen=True)
class Member:
    pattern: str
    rate: float = 1.0


@dataclass(frozen=True)
class Members:
    groups: tuple[Member, ...] = ()


@pytest.mark.parametrize("words", ["--groups.0.pattern a --groups.0.rate 2", "--groups.0.rate 2 --groups.0.pattern a"])
def test_a_member_may_be_given_in_any_order_of_its_fields(words: str) -> None:
    assert set_overrides(Members(), split_overrides(words.split())) == Members((Member("a", 2.0),))
    with pytest.raises(TriviumError, match=r"the recipe has no option groups\.0\.rate"):
        set_overrides(Members(), split_overrides(["--groups.0.rate", "2"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stray", "--optim.lr", "1"], "'stray'"),
        (["--optim.lr", "1", "--optim.lr", "2"], "--optim.lr is given twice"),
        (["-lr", "1"], "-lr"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(TriviumError, match=said):
        split_overrides(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optim.lr 3e-4", Run(Optim(lr=3e-4))),
        ("--optim.lr 3", Run(Optim(lr=3.0))),
        ("--optim.lr .5", Run(Optim(lr=0.5))),
        ("--optim.steps 7", Run(Optim(steps=7))),
        ("--optim.steps null", Run()),
        ("--optim.clip global", Run(Optim(clip="global"))),
        ("--names a.csv", Run(names=("a.csv",))),
        ("--names a.csv b.csv", Run(names=("a.csv", "b.csv"))),
        ("--names 1 true", Run(names=("1", "true"))),  # strings, since the leaf holds strings
        ("--scale 1 2", Run(scale=(1.0, 2.0))),
        ("--title 12", Run(title="12")),
        ("--fused", Run(fused=True)),
        ("--fused true", Run(fused=True)),
        ("--micro-batch 8", Run(micro_batch=8)),
        ("--micro-batch auto", Run()),
    ],
)
def test_the_leaf_says_what_its_words_mean(words: str, expected: Run) -> None:
    assert set_overrides(Run(), split_overrides(words.split())) == expected


def test_one_word_may_stand_without_a_list() -> None:
    assert set_overrides(Run(), {"title": "runs/a", "names": "b"}) == Run(title="runs/a", names=("b",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optim.lr fast", 'optim.lr takes a number, not "fast"'),
        ("--optim.lr 1 2", "optim.lr takes a number"),
        ("--scale 1", "scale takes a list of 2 values"),
        ("--lr 1", "did you mean optim.lr?"),
        ("--optim 1", "optim is a group of options"),
        ("--fused maybe", "fused takes true or false"),
    ],
)
def test_a_value_that_does_not_fit_is_named(words: str, said: str) -> None:
    with pytest.raises(TriviumError) as caught:
        set_overrides(Run(), split_overrides(words.split()))
    assert said in str(caught.value)


def test_a_verb_with_overrides_gets_what_is_none_of_its_own_flags() -> None:
    seen = {}

    def verb(recipe: str, *, size: str | None = None, overrides: dict[str, list[str]]) -> None:
        """Train.

        Args:
            recipe: its name
            size: how big
            overrides: the rest
        """
        seen.update(recipe=recipe, size=size, overrides=overrides)

    call = parse(verb, "try", ["flava", "--optim.lr", "3e-4", "--size", "tiny", "--data.pairs", "a.csv", "b.csv"])
    assert call is not None
    call()
    assert seen == {
        "recipe": "flava",
        "size": "tiny",
        "overrides": {"optim.lr": ["3e-4"], "data.pairs": ["a.csv", "b.csv"]},
    }
    with pytest.raises(TriviumError, match="'stray'"):
        parse(verb, "try", ["flava", "stray"])
