"""Features are a cache: where they cannot be kept, nothing is lost but the time of the next call."""

from __future__ import annotations

import pwd
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.evaluate.datasets import miniatures
from trivium.errors import TriviumError
from trivium.evaluate import feature_store
from trivium.evaluate.datasets import find, layouts
from trivium.evaluate.datasets.pictures import DataSet
from trivium.evaluate.feature_store import PixelEncoder, features


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a kilobyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("is_full", [False, True], ids=["a file in place of the folder", "a full disk"])
def test_features_that_cannot_be_kept_are_returned_all_the_same_and_that_is_said_once(
    is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "PIECE", 5)
    miniatures.dtd(tmp_path)
    data = find(layouts.BY_NAME["DTD"], tmp_path)
    assert isinstance(data, DataSet)
    expected = features(PixelEncoder(), data.train.pictures, tmp_path / "kept")
    folder = tmp_path / "cache"
    said: list[str] = []
    if is_full:
        with full_disk():
            found = features(PixelEncoder(), data.train.pictures, folder, said.append)
        assert not [path for path in folder.rglob("*") if path.is_file()], "nothing half-written stays"
    else:
        folder.write_text("")
        found = features(PixelEncoder(), data.train.pictures, folder, said.append)
    torch.testing.assert_close(found.readings, expected.readings, rtol=0, atol=0)
    assert found.digests == expected.digests and found.rows_N.tolist() == list(range(12)) and found.is_final
    [sentence] = [each for each in said if "cannot be written" in each]
    why = ".*File too large.*" if is_full else "Not a directory"
    assert re.fullmatch(
        rf"{folder}/\w+/000000000\.safetensors cannot be written \({why}\), so .* set XDG_CACHE_HOME", sentence
    )


def test_a_cache_folder_that_can_neither_be_found_nor_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert feature_store.make_cache_root() == feature_store.make_cache_root() == feature_store.cache_root()
    assert feature_store.cache_root().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TriviumError, match=r"keep figures and features in \(.*file.*\): set XDG_CACHE_HOME"):
        feature_store.make_cache_root()

    def unknown(_: int) -> None:
        raise KeyError("this user is in no table of users")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(TriviumError, match=r"\(Could not determine home directory\.\): set XDG_CACHE_HOME"):
        feature_store.make_cache_root()
