"""Tensors on disk: one safetensors file, or several beside an index where one would grow too large.

    model.safetensors                                                                 whole
    model-00000-of-00002.safetensors  model-00001-of-00002.safetensors                sharded
    model.safetensors.index.json      {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}

The index is that of Hugging Face. `convert.weights.read_weights` reads both forms, whoever wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 5 * 10**9  # of one file


def save_tensors(tensors: Mapping[str, Tensor], path: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write tensors to `path` (NAME.safetensors), or as shards of at most `shard_bytes` with an index beside it.

    A tensor is never cut: one that is larger than `shard_bytes` has a shard to itself. Which shard a tensor lies in
    depends on names and sizes alone.

    Returns:
        the name of the file that each tensor lies in.
    """
    prepared = {name: _alone(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(prepared):
        size = prepared[name].nbytes
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        _save(prepared, path)
        return dict.fromkeys(prepared, path.name)
    files = [f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}" for number in range(len(shards))]
    file_of = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    for file, names in zip(files, shards, strict=True):
        _save({name: prepared[name] for name in names}, path.with_name(file))
    size_of_all = sum(tensor.nbytes for tensor in prepared.values())
    index = {"metadata": {"total_size": size_of_all}, "weight_map": file_of}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return file_of


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})  # what transformers asks for


def _alone(tensor: Tensor) -> Tensor:
    """A slice of a bigger tensor cannot be saved without it: its copy can."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
