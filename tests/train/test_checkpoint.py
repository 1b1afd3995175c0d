from __future__ import annotations

import errno
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import Tiny, TinyMixture, export_of
from torch import nn

from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, newest_checkpoint, verify_manifest, write_manifest
from trivium.tensor_files import save_tensors
from trivium.train import checkpoint, optim
from trivium.train.optim import Optim
from trivium.train.protocol import Key
from trivium.train.step import step


def trained(steps: int, seed: int = 0) -> tuple[Tiny, torch.optim.Optimizer]:
    method = Tiny(seed)
    optimizer = optim.build(method, Optim())
    for at, batches in enumerate(TinyMixture().loader(0, 0, 1, steps)):
        step(method, batches, Key(0, batches[0].stream, at), optimizer)
    return method, optimizer


def save(folder: Path, step: int, method: Any, optimizer: torch.optim.Optimizer, export: Any, state: Any) -> Path:
    return checkpoint.write(folder, checkpoint.snapshot(step, method, optimizer, state), export)


def write(folder: Path, steps: int) -> Path:
    method, optimizer = trained(steps)
    return save(folder, steps, method, optimizer, export_of(method), {"seed": 0})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, 3)
    write(folder, 6)
    return folder


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    method, optimizer = trained(7)
    path = save(tmp_path, 7, method, optimizer, export_of(method), {"seed": 5})
    fresh = Tiny(seed=99)
    nn.init.constant_(fresh.queue, 3.0)
    fresh_optimizer = optim.build(fresh, Optim())
    assert checkpoint.restore(path, fresh, fresh_optimizer) == {"step": 7, "seed": 5}
    for name, tensor in method.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    before, after = optim.state_by_name(optimizer, method), optim.state_by_name(fresh_optimizer, fresh)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert fresh.model.head.weight is fresh.model.blocks[0][1].weight  # still tied
    verify_manifest(path)
    verify_manifest(path / "model")
    assert {p.name for p in (path / "training").iterdir()} == {
        *("optimizer.safetensors", "optimizer.json", "method.safetensors", "tensors.json", "state.json")
    }


def test_no_tensor_is_stored_twice(two: Path) -> None:
    """model/ holds the student and the codebook under names of its own; training/ holds the rest."""
    training = load_file(two / "step-00000006" / "training" / "method.safetensors")
    names = set(training)
    assert "queue" in names
    assert not any(name.startswith(("model.", "codebook")) for name in names)
    teacher = {name for name in names if name.startswith("teacher.")}
    assert names == teacher | {"queue"}
    assert not {"teacher.head.weight", "teacher.blocks.0.1.weight"} <= teacher  # tied: one of the two


def test_a_snapshot_is_of_its_moment(tmp_path: Path) -> None:
    """Whatever is trained afterwards, the files are those that would have been written then."""
    method, optimizer = trained(6)
    at_once = save(tmp_path / "at-once", 6, method, optimizer, export_of(method), {"seed": 0})
    taken = checkpoint.snapshot(6, method, optimizer, {"seed": 0})
    with torch.no_grad():
        moving = [tensor for name, tensor in method.state_dict().items() if not name.startswith("codebook.")]
        for tensor in [*moving, *optim.state_by_name(optimizer, method).values()]:
            tensor.fill_(7.0)
    optimizer.param_groups[0]["lr"] = 123.0
    later = checkpoint.write(tmp_path / "later", taken, export_of(method))
    assert files_of(later) == files_of(at_once)
    for name in files_of(later):
        assert (later / name).read_bytes() == (at_once / name).read_bytes(), name


