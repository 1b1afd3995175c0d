"""The fields of a recipe as a help page: each with its flag, its type, what it means and what it is by default."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import shutil
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_type_hints

from trivium.cli.arguments import metavar

COLUMN = 36  # where the meanings begin


class PerName(dict[str, Any]):
    """Values of one field by the names of those that have it."""


class Field(NamedTuple):
    path: str  # dotted
    annotation: Any
    value: Any  # as the recipe's function sets it
    comment: str  # beside the field in the source


def page(recipe: str, arguments: Mapping[str, str]) -> str:
    """What may follow the recipe on a command line. Loads torch, since only the function knows its values.

    Args:
        arguments: of the recipe's function, such as {"size": "tiny"}.

    Raises:
        TriviumError: there is no such recipe, size or task.
    """
    from trivium.recipes import RECIPES
    from trivium.train.config import Config, build

    tree = build(Config(recipe, dict(arguments)), RECIPES)
    named = " ".join([recipe, *(f"of {name} {value}" for name, value in arguments.items())])
    lines = [f"fields of {named}, with what they are by default in brackets:"]
    branch = None
    for field in fields_of(tree):
        if is_settled(field.path, tree):
            continue
        if field.path.rpartition(".")[0].partition(".")[0] != branch:
            branch = field.path.rpartition(".")[0].partition(".")[0]
            lines.append("")
        lines += _entry(field)
    return "\n".join(lines) + "\n"


def is_settled(path: str, tree: Any) -> bool:
    """Whether the data decides a field of this recipe, so that nobody sets it."""
    return any(f"{path}.".startswith(f"{each}.") for each in getattr(tree, "settled", ()))


def fields_of(tree: Any, prefix: str = "") -> Iterator[Field]:
    """Every leaf of a tree of dataclasses. Of a tuple of dataclasses the fields of a first member; of a dict of them
    each field once, as that of a member called NAME, with what it is in every one."""
    hints, comments = get_type_hints(type(tree)), comments_of(type(tree))
    for field in (field for field in dataclasses.fields(tree) if field.init):
        path, value = prefix + field.name, getattr(tree, field.name)
        member = (*get_args(hints[field.name]), None)[0]
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{path}.")
        elif isinstance(value, dict) and all(map(dataclasses.is_dataclass, value.values())):
            members = [list(fields_of(each, f"{path}.NAME.")) for each in value.values()]
            for of_each in zip(*members, strict=True):
                yield of_each[0]._replace(value=PerName(zip(value, (own.value for own in of_each), strict=True)))
        elif isinstance(value, tuple) and isinstance(member, type) and dataclasses.is_dataclass(member):
            member_hints, member_comments = get_type_hints(member), comments_of(member)
            for own in dataclasses.fields(member):
                default = None if own.default is dataclasses.MISSING else own.default
                comment = member_comments.get(own.name, "")
                yield Field(f"{path}.0.{own.name}", member_hints[own.name], default, comment)
        else:
            yield Field(path, hints[field.name], value, comments.get(field.name, ""))


def comments_of(kind: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, as its source has it."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        source = textwrap.dedent(inspect.getsource(base))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                rows = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found[node.target.id] = " ".join(comments[row] for row in rows if row in comments)
    return found


def _entry(field: Field) -> list[str]:
    flag = f"  --{field.path.replace('_', '-')} {metavar(field.annotation)}"
    meaning = f"{field.comment} {_default(field.value)}".strip()
    width = min(shutil.get_terminal_size((100, 24)).columns, 120) - COLUMN
    beside = textwrap.wrap(meaning, max(20, width), break_on_hyphens=False)
    if len(flag) + 2 > COLUMN:
        beside.insert(0, "")  # the flag has a line to itself
    first, *rest = beside or [""]
    return [f"{flag:{COLUMN}}{first}".rstrip(), *(" " * COLUMN + line for line in rest)]


def _default(value: Any) -> str:
    if isinstance(value, PerName):
        alike: dict[Any, list[str]] = {}
        for name, own in value.items():
            alike.setdefault(_default(own), []).append(name)
        if len(alike) == 1:
            return next(iter(alike))
        told = [f"{own[1:-1] or 'none'}: {' '.join(names)}" for own, names in alike.items()]
        return f"({', '.join(told)})"
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, tuple):
        return f"({' '.join(map(str, value))})"
    if isinstance(value, bool):
        return f"({str(value).lower()})"
    return f"({value:g})" if isinstance(value, float) else f"({value})"
