"""Any leaf of a recipe from the command line: ``--optim.lr 3e-4 --data.pairs a.csv b.csv``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trivium.errors import TriviumError


def is_flag(word: str) -> bool:
    """-3 and -1e-4 are values, --optim.lr and -k are flags."""
    return re.match(r"--?[A-Za-z]", word) is not None


def split_overrides(words: Sequence[str]) -> dict[str, list[str]]:
    """``--a.b value``, ``--a.b=value`` and ``--a.b one two`` as {path: words}; a bare ``--a.b`` means true.

    Hyphens in a path are underscores of the leaf. Raises TriviumError for a word that belongs to no flag and for a
    flag that is given twice.
    """
    overrides: dict[str, list[str]] = {}
    path = ""
    for word in words:
        if is_flag(word):
            flag, equals, value = word.partition("=")
            if not flag.startswith("--"):
                raise TriviumError(f"there is no option {flag}: options of a recipe begin with two hyphens")
            path = flag[2:].replace("-", "_")
            if path in overrides:
                raise TriviumError(f"{flag} is given twice: give it once, with all its values after it")
            overrides[path] = [value] if equals else []
        elif path:
            overrides[path].append(word)
        else:
            raise TriviumError(f"{word!r} stands there without an option: write --the.option {word}")
    return {path: values or ["true"] for path, values in overrides.items()}


def set_overrides(tree: Any, overrides: Mapping[str, str | Sequence[str]]) -> Any:
    """The recipe's tree with the leaves set from words; the type of each leaf says what its words mean.

    So ``7`` is a number for a number, a string for a string and a list of one for a list.
    Raises TriviumError as ``train.config.set_leaves`` does.
    """
    left = dict(overrides)
    while left:
        refusals = {}
        for path, words in left.items():
            try:
                tree = _set_leaf(tree, path, [words] if isinstance(words, str) else words)
            except TriviumError as error:  # it may need one that comes later: a group its pattern
                refusals[path] = error
        if len(refusals) == len(left):
            raise next(iter(refusals.values()))
        left = {path: left[path] for path in refusals}
    return tree


def _set_leaf(tree: Any, path: str, words: Sequence[str]) -> Any:
    from trivium.train.config import set_leaves  # imports torch

    refusal: TriviumError | None = None
    for value in _readings(words):
        try:
            return set_leaves(tree, {path: value})
        except TriviumError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _readings(words: Sequence[str]) -> Iterator[Any]:
    """What the words may mean, the plainest first."""
    if len(words) == 1:
        yield _scalar(words[0])
        yield words[0]
    yield [_scalar(word) for word in words]
    yield list(words)


def _scalar(word: str) -> Any:
    """A number, true, false or null where the word is one; else the word."""
    try:
        value = json.loads(word)
    except ValueError:
        try:
            return float(word) if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", word, re.IGNORECASE) else word
        except ValueError:
            return word
    return value if value is None or isinstance(value, bool | int | float) else word
