"""Models by their id on a hub: from a cache as huggingface_hub keeps it, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.convert import peers
from trivium.load import load

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF_HOME with one model in it, as a download leaves it."""
    home = tmp_path_factory.mktemp("hf")
    repository = home / "hub" / "models--museum--tiny-flava"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    peers.save_with_tokenizer(peers.pretraining(), repository / "snapshots" / REVISION)
    return home


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings once, when it is imported."""
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    return subprocess.run(
        [sys.executable, "-m", "trivium", *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def test_a_model_is_found_by_its_id_and_revision(home: Path, tmp_path: Path) -> None:
    local = load(home / "hub" / "models--museum--tiny-flava" / "snapshots" / REVISION)
    for name in ("hf-hub:museum/tiny-flava", f"hf-hub:museum/tiny-flava@{REVISION}"):
        out = tmp_path / name[-5:]
        done = run(home, "convert", name, "--to", "trivium", "--out", str(out))
        assert done.returncode == 0, done.stderr
        converted = load(out).model.state_dict()
        assert converted.keys() == local.model.state_dict().keys()
        assert all(torch.equal(converted[key], value) for key, value in local.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf-hub:museum/other", "is not kept on this machine and the hub was not reached"),
        ("hf-hub:museum/tiny-flava@v9", "is not kept on this machine and the hub was not reached"),
        ("hf-hub:a/b/c", "is no id of a hub: write hf-hub:owner/name"),
        ("hf-hub:", "is no id of a hub: write hf-hub:owner/name"),
    ],
)
def test_what_is_not_there_is_one_sentence(home: Path, tmp_path: Path, name: str, says: str) -> None:
    done = run(home, "evaluate", name, "--out", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert says in done.stderr
    assert not (tmp_path / "out").exists()
