from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_run
import torch
from tiny_run import Recipe, TinyMixture, make, real_mixture, with_train

from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, newest_checkpoint
from trivium.train import budget, checkpoint, distributed, optim, precision, trainer
from trivium.train.mishaps import Replaced
from trivium.train.optim import Optim
from trivium.train.protocol import Batch
from trivium.train.trainer import Outcome, Run, train


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of method and optimizer in a checkpoint."""
    method = tiny_run.Tiny(seed=3)
    optimizer = optim.build(method, Optim())
    checkpoint.restore(checkpoint.folder_of(folder / "checkpoints", step), method, optimizer)
    return dict(method.state_dict()) | optim.state_by_name(optimizer, method)


def assert_same_state(left: Path, right: Path, step: int) -> None:
    one, two = state_of(left, step), state_of(right, step)
    assert one.keys() == two.keys()
    assert len(one) > 30
    for name in one:
        assert torch.equal(one[name], two[name]), name


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "samples_per_second")} for line in lines]


def stopped_at(run: Run, at: int) -> Run:
    """The same run; this process gets SIGTERM in the midst of step `at`."""

    def stop(step: int) -> None:
        if step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)

    run.method.before_accept = stop  # type: ignore[assignment]
    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    outcome = train(make(with_train(log_every=1)), folder)
    assert (outcome.done, outcome.signal, outcome.exit_code) == (20, None, 0)
    return folder


@pytest.mark.parametrize("at", [1, 7, 10, 19])
def test_a_stopped_and_resumed_run_equals_a_straight_one(straight: Path, tmp_path: Path, at: int) -> None:
    outcome = train(stopped_at(make(with_train(log_every=1)), at), tmp_path)
    assert (outcome.done, outcome.signal, outcome.exit_code) == (at, signal.SIGTERM, 0)
    torch.manual_seed(1234)  # no random state may matter
    assert train(make(with_train(log_every=1)), tmp_path, resume=True).done == 20
    assert_same_state(straight, tmp_path, 20)
    assert metrics_of(straight) == metrics_of(tmp_path)
    passport = json.loads((tmp_path / "passport.json").read_text())
    assert [entry["step"] for entry in passport["resumed"]] == [at]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ten_and_ten_steps_are_twenty_with_the_real_loader(tmp_path: Path, workers: int) -> None:
    recipe = with_train(log_every=1)
    train(make(recipe, real_mixture(0)), tmp_path / "straight")
    train(stopped_at(make(recipe, real_mixture(workers)), 10), tmp_path / "halves")
    train(make(recipe, real_mixture(workers)), tmp_path / "halves", resume=True)
    assert_same_state(tmp_path / "straight", tmp_path / "halves", 20)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "halves")
    skipped = (tmp_path / "straight" / "skipped.jsonl").read_text()
    assert skipped == (tmp_path / "halves" / "skipped.jsonl").read_text()
    assert "tiny.csv (line 3): no such picture" in skipped


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


@pytest.mark.parametrize("fails", [False, True])
def test_training_goes_on_while_a_checkpoint_is_written(straight: Path, tmp_path: Path, fails: bool) -> None:
    """The export of step 5 waits until step 9 is done: a save that made the steps wait would never end. What it writes
    is step 5 to the bit, and where it fails the next step is the last."""
    run = make(with_train(save_every=5, log_every=1, keep_last=9))
    plain_export = run.export
    ninth = threading.Event()

    def export(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        if folder.parent.name.endswith("05"):
            assert ninth.wait(timeout=60)
            if fails:
                raise OSError(28, "No space left on device")
        plain_export(folder, weights)

    def at(step: int) -> None:
        if step + 1 == 9:
            ninth.set()

    run.export, run.method.before_accept = export, at  # type: ignore[assignment]
    if fails:
        with pytest.raises(TriviumError, match=r"step-00000005 could not be written .*No space left on device"):
            train(run, tmp_path)
        assert not list((tmp_path / "checkpoints").iterdir())
        assert metrics_of(tmp_path)[-1]["step"] in (9, 10)  # it fails while step 9 or 10 is done
        return
    train(run, tmp_path)
    assert_same_state(straight, tmp_path, 20)
    train(stopped_at(make(with_train(log_every=1)), 5), tmp_path / "five")
    assert_same_state(tmp_path / "five", tmp_path, 5)


def test_a_second_checkpoint_waits_for_the_first(tmp_path: Path) -> None:
    """At most one is written at a time, in order, however slow."""
    run = make(with_train(save_every=2, keep_last=20))
    plain_export = run.export
    writing: list[int] = []
    order: list[str] = []

    def export(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        writing.append(1)
        assert len(writing) == 1
        time.sleep(0.02)
        plain_export(folder, weights)
        order.append(folder.parent.name)
        writing.pop()

    run.export = export
    train(run, tmp_path)
    assert order == [f".tmp-step-{step:08d}" for step in range(2, 21, 2)]
    assert len(checkpoints_in(tmp_path / "checkpoints")) == 10  # the last is there when `train` returns


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
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # a line cut short
    train(make(with_train(log_every=1)), tmp_path, resume=True)
    assert_same_state(straight, tmp_path, 20)
    assert metrics_of(straight) == metrics_of(tmp_path)


# --------------------------------------------------------------------------------------------- two processes


def on_two_processes(action: Callable[[int], None]) -> None:
    """Run `action(rank)` on two forked gloo processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        action(rank)
        distributed.stop()

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]


