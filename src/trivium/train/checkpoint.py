"""Checkpoints: written whole or not at all, checked before use, never a pickle.

    checkpoints/step-00001200/
      model/       what the recipe exports (a model folder: config, weights, tokenizer, ...) and a manifest of its own
      training/    optimizer.safetensors, optimizer.json, method.safetensors, tensors.json, state.json
      manifest.json

A checkpoint is written into ``.tmp-step-00001200`` beside, every file and folder is synced to the disk, and one
rename puts it in place; so a crash at any moment leaves the older checkpoints as they were. The manifest, written
last, holds bytes and sha256 of every other file; a checkpoint whose files do not agree with it is not used.

Training waits for a `snapshot` alone, a copy in the memory of the host, which a thread of `Saving` writes.

``tensors.json`` says where each tensor of the method lies: in a file of model/ when the export already holds the very
same bytes (whatever the export calls them), else in ``method.safetensors``. Nothing is stored twice, tied
parameters neither, and what comes back is what was there, to the bit. Files that would grow above `SHARD_BYTES` are
written in shards.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, verify_manifest, write_manifest, written_beside
from trivium.tensor_files import SHARD_BYTES, save_tensors
from trivium.train import optim
from trivium.train.protocol import Method

# Writes the model folder of `method.exported()`, manifest and all, into the empty folder that it is given: with these
# tensors, since those of the module itself train on.
Export = Callable[[Path, Mapping[str, Tensor]], None]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps that were done when this checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


# ------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint is written from: copies in the memory of the host, which no later step changes."""

    step: int  # done steps
    method: dict[str, Tensor]
    exported: dict[str, Tensor]  # of `method.exported()`; mostly the same copies under other names
    optimizer: dict[str, Tensor]
    optimizer_settings: dict[str, Any]
    state: dict[str, Any]  # JSON values that come back from `restore`: seed, layout, versions


