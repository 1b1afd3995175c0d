"""From words on the command line to the call of a verb. Every mistake is one sentence, never a page."""

from __future__ import annotations

import difflib
import functools
import inspect
import io
import os
import re
import types
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from trivium.cli.overrides import is_flag, split_overrides
from trivium.errors import TriviumError

MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)


def parse(function: Callable[..., Any], verb: str, words: Sequence[str]) -> Callable[[], Any] | None:
    """The call that the words ask for, or None where they asked for help, which is then printed.

    As in Python, what stands before ``*`` in the verb's signature is given by place, what stands after it by name.

    A verb with a parameter ``overrides`` (``dict[str, list[str]]``) gets there every dotted flag that is none of its
    own parameters: ``--optim.lr 3e-4``. Its help lists them where the first word names a recipe. Any other verb refuses
    what it does not know.

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
            if takes_overrides and words and not is_flag(words[0]):
                _print_fields(verb, words)
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
        if name != "overrides" and any(parameter.default is nothing for nothing in (None, False, ())):
            hint = _optional(hint)
        elif parameter.default is parameter.empty and get_origin(_plain(hint)) is tuple:  # none of them is no default
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="(required)")]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            hint = tyro.conf.Positional[hint]  # type: ignore[misc, valid-type]
        if name != "overrides":
            parameters.append(parameter.replace(annotation=hint))
    del bound.__wrapped__
    bound.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    bound.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return bound


def _print_fields(verb: str, words: Sequence[str]) -> None:
    from trivium.cli.fields import page

    first, *rest = (word for word in words if word not in ("-h", "--help"))
    if verb == "finetune":
        print(page(verb, {"task": first}), end="")
        return
    size = split_overrides(rest).get("size")
    print(page(first, {"size": size[0]} if size else {}), end="")


def _plain(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _optional(hint: Any) -> Any:
    """The hint of a parameter that may be left out, shown as one writes it: ``--out PATH``, and no "default: None"."""
    known = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    given = any(getattr(mark, "metavar", None) for mark in known)
    shown = None if given or hint is bool else metavar(hint)
    return Annotated[hint, tyro.conf.arg(metavar=shown, help_behavior_hint="")]


def metavar(annotation: Any) -> str:
    """What to write for a value of this type: INT, PATH, "none|global", "STR ..." for any number of them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return metavar(arguments[0])
    if origin in (Union, types.UnionType):
        return "|".join(metavar(member) for member in arguments if member is not type(None))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (tuple, list):
        several = origin is list or arguments[-1] is Ellipsis
        return f"{metavar(arguments[0])} ..." if several else " ".join(map(metavar, arguments))
    if annotation is bool:
        return "true|false"
    return "PATH" if issubclass(annotation, os.PathLike) else annotation.__name__.upper()


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