def test_only_tensors_and_json(two: Path) -> None:
    suffixes = {path.suffix for path in two.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    for path in two.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.keys() is not None


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def damaged(file: Path, content: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def assert_passed_over(two: Path, file: Path) -> None:
    """The newer checkpoint is not used, and the sentence names the file that is damaged, whichever it is."""
    said: list[str] = []
    assert newest_checkpoint(two, said.append) == two / "step-00000003"
    (sentence,) = said
    assert sentence.startswith("step-00000006 is damaged and is passed over")
    assert f"({file}: " in sentence


def test_each_file_cut_at_ten_offsets(two: Path) -> None:
    newest = two / "step-00000006"
    assert len(files_of(newest)) == 10
    for file in (newest / name for name in files_of(newest)):
        whole = file.read_bytes()
        last = len(whole.rstrip()) - 1  # a JSON file that lost its last newline alone says the same
        for at in sorted({round(n * last / 9) for n in range(10)}):
            with damaged(file, whole[:at]):
                assert_passed_over(two, file)
    assert newest_checkpoint(two, pytest.fail) == newest


def test_a_hundred_flipped_bits(two: Path) -> None:
    """Ten in each file, so that small ones have their share."""
    newest = two / "step-00000006"
    draws = random.Random(0)
    for file in (newest / name for name in files_of(newest)):
        whole = file.read_bytes()
        for _ in range(10):
            flipped = bytearray(whole)
            flipped[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
            with damaged(file, bytes(flipped)):
                assert_passed_over(two, file)
    assert newest_checkpoint(two, pytest.fail) == newest


def test_whole_and_in_shards_are_one_checkpoint(tmp_path: Path) -> None:
    """Written in shards, restored, written whole: the files are those of a checkpoint that was never cut."""
    method, optimizer = trained(6)
    straight = save(tmp_path / "straight", 6, method, optimizer, export_of(method), {})

    def in_shards(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        export_of(method)(folder, weights)
        whole = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_tensors(whole, folder / "model.safetensors", shard_bytes=150)
        write_manifest(folder)

    taken = checkpoint.snapshot(6, method, optimizer, {})
    shards = checkpoint.write(tmp_path / "shards", taken, in_shards, shard_bytes=300)
    assert len(list((shards / "model").glob("model-*.safetensors"))) > 1
    assert len(list((shards / "training").glob("optimizer-*.safetensors"))) > 1
    assert len(list((shards / "training").glob("method-*.safetensors"))) > 1
    verify_manifest(shards)
    verify_manifest(shards / "model")
    fresh = Tiny(seed=99)
    fresh_optimizer = optim.build(fresh, Optim())
    checkpoint.restore(shards, fresh, fresh_optimizer)
    back = save(tmp_path / "back", 6, fresh, fresh_optimizer, export_of(fresh), {})
    assert files_of(back) == files_of(straight)
    for name in files_of(straight):
        assert (back / name).read_bytes() == (straight / name).read_bytes(), name


@pytest.mark.parametrize("lost", ["model/model.safetensors", "training/state.json", "manifest.json"])
def test_a_missing_file_is_named(two: Path, tmp_path: Path, lost: str) -> None:
    copy = shutil.copytree(two, tmp_path / "copy")
    (copy / "step-00000006" / lost).unlink()
    said: list[str] = []
    assert newest_checkpoint(copy, said.append) == copy / "step-00000003"
    assert Path(lost).name in said[0]


def test_half_written_folders_are_not_checkpoints(two: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(two, tmp_path / "copy")
    shutil.copytree(copy / "step-00000006", copy / ".tmp-step-00000009")
    assert newest_checkpoint(copy, pytest.fail) == copy / "step-00000006"
    checkpoint.remove_leftovers(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["step-00000003", "step-00000006"]
    assert newest_checkpoint(tmp_path / "absent", pytest.fail) is None


def test_a_sound_checkpoint_is_never_written_over(two: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(two, tmp_path / "copy")
    with pytest.raises(TriviumError, match="exists already and is sound"):
        write(copy, 6)
    weights = copy / "step-00000006" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert write(copy, 6) == copy / "step-00000006"  # the damaged one is moved aside
    verify_manifest(copy / "step-00000006")
    assert (copy / "damaged-0-step-00000006").is_dir()
    assert [path.name for path in checkpoints_in(copy)] == ["step-00000003", "step-00000006"]


def empty(folder: Path) -> None:
    for path in [*folder.iterdir()]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def without_training(folder: Path) -> None:
    shutil.rmtree(folder / "training")


def half_written(folder: Path) -> None:
    folder.rename(folder.with_name(f".tmp-{folder.name}"))


def half_written_twice(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name(f".tmp-{folder.name}"))
    without_manifest(folder)


@pytest.mark.parametrize("part", [empty, without_manifest, without_training, half_written, half_written_twice])
def test_a_part_of_the_same_step_is_not_in_the_way(two: Path, tmp_path: Path, part: Callable[[Path], None]) -> None:
    copy = shutil.copytree(two, tmp_path / "copy")
    part(copy / "step-00000006")
    assert newest_checkpoint(copy, lambda sentence: None) == copy / "step-00000003"
    write(copy, 6)
    assert newest_checkpoint(copy, pytest.fail) == copy / "step-00000006"
    assert not list(copy.glob(".tmp-*"))
    for name in files_of(two / "step-00000006"):
        assert (copy / "step-00000006" / name).read_bytes() == (two / "step-00000006" / name).read_bytes()


@pytest.mark.parametrize("limit", [200, 2000, 3000])
def test_a_full_disk(tmp_path: Path, limit: int) -> None:
    """A file-size limit makes writes fail as a full disk does: in json files, in our tensors, in the export's."""
    write(tmp_path, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    method, optimizer = trained(4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(TriviumError, match=r"step-00000004 could not be written .*free some space") as caught:
            save(tmp_path, 4, method, optimizer, export_of(method), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    save(tmp_path, 4, method, optimizer, export_of(method), {})  # with space again, it goes on


@pytest.mark.parametrize("error", [RuntimeError("a bug in the export"), KeyboardInterrupt()])
def test_nothing_stays_of_a_save_that_broke_off(tmp_path: Path, error: BaseException) -> None:
    method, optimizer = trained(1)

    def export(folder: Path, weights: Any) -> None:
        export_of(method)(folder, weights)
        raise error

    with pytest.raises(type(error)):
        save(tmp_path, 1, method, optimizer, export, {})
    assert list(tmp_path.iterdir()) == []


def numbered(folder: Path, *steps: int) -> None:
    for number in steps:
        checkpoint.folder_of(folder, number).mkdir(parents=True)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "spared", "left"),
    [
        (1, None, (), [50]),
        (2, None, (), [40, 50]),
        (1, 20, (), [20, 40, 50]),
        (1, None, (30, None), [30, 50]),
        (9, None, (), [10, 20, 30, 40, 50]),
    ],
)
def test_pruning(
    tmp_path: Path, keep_last: int, keep_every: int | None, spared: tuple[int | None, ...], left: list[int]
) -> None:
    numbered(tmp_path, 10, 20, 30, 40, 50)
    checkpoint.prune(tmp_path, keep_last, keep_every, spared)
    assert [checkpoint.step_of(path) for path in checkpoints_in(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


@pytest.mark.parametrize("fails", ["rmtree", "rename"])
def test_what_cannot_be_removed_is_told_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    """As where a network's file system keeps files that are still read. The same step may come again, and be removed
    again."""

    def busy(*_: object, **more: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    numbered(tmp_path, 10, 20)
    with monkeypatch.context() as patched:
        patched.setattr(*((shutil, "rmtree", busy) if fails == "rmtree" else (Path, "rename", busy)))
        for _ in range(2):
            checkpoint.prune(tmp_path, 1)
            assert f"{tmp_path}/step-00000010 cannot be removed (Directory not empty)" in capsys.readouterr().err
            checkpoint.folder_of(tmp_path, 10).mkdir(exist_ok=True)
        checkpoint.remove_leftovers(tmp_path)
        assert (".tmp-1-step-00000010 cannot be removed" in capsys.readouterr().err) == (fails == "rmtree")
    checkpoint.prune(tmp_path, 1)
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def rename_a_tensor(method: Tiny) -> None:
    method.model.other = method.model.text_head
    del method.model.text_head


def resize_a_tensor(method: Tiny) -> None:
    method.queue = torch.zeros(5, 6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (rename_a_tensor, r"model\.other\.bias is absent there and float32 \[1\] here"),
        (resize_a_tensor, r"queue is float32 \[20, 6\] there and float32 \[5, 6\] here"),
    ],
)
def test_a_checkpoint_of_another_recipe(two: Path, change: Callable[[Tiny], None], sentence: str) -> None:
    method = Tiny()
    change(method)
    with pytest.raises(TriviumError, match=f"does not fit this recipe: {sentence}"):
        checkpoint.restore(two / "step-00000006", method, None)


def test_another_optimizer_is_refused(two: Path) -> None:
    method = Tiny()
    with pytest.raises(TriviumError, match="holds the state of AdamW"):
        checkpoint.restore(two / "step-00000006", method, torch.optim.SGD(method.model.parameters(), lr=1.0))


def test_types_and_shapes_that_are_easy_to_lose(tmp_path: Path) -> None:
    method = nn.Module()
    method.exported = lambda: method  # type: ignore[assignment]
    method.register_buffer("scalar", torch.tensor(3.5))
    method.register_buffer("count", torch.tensor([2**40]))
    method.register_buffer("bfloat", torch.arange(6).to(torch.bfloat16).view(2, 3))
    method.register_buffer("flags", torch.tensor([True, False]))
    method.register_buffer("nothing", torch.zeros(0, 4))
    method.register_buffer("part", torch.arange(100.0)[10:13])
    method.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
    method.register_buffer("same_bytes", torch.zeros(4, dtype=torch.int32))
    method.register_buffer("same_bytes_other_type", torch.zeros(4))
    method.weight = nn.Parameter(torch.ones(1))
    optimizer = optim.build(method, Optim())
    path = save(tmp_path, 1, method, optimizer, lambda folder, weights: None, {})
    expected = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    for tensor in method.state_dict().values():
        tensor.zero_()
    checkpoint.restore(path, method, optimizer)
    for name, tensor in method.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    assert (path / "training" / "method.safetensors").stat().st_size < 2000  # the slice alone, not what it is cut from
