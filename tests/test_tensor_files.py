"""Tensors in one file or in shards: what is written comes back to the bit, and no file is larger than it may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trivium.convert.weights import read_weights
from trivium.tensor_files import save_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 60), max_size=12),
    shard_bytes=st.integers(1, 2000),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=12, max_size=12),
)
def test_both_forms_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_bytes: int, dtypes: list[torch.dtype]
) -> None:
    folder = tmp_path_factory.mktemp("tensors")
    tensors = {f"layer.{n}": (torch.randn(size) * 9).to(dtypes[n]) for n, size in enumerate(sizes)}
    file_of = save_tensors(tensors, folder / "model.safetensors", shard_bytes)
    back = read_weights(folder)
    assert back.keys() == tensors.keys() == file_of.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
        assert name in load_file(folder / file_of[name])
    for path in folder.glob("*.safetensors"):
        held = load_file(path).values()
        assert sum(tensor.nbytes for tensor in held) <= shard_bytes or len([t for t in held if t.nbytes]) == 1


def test_the_index_is_that_of_hugging_face(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10), "b": torch.ones(30), "c": torch.zeros(10)}
    save_tensors(tensors, tmp_path / "model.safetensors", shard_bytes=100)
    files = [f"model-0000{n}-of-00003.safetensors" for n in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 200},
        "weight_map": dict(zip("abc", files, strict=True)),
    }


def test_a_slice_is_written_without_what_it_is_cut_from(tmp_path: Path) -> None:
    whole = torch.arange(10_000.0)
    save_tensors({"one": whole[:5], "two": whole[5:9], "turned": whole[:6].view(2, 3).T}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size < 1000
    back = load_file(tmp_path / "a.safetensors")
    assert torch.equal(back["two"], whole[5:9])
    assert torch.equal(back["turned"], whole[:6].view(2, 3).T)
