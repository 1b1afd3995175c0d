"""Reading weights that come from anybody: tensors come out, and nothing in the file ever runs.

safetensors are plain. Pickles (.bin, .pt, .pth, .pkl) go through torch's restricted unpickler; what is no tensor but
stands in well-known files (``argparse.Namespace`` in checkpoints, whole modules in DALL-E's) is replaced by inert
objects under the names that the file asks for. Everything else is refused.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trivium.errors import TriviumError

State = dict[str, Tensor]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Names that become inert objects.
_STUBBED = re.compile(r"argparse\.Namespace|dall_e(\.\w+)+|torch\.nn\.modules(\.\w+)+")
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "teacher", "student")
# In a folder, the first that exists; an index stands for several shards.
_IN_FOLDER = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
              "open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # fmt: skip


def read_weights(path: Path) -> State:
    """Every tensor of a file, or of a folder in the layout of Hugging Face (shards too), by name.

    Raises:
        TriviumError: nothing there, a damaged file, a file that holds more than tensors, TorchScript.
    """
    if path.is_dir():
        name = next((name for name in _IN_FOLDER if (path / name).is_file()), None)
        if name is None:
            raise TriviumError(f"{path} holds no weights: one of {', '.join(_IN_FOLDER)} is looked for")
        return _read_shards(path / name) if name.endswith(".index.json") else read_weights(path / name)
    if not path.is_file():
        raise TriviumError(f"{path} does not exist: name a file of weights or a folder that holds one")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise TriviumError(f"{path} is cut short or no safetensors file ({error}): get it again") from None
    if path.suffix not in PICKLES:
        raise TriviumError(
            f"{path}: weights are read from .safetensors, {', '.join(PICKLES)}, not from {path.suffix!r}"
        )
    return _tensors_of(_read_pickle(path), path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        TriviumError: no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TriviumError(f"{path} cannot be read as JSON ({error}): get it again") from None
    if not isinstance(value, dict):
        raise TriviumError(f"{path} holds no JSON object: get it again")
    return value


def listed(verb: str, names: list[str]) -> str:
    """'misses 7 tensors (a, b, c, d, e and 2 more)', or nothing for no names."""
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{verb} {len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:5])}{more})"


def _read_shards(index: Path) -> State:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise TriviumError(f"{index} has no weight_map of file names: get it again")
    state: State = {}
    for name in sorted(set(shards.values())):
        if PurePosixPath(name).name != name or "\\" in name:
            raise TriviumError(f"{index} names the shard {name!r}, which is no plain file name: refused")
        state |= read_weights(index.parent / name)
    missing = sorted(set(shards) - set(state))
    if missing:
        raise TriviumError(f"the shards beside {index} lack what it lists: it {listed('misses', missing)}")
    return state


# -------------------------------------------------------------------------------------------------------- pickles


class Inert:
    """Stands where a file asks for an object of some class. It holds what the file says about it and does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


def _read_pickle(path: Path) -> Any:
    if zipfile.is_zipfile(path) and _is_torchscript(path):
        raise TriviumError(
            f"{path} is a TorchScript archive, which is a program and is not run: where you trust it, make a state "
            f'dict of it with torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pt")'
        )
    try:
        names = _globals_of(path)
        stubs = [(type(Inert.__name__, (Inert,), {}), name) for name in sorted(names) if _STUBBED.fullmatch(name)]
        with torch.serialization.safe_globals(stubs):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|global|function|class) ([\w.]+\.\w+)", str(error))
        what = f"asks for {name[1]}" if name else "holds more than tensors"
        raise TriviumError(
            f"{path} {what}, and a pickle that does is not opened, since it can run any program: where you trust it, "
            "save its state_dict() alone"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TriviumError(f"{path} is cut short or no file of weights ({reason}): get it again") from None


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def _globals_of(path: Path) -> set[str]:
    """The names of all classes and functions that a file asks for; read from its opcodes, which run nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if not names:
                raise ValueError("no data.pkl in the archive")
            with archive.open(names[0]) as file:
                return set(_globals_in(file))
    with path.open("rb") as file:
        # The older format: magic number, version, machine, then the object.
        return {name for _ in range(4) for name in _globals_in(file)}


def _globals_in(file: IO[bytes]) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")


def _tensors_of(value: Any, path: Path) -> State:
    """The state dict in what a file held: bare, wrapped in a checkpoint, or a whole module made inert."""
    if isinstance(value, Inert) and hasattr(value, "_modules"):
        state = dict(_module_tensors(value, ""))
    elif isinstance(value, Mapping):
        if not any(isinstance(part, Tensor) for part in value.values()):
            inner = next((value[name] for name in _WRAPPERS if isinstance(value.get(name), Mapping | Inert)), None)
            if inner is not None:
                return _tensors_of(inner, path)
        state = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    else:
        state = {}
    if not state:
        raise TriviumError(f"{path} holds no state dict: a mapping from names to tensors is needed")
    if all(name.startswith("module.") for name in state):  # saved from a data-parallel wrapper
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor.detach() for name, tensor in state.items()}


def _module_tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in {**vars(module).get("_parameters", {}), **vars(module).get("_buffers", {})}.items():
        if isinstance(tensor, Tensor):
            yield prefix + name, tensor
    for name, child in vars(module).get("_modules", {}).items():
        if isinstance(child, Inert):
            yield from _module_tensors(child, f"{prefix}{name}.")
