from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_run
import torch
from tiny_run import Recipe, TinyMixture, make, real_mixture, with_train

from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in
from trivium.train import budget, checkpoint, distributed, optim, precision, trainer
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
        *("config.json", "passport.json", "metrics.jsonl", "skipped.jsonl", "checkpoints")
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
    with pytest.raises(TriviumError, match=r"three steps in a row.* step 9 with places 12 to 17 of stream text"):
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
    meter = trainer.Replaced(tmp_path / "skipped.jsonl", window=200, rate=0.05)

    def note(step: int, bad: int) -> None:
        rows = torch.arange(20)
        meter.note(step, [Batch("pairs", rows, rows, bad=tuple(f"{step}-{n}.png: cut" for n in range(bad)))])

    for step in range(10):
        note(step, 1)  # 10 of 200: at the rate, not above
    for step in range(10, 15):
        note(step, 2)
    with pytest.raises(TriviumError, match=r"11 of the last 120 samples were bad .* 15-0\.png: cut"):
        note(15, 1)


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
    run = make(with_train(save_every=5, log_every=1))
    plain_export = run.export

    def export(folder: Path) -> None:
        if folder.parent.name.endswith("10"):
            raise OSError(28, "No space left on device")
        plain_export(folder)

    run.export = export
    with pytest.raises(TriviumError, match=r"step-00000010 could not be written .*No space left on device"):
        train(run, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    train(make(with_train(save_every=5, log_every=1)), tmp_path, resume=True)


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