def snapshot(step: int, method: Method, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Snapshot:
    """Copy what stands after `step` done steps: the one part of a save that training waits for."""
    copies: dict[int, Tensor] = {}  # a tensor under several names is copied once

    def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for tensor in tensors.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    whole, exported = (module.state_dict(keep_vars=True) for module in (method, method.exported()))
    groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    return Snapshot(
        step,
        copied(whole),
        copied(exported),
        copied(optim.state_by_name(optimizer, method)),
        {"kind": type(optimizer).__name__, "groups": groups},
        dict(state),
    )


def write(checkpoints: Path, taken: Snapshot, export: Export, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a checkpoint. A damaged one of that step is moved aside, a sound one never is.

    Raises:
        TriviumError: the disk is full or not writable; older checkpoints are untouched and nothing half-written stays.
    """
    target = folder_of(checkpoints, taken.step)
    if target.exists() and not _set_aside_if_damaged(target):
        raise TriviumError(f"{target} exists already and is sound: it is not written over")
    with written_beside(target) as folder:
        model, training = folder / "model", folder / "training"
        model.mkdir()
        export(model, taken.exported)
        training.mkdir()
        _write_method(taken.method, folder, shard_bytes)
        save_tensors(taken.optimizer, training / "optimizer.safetensors", shard_bytes)
        _write_json(training / "optimizer.json", taken.optimizer_settings)
        _write_json(training / "state.json", {"step": taken.step, **taken.state})
        write_manifest(folder)
    return target


def _write_method(method: Mapping[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write what model/ does not hold, and where each tensor lies. Compared by content, not by name."""
    held: dict[tuple[torch.dtype, torch.Size], list[tuple[Tensor, str | None, str]]] = defaultdict(list)  # file, key
    for path in sorted((folder / "model").rglob("*.safetensors")):
        for key, tensor in load_file(path).items():
            held[tensor.dtype, tensor.shape].append((tensor, path.relative_to(folder).as_posix(), key))
    places: dict[str, tuple[str | None, str]] = {}  # None: a file of training/
    rest: dict[str, Tensor] = {}
    for name, tensor in method.items():
        alike = held[tensor.dtype, tensor.shape]
        place = next(((file, key) for other, file, key in alike if torch.equal(_bytes(other), _bytes(tensor))), None)
        if place is None:
            place = None, name
            rest[name] = tensor
            alike.append((tensor, *place))
        places[name] = place
    file_of = save_tensors(rest, folder / "training" / "method.safetensors", shard_bytes)
    settled = {name: (file or f"training/{file_of[key]}", key) for name, (file, key) in places.items()}
    _write_json(folder / "training" / "tensors.json", settled)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def set_aside_after(checkpoints: Path, step: int) -> None:
    """Of a run that goes on after `step`: later ones, which were passed over. Pruning counts sound checkpoints alone,
    and what a disk did not give once is not to be in the way when it does again."""
    for path in checkpoints_in(checkpoints):
        if step_of(path) > step:
            _set_aside(path)


def _set_aside_if_damaged(checkpoint: Path) -> bool:
    """Make room where a damaged checkpoint stands."""
    try:
        verify_manifest(checkpoint)
    except TriviumError:
        _set_aside(checkpoint)
        return True
    return False


def _set_aside(checkpoint: Path) -> None:
    """It is kept under another name for whoever wants to look."""
    number = next(n for n in range(1000) if not checkpoint.with_name(f"damaged-{n}-{checkpoint.name}").exists())
    try:
        checkpoint.rename(checkpoint.with_name(f"damaged-{number}-{checkpoint.name}"))
    except OSError as error:
        raise TriviumError(f"{checkpoint} is damaged and cannot be renamed ({error.strerror}): move it away") from error


def prune(
    checkpoints: Path, keep_last: int, keep_every: int | None = None, spared: Collection[int | None] = ()
) -> None:
    """Remove all but the last `keep_last` checkpoints, those at multiples of `keep_every` steps and those of the
    `spared` steps. What cannot be removed is told and left: a network's file system may need its files for a while."""
    assert keep_last >= 1
    for path in checkpoints_in(checkpoints)[:-keep_last]:
        if (keep_every and step_of(path) % keep_every == 0) or step_of(path) in spared:
            continue
        taken = set(checkpoints.glob(".tmp-*"))
        names = (path.with_name(f".tmp-{number}-{path.name}") for number in range(1000))
        doomed = next(name for name in names if name not in taken)
        with _left_for_later(path):
            path.rename(doomed)  # first out of sight: a half-removed one is never found
            shutil.rmtree(doomed)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what a killed process left half-written or half-removed, as far as it can be removed."""
    for path in checkpoints.glob(".tmp-*"):
        with _left_for_later(path):
            shutil.rmtree(path)


@contextmanager
def _left_for_later(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        print(f"{path} cannot be removed ({error.strerror}): it is left there for now", file=sys.stderr)


LONG_WAIT = 1.0  # seconds of a step that waits for the disk; less is not worth a sentence


class Saving:
    """Writes checkpoints while training goes on, one at a time. What fails there is told at the next call."""

    def __init__(self) -> None:
        self._told = False
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Run this on the thread, when what it had before is done."""
        self.finish()
        self._writing = self._thread.submit(work)

    @property
    def failed(self) -> bool:
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def finish(self) -> float:
        """Wait for what is being written; the seconds of that. Raises what went wrong there."""
        begun = time.perf_counter()
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        return time.perf_counter() - begun

    def held_up(self, waited: float, copied: float) -> str | None:
        """A sentence, once a run, where a save waited longer for the one before it than it took itself to copy."""
        if self._told or waited <= max(LONG_WAIT, copied):
            return None
        self._told = True
        return (
            f"training stood still for {waited:.1f} s, since the checkpoint before this one was still being written:"
            " raise --train.save-every, or let --out be on a faster disk"
        )

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *_: object) -> None:
        """After an error elsewhere: what is being written is finished all the same."""
        self._thread.shutdown()
        if self.failed:
            assert self._writing is not None
            print(f"besides, {self._writing.exception()}", file=sys.stderr)


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
        files_of_optimizer = sorted(training.glob("optimizer*.safetensors"))  # one, or shards
        tensors = {key: tensor for file in files_of_optimizer for key, tensor in load_file(file).items()}
        optim.load_state_by_name(optimizer, method, tensors)
    state: dict[str, Any] = json.loads((training / "state.json").read_text())
    return state


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
