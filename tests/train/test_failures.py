"""What may go wrong in a run: it is killed, its files are damaged, gradients, samples, memory or the disk fail it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from runs import assert_same_state, metrics_of, state_of, stopped_at
from tiny_run import TinyMixture, make, real_mixture, with_train

from tests.other_process import held_elsewhere, is_free_elsewhere
from trivium import manifest
from trivium.data.mixture import StreamMixture
from trivium.data.sources import open_source
from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, newest_checkpoint
from trivium.train import checkpoint
from trivium.train.mishaps import Replaced, not_finite
from trivium.train.optim import Optim
from trivium.train.protocol import Batch, Stream
from trivium.train.trainer import train


def start(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run tiny_run.py as a forked process; returns exit code (negative: killed by that signal), stdout, stderr."""

    def child() -> None:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["tiny_run.py", str(folder), *arguments]
        sys.exit(tiny_run.main())

    folder.mkdir(exist_ok=True)
    out, err = folder.with_name("stdout"), folder.with_name("stderr")
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None
    return process.exitcode, out.read_text(), err.read_text()


def test_signals_in_a_process_of_its_own(straight: Path, tmp_path: Path) -> None:
    """SIGTERM saves and exits with 0, Ctrl-C saves and exits with 130; a third start finishes the run."""
    run = tmp_path / "run"
    code, out, err = start(run, "term", "7")
    assert (code, "Traceback" in err) == (0, False), err
    assert f"saved after step 7 of 20; to go on: trivium pretrain {run} --resume\n" in out
    assert "SIGTERM: finishing this step and saving" in err
    code, out, err = start(run, "int", "12", "--resume")
    assert (code, "Traceback" in err) == (130, False), err
    assert "resuming after step 7 of 20" in out
    code, out, err = start(run, "none", "0", "--resume")
    assert (code, "Traceback" in err) == (0, False), err
    assert "resuming after step 12 of 20" in out
    assert_same_state(straight, run, 20)


