"""A run in parts over two processes: the same files, the same training, and back and forth between both forms."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import metrics_of, on_two_processes, state_of, stopped_at
from tiny_run import Tiny, make, with_train

from trivium.errors import TriviumError
from trivium.train import distributed, monitors, sharding
from trivium.train.protocol import Key, Rows
from trivium.train.run import Run
from trivium.train.trainer import _steps, train


def run_of(shard: bool) -> Run:
    run = make(with_train(log_every=1, shard=shard, evaluate_every=20))
    run.blocks = lambda: list(run.method.model.blocks)  # type: ignore[union-attr, arg-type]

    def evaluate(method: Any) -> dict[str, Any]:  # on the first process alone, so with the whole method
        return {"norm": float(sum(parameter.double().norm() for parameter in method.model.parameters()))}

    run.evaluate = evaluate
    return run


def trained(folder: Path, *forms: bool) -> Path:
    """Twenty steps on two processes; with several forms, each goes on where the one before was stopped."""
    for number, shard in enumerate(forms):

        def action(rank: int, number: int = number, shard: bool = shard) -> None:
            run = run_of(shard)
            last = number == len(forms) - 1
            train(run if last else stopped_at(run, 7 + 6 * number), folder, resume=number > 0)

        on_two_processes(action)
    return folder


def assert_close_states(left: Path, right: Path) -> None:
    one, two = state_of(left, 20), state_of(right, 20)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("whole"), False)


def test_a_sharded_run_leaves_the_same_files_and_the_same_weights(whole: Path, tmp_path: Path) -> None:
    parts = trained(tmp_path, True)
    files = [{path.relative_to(run): path.stat().st_size for path in run.rglob("*.safetensors")}
             for run in (whole, parts)]  # fmt: skip
    assert files[0] == files[1]
    assert_close_states(whole, parts)
    groups = [json.loads((run / "checkpoints/step-00000020/training/optimizer.json").read_text()) for run in
              (whole, parts)]  # fmt: skip
    assert groups[0] == groups[1]
    for mine, reference in zip(metrics_of(parts), metrics_of(whole), strict=True):
        assert mine.keys() == reference.keys()
        for figure in ("grad_norm", "losses", "results"):
            if figure in reference:
                assert mine[figure] == pytest.approx(reference[figure], rel=1e-3)


def test_a_run_goes_from_parts_to_whole_and_back(whole: Path, tmp_path: Path) -> None:
    assert_close_states(whole, trained(tmp_path, True, False, True))


def test_what_parts_do_not_go_with_is_refused() -> None:
    for options in ({"compile": True}, {"micro_batch": "auto"}):
        with pytest.raises(TriviumError, match=r"train\.shard goes neither with"):
            with_train(shard=True, **options)


def looked_at(folder: Path) -> dict[tuple[int, str, str, str], float]:
    lines = [json.loads(line) for line in (folder / "monitors.jsonl").read_text().splitlines()]
    return {
        (line["step"], line["stream"], line["monitor"], line["subject"]): line["value"]
        for line in lines
        if line["monitor"] != "loading"  # reads the clock
    }


def test_the_monitors_see_the_same_of_a_sharded_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And training is none the worse for it. Shares of the gradient differ: in a whole run they are of one micro-batch
    of one process, here of one of each."""
    monkeypatch.setattr(monitors, "BALANCE_LOOKS", 1)
    monkeypatch.setattr(Tiny, "clamped", lambda method: {"logit_scale": (method.model.logit_scale, 0.0, 4.0)})
    for form in (False, True):

        def action(rank: int, form: bool = form) -> None:
            run = run_of(form)
            run.train = replace(run.train, monitor_every=4)
            train(run, tmp_path / str(form))

        on_two_processes(action)
    whole, parts = looked_at(tmp_path / "False"), looked_at(tmp_path / "True")
    assert whole.keys() == parts.keys()
    assert {monitor for _, _, monitor, _ in parts} >= {"collapse", "saturation", "balance"}
    for name, value in parts.items():
        if name[2] != "balance":
            assert value == pytest.approx(whole[name], rel=1e-3), name
    assert_close_states(tmp_path / "False", tmp_path / "True")


def test_the_gradient_of_a_single_loss_is_that_of_the_sum_over_processes() -> None:
    def action(rank: int) -> None:
        distributed.start()
        run = run_of(True)
        plain, key = copy.deepcopy(run.method), Key(0, "pairs", 0)
        [(_, _, [batch])] = _steps(run, 0, 1)
        everyone = distributed.gather(plain.embed(batch)[0])
        everyone = Rows({name: rows.detach() for name, rows in everyone.rows.items()}, everyone.marks)
        expected = {}
        for name in run.method.weights:
            plain.zero_grad(set_to_none=True)
            counts = plain.counts(batch)
            loss = monitors._forward(plain, batch, everyone, key, counts, nullcontext)[name]
            (plain.weights[name] * loss / counts[name]).backward()
            parameters = [parameter for parameter in plain.parameters() if parameter.grad is not None]
            distributed.sum_gradients(parameters)
            expected[name] = float(distributed.norms([p.grad for p in parameters if p.grad is not None]).norm())
        assert run.blocks is not None
        method = sharding.shard(run.method, list(run.blocks()), torch.device("cpu"))
        for _ in range(2):  # nothing is left behind
            found = monitors.gradient_norms(method, batch, everyone, key, list(expected))
            assert found == pytest.approx(expected, rel=1e-5)
            assert monitors.forward_flops(method, batch, everyone, key) > 0
            assert not any(parameter.grad is not None for parameter in method.parameters())

    on_two_processes(action)
