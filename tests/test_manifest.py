"""Files that are whole: written beside and renamed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trivium.errors import TriviumError
from trivium.manifest import file_beside, write_whole, written_beside


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"old", b"new"):
        with file_beside(path) as beside:
            beside.write_bytes(content)
            assert path.exists() == (content == b"new")
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_as_open_as_the_user_has_it(tmp_path: Path) -> None:
    """safetensors writes for the owner alone; a colleague or a web server is to read what lies there."""
    tensors = {"a": torch.ones(2)}
    before = os.umask(0o022)
    try:
        with file_beside(tmp_path / "a.safetensors") as beside:
            save_file(tensors, beside)
        with written_beside(tmp_path / "folder") as folder:
            (folder / "below").mkdir()
            save_file(tensors, folder / "below" / "b.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder" / "below" / "b.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder" / "below").stat().st_mode & 0o777 == 0o755


def test_a_folder_is_on_the_disk_before_it_is_seen_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave the name of a checkpoint with nothing in it. A file keeps its number when renamed."""
    target = tmp_path / "folder"
    synced: dict[bool, set[int]] = {False: set(), True: set()}  # by whether the folder was in its place
    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        synced[target.exists()].add(os.fstat(descriptor).st_ino)
        plain_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with written_beside(target) as folder:
        (folder / "below").mkdir()
        for name in ("a.json", "below/b.safetensors", "below/c.json"):
            (folder / name).write_text("whole")
    inside = [target, *target.rglob("*")]
    assert len(inside) == 5
    assert {path.name for path in inside if path.stat().st_ino not in synced[False]} == set()
    assert tmp_path.stat().st_ino in synced[True]

    synced[False].clear()
    target = tmp_path / "a.bin"
    with file_beside(target) as beside:
        beside.write_bytes(b"whole")
    assert target.stat().st_ino in synced[False]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_leads_to_the_folder_that_is_written(tmp_path: Path, exists: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "model")
    if exists:
        (disk / "model").mkdir()
    with written_beside(tmp_path / "out") as folder:
        assert folder.parent == disk
        (folder / "a.json").write_text("whole")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / "a.json").read_text() == "whole"
    assert os.listdir(disk) == ["model"]
    with (
        pytest.raises(TriviumError, match="disk/model exists already and is not empty"),
        written_beside(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_the_old_file_and_is_raised_as_it_is(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def broken() -> None:
        with file_beside(path) as beside:
            beside.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        broken()
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    code = f"""
import os, signal
from pathlib import Path
from trivium.manifest import file_beside
with file_beside(Path({str(tmp_path / "a.txt")!r})) as beside:
    beside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", code], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old"
    write_whole(tmp_path / "a.txt", "new")  # what the other left is not in the way
    assert (tmp_path / "a.txt").read_text() == "new"


def test_two_processes_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with file_beside(path) as beside:
        beside.write_text("the parent's")
        child = os.fork()
        if child == 0:
            write_whole(path, "the child's")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.read_text() == "the child's"
    assert path.read_text() == "the parent's"


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TriviumError, match=r"b\.txt cannot be written \("):
        write_whole(tmp_path / "file" / "b.txt", "x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(TriviumError, match="folder cannot be written"):
        write_whole(tmp_path / "folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