def test_two_processes_stop_together_and_resume(straight: Path, tmp_path: Path) -> None:
    """A signal that reaches the second process alone stops both after the same step; both halves make a whole."""

    def whole(rank: int) -> None:
        train(make(with_train(log_every=1)), tmp_path / "whole")

    def first_half(rank: int) -> None:
        run = make(with_train(log_every=1))
        outcome = train(stopped_at(run, 7) if rank == 1 else run, tmp_path / "halves")
        assert (outcome.done, outcome.signal) == (7, signal.SIGTERM)

    def second_half(rank: int) -> None:
        train(make(with_train(log_every=1)), tmp_path / "halves", resume=True)

    for action in (whole, first_half, second_half):
        on_two_processes(action)
    assert_same_state(tmp_path / "whole", tmp_path / "halves", 20)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "halves")
    one, two = state_of(straight, 20), state_of(tmp_path / "whole", 20)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_partial_checkpoint_in_the_way_stops_no_process(straight: Path, tmp_path: Path) -> None:
    """Others hang for ever where the first process alone meets the folder that an interrupted save left."""
    for name in ("step-00000010", ".tmp-step-00000010", ".tmp-step-00000020"):
        (tmp_path / "run" / "checkpoints" / name / "model").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000010").rename(tmp_path / "partial")

    def both(rank: int) -> None:
        run = make(with_train(save_every=5, log_every=1))
        if rank == 0:
            run.method.before_accept = lambda step: put_back() if step == 7 else None  # type: ignore[assignment]
        train(run, tmp_path / "run")

    def put_back() -> None:
        (tmp_path / "partial").rename(tmp_path / "run" / "checkpoints" / "step-00000010")

    on_two_processes(both)
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["damaged-0-step-00000010", "step-00000015", "step-00000020"]
    assert newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail) is not None


def test_what_is_not_finite_on_one_process_changes_nothing_on_any(tmp_path: Path) -> None:
    """The bad batch is the second process's alone; parameters, teacher, queue and optimizer stay to the bit on both."""

    def action(rank: int) -> None:
        run = make(with_train(log_every=1, steps=9), OneSided(frozenset({4, 6, 7})))
        states: list[dict[str, torch.Tensor]] = []
        plain = trainer.one_step

        def one_step(run: Run, optimizer: torch.optim.Optimizer, step: int, *rest: Any) -> Any:
            def state() -> dict[str, torch.Tensor]:
                everything = run.method.state_dict() | optim.state_by_name(optimizer, run.method)
                return {name: tensor.clone() for name, tensor in everything.items()}

            before = state()
            result = plain(run, optimizer, step, *rest)
            changed = [name for name, tensor in state().items() if not torch.equal(tensor, before.get(name, tensor))]
            assert result.accepted == (step not in (4, 6, 7)) == bool(changed), (step, changed)
            if result.accepted:
                assert {"model.head.weight", "teacher.head.weight"} <= set(changed)
                assert ("queue" in changed) == (run.mixture.stream_at(step).name == "pairs")
            states.append(state())
            return result

        trainer.one_step = one_step
        assert train(run, tmp_path / "run").done == 9
        torch.save(states, tmp_path / f"{rank}.pt")

    on_two_processes(action)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for one, two in zip(first, second, strict=True) for name in one)
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "skipped" in line] == [5, 7, 8]

    def three(rank: int) -> None:
        sentence = "three steps in a row, step 7 with places 32 to 39 of stream pairs, step 8"
        with pytest.raises(TriviumError, match=sentence):
            train(make(with_train(log_every=1), OneSided(frozenset({6, 7, 8}))), tmp_path / "stopped")

    on_two_processes(three)


