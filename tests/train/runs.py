"""What tests of whole runs have in common: stopping them, running two processes, comparing what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run
import torch

from trivium.train import checkpoint, distributed, optim
from trivium.train.optim import Optim
from trivium.train.run import Run


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
