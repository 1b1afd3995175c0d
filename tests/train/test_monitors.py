"""Each monitor on a run that is really bad in its way, all of them on one that is well, and what they may not touch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from runs import assert_same_state, metrics_of, on_two_processes
from safetensors.torch import save_file
from tiny_run import TinySource, make, with_train
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.evaluate import report
from trivium.evaluate.embedded import Evaluation
from trivium.invariance import unit
from trivium.manifest import write_manifest
from trivium.train import config, monitors
from trivium.train.config import Config
from trivium.train.monitors import Monitors
from trivium.train.optim import Optim
from trivium.train.protocol import Batch, Key, Method, Rows, Stream, Sums, hash64
from trivium.train.run import Run, Train
from trivium.train.step import step as take_step
from trivium.train.trainer import train

ROWS, FALSE, WIDTH = 32, 8, 8
LATENT = torch.randn(10_000, WIDTH, generator=torch.Generator().manual_seed(0))  # what there is to see in each thing
MIXING = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))  # the right view is a turned left one


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.matching = nn.Linear(WIDTH, 2)
        self.logit_scale = nn.Parameter(torch.full((1,), 1.0))


class Views(Method):
    """Two views of a thing: which belong together (contrastive), whether one pair does (itm), and, where that is asked
    for, that all rows be one (pull)."""

    def __init__(self, highest: float = 4.6, **weights: float) -> None:
        super().__init__()
        self.model = Model()
        self.highest = highest
        self.weights = {"contrastive": 1.0, "itm": 1.0, "pull": 0.0} | weights

    def counts(self, batch: Batch) -> Sums:
        rows, true = torch.tensor(len(batch)), batch.targets["true"].sum()
        return {"contrastive": true, "itm": rows, "pull": rows, "true": true}

    def embed(self, batch: Batch) -> tuple[Rows, Any]:
        left, right = self.model.left(batch.targets["left"]), self.model.right(batch.targets["right"])
        marks = {"row": batch.rows_B, "true": batch.targets["true"], "same_thing": batch.targets["thing"]}
        return Rows({"left": F.normalize(left, dim=1), "right": F.normalize(right, dim=1)}, marks), None

    def couple(self, mine: Rows, everyone: Rows) -> Sums:
        logits = self.model.logit_scale.exp() * mine.rows["left"] @ everyone.rows["right"].T
        answer = (mine.marks["row"][:, None] == everyone.marks["row"]).int().argmax(1)
        loss = F.cross_entropy(logits, answer, reduction="none")
        pull = (mine.rows["left"] - mine.rows["left"].detach().mean(0)).square().sum()
        pull = pull + (mine.rows["right"] - mine.rows["left"].detach().mean(0)).square().sum()
        return {"contrastive": (loss * mine.marks["true"]).sum(), "pull": pull}

    def separate(self, batch: Batch, rows: Rows, states: Any, counts: Sums, key: Key) -> Sums:
        logits = self.model.matching(4 * WIDTH**0.5 * rows.rows["left"] * rows.rows["right"])
        return {"itm": F.cross_entropy(logits, batch.targets["true"].long(), reduction="sum")}

    def after_step(self, step: int, everyone: Rows, stats: Sums) -> None:
        self.model.logit_scale.clamp_(0.0, self.highest)

    def clamped(self) -> dict[str, tuple[Tensor, float, float]]:
        return {"logit_scale": (self.model.logit_scale, 0.0, self.highest)}

    def chance(self, counts: Mapping[str, float]) -> dict[str, float]:
        share = counts["true"] / counts["itm"]
        return {"itm": -share * log(share) - (1 - share) * log(1 - share)}


@dataclass
class Things:
    """things: how many there are, a batch draws of them. wrong_labels: "true" says nothing. slow: each batch takes as
    long as the step before it."""

    things: int = 10_000
    wrong_labels: bool = False
    slow: bool = False

    def stream_at(self, step: int) -> Stream:
        return Stream("pairs", TinySource(), None, ROWS, ROWS)

    def place_at(self, step: int) -> int:
        return step * ROWS

    def names_at(self, step: int) -> list[str]:
        return [f"thing {place}" for place in range(self.place_at(step), self.place_at(step) + ROWS)]

    def loader(self, step: int, rank: int, world: int, stop: int, pinned: bool = False) -> Iterator[list[Batch]]:
        step_took = 0.0
        for number in range(step, stop):
            time.sleep(step_took if self.slow else 0.0)
            generator = torch.Generator().manual_seed(hash64("things", number) % 2**63)
            thing = torch.randint(self.things, (ROWS,), generator=generator)
            z = LATENT[thing]
            true = torch.rand(ROWS, generator=generator).argsort() >= FALSE
            right = torch.where(true[:, None], z, z.roll(1, 0)) @ MIXING
            if self.wrong_labels:
                true = true[torch.randperm(ROWS, generator=generator)]
            rows = torch.arange(ROWS)
            targets = {"left": z, "right": right, "true": true, "thing": thing}
            handed_over = time.perf_counter()
            yield [Batch("pairs", rows, self.place_at(number) + rows, targets=targets)]
            step_took = time.perf_counter() - handed_over


def run_on(folder: Path, method: Method, data: Things) -> list[dict[str, Any]]:
    """Train 120 steps; every line of monitors.jsonl."""
    settings = Train(
        steps=120, monitor_every=20, log_every=120, precision="fp32", device="cpu", threads=1, save_every=120
    )

    def export(model: Path, weights: Mapping[str, Tensor]) -> None:
        save_file(dict(weights), model / "model.safetensors")
        write_manifest(model)

    run = Run(
        method,
        data,
        Optim(lr=2e-2, warmup=5, weight_decay=0.0, schedule="constant"),
        settings,
        export,
        Config("views", {}, config.leaves(settings)),
    )
    train(run, folder)
    return [json.loads(line) for line in (folder / "monitors.jsonl").read_text().splitlines()]


def test_a_healthy_run_is_left_in_peace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_on(tmp_path, Views(), Things())
    # Steps of a microsecond wait for data half of their time on a busy machine: that figure is judged by itself.
    assert [line["sentence"] for line in lines if "sentence" in line and line["monitor"] != "loading"] == []
    assert not next(monitors.loading(waited=0.19, seconds=1.0, workers=1)).crossed
    looked_at = {(line["monitor"], line["subject"]) for line in lines}
    assert looked_at == {
        *(("collapse", "left"), ("collapse", "right"), ("saturation", "logit_scale"), ("chance", "itm")),
        *(("balance", "contrastive"), ("balance", "itm"), ("duplicates", "same_thing"), ("loading", "")),
    }
    last = {(line["monitor"], line["subject"]): line["value"] for line in lines}
    assert last["balance", "contrastive"] + last["balance", "itm"] == pytest.approx(1)
    assert 2 < last["collapse", "left"] <= WIDTH
    assert [line["step"] for line in lines if line["monitor"] == "balance"] == [100, 100]
    assert "step 120/120" in capsys.readouterr().out


BAD = {
    "collapse": (Views(contrastive=0.0, itm=0.1, pull=10.0), Things(), r"features .* effective rank of 1\.\d\d of 8"),
    "saturation": (Views(highest=1.2), Things(), r"logit_scale stands at 1\.2, an end of its range \(0 to 1\.2\)"),
    "balance": (Views(itm=0.001), Things(), r"contrastive makes 9\d\.\d% of the gradient \(contrastive 9.*, itm 0"),
    "chance": (Views(), Things(wrong_labels=True), r"itm is 0\.\d+ where guessing gives 0\.5623"),
    "duplicates": (Views(), Things(things=12), r"6\d% of the rows of a batch repeat another \(same_thing\)"),
    "loading": (Views(), Things(slow=True), r"loader-bound: \d\d% of the time .* --train\.workers \(1 now\)"),
}


@pytest.mark.parametrize("monitor", BAD)
def test_a_bad_run_is_told_so_once(monitor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method, data, sentence = BAD[monitor]
    lines = [line for line in run_on(tmp_path, method, data) if line["monitor"] == monitor]
    said, shown = (
        [line for line in lines if "sentence" in line and line["crossed"]],
        capsys.readouterr().out.splitlines(),
    )
    assert len(said) == (2 if monitor == "collapse" else 1)  # of the left rows and of the right ones
    for line in said:
        assert line["crossed"]
        where = "" if monitor == "loading" else " (pairs)"
        assert f"step {line['step']}{where}: {line['sentence']}" in shown
        assert re.search(sentence, line["sentence"])


@pytest.mark.parametrize("every", [0, 5])
def test_skipped_steps_are_told_when_their_number_doubles(
    every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no monitor looks. TinyMixture draws text at the steps 3, 6, 9 and so on."""
    mixture = tiny_run.TinyMixture(nan_at=frozenset({3, 4, 5, 12, 15}))
    train(make(with_train(monitor_every=every), mixture), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "monitors.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["monitor"] == "skipped"]
    assert [(line["step"], line["stream"], line["value"]) for line in told] == [
        (4, "pairs", 1), (5, "pairs", 2), (6, "text", 1), (16, "pairs", 4)
    ]  # fmt: skip
    assert "4 of 11 steps so far, which changed nothing; lower --optim.lr" in told[-1]["sentence"]
    shown = capsys.readouterr().out.splitlines()
    assert all(f"step {line['step']} ({line['stream']}): {line['sentence']}" in shown for line in told)
    page = tmp_path / "report.html"
    report.write(page, report.Report("", Evaluation(), monitors=lines))
    assert "<b>Step 16 (pairs):</b> skipped, since the gradient was not finite: 4 of 11" in page.read_text()


def test_it_is_said_again_after_a_while(tmp_path: Path) -> None:
    said: list[str] = []
    data, method = Things(things=5), Views()
    watch = Monitors(tmp_path / "m", said.append, method, seed=0, every=2, first=0, warmup=10**6, workers=0)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    for number, batches in enumerate(data.loader(0, 0, 1, 50)):
        result = take_step(method, batches, Key(0, "pairs", number), optimizer)
        watch.note(number + 1, data.stream_at(number), batches, result, seconds=1.0, waited=0.0)
    assert [sentence.partition(" (")[0] for sentence in said] == ["step 2", "step 22", "step 42"]


def test_a_run_is_loader_bound_or_compute_bound(tmp_path: Path) -> None:
    """The first is said while it trains, the second is written for the report: each at its first look."""
    said: list[str] = []
    data, method = Things(), Views()
    watch = Monitors(tmp_path / "m", said.append, method, seed=0, every=2, first=0, warmup=10**6, workers=3)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    for number, batches in enumerate(data.loader(0, 0, 1, 8)):
        result = take_step(method, batches, Key(0, "pairs", number), optimizer)
        watch.note(number + 1, data.stream_at(number), batches, result, seconds=1.0, waited=0.1 if number < 4 else 0.5)
    lines = [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()]
    found = [(line["step"], line["sentence"][:14]) for line in lines if "sentence" in line]
    assert found == [(2, "compute-bound:"), (6, "loader-bound: ")]
    [sentence] = said
    assert sentence.startswith("step 6: loader-bound: 50% of the time goes by waiting for data")
    assert not any("well" in line for line in lines)


def test_use_of_a_gpu_is_a_share_of_its_measured_speed(tmp_path: Path) -> None:
    """One forward multiplies 32 rows of 8 by three 8 x 8 matrices (and one of 8 x 2), and the rows with each other."""
    said: list[str] = []
    data, method = Things(), Views()
    batches = next(data.loader(0, 0, 1, 1))
    forward = 2 * ROWS * (WIDTH * WIDTH * 2 + WIDTH * 2 + WIDTH * ROWS)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    rows = take_step(method, batches, Key(0, "pairs", 0), optimizer).rows
    assert monitors.forward_flops(method, batches[0], rows, Key(0, "pairs", 0)) == forward
    for share in (0.3, 0.1):
        flops = 3 * forward / 0.5 / share
        path = tmp_path / f"{share}"
        watch = Monitors(path, said.append, method, seed=0, every=1, first=0, warmup=9, workers=0, flops=flops)
        result = take_step(method, batches, Key(0, "pairs", 0), optimizer)
        watch.note(1, data.stream_at(0), batches, result, seconds=0.75, waited=0.25)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["value"] for line in lines if line["monitor"] == "mfu"] == [pytest.approx(share)]
    assert len(said) == 1
    assert "runs at 10% of what this device does" in said[0]