class OneSided(TinyMixture):
    """What is not finite lies in the last micro-batch alone: the second process's."""

    def __init__(self, inf_at: frozenset[int]) -> None:
        super().__init__()
        self.inf_at = inf_at

    def loader(self, step: int, rank: int, world: int, stop: int) -> Any:
        for number, batches in enumerate(super().loader(step, rank, world, stop), start=step):
            if number in self.inf_at and rank == world - 1:
                batches[-1].targets["y"][0] = float("inf") if number % 2 else float("nan")
            yield batches


def test_from_one_process_to_two_and_back(tmp_path: Path) -> None:
    """Every global step of the real loader holds the same samples, and the weights differ by rounding alone."""

    def leg(folder: Path, rank: int, world: int, stop: int | None) -> None:
        run = make(with_train(log_every=1), real_mixture(0))
        plain = run.mixture.loader

        def loader(*arguments: Any) -> Any:
            for number, batches in enumerate(plain(*arguments), start=arguments[0]):
                with (folder.parent / f"{folder.name}-{number}-{rank}.json").open("w") as file:
                    json.dump([[batch.places_B.tolist(), batch.targets["x"].tolist()] for batch in batches], file)
                yield batches

        run.mixture.loader = loader  # type: ignore[method-assign]
        outcome = train(run if stop is None else stopped_at(run, stop), folder, resume=folder.exists())
        assert outcome.done == (stop or 20)

    def seen(name: str, step: int) -> list[Any]:
        files = [tmp_path / f"{name}-{step}-{rank}.json" for rank in range(2)]
        return [batch for file in files if file.exists() for batch in json.loads(file.read_text())]

    leg(tmp_path / "one", 0, 1, None)
    leg(tmp_path / "elastic", 0, 1, 6)
    on_two_processes(lambda rank: leg(tmp_path / "elastic", rank, 2, 13))
    leg(tmp_path / "elastic", 0, 1, None)
    assert all(seen("one", step) == seen("elastic", step) for step in range(20))
    assert (tmp_path / "elastic-9-1.json").exists()
    one, two = state_of(tmp_path / "one", 20), state_of(tmp_path / "elastic", 20)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)


