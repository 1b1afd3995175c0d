"""A run in parts over two processes: the same files, the same training, and back and forth between both forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import metrics_of, on_two_processes, state_of, stopped_at
from tiny_run import make, with_train

from trivium.errors import TriviumError
from trivium.train.trainer import Run, train


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
