"""Checkpoints: written whole or not at all, checked before use, never a pickle.

    checkpoints/step-00001200/
      model/       what the recipe exports (a model folder: config, weights, tokenizer, ...) and a manifest of its own
      training/    optimizer.safetensors, optimizer.json, method.safetensors, tensors.json, state.json
      manifest.json

A checkpoint is written into ``.tmp-step-00001200`` beside, every file and folder is synced to the disk, and one
rename puts it in place; so a crash at any moment leaves the older checkpoints as they were. The manifest, written
last, holds bytes and sha256 of every other file; a checkpoint whose files do not agree with it is not used.

``tensors.json`` says where each tensor of the method lies: in a file of model/ when the export already holds the very
same bytes (whatever the export calls them), else in ``method.safetensors``. Nothing is stored twice, tied
parameters neither, and what comes back is what was there, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, verify_manifest, write_manifest, written_beside
from trivium.train import optim

Export = Callable[[Path], None]  # writes a model folder into the empty folder that it is given


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps that were done when this checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


# ------------------------------------------------------------------------------------------------------ writing


def save(
    checkpoints: Path,
    step: int,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    export: Export,
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of `step` done steps. A damaged one of that step is moved aside, a sound one never is.

    Args:
        state: JSON values that come back from `restore`: seed, layout, versions.

    Raises:
        TriviumError: the disk is full or not writable; older checkpoints are untouched and nothing half-written stays.
    """
    target = folder_of(checkpoints, step)
    if target.exists():
        _set_aside(target)
    try:
        with written_beside(target) as folder:
            (folder / "model").mkdir()
            export(folder / "model")
            write_manifest(folder / "model")
            (folder / "training").mkdir()
            _save_method(method, folder)
            _save_optimizer(optimizer, method, folder / "training")
            _write_json(folder / "training" / "state.json", {"step": step, **state})
            write_manifest(folder)
    except TriviumError as error:  # it may name files where they were written, which nobody will find there
        sentence = str(error).replace(f".tmp-{target.name}", target.name).replace(".tmp-model", "model")
        raise TriviumError(sentence) from error
    return target


def _save_method(method: nn.Module, folder: Path) -> None:
    """Write what model/ does not hold, and where each tensor lies. Compared by content, not by name."""
    held: dict[str, tuple[str, str]] = {}  # content -> file, key
    for path in sorted((folder / "model").rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                held.setdefault(_content(file.get_tensor(key)), (path.relative_to(folder).as_posix(), key))
    places: dict[str, tuple[str, str]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in method.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        content = _content(tensor)
        if content not in held:
            held[content] = ("training/method.safetensors", name)
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            rest[name] = tensor if whole else tensor.clone()  # a slice of a bigger tensor cannot be saved alone
        places[name] = held[content]
    save_file(rest, folder / "training" / "method.safetensors")
    _write_json(folder / "training" / "tensors.json", places)


def _content(tensor: Tensor) -> str:
    """Equal for equal type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save_optimizer(optimizer: torch.optim.Optimizer, method: nn.Module, folder: Path) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in optim.state_by_name(optimizer, method).items()}
    save_file(tensors, folder / "optimizer.safetensors")
    groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    _write_json(folder / "optimizer.json", {"kind": type(optimizer).__name__, "groups": groups})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _set_aside(checkpoint: Path) -> None:
    """Make room where a damaged checkpoint stands; it is kept under another name for whoever wants to look."""
    try:
        verify_manifest(checkpoint)
    except TriviumError:
        number = next(n for n in range(1000) if not checkpoint.with_name(f"damaged-{n}-{checkpoint.name}").exists())
        checkpoint.rename(checkpoint.with_name(f"damaged-{number}-{checkpoint.name}"))
        return
    raise TriviumError(f"{checkpoint} exists already and is sound: it is not written over")


def prune(checkpoints: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Remove all but the last `keep_last` checkpoints and those at multiples of `keep_every` steps."""
    assert keep_last >= 1
    for path in checkpoints_in(checkpoints)[:-keep_last]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        doomed = path.with_name(f".tmp-{path.name}")  # first out of sight: a half-removed one is never found
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    for path in checkpoints.glob(".tmp-*"):
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------------ reading


def restore(checkpoint: Path, method: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Put a checkpoint back into a method and its optimizer; it must have been verified. Returns state.json.

    Raises:
        TriviumError: the checkpoint belongs to a method with other tensors.
    """
    training = checkpoint / "training"
    places: dict[str, tuple[str, str]] = json.loads((training / "tensors.json").read_text())
    files = {file: load_file(checkpoint / file) for file, _ in places.values()}
    saved = {name: files[file][key] for name, (file, key) in places.items()}
    current = method.state_dict()
    for name in sorted(current.keys() | saved.keys()):
        there, here = _shape(saved.get(name)), _shape(current.get(name))
        if there != here:
            raise TriviumError(f"{checkpoint} does not fit this recipe: {name} is {there} there and {here} here")
    method.load_state_dict(saved)
    if optimizer is not None:
        kind = json.loads((training / "optimizer.json").read_text())["kind"]
        if kind != type(optimizer).__name__:
            raise TriviumError(f"{checkpoint} holds the state of {kind}, and this run trains with another optimizer")
        optim.load_state_by_name(optimizer, method, load_file(training / "optimizer.safetensors"))
    state: dict[str, Any] = json.loads((training / "state.json").read_text())
    return state


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
