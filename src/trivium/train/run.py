"""What a run is: how it proceeds, what it is made of, how it ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from trivium.errors import TriviumError
from trivium.train import checkpoint, distributed
from trivium.train.config import Config
from trivium.train.optim import Optim
from trivium.train.precision import Precision
from trivium.train.protocol import Method, Mixture


@dataclass(frozen=True)
class Train:
    """How a run proceeds; the part of a recipe that every family shares."""

    steps: int = 1000
    minutes: float | None = None  # a time budget; `steps_in` turns it into `steps` once, before the run begins
    seed: int = 0
    micro_batch: int | Literal["auto"] | None = None  # rows of one forward; None: as each stream says
    precision: Precision = "auto"
    device: str = "auto"
    threads: int | None = None  # of torch; None: as torch finds best
    workers: int = 1  # processes that decode samples; 0: none
    compile: bool = False  # torch.compile for each block: faster steps after a slow start
    shard: bool = False  # each process holds a part of every tensor (FSDP2), for sizes that do not fit one device
    save_every: int = 1000  # steps between checkpoints; the last step is always saved
    keep_last: int = 2  # checkpoints
    keep_every: int | None = None  # those at multiples of so many steps stay for good
    evaluate_every: int | None = None  # None: at the end alone
    patience: int | None = None  # evaluations without a better figure that end a run which chooses by one
    log_every: int = 10
    bad_rate: float = 0.01  # share of unreadable samples above which the run stops; below, each is replaced
    bad_window: int = 10_000  # samples over which the share is taken
    monitor_every: int = 100  # steps between looks of the monitors (see monitors.py); 0: skipped steps alone are told
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep_last", "log_every", "bad_window"):
            if getattr(self, name) < 1:
                raise TriviumError(f"train.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.bad_rate <= 1:
            raise TriviumError(f"train.bad_rate is {self.bad_rate}: it is a share, from 0 to 1")
        if self.shard and (self.compile or self.micro_batch == "auto"):
            raise TriviumError("train.shard goes neither with train.compile nor with train.micro_batch auto: drop one")

    @property
    def in_parts(self) -> bool:
        """Whether the method is sharded: one process has nobody to share with."""
        return self.shard and distributed.world() > 1

    def evaluates_after(self, done: int) -> bool:
        return done == self.steps or (self.evaluate_every is not None and done % self.evaluate_every == 0)


@dataclass
class Run:
    """A whole run, as a recipe makes it."""

    method: Method
    mixture: Mixture
    optim: Optim
    train: Train
    export: checkpoint.Export  # writes the model folder of `method.exported()`
    config: Config
    evaluate: Callable[[Method], dict[str, Any] | None] | None = None  # called in eval mode, without gradient
    blocks: Callable[[], Iterable[nn.Module]] | None = None  # what torch.compile is given, one by one
    select: str | None = None  # a figure of `evaluate`: the checkpoint where it is highest is kept (see selection.py)
    measures_start: bool = False  # once before the first step too: training is to make that figure better


@dataclass
class Outcome:
    done: int  # steps
    seconds: float  # of the whole run, evaluations included
    signal: signal.Signals | None  # what stopped the run before its last step, or in the evaluation after it
    results: dict[str, Any] | None  # of the last evaluation

    @property
    def exit_code(self) -> int:
        return 130 if self.signal == signal.SIGINT else 0
