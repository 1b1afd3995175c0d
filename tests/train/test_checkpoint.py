from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import Tiny, TinyMixture, export_of
from torch import nn

from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, newest_checkpoint, verify_manifest
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


def test_only_tensors_and_json(two: Path) -> None:
    suffixes = {path.suffix for path in two.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    for path in two.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.keys() is not None


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), cut=st.booleans())
def test_any_flipped_bit_and_any_cut_is_found(two: Path, data: st.DataObject, cut: bool) -> None:
    newest = two / "step-00000006"
    file = newest / data.draw(st.sampled_from(files_of(newest)), label="file")
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1), label="at")
    bit = data.draw(st.integers(0, 7), label="bit")
    flipped = whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
    if file.name == "manifest.json" and cut and whole[at:].strip() == b"":
        return  # a manifest that lost its last newline says the same
    said: list[str] = []
    try:
        file.write_bytes(whole[:at] if cut else flipped)
        assert newest_checkpoint(two, said.append) == two / "step-00000003"
    finally:
        file.write_bytes(whole)
    assert "step-00000006 is damaged" in said[0]
    assert len(said) == 1
    assert str(newest) in said[0]
    assert newest_checkpoint(two, said.append) == newest


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
    ("keep_last", "keep_every", "left"),
    [(1, None, [50]), (2, None, [40, 50]), (1, 20, [20, 40, 50]), (9, None, [10, 20, 30, 40, 50])],
)
def test_pruning(tmp_path: Path, keep_last: int, keep_every: int | None, left: list[int]) -> None:
    numbered(tmp_path, 10, 20, 30, 40, 50)
    checkpoint.prune(tmp_path, keep_last, keep_every)
    assert [checkpoint.step_of(path) for path in checkpoints_in(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


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
