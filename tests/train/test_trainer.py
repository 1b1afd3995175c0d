"""A run as a whole: resuming, its folder, evaluation, budgets, precision, compiled blocks."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import assert_same_state, metrics_of, state_of, stopped_at
from tiny_run import Recipe, TinyMixture, TinySource, make, real_mixture, with_train
from torch.utils.data import DataLoader

from trivium.data.mixture import StreamMixture, refuse_uneven_shares
from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, write_manifest
from trivium.train import budget, checkpoint, precision, trainer
from trivium.train.run import Outcome, Run
from trivium.train.trainer import train


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


def test_resuming_with_other_data(tmp_path: Path) -> None:
    """Rows that came or went, and files that were cut otherwise, give every later place another sample."""

    def mixture(source: TinySource) -> StreamMixture:
        streams = [replace(stream, source=source) for stream in real_mixture(0).streams]
        return StreamMixture(streams, seed=0)

    class Recut(TinySource):
        def blocks(self) -> list[range]:
            return [range(25), range(25, 50)]

    train(stopped_at(make(None, mixture(TinySource())), 3), tmp_path)
    with pytest.raises(TriviumError, match=r"stream text has 40 rows, and had 50 when .* was saved, .*--init"):
        train(make(None, mixture(TinySource(rows=40))), tmp_path, resume=True)
    with pytest.raises(TriviumError, match="stream text has its 50 rows in other files or blocks than when"):
        train(make(None, mixture(Recut())), tmp_path, resume=True)
    of_an_older_version = tmp_path / "checkpoints" / "step-00000003"
    state = json.loads((of_an_older_version / "training" / "state.json").read_text())
    del state["data"]
    (of_an_older_version / "training" / "state.json").write_text(json.dumps(state))
    write_manifest(of_an_older_version)
    assert train(make(None, mixture(TinySource())), tmp_path, resume=True).done == 20


def test_what_a_run_folder_holds(straight: Path) -> None:
    assert {path.name for path in straight.iterdir()} == {
        *("config.json", "passport.json", "metrics.jsonl", "skipped.jsonl", "monitors.jsonl", "checkpoints", ".lock")
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


@pytest.mark.parametrize(("long_wait", "said"), [(0.2, 1), (1e9, 0)])
def test_a_save_that_waits_long_for_the_one_before_is_told_once(
    straight: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    long_wait: float,
    said: int,
) -> None:
    """The second and the third save both find the one before unwritten. Training is none the worse for it."""
    run = make(with_train(save_every=3, log_every=1))
    plain_export = run.export

    def export(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        if not folder.parent.name.endswith(("15", "18", "20")):
            time.sleep(1.0)
        plain_export(folder, weights)

    run.export = export
    monkeypatch.setattr(checkpoint, "LONG_WAIT", long_wait)
    train(run, tmp_path)
    out = capsys.readouterr().out
    assert out.count("since the checkpoint before this one was still being written: raise --train.save-every") == said
    assert_same_state(straight, tmp_path, 20)


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    train(make(with_train(save_every=3, keep_last=2, keep_every=6)), tmp_path)
    kept = [checkpoint.step_of(path) for path in checkpoints_in(tmp_path / "checkpoints")]
    assert kept == [6, 12, 18, 20]


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


@pytest.mark.parametrize(("at", "number"), [(8, signal.SIGTERM), (20, signal.SIGTERM), (20, signal.SIGINT)])
def test_a_signal_in_an_evaluation_leaves_it_and_saves(
    straight: Path, tmp_path: Path, at: int, number: signal.Signals
) -> None:
    """In one between, in the last, and in the one that a resumed run repeats; what follows is exact."""
    run = make(with_train(evaluate_every=at, save_every=100, log_every=1))
    went_on: list[bool] = []

    def stopped(method: object) -> dict[str, Any]:
        signal.raise_signal(number)
        went_on.append(True)
        return {"a": 1}

    for resume in (False, True):
        run.evaluate = stopped
        outcome = train(run, tmp_path, resume=resume)
        assert (outcome.done, outcome.signal, outcome.results) == (at, number, None)
        assert outcome.exit_code == (130 if number == signal.SIGINT else 0)
        assert [checkpoint.step_of(path) for path in checkpoints_in(tmp_path / "checkpoints")] == [at]
        assert run.method.training
    assert not went_on
    run.evaluate = lambda method: {"a": 2}
    assert train(run, tmp_path, resume=True).results == {"a": 2}
    assert_same_state(straight, tmp_path, 20)
    assert [line["step"] for line in metrics_of(tmp_path) if "results" in line] == ([8, 16, 20] if at == 8 else [20])


def test_a_signal_in_the_last_step_does_not_wait_for_the_evaluation(tmp_path: Path) -> None:
    run = stopped_at(make(), 20)
    run.evaluate = lambda method: pytest.fail("it was to stop")
    outcome = train(run, tmp_path)
    assert (outcome.done, outcome.signal) == (20, signal.SIGTERM)
    run.evaluate = lambda method: {"a": 1}
    assert train(run, tmp_path, resume=True).results == {"a": 1}


def test_options_out_of_range() -> None:
    with pytest.raises(TriviumError, match=r"train\.save_every is 0: it must be at least 1"):
        with_train(save_every=0)


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


@pytest.mark.parametrize(
    ("batch", "processes", "sizes"), [(60, 4, [15, 5, 1]), (36, 2, [18, 9, 3, 1]), (100, 4, [25, 5, 1])]
)
def test_micro_batch_auto_tries_only_what_the_processes_can_share(batch: int, processes: int, sizes: list[int]) -> None:
    tried = []

    def attempt(rows: int) -> None:
        tried.append(rows)
        refuse_uneven_shares("this run", batch, rows, processes)
        if rows > 1:
            torch.empty(1 << 60, dtype=torch.uint8)

    assert budget.largest_micro_batch(attempt, batch, processes) == 1
    assert tried == sizes


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


def test_every_stream_is_tried_with_what_its_first_step_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them once, then again: state of the optimizer is there for the whole model by then."""
    tried: list[tuple[int, int]] = []
    plain = trainer.one_step

    def one_step(run: Run, optimizer: torch.optim.Optimizer, step: int, *rest: Any) -> Any:
        tried.append((step, len(optimizer.state)))
        return plain(run, optimizer, step, *rest)

    monkeypatch.setattr(trainer, "one_step", one_step)
    trainer.try_streams(make())
    assert [step for step, _ in tried] == [0, 2, 1, 5]
    assert tried[0][1] == 0 < tried[1][1] < tried[2][1] == tried[3][1] == len(list(make().method.model.parameters()))