def test_killed_in_a_save(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(run, "kill-in-save", "10")[0] == -signal.SIGKILL
    assert (run / "checkpoints" / ".tmp-step-00000010").is_dir()
    code, out, err = start(run, "none", "0", "--resume")
    assert code == 0, err
    assert "resuming after step 5 of 20" in out
    assert_same_state(straight, run, 20)
    assert not list((run / "checkpoints").glob(".tmp-*"))
    steps = [(line["step"], line["stream"]) for line in metrics_of(run)]
    assert len(steps) == len(set(steps))  # no doubles of steps 6 to 9


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_process_works_in_is_left_to_it(straight: Path, tmp_path: Path, resume: bool) -> None:
    """Nothing is touched there; a killed process holds it no more."""
    run = tmp_path / "run"
    if resume:
        train(stopped_at(make(with_train(log_every=1)), 10), run)
    run.mkdir(exist_ok=True)
    with held_elsewhere(run / ".lock") as other:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(TriviumError, match=f"{run}: another process is at work on this run: wait for its end"):
            train(make(with_train(log_every=1)), run, resume=resume)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        other.kill()
        other.wait()
        train(make(with_train(log_every=1)), run, resume=resume)
    assert_same_state(straight, run, 20)


def test_a_run_holds_its_folder_and_goes_on_where_there_are_no_locks(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from another process, in its midst and at its end."""

    def tried_elsewhere(step: int) -> None:
        if step == 3:
            assert multiprocessing.active_children()
            assert not is_free_elsewhere(lock)

    run, lock = make(None, real_mixture(1)), tmp_path / "run" / ".lock"
    run.method.before_accept = tried_elsewhere  # type: ignore[assignment]
    train(run, tmp_path / "run")
    assert is_free_elsewhere(lock)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    train(make(with_train(log_every=1)), tmp_path / "other")
    assert_same_state(straight, tmp_path / "other", 20)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    recipe = tiny_run.Recipe(optim=Optim(freeze=("nothing",)))
    with pytest.raises(TriviumError, match='no parameter is called "nothing"'):
        train(make(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_anywhere(straight: Path, tmp_path: Path) -> None:
    """SIGKILL at 15 moments spread over a run that saves at every step: each time the rest equals a straight run."""
    for number in range(15):
        run = tmp_path / str(number)

        def child(run: Path = run) -> None:
            sys.stdout = (run.parent / "stdout").open("w")
            train(make(with_train(save_every=1, log_every=1)), run)
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        while not (run / "config.json").exists():
            time.sleep(0.001)
        time.sleep(number * 0.2)
        process.kill()
        process.join()
        train(make(with_train(save_every=1, log_every=1)), run, resume=True)
        assert_same_state(straight, run, 20)
        assert metrics_of(straight) == metrics_of(run)


def test_a_killed_data_worker_stops_the_run_and_the_rest_is_exact(tmp_path: Path) -> None:
    """SIGKILL of the worker in the midst of a step: one sentence, the last checkpoint stands, nothing is left out."""
    recipe = with_train(log_every=1, save_every=5)
    train(make(recipe, real_mixture(0)), tmp_path / "straight")
    run = make(recipe, real_mixture(1))

    def kill(step: int) -> None:
        if step + 1 == 8:
            [worker] = multiprocessing.active_children()
            worker.kill()
            worker.join()

    run.method.before_accept = kill  # type: ignore[assignment]
    with pytest.raises(TriviumError, match=r"a worker that reads the data ended unexpectedly .*--resume"):
        train(run, tmp_path / "killed")
    assert not multiprocessing.active_children()
    assert [checkpoint.step_of(path) for path in checkpoints_in(tmp_path / "killed" / "checkpoints")] == [5]
    train(make(recipe, real_mixture(1)), tmp_path / "killed", resume=True)
    assert_same_state(tmp_path / "straight", tmp_path / "killed", 20)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "killed")
    assert (tmp_path / "straight" / "skipped.jsonl").read_text() == (tmp_path / "killed" / "skipped.jsonl").read_text()


def test_a_damaged_checkpoint_is_passed_over(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(stopped_at(make(with_train(save_every=4, log_every=1)), 10), tmp_path)
    weights = tmp_path / "checkpoints" / "step-00000010" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 16
    weights.write_bytes(content)
    capsys.readouterr()
    train(make(with_train(save_every=4, log_every=1)), tmp_path, resume=True)
    said = capsys.readouterr().out
    assert "step-00000010 is damaged and is passed over" in said
    assert "model.safetensors: its bytes changed" in said
    assert "resuming after step 8 of 20" in said
    assert_same_state(straight, tmp_path, 20)
    assert metrics_of(straight) == metrics_of(tmp_path)


def test_pruning_spares_the_sound_checkpoint_where_a_later_one_is_damaged(straight: Path, tmp_path: Path) -> None:
    train(stopped_at(make(with_train(save_every=5, log_every=1)), 10), tmp_path)
    weights = tmp_path / "checkpoints" / "step-00000010" / "model" / "model.safetensors"
    weights.write_bytes(DAMAGES["flipped"](weights.read_bytes()))
    recipe = with_train(save_every=5, log_every=1, keep_last=1)
    assert train(stopped_at(make(recipe), 8), tmp_path, resume=True).done == 8
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        *("damaged-0-step-00000010", "step-00000008")
    ]
    assert train(make(recipe), tmp_path, resume=True).done == 20
    assert_same_state(straight, tmp_path, 20)


@pytest.mark.parametrize("errors", [1, 1000])
def test_a_checkpoint_that_the_disk_does_not_give_is_passed_over(
    errors: int, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, or for good: a run that goes on from the one before writes its step 10 anew."""
    train(stopped_at(make(with_train(save_every=4, log_every=1)), 10), tmp_path)
    weights = tmp_path / "checkpoints" / "step-00000010" / "model" / "model.safetensors"
    plain_digest = manifest.sha256

    left = [errors]

    def sha256(path: Path) -> str:
        if path == weights and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain_digest(path)

    monkeypatch.setattr(manifest, "sha256", sha256)
    capsys.readouterr()
    train(make(with_train(save_every=2, log_every=1)), tmp_path, resume=True)
    said = capsys.readouterr().out
    assert f"step-00000010 is damaged and is passed over ({weights} cannot be read (Input/output error): " in said
    assert "resuming after step 8 of 20" in said
    assert_same_state(straight, tmp_path, 20)


DAMAGES = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "flipped": lambda whole: whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
}


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_whichever_file_is_damaged_a_resumed_run_ends_the_same(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    train(stopped_at(make(with_train(save_every=4, log_every=1)), 10), tmp_path / "stopped")
    newest = tmp_path / "stopped" / "checkpoints" / "step-00000010"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) == 10
    for number, file in enumerate(files):
        run = Path(shutil.copytree(tmp_path / "stopped", tmp_path / str(number)))
        bad = run / "checkpoints" / "step-00000010" / file
        bad.write_bytes(DAMAGES[damage](bad.read_bytes()))
        capsys.readouterr()
        train(make(with_train(save_every=4, log_every=1)), run, resume=True)
        said = capsys.readouterr().out
        assert f"step-00000010 is damaged and is passed over ({bad}: " in said
        assert "resuming after step 8 of 20" in said
        assert_same_state(straight, run, 20)


def test_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    train(stopped_at(make(), 3), tmp_path)
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").write_text("{}")
    with pytest.raises(TriviumError, match="every checkpoint is damaged"):
        train(make(), tmp_path, resume=True)


def test_killed_before_the_first_checkpoint(straight: Path, tmp_path: Path) -> None:
    run = make(with_train(log_every=1))

    def crash(step: int) -> None:
        if step == 4:
            raise RuntimeError("power cut")

    run.method.before_accept = crash  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n{"step": 5, "los')  # a byte that is no text, and a line cut short
    train(make(with_train(log_every=1)), tmp_path, resume=True)
    assert_same_state(straight, tmp_path, 20)
    assert metrics_of(straight) == metrics_of(tmp_path)


def test_a_gradient_that_is_not_finite_skips_the_step(tmp_path: Path) -> None:
    outcome = train(make(with_train(log_every=1), TinyMixture(nan_at=frozenset({3, 4, 7, 8}))), tmp_path)
    assert outcome.done == 20
    assert [line["step"] for line in metrics_of(tmp_path) if "skipped" in line] == [4, 5, 8, 9]
    assert all(tensor.isfinite().all() for tensor in state_of(tmp_path, 20).values())


def test_three_of_one_stream_in_a_row_stop_the_run(tmp_path: Path) -> None:
    """Sound steps of another stream between them are no excuse."""
    mixture = TinyMixture(nan_at=frozenset({6, 7, 9}))
    places = ("step 7 with places 32 to 39", "step 8 with places 40 to 47", "step 10 with places 48 to 55")
    sentence = f"three steps of stream pairs in a row, {', '.join(places)}: lower --optim.lr"
    with pytest.raises(TriviumError, match=sentence):
        train(make(with_train(log_every=1, save_every=5), mixture), tmp_path)
    assert [checkpoint.step_of(path) for path in checkpoints_in(tmp_path / "checkpoints")] == [5]
    assert metrics_of(tmp_path)[-1]["step"] == 10  # the log says how it ended
    named = [json.loads(line) for line in (tmp_path / "not_finite.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in named] == [f"pairs {place}" for place in range(32, 56)]


def test_samples_to_look_at_are_named_by_file(tmp_path: Path) -> None:
    path = tmp_path / "words.csv"
    path.write_text("text\n" + "".join(f"word {row}\n" for row in range(50)))
    collate = tiny_run.TinyCollate()
    collate.false_pairs = 0.0
    mixture = StreamMixture([Stream("text", open_source("text", [path]), collate, 6, 3)], seed=0)
    first_places = [range(mixture.place_at(step), mixture.place_at(step) + 2) for step in (6, 7, 8)]
    rows = [int(row) for places in first_places for row in mixture.readers["text"].order.rows(np.array(places))]
    sentence = not_finite(tmp_path / "not_finite.jsonl", mixture, [6, 7, 8])
    assert f"the 18 samples that {tmp_path}/not_finite.jsonl names" in sentence
    names = sentence.partition("among them ")[2].split("; ")
    assert names == [f"{path} (line {row + 2})" for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "not_finite.jsonl").read_text().splitlines()]
    all_places = [(step, place) for step in (6, 7, 8) for place in mixture.place_at(step) + np.arange(6)]
    for (step, place), line in zip(all_places, lines, strict=True):
        [row] = mixture.readers["text"].order.rows(np.array([place]))
        assert line == {"step": step + 1, "stream": "text", "sample": f"{path} (line {row + 2})"}


def test_replaced_samples_are_logged_and_too_many_are_fatal(tmp_path: Path) -> None:
    train(make(None, TinyMixture(bad_at=frozenset({2, 5}))), tmp_path / "few")
    lines = [json.loads(line) for line in (tmp_path / "few" / "skipped.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 3, "stream": "text", "sample": "sample 2.png: truncated"},
        {"step": 6, "stream": "text", "sample": "sample 5.png: truncated"},
    ]
    meter = Replaced(tmp_path / "skipped.jsonl", window=200, rate=0.05)

    def note(step: int, bad: int) -> None:
        rows = torch.arange(20)
        meter.note(step, [Batch("pairs", rows, rows, bad=tuple(f"{step}-{n}.png: cut" for n in range(bad)))])

    for step in range(10):
        note(step, 1)  # 10 of 200: at the rate, not above
    for step in range(10, 15):
        note(step, 2)
    with pytest.raises(TriviumError, match=r"11 of the last 120 samples were bad .* 15-0\.png: cut"):
        note(15, 1)


def test_the_fatal_rate_belongs_to_the_recipe(tmp_path: Path) -> None:
    mixture = TinyMixture(bad_at=frozenset(range(20)))  # one sample of eight, or of six
    assert train(make(with_train(bad_rate=0.2, bad_window=60), mixture), tmp_path / "lenient").done == 20
    with pytest.raises(TriviumError, match=r"4 of the last 30 samples were bad \(more than 5% of 60\)"):
        train(make(with_train(bad_rate=0.05, bad_window=60), mixture), tmp_path / "strict")
    with pytest.raises(TriviumError, match=r"train\.bad_rate is 5: it is a share, from 0 to 1"):
        with_train(bad_rate=5)


def test_a_run_that_is_stopped_often_counts_its_bad_samples_on(tmp_path: Path) -> None:
    """Stopped every second step it ends where a straight run does; a higher rate lets it go on."""
    recipe = with_train(bad_rate=0.05, bad_window=60)
    mixture = TinyMixture(bad_at=frozenset(range(20)))
    train(stopped_at(make(recipe, mixture), 2), tmp_path)
    with pytest.raises(TriviumError, match=r"4 of the last 30 samples were bad \(more than 5% of 60\)"):
        train(stopped_at(make(recipe, mixture), 4), tmp_path, resume=True)
    assert train(make(with_train(bad_rate=0.2, bad_window=60), mixture), tmp_path, resume=True).done == 20


def test_running_out_of_memory_names_the_dial(tmp_path: Path) -> None:
    run = make()

    def exhaust(step: int) -> None:
        if step == 2:
            torch.empty(1 << 60, dtype=torch.uint8)

    run.method.before_accept = exhaust  # type: ignore[assignment]
    with pytest.raises(TriviumError, match=r"stream text with 3 samples at once: use --train\.micro-batch 1 "):
        train(run, tmp_path)
    other = make()

    def fail(step: int) -> None:
        raise RuntimeError("shapes do not match")

    other.method.before_accept = fail  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(other, tmp_path / "other")


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """The sentence stops the run after a step at the latest, and the same run goes on when there is space."""
    run = make(with_train(save_every=5, log_every=1, steps=10_000))
    plain_export = run.export

    def export(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        if folder.parent.name.endswith("10"):
            raise OSError(28, "No space left on device")
        plain_export(folder, weights)

    run.export = export
    with pytest.raises(TriviumError, match=r"step-00000010 could not be written .*No space left on device"):
        train(run, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert metrics_of(tmp_path)[-1]["step"] <= 15  # the next save at the latest
    run.export = plain_export
    assert train(stopped_at(run, 20), tmp_path, resume=True).done == 20


def on_a_small_disk(folder: Path, size: str, action: Callable[[], None]) -> None:
    """Run an action in a forked process that finds a file system of `size` mounted at `folder`."""
    new_mounts, new_user, refused = 0x00020000, 0x10000000, 77

    def child() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(new_mounts) and libc.unshare(new_mounts | new_user):
            os._exit(refused)
        if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
            os._exit(refused)
        action()

    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=120)
    if process.exitcode == refused:
        pytest.skip("this system lets no test mount a small disk")
    assert process.exitcode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a small disk is a tmpfs of Linux")
def test_a_disk_that_is_really_full(straight: Path, tmp_path: Path) -> None:
    """Something else takes the rest of the disk after step 12: what was saved stays, and the run says why it ends."""
    disk = tmp_path / "disk"

    def fill(step: int) -> None:
        if step + 1 == 12:
            saved, patience = disk / "run" / "checkpoints" / "step-00000010", time.monotonic() + 60
            while not saved.exists() and time.monotonic() < patience:  # it is written while training goes on
                time.sleep(0.01)
            with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    def action() -> None:
        recipe = with_train(save_every=5, log_every=1)
        run = make(recipe)
        run.method.before_accept = fill  # type: ignore[assignment]
        with pytest.raises(TriviumError, match=r"(could not|cannot) be written .*No space left on device"):
            train(run, disk / "run")
        names = [path.name for path in sorted((disk / "run" / "checkpoints").iterdir())]
        assert names == ["step-00000005", "step-00000010"]
        assert newest_checkpoint(disk / "run" / "checkpoints", pytest.fail) is not None
        (disk / "filler").unlink()
        train(make(recipe), disk / "run", resume=True)
        assert_same_state(straight, disk / "run", 20)
        assert metrics_of(straight) == metrics_of(disk / "run")

    on_a_small_disk(disk, "600k", action)