def torchrun(folder: Path, *arguments: str) -> tuple[int, str]:
    """tiny_run.py on two processes under torchrun, ended after a minute: exit code and what it wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(tiny_run.__file__)), str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])}
    with folder.with_name("log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return code, log.read()


def test_a_process_that_is_killed_under_torchrun_ends_the_job(tmp_path: Path) -> None:
    """SIGKILL of the second of two: the first one says so, the job ends by itself, and what follows is exact."""
    on_two_processes(lambda rank: train(make(with_train(log_every=3, save_every=5)), tmp_path / "whole"))
    code, text = torchrun(tmp_path / "run", "kill-second", "8")
    assert code not in (0, -signal.SIGKILL), text
    assert "another process of this run ended" in text
    assert [checkpoint.step_of(path) for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == [5]
    on_two_processes(
        lambda rank: train(make(with_train(log_every=3, save_every=5)), tmp_path / "run", resume=True) and None
    )
    assert_same_state(tmp_path / "whole", tmp_path / "run", 20)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "run")


def test_a_mistake_on_the_first_process_stops_both(straight: Path) -> None:
    def again(rank: int) -> None:
        with pytest.raises(TriviumError, match="holds a run already" if rank == 0 else "the first process stopped"):
            train(make(with_train(log_every=1)), straight)

    on_two_processes(again)


# --------------------------------------------------------------------------------------------- the run folder


def test_an_existing_run_is_not_started_over(straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(TriviumError, match=r"holds a run already: continue it with `trivium pretrain .* --resume`"):
        train(make(with_train(log_every=1)), straight)
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match="holds no run to resume"):
        train(make(), tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_resuming_with_other_values(tmp_path: Path) -> None:
    train(stopped_at(make(), 3), tmp_path)
    other = Recipe(optim=replace(Recipe().optim, lr=0.5))
    with pytest.raises(TriviumError, match=r"was started with optim\.lr = 0\.01, not 0\.5"):
        train(make(other), tmp_path, resume=True)
    free = with_train(log_every=3, save_every=7, workers=0, keep_last=1)
    assert train(make(free), tmp_path, resume=True).done == 20


def test_what_a_run_folder_holds(straight: Path) -> None:
    assert {path.name for path in straight.iterdir()} == {
        *("config.json", "passport.json", "metrics.jsonl", "skipped.jsonl", "monitors.jsonl", "checkpoints")
    }
    config = json.loads((straight / "config.json").read_text())
    assert config["recipe"] == "tiny"
    assert config["values"]["optim.lr"] == 0.01
    passport = json.loads((straight / "passport.json").read_text())
    assert passport["machine"]["class"] in ("AMX", "AVX512", "AVX2", "other")
    assert passport["versions"]["torch"] == torch.__version__
    assert len(passport["config_sha256"]) == 64
    state = json.loads((straight / "checkpoints" / "step-00000020" / "training" / "state.json").read_text())
    assert state["config_sha256"] == passport["config_sha256"]
    assert state["layout"] == {
        "processes": 1,
        "micro_batch": {"pairs": 4, "text": 3},
        "sharded": False,
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
    }


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    train(make(with_train(save_every=3, keep_last=2, keep_every=6)), tmp_path)
    kept = [checkpoint.step_of(path) for path in checkpoints_in(tmp_path / "checkpoints")]
    assert kept == [6, 12, 18, 20]


# ------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_in_eval_mode_and_changes_nothing(straight: Path, tmp_path: Path) -> None:
    run = make(with_train(log_every=1, evaluate_every=8))
    modes = []

    def evaluate(method: torch.nn.Module) -> dict[str, Any]:
        modes.append((method.training, torch.is_grad_enabled()))
        torch.rand(5)
        return {"accuracy": len(modes) / 10}

    run.evaluate = evaluate
    outcome = train(run, tmp_path)
    assert outcome.results == {"accuracy": 0.3}
    assert modes == [(False, False)] * 3
    found = [(line["step"], line["results"]["accuracy"]) for line in metrics_of(tmp_path) if "results" in line]
    assert found == [(8, 0.1), (16, 0.2), (20, 0.3)]
    assert_same_state(straight, tmp_path, 20)


def test_an_evaluation_that_was_killed_is_done_again(tmp_path: Path) -> None:
    def run_with(evaluate: Callable[[Any], dict[str, Any]]) -> Outcome:
        run = make(with_train(save_every=8, evaluate_every=8, log_every=1))
        run.evaluate = evaluate
        return train(run, tmp_path, resume=(tmp_path / "config.json").exists())

    def killed(method: object) -> dict[str, Any]:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_with(killed)
    assert run_with(lambda method: {"a": 1}).results == {"a": 1}
    assert run_with(lambda method: {"a": 2}).results == {"a": 2}  # a finished run only evaluates
    found = [(line["step"], line["results"]) for line in metrics_of(tmp_path) if "results" in line]
    assert found == [(8, {"a": 1}), (16, {"a": 1}), (20, {"a": 2})]


# --------------------------------------------------------------------------------------------- what may go wrong


def test_a_gradient_that_is_not_finite_skips_the_step(tmp_path: Path) -> None:
    outcome = train(make(with_train(log_every=1), TinyMixture(nan_at=frozenset({3, 4, 6, 7}))), tmp_path)
    assert outcome.done == 20
    assert [line["step"] for line in metrics_of(tmp_path) if "skipped" in line] == [4, 5, 7, 8]
    assert all(tensor.isfinite().all() for tensor in state_of(tmp_path, 20).values())


def test_three_in_a_row_stop_the_run(tmp_path: Path) -> None:
    mixture = TinyMixture(nan_at=frozenset({6, 7, 8}))
    places = ("7 with places 32 to 39 of stream pairs", "8 with places 40 to 47 of stream pairs")
    sentence = f"three steps in a row, step {places[0]}, step {places[1]}, step 9 with places 12 to 17 of stream text"
    with pytest.raises(TriviumError, match=sentence):
        train(make(with_train(log_every=1, save_every=5), mixture), tmp_path)
    assert [checkpoint.step_of(path) for path in checkpoints_in(tmp_path / "checkpoints")] == [5]
    assert metrics_of(tmp_path)[-1]["step"] == 9  # the log says how it ended


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


def test_options_out_of_range() -> None:
    with pytest.raises(TriviumError, match=r"train\.save_every is 0: it must be at least 1"):
        with_train(save_every=0)


# ------------------------------------------------------------------------------------------------------- budgets


def test_micro_batch_auto_goes_down_until_it_fits() -> None:
    tried = []

    def attempt(rows: int) -> None:
        tried.append(rows)
        if rows > 20:
            torch.empty(1 << 60, dtype=torch.uint8)

    assert budget.largest_micro_batch(attempt, 128) == 16
    assert budget.largest_micro_batch(attempt, 100) == 10  # 25 has no room, 12 does not divide 100
    assert tried == [128, 64, 32, 16, 100, 50, 25, 10]

    def never(rows: int) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(TriviumError, match="single sample"):
        budget.largest_micro_batch(never, 4)


def test_memory_that_runs_out_on_one_process_alone_lowers_the_micro_batch_of_all() -> None:
    def action(rank: int) -> None:
        tried = []

        def attempt(rows: int) -> None:
            tried.append(rows)
            run = make()

            def exhaust(step: int) -> None:
                if rank == 1 and rows > 2:
                    torch.empty(1 << 60, dtype=torch.uint8)

            run.method.before_accept = exhaust  # type: ignore[assignment]
            trainer.try_streams(run)

        distributed.start()
        assert budget.largest_micro_batch(attempt, 16, distributed.world()) == 2
        assert tried == [8, 4, 2]

    on_two_processes(action)


def test_every_stream_is_tried_for_memory() -> None:
    """The stream that runs out is the rare one; the run that was tried stays new."""
    run = make()
    before = {name: tensor.clone() for name, tensor in run.method.state_dict().items()}
    trainer.try_streams(run)

    def exhaust(step: int) -> None:
        if run.mixture.stream_at(step).name == "text":
            torch.empty(1 << 60, dtype=torch.uint8)

    run.method.before_accept = exhaust  # type: ignore[assignment]
    with pytest.raises(budget.OutOfMemory, match="stream text"):
        trainer.try_streams(run)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.method.state_dict().items())


def test_minutes_become_steps_weighted_by_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that take 1 s (two of three steps) and 4 s: 2 s a step on average, so 30 steps a minute."""
    now = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])

    def stream_at(step: int) -> str:
        return "slow" if step % 3 == 2 else "fast"

    def one(step: int) -> None:
        now[0] += 60.0 if step == 0 else {"slow": 4.0, "fast": 1.0}[stream_at(step)]  # the first one compiles

    assert budget.calibrate(one, stream_at, minutes=60) == pytest.approx(1800, rel=0.01)


