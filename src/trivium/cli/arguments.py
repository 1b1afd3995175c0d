"""From words on the command line to the call of a verb. Every mistake is one sentence, never a page."""

from __future__ import annotations

import difflib
import functools
import inspect
import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, get_type_hints

import tyro

from trivium.cli.overrides import is_flag, split_overrides
from trivium.errors import TriviumError

MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)


def parse(function: Callable[..., Any], verb: str, words: Sequence[str]) -> Callable[[], Any] | None:
    """The call that the words ask for, or None where they asked for help, which is then printed.

    As in Python, what stands before ``*`` in the verb's signature is given by place, what stands after it by name.

    A verb with a parameter ``overrides`` (``dict[str, list[str]]``) gets there every dotted flag that is none of its
    own parameters: ``--optim.lr 3e-4``. Any other verb refuses what it does not know.

    Raises:
        TriviumError: unknown flag (with the nearest), missing or superfluous argument, value of the wrong type.
    """
    takes_overrides = "overrides" in inspect.signature(function).parameters
    bound = _binding(function)
    complaint = io.StringIO()
    call: Callable[..., Any]
    try:
        with redirect_stderr(complaint):
            call, unknown = tyro.cli(
                bound, prog=f"trivium {verb}", args=list(words), config=MARKERS, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        if not takes_overrides:
            _refuse_unknown_flags(bound, verb, words)
        raise TriviumError(f"{_one_sentence(complaint.getvalue())}: see trivium {verb} --help") from None
    if takes_overrides:
        return functools.partial(call, overrides=split_overrides(unknown))
    if unknown:
        _refuse_unknown_flags(bound, verb, words)
        raise TriviumError(f"trivium {verb} has no use for {unknown[0]!r}: see trivium {verb} --help")
    return call


def _binding(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """The same signature as the command line sees it: without ``overrides``, what stands before ``*`` positional.

    Calling it only binds, so what a verb prints and raises is its own.
    """

    @functools.wraps(function)
    def bound(*positional: Any, **named: Any) -> Callable[[], Any]:
        return functools.partial(function, *positional, **named)

    hints = get_type_hints(function, include_extras=True)
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            hint = tyro.conf.Positional[hint]  # type: ignore[misc, valid-type]
        if name != "overrides":
            parameters.append(parameter.replace(annotation=hint))
    del bound.__wrapped__
    bound.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    bound.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return bound


def _refuse_unknown_flags(bound: Callable[..., Any], verb: str, words: Sequence[str]) -> None:
    page = io.StringIO()
    try:
        with redirect_stdout(page):
            tyro.cli(bound, prog=f"trivium {verb}", args=["--help"], config=MARKERS)
    except SystemExit:
        known = sorted(set(re.findall(r"(?<![\w-])-{1,2}[A-Za-z][\w.-]*", page.getvalue())))
    for word in words:
        flag = word.partition("=")[0].replace("_", "-")
        if is_flag(word) and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"see trivium {verb} --help"
            raise TriviumError(f"trivium {verb} has no option {flag}: {hint}")


def _one_sentence(box: str) -> str:
    """tyro's complaint as one line. It comes as a box: a title, what is wrong, a rule, what to read."""
    lines = [line.strip("│|╭╮╰╯").rstrip() for line in box.splitlines()]
    lines = [line for line in lines if line.strip()][1:]
    blocks: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"\s*[─-]{5,}\s*", line):
            blocks.append([])
        else:
            blocks[-1].append(line)
    first, *rest = next(block for block in blocks if block)
    if first.strip().startswith("Missing from"):  # then a name and, further in, its description; and so on
        margin = min(len(line) - len(line.lstrip()) for line in rest)
        names = [line.strip() for line in rest if line[margin] != " "]
        return f"{first.strip().removeprefix('Missing from ').rstrip(':')} needs {' and '.join(names)}"
    return " ".join(line.strip() for line in (first, *rest))
