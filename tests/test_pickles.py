"""A pickle in place of any file that we open, or inside it, is never run: its marker never appears."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch

import trivium
from tests.test_load import new_bundle
from trivium import manifest
from trivium.convert import read_foreign
from trivium.convert.weights import read_json, read_weights
from trivium.data.codes import CodeCache
from trivium.data.decode import DecodeError, decode
from trivium.data.shards import TarShards
from trivium.data.sources import open_source
from trivium.data.tokenizer import Tokenizer
from trivium.data.unpickling import read_pickle
from trivium.data.views import Views
from trivium.errors import BadSample, TriviumError
from trivium.evaluate import results
from trivium.evaluate.datasets import arrays, captions, lists
from trivium.load import load_image_tokenizer
from trivium.recipes.towers import read_text
from trivium.search.table import Table
from trivium.train import config
from trivium.train.trainer import train

COCO = captions.BY_NAME["COCO retrieval"]
REFUSALS = (TriviumError, BadSample, DecodeError)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def payloads(marker: Path) -> dict[str, bytes]:
    def saved(save: Callable[[io.BytesIO], object]) -> bytes:
        file = io.BytesIO()
        save(file)
        return file.getvalue()

    attack = Attack(marker)
    array = np.array([attack], dtype=object)
    return {
        "pickle 0": pickle.dumps(attack, 0),
        "pickle 5": pickle.dumps({"state_dict": attack}, 5),
        "torch": saved(lambda file: torch.save({"a": attack}, file)),
        "torch, old": saved(lambda file: torch.save(attack, file, _use_new_zipfile_serialization=False)),
        "npy": saved(lambda file: np.save(file, array, allow_pickle=True)),
        "npz": saved(lambda file: np.savez(file, pictures=array, codes=array)),
    }


def test_the_payloads_are_armed(marker: Path) -> None:
    for name, data in payloads(marker).items():
        if name.startswith("torch"):
            torch.load(io.BytesIO(data), weights_only=False)
        elif name.startswith("np"):
            found = np.load(io.BytesIO(data), allow_pickle=True)
            assert name == "npy" or found["codes"] is not None
        else:
            pickle.loads(data)
        assert marker.exists(), name
        marker.rmdir()


def read_all(kind: Any) -> Callable[[Path], object]:
    """Opens a source and reads every row of it."""

    def read(path: Path) -> None:
        source = open_source(kind, [path])
        for row in range(len(source)):
            source.read(row, row)

    return read


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a picture": ("a.jpg", lambda path: decode(path.read_bytes())),
    "CSV": ("a.csv", read_all("pairs")),
    "TSV": ("a.tsv", read_all("pairs")),
    "JSONL": ("a.jsonl", read_all("pairs")),
    "Parquet": ("a.parquet", read_all("pairs")),
    "a tar shard": ("a.tar", read_all("pairs")),
    "a list of files": ("a.list", read_all("pairs")),
    "a cache of codes": ("codes.safetensors", lambda path: CodeCache(path, Views(16), "")),
    "an index of a folder": ("index.parquet", Table.read),
    "a tokenizer": ("tokenizer.json", Tokenizer.from_file),
    "results": ("results.json", results.read),
    "a batch of CIFAR": ("test_batch", read_pickle),
    "MNIST": ("train-images-idx3-ubyte", lambda path: arrays.mnist(path.parent)),
    "a .mat file": ("imagelabels.mat", lambda path: lists.flowers102(path.parent)),
    "captions of COCO": ("dataset_coco.json", lambda path: captions.find_captions(COCO, path.parent)),
    "a config": ("config.json", config.load),
    "JSON of others": ("config.json", read_json),
    **{
        f"weights {suffix}": (f"a{suffix}", read_weights) for suffix in (".pt", ".bin", ".ckpt", ".pkl", ".safetensors")
    },
    "a model": ("model.safetensors", trivium.load),
    "a model of others": ("a.bin", read_foreign),
    "a text tower": ("pytorch_model.bin", lambda path: read_text(str(path))),
    "an image tokenizer": ("encoder.pkl", load_image_tokenizer),
}


@pytest.mark.parametrize("name", READERS)
def test_in_place_of_a_file(name: str, tmp_path: Path, marker: Path) -> None:
    file, read = READERS[name]
    for payload, data in payloads(marker).items():
        (tmp_path / file).write_bytes(data)
        with pytest.raises(REFUSALS):
            read(tmp_path / file)
        assert not marker.exists(), payload


def test_in_place_of_text(tmp_path: Path, marker: Path) -> None:
    """Lines of text may say anything."""
    for data in payloads(marker).values():
        (tmp_path / "a.txt").write_bytes(data)
        with suppress(*REFUSALS):
            read_all("text")(tmp_path / "a.txt")
        assert not marker.exists()


def test_in_place_of_each_file_of_a_model_folder(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "model"
    new_bundle().save(folder)
    names = [path.name for path in folder.iterdir()]
    assert {"model.safetensors", "config.json", "tokenizer.json", "preprocessor.json"} <= set(names)
    for name in names:
        before = (folder / name).read_bytes()
        for payload, data in payloads(marker).items():
            (folder / name).write_bytes(data)
            if name != manifest.NAME:
                manifest.write_manifest(folder)
            with pytest.raises(REFUSALS):
                trivium.load(folder)
            assert not marker.exists(), (name, payload)
        (folder / name).write_bytes(before)


def test_in_place_of_each_file_of_a_checkpoint(tmp_path: Path, marker: Path) -> None:
    run = tmp_path / "run"
    train(tiny_run.make(tiny_run.with_train(steps=2)), run)
    [checkpoint] = (run / "checkpoints").iterdir()
    files = [path for path in checkpoint.rglob("*") if path.is_file()] + [run / "passport.json", run / "metrics.jsonl"]
    assert len(files) > 8
    for path in files:
        before = path.read_bytes()
        for payload, data in payloads(marker).items():
            path.write_bytes(data)
            if path.name != manifest.NAME:
                manifest.write_manifest(checkpoint)
            with suppress(Exception):  # with a sound manifest it is taken for our own: only that nothing runs counts
                train(tiny_run.make(tiny_run.with_train(steps=2)), run, resume=True)
            assert not marker.exists(), (path, payload)
        path.write_bytes(before)
        manifest.write_manifest(checkpoint)


def test_inside_of_shards_and_tables(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, data in enumerate(payloads(marker).values()):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for name in ("0.jpg", "0.txt", "0.json", "0.cls", "0.pkl", "0.pyd", "0.pickle", "0.pth", "0.npy", "1.txt"):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        for kind in ("pairs", "images", "text"):
            source = TarShards([tmp_path / f"{number}.tar"], kind)  # type: ignore[arg-type]
            for row in range(len(source)):
                with suppress(*REFUSALS):
                    decode(source.read(row, row).get("image", b""))
        (tmp_path / f"{number}.tar.index.parquet").write_bytes(data)
        assert len(TarShards([tmp_path / f"{number}.tar"], "images")) == 1  # the index is built again
        columns = pa.schema([("image", pa.binary()), ("caption", pa.string())])
        hostile = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": data}
        columns = columns.append(pa.field("more", pa.binary(), metadata=hostile))
        table = pa.table(
            {"image": [data], "caption": ["a"], "more": [b""]}, schema=columns.with_metadata({"pandas": data})
        )
        pq.write_table(table, tmp_path / "a.parquet")
        sample = open_source("pairs", [tmp_path / "a.parquet"]).read(0, 0)
        with pytest.raises(DecodeError):
            decode(sample["image"])
        assert not marker.exists()
    (tmp_path / "config.json").write_text(json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, [str(marker)]]}))
    with pytest.raises(TriviumError):
        config.load(tmp_path)
    assert not marker.exists()


def test_nothing_of_ours_unpickles_a_file() -> None:
    """Where torch.load stands it takes weights alone; nothing asks numpy for objects, or evaluates text."""
    for path in Path(trivium.__file__ or "").parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open"), path
            assert options.get("allow_pickle") in (None, "False"), path
            assert name != "torch.load" or options.get("weights_only") == "True", path