def test_a_module_that_reads_a_slice_of_a_parameter_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """UniT's places of words: the only product of its step with texts that does not grow with the rows."""
    monkeypatch.setattr("trivium.layers.packing.WORTH_IT", 2.0)  # without pads it would grow by fits and starts
    method = unit.unit_method(unit.random_unit(dtype=torch.float32))
    none = Rows({}, {})
    few, many = (
        monitors.forward_flops(method, unit.make_batch("qnli", rows), none, Key(0, "qnli", 0)) for rows in (8, 16)
    )
    assert 2 * few - many == 2 * unit.TINY.text_width * unit.TINY.width
    assert not any(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_are_equal_to_the_bit_with_monitors_and_without(processes: int, tmp_path: Path) -> None:
    """Dropout, micro-batches, an EMA teacher and a queue: every look, with every gradient, leaves no trace."""

    def both(rank: int) -> None:
        for every in (0, 1):
            train(make(with_train(monitor_every=every, log_every=1)), tmp_path / str(every))

    if processes == 1:
        both(0)
    else:
        on_two_processes(both)
    assert_same_state(tmp_path / "0", tmp_path / "1", 20)
    assert metrics_of(tmp_path / "0") == metrics_of(tmp_path / "1")
    assert (tmp_path / "0" / "monitors.jsonl").read_text() == ""
    lines = [json.loads(line) for line in (tmp_path / "1" / "monitors.jsonl").read_text().splitlines()]
    assert {line["subject"] for line in lines if line["monitor"] == "balance"} == {"contrastive", "regression"}
    assert len([line for line in lines if line["monitor"] == "loading"]) == 20


def test_lines_after_the_checkpoint_are_forgotten_on_resumption(tmp_path: Path) -> None:
    recipe = with_train(monitor_every=1, save_every=8)
    run = make(recipe)

    def crash(step: int) -> None:
        if step == 14:
            raise RuntimeError("power cut")

    run.method.before_accept = crash  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="power cut"):
        train(run, tmp_path)
    train(make(recipe), tmp_path, resume=True)
    steps = [json.loads(line) for line in (tmp_path / "monitors.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["monitor"] == "loading"] == list(range(1, 21))


def test_norms_are_those_of_the_weighted_losses() -> None:
    """Of the second micro-batch of two, whose rows stand against all rows of the step."""
    method, key = tiny_run.Tiny(), Key(0, "pairs", 0)
    batches = next(tiny_run.TinyMixture().loader(0, 0, 1, 1))
    everyone = take_step(method, batches, key, torch.optim.SGD(method.parameters(), lr=0.0)).rows
    batch, names = batches[1], ["contrastive", "regression"]
    norms = monitors.gradient_norms(method, batch, everyone, key, names)
    assert all(parameter.grad is None for parameter in method.parameters())
    method.weights = {"contrastive": 0.0, "regression": 3.0}
    tripled = monitors.gradient_norms(method, batch, everyone, key, names)
    assert tripled["contrastive"] == 0.0
    assert tripled["regression"] == pytest.approx(3 * norms["regression"], rel=1e-5)
    key.reseed(batch.number)
    mine = method.embed(batch)[0].rows
    right = torch.cat([everyone.rows["right"][:4], mine["right"]])
    assert torch.equal(right, everyone.rows["right"])  # the same draws as in the step
    logits = method.model.logit_scale * mine["left"] @ torch.cat([right, method.queue]).T
    (0.5 * F.cross_entropy(logits, torch.arange(4, 8))).backward()
    expected = torch.stack([p.grad.norm() for p in method.parameters() if p.grad is not None]).norm()
    assert norms["contrastive"] == pytest.approx(float(expected), rel=1e-5)


def test_effective_rank_of_known_rows() -> None:
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    assert monitors.effective_rank(row.repeat(50, 1)) == pytest.approx(1)
    assert monitors.effective_rank(row * torch.tensor([[1.0], [-2.0]]).repeat(25, 1)) == pytest.approx(1)
    assert monitors.effective_rank(torch.eye(16).repeat(3, 1)) == pytest.approx(16)
    assert monitors.effective_rank(torch.eye(16)[:5]) == pytest.approx(5)
    assert monitors.effective_rank(torch.eye(4).repeat_interleave(torch.tensor([97, 1, 1, 1]), 0)) < 1.1