@pytest.mark.parametrize("compiles", [False, True])
def test_what_is_tried_is_compiled_where_the_run_is(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy, and not the blocks of the run itself."""
    run, compiled = make(with_train(compile=compiles)), []
    run.blocks = lambda: run.method.model.blocks
    monkeypatch.setattr(trainer, "compile_blocks", compiled.extend)
    assert trainer.steps_in(run, minutes=0.0001) >= 1
    assert len(compiled) == (2 if compiles else 0)
    assert not set(compiled) & set(run.method.model.blocks)


def test_the_time_of_compiling_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of each stream takes as long as the whole budget, and four steps are one of each and one more."""
    now = [0.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])

    def one(step: int) -> None:
        now[0] += 60.0 if step < 3 else 1.0

    assert budget.calibrate(one, lambda step: str(step % 3), minutes=1) == 60


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
        def loader(self, step: int, rank: int, world: int, stop: int, pinned: bool = False) -> Any:
            raise TriviumError("no such file")
            yield

    with pytest.raises(TriviumError, match="no such file"):
        train(make(None, NoData()), tmp_path)
    other = Recipe(optim=replace(Recipe().optim, lr=0.5))
    assert train(make(other), tmp_path).done == 20
    assert json.loads((tmp_path / "config.json").read_text())["values"]["optim.lr"] == 0.5


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_a_run_on_a_gpu_alone(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with --train.device cpu leaves the GPU beside it alone."""
    asked: list[bool] = []

    def recorded(*arguments: Any, pin_memory: bool, **more: Any) -> DataLoader[Any]:
        asked.append(pin_memory)
        return DataLoader(*arguments, **more)

    monkeypatch.setattr("trivium.data.loader.DataLoader", recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "choose_device", torch.device)
    with closing(trainer._steps(make(with_train(device=device), real_mixture(0)), 0, 1)) as steps:
        next(steps)
    assert asked == [pinned]


@pytest.mark.slow
def test_compiled_blocks_keep_their_names_and_their_numbers(straight: Path, tmp_path: Path) -> None:
    run = make(with_train(compile=True, log_every=1))
    run.blocks = lambda: list(run.method.model.blocks)  # type: ignore[arg-type]
    train(run, tmp_path)
    assert run.method.model.blocks[0]._compiled_call_impl is not None
    one, two = state_of(straight, 20), state_of(tmp_path, 20)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)
