"""Runs of two processes: they stop, resume, skip and fail together."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import torch.distributed as dist
from runs import assert_same_state, metrics_of, on_two_processes, state_of, stopped_at
from tiny_run import Recipe, TinyMixture, TinySource, make, real_mixture, with_train

from trivium.cli import main
from trivium.data.mixture import StreamMixture
from trivium.errors import TriviumError
from trivium.manifest import checkpoints_in, newest_checkpoint
from trivium.train import budget, checkpoint, distributed, mishaps, optim, trainer
from trivium.train.protocol import Batch, Stream
from trivium.train.run import Run
from trivium.train.trainer import train


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


def test_a_signal_in_an_evaluation_stops_both(tmp_path: Path) -> None:
    """The first process evaluates while the second waits; a signal to the second alone is acted on after that."""

    def leg(folder: Path, rank: int, receiver: int | None) -> None:
        run = make(with_train(log_every=1, save_every=100, evaluate_every=4, steps=8))

        def evaluate(method: object) -> dict[str, Any]:
            if receiver is not None:
                os.kill(int((tmp_path / f"process-{receiver}").read_text()), signal.SIGTERM)
            return {"a": 1}

        run.evaluate = evaluate
        (tmp_path / f"process-{rank}").write_text(str(os.getpid()))
        outcome = train(run, folder, resume=folder.exists())
        assert outcome.done == (8 if receiver is None else 4)
        assert outcome.signal == (None if receiver is None else signal.SIGTERM)
        assert outcome.results == ({"a": 1} if rank == 0 and receiver != 0 else None)

    on_two_processes(lambda rank: leg(tmp_path / "whole", rank, None))
    for receiver in (0, 1):
        run = tmp_path / str(receiver)
        on_two_processes(lambda rank, run=run, receiver=receiver: leg(run, rank, receiver))  # type: ignore[misc]
        assert [checkpoint.step_of(path) for path in checkpoints_in(run / "checkpoints")] == [4]
        on_two_processes(lambda rank, run=run: leg(run, rank, None))  # type: ignore[misc]
        assert_same_state(tmp_path / "whole", run, 8)
        assert metrics_of(tmp_path / "whole") == metrics_of(run)


def test_the_first_process_chooses_what_is_resumed(straight: Path, tmp_path: Path) -> None:
    """On disks of their own: a process that has more than the first goes back with it, one that has less stops both."""
    recipe = with_train(save_every=5, log_every=1)
    train(stopped_at(make(recipe), 10), tmp_path / "stopped")
    for name in ("more-0", "more-1", "less-0", "less-1"):
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
    for name in ("more-0", "less-1"):
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000010")

    def more(rank: int) -> None:
        assert train(make(recipe), tmp_path / f"more-{rank}", resume=True).done == 20

    def less(rank: int) -> None:
        sentence = r"process 1 of 2: .* goes on from is not sound here \(.*step-00000010: no manifest\.json"
        with pytest.raises(TriviumError, match=sentence):
            train(make(recipe), tmp_path / f"less-{rank}", resume=True)

    on_two_processes(more)
    on_two_processes(less)
    one, two = state_of(straight, 20), state_of(tmp_path / "more-0", 20)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)


def test_processes_with_other_values_do_not_begin(tmp_path: Path) -> None:
    def action(rank: int) -> None:
        settings = Recipe(replace(Recipe().train, workers=rank), replace(Recipe().optim, lr=0.5 if rank else 0.01))
        with pytest.raises(TriviumError, match=r"optim\.lr is 0\.01 on the first process and 0\.5 on process 1"):
            train(make(settings), tmp_path / "run")

    on_two_processes(action)
    assert not (tmp_path / "run").exists()


def test_processes_with_other_data_do_not_begin(tmp_path: Path) -> None:
    def action(rank: int) -> None:
        mixture = real_mixture(0)
        if rank == 1:
            mixture.streams[1].source = TinySource(rows=30)
        sentence = "rows of stream text is 50 on the first process and 30 on process 1: give all of them the same files"
        with pytest.raises(TriviumError, match=sentence):
            train(make(None, mixture), tmp_path / "run")

    on_two_processes(action)
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_share_a_batch_begin_nothing(tmp_path: Path) -> None:
    """A recipe is refused before its data is read or anything learned, and the first process alone says why; a run that
    was put together otherwise before it has a folder."""

    def recipe(rank: int, *flags: str) -> None:
        said = io.StringIO()
        with redirect_stderr(said):
            words = ["pretrain", "flava", "--size", "tiny", "--out", str(tmp_path / "run"), *flags]
            assert main(words) == 2
        why = "2 processes cannot share" if rank == 0 else "the first process stopped"
        assert said.getvalue().count("\n") == 1 and why in said.getvalue(), said.getvalue()

    def run(rank: int) -> None:
        mixture = StreamMixture([Stream("pairs", TinySource(), tiny_run.TinyCollate(), 8, 8)], seed=0)
        with pytest.raises(TriviumError, match=r"stream 'pairs': 2 processes cannot share 1 micro-batches"):
            train(make(None, mixture), tmp_path / "run")

    on_two_processes(lambda rank: recipe(rank, "--data.batch", "7", "--train.micro-batch", "1"))
    for micro_batch in ("8", "null"):  # null: the whole batch
        on_two_processes(lambda rank, rows=micro_batch: recipe(rank, "--data.batch", "8", "--train.micro-batch", rows))
    on_two_processes(run)
    assert not (tmp_path / "run").exists()


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
        run = make(with_train(log_every=1, steps=9), OneSided(frozenset({4, 7, 8})))
        states: list[dict[str, torch.Tensor]] = []
        plain = trainer.one_step

        def one_step(run: Run, optimizer: torch.optim.Optimizer, step: int, *rest: Any) -> Any:
            def state() -> dict[str, torch.Tensor]:
                everything = run.method.state_dict() | optim.state_by_name(optimizer, run.method)
                return {name: tensor.clone() for name, tensor in everything.items()}

            before = state()
            result = plain(run, optimizer, step, *rest)
            changed = [name for name, tensor in state().items() if not torch.equal(tensor, before.get(name, tensor))]
            assert result.accepted == (step not in (4, 7, 8)) == bool(changed), (step, changed)
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
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "skipped" in line] == [5, 8, 9]

    def three(rank: int) -> None:
        sentence = "three steps of stream pairs in a row, step 7 with places 32 to 39, step 8"
        with pytest.raises(TriviumError, match=sentence):
            train(make(with_train(log_every=1), OneSided(frozenset({6, 7, 9}))), tmp_path / "stopped")

    on_two_processes(three)
    assert len((tmp_path / "stopped" / "not_finite.jsonl").read_text().splitlines()) == 3 * 8


def test_the_first_process_logs_the_bad_samples_of_all(tmp_path: Path) -> None:
    """The second has no run folder, as on a machine without the first one's disk."""

    def action(rank: int) -> None:
        distributed.start()
        folder = tmp_path / f"machine-{rank}"
        if rank == 0:
            folder.mkdir()
        replaced = mishaps.Replaced(folder / "skipped.jsonl", window=100, rate=0.03)
        rows = torch.arange(4)
        for step in range(3):
            bad = (f"{step}-{rank}.png: cut",) if rank in (0, 1)[:step] else ()
            replaced.note(step, [Batch("pairs", rows, rows, bad=bad)])
        assert replaced.counts == {"seen": 24, "bad": 3}
        with pytest.raises(TriviumError, match=r"4 of the last 32 samples were bad .*, the last of them 3-1\.png: cut"):
            replaced.note(3, [Batch("pairs", rows, rows, bad=("3-1.png: cut",) * rank)])

    on_two_processes(action)
    lines = map(json.loads, (tmp_path / "machine-0" / "skipped.jsonl").read_text().splitlines())
    assert [(line["step"], line["sample"]) for line in lines] == [
        (1, "1-0.png: cut"), (2, "2-0.png: cut"), (2, "2-1.png: cut"), (3, "3-1.png: cut")
    ]  # fmt: skip


class OneSided(TinyMixture):
    """What is not finite lies in the last micro-batch alone: the second process's."""

    def __init__(self, inf_at: frozenset[int]) -> None:
        super().__init__()
        self.inf_at = inf_at

    def loader(self, step: int, rank: int, world: int, stop: int, pinned: bool = False) -> Any:
        for number, batches in enumerate(super().loader(step, rank, world, stop, pinned), start=step):
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


def test_the_first_process_is_waited_for_longer_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the time after which a message is given up, which is then told as a process that is lost."""
    plain = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda backend: plain(backend, timeout=timedelta(seconds=2)))

    def action(rank: int) -> None:
        distributed.start()
        assert distributed.first_process_does(lambda: time.sleep(4) or "done") == (None if rank else "done")
        if rank == 1:
            time.sleep(4)
        with pytest.raises(TriviumError, match="another process of this run ended"), mishaps.lost_processes_told():
            distributed.any_process(False)

    on_two_processes(action)


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
