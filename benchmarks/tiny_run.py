"""A run in miniature for what is tried on the engine itself, here and in tests/train: a regression with dropout, a
contrastive part against a queue that an EMA teacher fills, and a tied weight, over two streams. Started as a script it
trains in a process of its own, to be stopped or killed.

B rows, D width 6.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.data.mixture import StreamMixture
from trivium.data.order import Draws
from trivium.errors import BadSample
from trivium.manifest import write_manifest
from trivium.train import config, distributed
from trivium.train.checkpoint import Export
from trivium.train.config import Config
from trivium.train.initial import initialise
from trivium.train.optim import Optim
from trivium.train.protocol import Batch, Key, Method, Mixture, Rows, Sample, Stream, Sums, hash64
from trivium.train.run import Run, Train
from trivium.train.trainer import train

WIDTH = 6
SIZES = {"pairs": (8, 4), "text": (6, 3)}  # global batch, micro-batch


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        linear = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), each) for each in linear)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = linear[0].weight  # tied
        self.text_head = nn.Linear(WIDTH, 1)  # only stream "text" gives it a gradient
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BD = x_BD + self.dropout(block(x_BD))
        return x_BD


class Tiny(Method):
    model: Model
    queue: Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model = Model()
        for parameter in self.parameters():
            nn.init.constant_(parameter, 1.0)  # what `initialise` leaves as constructed
        initialise(self.model, seed, std=0.3)
        self.teacher = Model().requires_grad_(False)
        self.teacher.load_state_dict(self.model.state_dict())
        # Written by the export too, like an image tokenizer.
        self.codebook = nn.Linear(WIDTH, 3, bias=False).requires_grad_(False)
        initialise(self.codebook, 7)
        self.register_buffer("queue", torch.zeros(20, WIDTH))
        self.weights = {"contrastive": 0.5, "regression": 1.0}
        self.before_accept: Callable[[int], None] = lambda step: None

    def counts(self, batch: Batch) -> Sums:
        rows = torch.tensor(float(len(batch)))
        return {"contrastive": rows, "regression": rows} if batch.stream == "pairs" else {"regression": rows}

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        states_BD = self.model(batch.targets["x"])
        if batch.stream != "pairs":
            return Rows(), states_BD
        with torch.no_grad():
            slow_BD = self.teacher(batch.targets["x"])
        rows = {"left": states_BD, "right": self.model.head(states_BD), "slow": slow_BD}
        return Rows(rows, {"row": batch.rows_B}), states_BD

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        if not mine.rows:
            return {}
        candidates = torch.cat([everyone.rows["right"], self.queue])
        logits = self.model.logit_scale * mine.rows["left"] @ candidates.T
        return {"contrastive": F.cross_entropy(logits, mine.marks["row"], reduction="sum")}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        y_B = self.model.text_head(states)[:, 0] if batch.stream == "text" else states[:, 0]
        noise_B = key.uniform("noise", batch.rows_B).float()
        return {"regression": (y_B - batch.targets["y"] + 0.1 * noise_B).square().sum()}

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(fast, 0.1)
        if "slow" in everyone.rows:
            self.queue.copy_(torch.cat([everyone.rows["slow"], self.queue])[: len(self.queue)])
        self.before_accept(step)


@dataclass
class TinyMixture:
    """`nan_at`: steps whose targets are not finite. `bad_at`: steps that replaced a sample."""

    seed: int = 0
    nan_at: frozenset[int] = frozenset()
    bad_at: frozenset[int] = frozenset()

    def stream_at(self, step: int) -> Stream:
        name = "text" if step % 3 == 2 else "pairs"
        return Stream(name, TinySource(), None, *SIZES[name])

    def place_at(self, step: int) -> int:
        name = self.stream_at(step).name
        return sum(SIZES[name][0] for before in range(step) if self.stream_at(before).name == name)

    def names_at(self, step: int) -> list[str]:
        return [f"{self.stream_at(step).name} {self.place_at(step) + row}" for row in range(self.stream_at(step).batch)]

    def loader(self, step: int, rank: int, world: int, stop: int, pinned: bool = False) -> Iterator[list[Batch]]:
        for number in range(step, stop):
            stream = self.stream_at(number)
            generator = torch.Generator().manual_seed(hash64(self.seed, stream.name, number) % 2**63)
            x_GD = torch.randn(stream.batch, WIDTH, generator=generator)
            y_G = x_GD.sum(1) * (float("nan") if number in self.nan_at else 1.0)
            batches: list[Batch] = []
            for first in range(0, stream.batch, stream.micro_batch):
                rows = slice(first, first + stream.micro_batch)
                rows_B = torch.arange(stream.batch)[rows]
                targets = {"x": x_GD[rows], "y": y_G[rows]}
                bad = (f"sample {number}.png: truncated",) if number in self.bad_at and first == 0 else ()
                place = self.place_at(number)
                batches.append(
                    Batch(stream.name, rows_B, place + rows_B, targets=targets, number=len(batches), bad=bad)
                )
            share = len(batches) // world
            yield batches[rank * share : (rank + 1) * share]


@dataclass
class Recipe:
    train: Train = field(default_factory=lambda: Train(steps=20, precision="fp32", device="cpu", threads=1))
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-2, warmup=3, clip_norm=0.5))


@dataclass
class TinySource:
    """Rows of a stream for the loader itself; every seventh cannot be read, unless all are `sound`."""

    sound: bool = False
    rows: int = 50

    def __len__(self) -> int:
        return self.rows

    def blocks(self) -> list[range]:
        return [range(20), range(20, self.rows)]

    def read(self, image_row: int, text_row: int) -> Sample:
        if image_row % 7 == 3 and not self.sound:
            raise BadSample("tiny.csv", f"line {image_row}", "no such picture")
        return {"text": str(text_row)}

    def lengths(self) -> None:
        return None


class TinyCollate:
    false_pairs = 0.5
    sort_by_length = False

    def prepare(self, sample: Sample, draws: Draws) -> Any:
        return draws.generator("x").normal(size=WIDTH).astype("float32") * (1 + int(sample["text"]) / 50)

    def batch(self, stream: str, prepared: Any, rows_B: Tensor, places_B: Tensor, number: int, bad: Any) -> Batch:
        x_BD = torch.tensor(np.stack(prepared))
        return Batch(stream, rows_B, places_B, (), (), {"x": x_BD, "y": x_BD.sum(1)}, number, tuple(bad))


def real_mixture(workers: int, sound: bool = False) -> StreamMixture:
    ratios = {"pairs": 0.7, "text": 0.3}
    streams = [Stream(name, TinySource(sound), TinyCollate(), *SIZES[name], ratio) for name, ratio in ratios.items()]
    return StreamMixture(streams, seed=0, workers=workers)


def export_of(method: Tiny) -> Export:
    def export(folder: Path, weights: Mapping[str, Tensor]) -> None:
        state = {name: value for name, value in weights.items() if name != "head.weight"}  # tied
        save_file(
            {name.replace("blocks", "layer"): value for name, value in state.items()}, folder / "model.safetensors"
        )
        save_file(
            {f"codes.{n}": v for n, v in method.codebook.state_dict().items()}, folder / "image_tokenizer.safetensors"
        )
        (folder / "config.json").write_text(json.dumps({"family": "tiny"}))
        write_manifest(folder)

    return export


def make(recipe: Recipe | None = None, mixture: Mixture | None = None) -> Run:
    recipe = recipe or Recipe()
    method = Tiny(recipe.train.seed)
    settings = Config("tiny", {}, config.leaves(recipe))
    return Run(method, mixture or TinyMixture(), recipe.optim, recipe.train, export_of(method), settings)


def with_train(**changes: Any) -> Recipe:
    return Recipe(replace(Recipe().train, **changes))


def main() -> int:
    """python tiny_run.py OUT MODE AT [WORKERS] [--resume]: stop by MODE (term, int, kill-in-save, kill-second: of two
    processes, none) at step AT."""
    out, mode, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    workers = int(sys.argv[4]) if len(sys.argv) > 4 and sys.argv[4].isdigit() else None
    run = make(with_train(save_every=5, log_every=3), None if workers is None else real_mixture(workers))
    plain_export = run.export

    def stop(step: int) -> None:
        if step + 1 == at and mode in ("term", "int"):
            os.kill(os.getpid(), signal.SIGTERM if mode == "term" else signal.SIGINT)
        if step + 1 == at and mode == "kill-second" and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def export(folder: Path, weights: Mapping[str, Tensor]) -> None:
        plain_export(folder, weights)
        if mode == "kill-in-save" and folder.parent.name.endswith(f"{at:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)

    run.method.before_accept = stop  # type: ignore[assignment]
    run.export = export
    return train(run, out, resume="--resume" in sys.argv).exit_code


if __name__ == "__main__":
    sys.exit(main())
