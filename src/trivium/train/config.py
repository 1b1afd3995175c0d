"""A run as data: a recipe gives structure and types, ``config.json`` gives values.

A recipe is a Python function that returns a tree of dataclasses. Every leaf of the tree has a dotted path
("optim.lr", "streams.0.ratio", "weights.mim"), and ``config.json`` holds the recipe's name, its arguments and the
value of every leaf. To repeat a run: call the recipe, set the leaves.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trivium.errors import TriviumError
from trivium.manifest import write_whole

Recipe = Callable[..., Any]


@dataclass(frozen=True)
class Config:
    """What ``config.json`` holds: enough to make the same run again."""

    recipe: str  # a name of ours, or "my_run.py:shop"
    arguments: dict[str, Any] = field(default_factory=dict)  # of the recipe's function, such as {"size": "tiny"}
    values: dict[str, Any] = field(default_factory=dict)  # every leaf by its dotted path

    def digest(self) -> str:
        """A name for exactly this configuration: sha256 of its JSON with sorted keys."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------- the tree's leaves


def leaves(tree: Any, annotation: Any = None) -> dict[str, Any]:
    """Every leaf of a tree of dataclasses by its dotted path, as a JSON value.

    Dataclasses, dicts with string keys and tuples or lists that hold dataclasses are branches; everything else is
    a leaf (a tuple of numbers too). annotation: of the tree itself, where it is a dict.
    """
    found: dict[str, Any] = {}
    for name, wanted, value in _children(tree, annotation):
        if _is_branch(value):
            found |= {f"{name}.{path}": leaf for path, leaf in leaves(value, wanted).items()}
        else:
            found[name] = _to_json(float(value) if wanted is float else value)  # 1 where 1.0 is meant
    return found


def set_leaves(tree: Any, values: Mapping[str, Any]) -> Any:
    """The same tree with the leaves named by dotted path replaced; the tree that was given stays as it was.

    Raises:
        TriviumError: a path that does not exist (with the nearest that does), or a value of the wrong type.
    """
    tree = _grown(tree, values, "")
    known = leaves(tree)
    for path in values:
        if path not in known:
            raise TriviumError(_no_such_path(path, list(known)))
    return _replaced(tree, None, values, "")