def test_steps_in_leaves_the_run_as_it_was(straight: Path, tmp_path: Path) -> None:
    run = make(with_train(log_every=1))
    assert trainer.steps_in(run, minutes=0.01) >= 4
    train(run, tmp_path)
    assert_same_state(straight, tmp_path, 20)


def test_a_precision_that_is_measured_changes_nothing_else(straight: Path, tmp_path: Path) -> None:
    """Where the product is faster in bfloat16, steps are timed on a copy; the run itself is the one in float32."""
    run = make(with_train(save_every=5, log_every=3, precision="auto"))
    with mock.patch.object(precision, "choose", return_value="bf16"), mock.patch.object(precision, "faster") as faster:
        faster.side_effect = lambda one_step: (one_step("bf16"), one_step("fp32"), "fp32")[-1]
        train(run, tmp_path / "run")
    assert faster.call_count == 1
    assert_same_state(straight, tmp_path / "run", 20)


def test_a_changed_layout_is_said_and_a_measured_precision_stays() -> None:
    said: list[str] = []
    saved = {"processes": 2, "threads": 1, "device": "cpu", "precision": "bf16"}
    now = {"processes": 1, "threads": 1, "device": "cpu", "precision": "fp32"}
    assert trainer._settled_layout(now, saved, "auto", said.append)["precision"] == "bf16"
    assert said == ["the last bits may differ from a run that was never stopped: processes 2 before, 1 now"]
    moved = trainer._settled_layout({**now, "device": "cuda"}, saved, "auto", said.append)
    assert moved["precision"] == "fp32"  # another device measures anew
    assert "precision bf16 before, fp32 now" in said[1]


def test_a_run_that_failed_at_once_may_be_started_anew(tmp_path: Path) -> None:
    class NoData(TinyMixture):
        def loader(self, step: int, rank: int, world: int, stop: int) -> Any:
            raise TriviumError("no such file")
            yield

    with pytest.raises(TriviumError, match="no such file"):
        train(make(None, NoData()), tmp_path)
    other = Recipe(optim=replace(Recipe().optim, lr=0.5))
    assert train(make(other), tmp_path).done == 20
    assert json.loads((tmp_path / "config.json").read_text())["values"]["optim.lr"] == 0.5


@pytest.mark.slow
def test_compiled_blocks_keep_their_names_and_their_numbers(straight: Path, tmp_path: Path) -> None:
    run = make(with_train(compile=True, log_every=1))
    run.blocks = lambda: list(run.method.model.blocks)  # type: ignore[arg-type]
    train(run, tmp_path)
    assert run.method.model.blocks[0]._compiled_call_impl is not None
    one, two = state_of(straight, 20), state_of(tmp_path, 20)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)
