from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trivium.convert.weights import read_weights
from trivium.errors import TriviumError

TENSORS = {"a.weight": torch.randn(3, 4), "a.bias": torch.arange(4), "half": torch.randn(2).half()}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


class Attack:
    """A pickle that makes a marker file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3, name="x"), "epoch": 3},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["bare", "lightning", "namespace", "data-parallel"],
)
def test_pickles_of_tensors_are_read_in_both_formats(tmp_path: Path, zipped: bool, wrap: object) -> None:
    path = tmp_path / "weights.pt"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=zipped)  # type: ignore[operator]
    assert equal(read_weights(path), TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["top", "beside"])
def test_a_pickle_never_runs(tmp_path: Path, zipped: bool, protocol: int, where: str) -> None:
    path, marker = tmp_path / "weights.bin", tmp_path / "it-ran"
    payload = Attack(marker) if where == "top" else {"state_dict": TENSORS, "x": Attack(marker)}
    torch.save(payload, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(TriviumError, match=r"weights\.bin"):
        read_weights(path)
    assert not marker.exists()
    path.write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(TriviumError):
        read_weights(path)
    assert not marker.exists()


def test_an_allow_listed_name_is_inert(tmp_path: Path) -> None:
    """A file may ask for `dall_e.anything` with any arguments and any state: nothing of that module runs."""
    module = types.ModuleType("dall_e")

    class Runs:
        def __init__(self, marker: str) -> None:
            self.marker = marker

        def __reduce__(self) -> tuple:
            return Runs, (self.marker,), {"marker": self.marker}

        def __setstate__(self, state: dict) -> None:
            os.mkdir(state["marker"])

    Runs.__module__, Runs.__qualname__, module.Runs = "dall_e", "Runs", Runs  # type: ignore[attr-defined]
    sys.modules["dall_e"] = module
    try:
        torch.save({"state_dict": TENSORS, "x": Runs(str(tmp_path / "it-ran"))}, tmp_path / "w.pt")
        assert equal(read_weights(tmp_path / "w.pt"), TENSORS)  # even where the real module can be imported
    finally:
        del sys.modules["dall_e"]
    assert equal(read_weights(tmp_path / "w.pt"), TENSORS)
    assert not (tmp_path / "it-ran").exists()


def test_a_whole_module_gives_its_tensors(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    torch.save(module, tmp_path / "encoder.pkl")
    assert equal(read_weights(tmp_path / "encoder.pkl"), dict(module.state_dict()))


def test_torchscript_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(TriviumError, match=r"TorchScript.*torch\.jit\.load\(\"model\.pt\"\)\.state_dict\(\)"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "old.pt"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.97])
def test_a_file_cut_short_is_one_sentence(tmp_path: Path, name: str, keep: float) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save({"w": torch.randn(500)}, path, _use_new_zipfile_serialization=name == "w.pt")
    else:
        save_file({"w": torch.randn(500)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(TriviumError, match=name):
        read_weights(path)


def test_shards_are_joined_and_checked(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert read_weights(tmp_path).keys() == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}))
    with pytest.raises(TriviumError, match=r"misses 1 tensor \(c\)"):
        read_weights(tmp_path)
    for escape in ("../one.safetensors", "/etc/one.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": escape}}))
        with pytest.raises(TriviumError, match="no plain file name"):
            read_weights(tmp_path)
    index.write_text("{")
    with pytest.raises(TriviumError, match=r"index\.json"):
        read_weights(tmp_path)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, torch.zeros(3)])
def test_a_pickle_without_a_state_dict(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(TriviumError, match="no state dict"):
        read_weights(tmp_path / "w.pt")