def _grown(tree: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """The tree with its empty tuples of dataclasses as long as the paths say: a recipe may have been given members
    ("optim.groups.0.pattern") where its function starts from none."""
    changed: dict[str, Any] = {}
    for name, wanted, value in _children(tree, None) if dataclasses.is_dataclass(tree) else []:
        path = f"{prefix}{name}."
        member = (*get_args(wanted), None)[0]
        if dataclasses.is_dataclass(value):
            changed[name] = _grown(value, values, path)
        elif value == () and isinstance(member, type) and dataclasses.is_dataclass(member):
            hints = get_type_hints(member)
            while any(given.startswith(f"{path}{len(value)}.") for given in values):
                at = f"{path}{len(value)}."
                own = {field: values[at + field] for field in hints if at + field in values}
                try:
                    new = member(**{field: _from_json(given, hints[field], at + field) for field, given in own.items()})
                except TypeError:  # a value that it cannot be without is missing: the path is refused as unknown
                    break
                value = (*value, new)
            changed[name] = value
    return dataclasses.replace(tree, **changed) if changed else tree


def _replaced(tree: Any, annotation: Any, values: Mapping[str, Any], prefix: str) -> Any:
    changed: dict[str, Any] = {}
    for name, wanted, value in _children(tree, annotation):
        path = prefix + name
        if _is_branch(value):
            if any(given.startswith(path + ".") for given in values):
                changed[name] = _replaced(value, wanted, values, path + ".")
        elif path in values:
            changed[name] = _from_json(values[path], wanted, path)
    if dataclasses.is_dataclass(tree):
        return dataclasses.replace(tree, **changed)  # type: ignore[type-var]
    if isinstance(tree, dict):
        return {**tree, **changed}
    return type(tree)(changed.get(str(index), value) for index, value in enumerate(tree))


def _children(tree: Any, annotation: Any) -> list[tuple[str, Any, Any]]:
    """(name, annotation, value) of what hangs directly below a branch."""
    if dataclasses.is_dataclass(tree):
        hints = get_type_hints(type(tree))
        return [(f.name, hints[f.name], getattr(tree, f.name)) for f in dataclasses.fields(tree) if f.init]
    if isinstance(tree, dict):  # dict[str, float] says what its values are
        wanted = get_args(annotation)[1] if get_origin(annotation) is dict else Any
        return [(key, wanted, value) for key, value in tree.items()]
    return [(str(index), Any, value) for index, value in enumerate(tree)]


def _is_branch(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(dataclasses.is_dataclass(member) for member in value)
    return isinstance(value, dict) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_to_json(member) for member in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    assert value is None or isinstance(value, bool | int | float | str), f"{value!r} is no leaf of a recipe"
    return value


# ----------------------------------------------------------------------------------------------- types of leaves


def _from_json(value: Any, annotation: Any, path: str) -> Any:
    try:
        return _converted(value, annotation)
    except TypeError:
        raise TriviumError(f"{path} takes {_describe(annotation)}, not {json.dumps(value, default=repr)}") from None


def _converted(value: Any, annotation: Any) -> Any:
    """The value as the annotation wants it. Raises TypeError where it does not fit."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        for alternative in arguments:
            try:
                return _converted(value, alternative)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise TypeError
    if origin is tuple or origin is list or annotation in (tuple, list):
        if not isinstance(value, list | tuple):
            raise TypeError
        if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
            if len(value) != len(arguments):
                raise TypeError
            return tuple(_converted(member, wanted) for member, wanted in zip(value, arguments, strict=True))
        wanted = arguments[0] if arguments else Any
        return (origin or annotation)(_converted(member, wanted) for member in value)
    if annotation in (None, type(None)):
        if value is None:
            return None
        raise TypeError
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if annotation in (bool, int, str) and type(value) is annotation:
        return value
    if isinstance(annotation, type) and issubclass(annotation, os.PathLike) and isinstance(value, str | os.PathLike):
        return Path(value)
    raise TypeError


def _describe(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(alternative) for alternative in arguments)
    if origin is Literal:
        return " or ".join(json.dumps(choice) for choice in arguments)
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return f"a list of {len(arguments)} values ({', '.join(_describe(member) for member in arguments)})"
    if origin in (tuple, list):
        return f"a list, each {_describe(arguments[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}
    if annotation in names:
        return names[annotation]
    if dataclasses.is_dataclass(annotation):  # by paths of its own: optim.groups.0.pattern
        return f"with fields of its own ({', '.join(field.name for field in dataclasses.fields(annotation))})"
    return "a path" if isinstance(annotation, type) and issubclass(annotation, os.PathLike) else str(annotation)


def _no_such_path(path: str, known: list[str]) -> str:
    """The nearest path by spelling; where a user left out the branch ("lr"), the one that ends so."""
    ends_so = [other for other in known if other.endswith("." + path)]
    branch, _, leaf = path.rpartition(".")
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == branch}
    # Beside its siblings the last part alone decides: objectives.foo is not near to objectives.mlm.
    alike = [beside[name] for name in difflib.get_close_matches(leaf, beside, n=1, cutoff=0.6)]
    if not (branch and beside):
        alike = alike or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    near = ends_so[:1] or alike
    below = [other for other in known if other.startswith(path + ".")]
    if below:
        return f"{path} is a group of options: set one of them, such as {below[0]}"
    return f"the recipe has no option {path}" + (f": did you mean {near[0]}?" if near else "")


# ------------------------------------------------------------------------------------------- files and functions


def save(config: Config, path: Path) -> None:
    """Write config.json, whole or not at all."""
    write_whole(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(path: Path) -> Config:
    """Read config.json, or the one inside a run folder."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise TriviumError(f"{path}: there is no such config file; give a config.json or a run folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = Config(content["recipe"], content["arguments"], content["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise TriviumError(
            f"{path}: not a config of ours, which holds recipe, arguments and values ({error})"
        ) from None
    if not (isinstance(config.recipe, str) and isinstance(config.arguments, dict) and isinstance(config.values, dict)):
        raise TriviumError(f"{path}: recipe must be a string, arguments and values must be objects")
    return config


def with_absolute_file(name: str) -> str:
    """The name of a recipe that holds in every folder: ``my_run.py:shop`` with the file's whole path."""
    file, _, function = name.rpartition(":")
    return f"{os.path.abspath(file)}:{function}" if file.endswith(".py") else name


def with_defaults(config: Config, known: Mapping[str, Recipe]) -> Config:
    """The same with the arguments that a recipe of ours sets by default, so that they are stated and not implied."""
    if config.recipe not in known:
        return config
    call = _call(config, known[config.recipe])
    call.apply_defaults()
    return dataclasses.replace(config, arguments=dict(call.arguments))


def _call(config: Config, recipe: Recipe) -> inspect.BoundArguments:
    try:
        return inspect.signature(recipe).bind(**config.arguments)
    except TypeError as error:
        raise TriviumError(f"the recipe {config.recipe} does not take these arguments: {error}") from None


def find_recipe(name: str, known: Mapping[str, Recipe]) -> Recipe:
    """The function behind a recipe's name: one of `known`, or ``path/to/file.py:function``."""
    if name in known:
        return known[name]
    file, colon, function = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"ours are {', '.join(known)}; your own is file.py:function"
        raise TriviumError(f"there is no recipe {name}: {hint}")
    if not Path(file).is_file():
        raise TriviumError(f"{file}: there is no such file to take the recipe {function} from")
    module_name = f"trivium_recipe_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(module_name, Path(file).absolute())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # annotations of its dataclasses are looked up there
    with _mistakes_of_the_file(name):
        spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise TriviumError(f"{file} has no function {function}")
    return getattr(module, function)


def build(config: Config, known: Mapping[str, Recipe]) -> Any:
    """Call the recipe and set the leaves: the tree of dataclasses that a run is made from."""
    recipe = find_recipe(config.recipe, known)
    call = _call(config, recipe)
    with _mistakes_of_the_file(config.recipe):
        tree = recipe(*call.args, **call.kwargs)
    return set_leaves(tree, config.values)


@contextmanager
def _mistakes_of_the_file(name: str) -> Iterator[None]:
    """What the code of a user's own recipe raises is a sentence with file and line; our own code stays as it is."""
    file = name.rpartition(":")[0]
    compiled_as = str(Path(file).absolute())
    try:
        yield
    except TriviumError:
        raise
    except SyntaxError as error:
        if error.filename != compiled_as:
            raise
        raise TriviumError(f"{file}, line {error.lineno}: {error.msg}: mend the file and try again") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == compiled_as]
        if not lines:
            raise
        what = f"{type(error).__name__}: {error}"
        raise TriviumError(f"{file}, line {lines[-1]}: {what}: mend the file and try again") from error
