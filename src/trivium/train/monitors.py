"""What goes wrong in training without stopping it, said while there is time to act.

A monitor reads what a step leaves anyway, detached, once in some steps of each stream. Where its figure crosses its
threshold it says one sentence: the figure, and what to do. It knows no family: rows and marks ("same_...") are those of
`embed`, and a method states the ranges of its learned numbers (`Method.clamped`), figures of its own with theirs
(`Method.watched`) and the chance of its losses (`Method.chance`).

    collapse      coupled rows point the same way                               needs `embed`
    saturation    a learned number stays at an end of its range                 needs `clamped`
    balance       one loss makes nearly the whole gradient                      needs a step with two losses
    health        a figure that a method watches itself leaves its range        needs `watched`
    chance        a loss is no better than the frequencies of its labels        needs `chance`
    duplicates    rows of a batch that are not each other's negatives           needs marks "same_..."
    skipped       steps changed nothing, since their gradient was not finite
    loading       share of the time that is spent waiting for data: whether a run is loader-bound or compute-bound
    mfu           share of the measured speed of a matrix product that is used  GPU alone

Every figure goes to monitors.jsonl, one JSON object a line. "stream" is empty where a figure is of the whole run, and
"sentence" is there where it was said, at most once in QUIET_LOOKS looks; what there is to say of a figure that is well
stands there as often, for the report, and is not shown while it trains. `skipped` alone speaks of the steps so far,
when they are 1, 2, 4, 8 and so on, and where the others never look too:

    {"step": 300, "stream": "pairs", "monitor": "duplicates", "subject": "same_image", "value": 0.31,
     "threshold": 0.2, "crossed": true, "sentence": "..."}

Nothing here changes what is trained: no update, and torch's generator is seeded before every forward of a step.
`balance` alone computes: one forward and backward for each loss, on one micro-batch, once in BALANCE_LOOKS looks. All
processes look at the same steps, so that a method in parts (sharding.py) can be gathered; elsewhere no message is sent.

G rows of the global batch, D width.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from trivium.train import distributed
from trivium.train.protocol import Batch, Key, Method, Rows, Stream, Sums
from trivium.train.sharding import let_go
from trivium.train.step import Context, StepResult

# The thresholds, all of them. Beyond one, its monitor speaks.
EFFECTIVE_RANK = 1.2  # below: two rows of a batch have a cosine of 0.91 (root of the mean square); 1 = all are one
AT_END = 0.001  # below: distance to an end of the range, as a share of the range
GRADIENT_SHARE = 0.95  # above: of one loss, in the sum of the norms of all
CHANCE = 0.99  # above: a loss as a share of its chance
DUPLICATES = 0.2  # above: rows of a batch that repeat another, as a share
WAITING = 0.2  # above: time waiting for data, as a share
MFU = 0.2  # below: FLOPs a second, as a share of those of a matrix product on this device

PATIENCE = 2  # looks after the warm-up before what is learned is judged; the first two minutes say little
QUIET_LOOKS = 10  # looks until a monitor may say the same again
BALANCE_LOOKS = 5  # looks between two measurements of gradients
MOST_ROWS = 1024  # of a batch, whose effective rank is computed


@dataclass(frozen=True)
class Finding:
    """One figure of one monitor."""

    monitor: str
    subject: str  # what of a run it is about: a loss, the name of rows or marks; "" where it is the run as a whole
    value: float
    threshold: float
    crossed: bool
    sentence: str  # what is said where it is crossed
    well: str = ""  # what is written where it is not, if there is something to say


# ------------------------------------------------------------------------------------------------- the figures


def effective_rank(rows_GD: Tensor) -> float:
    """How many directions the rows take: 1 / mean of the squared cosines of all pairs, between 1 and min(G, D).

    The participation ratio of the second moments of the rows at unit length. 1: all rows are one, or its opposite.
    """
    rows = normalize(rows_GD[:MOST_ROWS].float(), dim=1)
    moments = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    return float(len(rows) ** 2 / moments.square().sum())


def duplicate_rate(same_G: Tensor) -> float:
    """Share of rows that repeat another of the batch. same_G: int64, equal numbers = the same thing."""
    return 1 - len(same_G.unique()) / len(same_G)


def gradient_norms(
    method: Method, batch: Batch, everyone: Rows, key: Key, names: Sequence[str], autocast: Context = nullcontext
) -> dict[str, float]:
    """Norm of the weighted gradient of each loss named, from one micro-batch; of a method in parts from one micro-batch
    of each process.

    A forward for each: to keep one graph for all of them would take more memory than a step, and compiled blocks do not
    allow it. Leaves no gradient behind.

    Args:
        everyone: the coupled rows of the whole batch, detached.
    """
    counts = method.divisors(method.counts(batch))
    norms = {}
    for name in names:
        loss = _forward(method, batch, everyone, key, counts, autocast)[name]
        if loss.requires_grad:
            (method.weights[name] * loss / counts[name].clamp(min=1).to(loss.device, loss.dtype)).backward()
        grads = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
        norms[name] = float(distributed.norms(grads).norm()) if grads else 0.0
        method.zero_grad(set_to_none=True)
    return norms


def forward_flops(method: Method, batch: Batch, everyone: Rows, key: Key, autocast: Context = nullcontext) -> int:
    """FLOPs of the matrix products, convolutions and attentions of one forward of a micro-batch, uncompiled.

    With a graph, as in a step: without one torch's counter refuses a module that is handed a slice of a parameter.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        _forward(method, batch, everyone, key, method.divisors(method.counts(batch)), autocast)
    let_go(method)
    return counter.get_total_flops()


def _forward(method: Method, batch: Batch, everyone: Rows, key: Key, counts: Sums, autocast: Context) -> Sums:
    key.reseed(batch.number)
    with autocast():
        rows, states = method.embed(batch)
        with_mine = {
            name: everyone.rows[name].index_copy(0, batch.rows_B.to(rows_BD.device), rows_BD)
            for name, rows_BD in rows.rows.items()
        }
        return method.couple(rows, Rows(with_mine, everyone.marks)) | method.separate(batch, rows, states, counts, key)


# ------------------------------------------------------------------------------------- figures with their sentences


def collapse(rows: Rows) -> Iterator[Finding]:
    for name, rows_GD in rows.rows.items():
        rank, cosine = (value := effective_rank(rows_GD)), value**-0.5
        yield Finding(
            "collapse", name, rank, EFFECTIVE_RANK, rank < EFFECTIVE_RANK,
            f'the features "{name}" are collapsing: their cosines are about {cosine:.2f}, an effective rank of'
            f" {rank:.2f} of {rows_GD.shape[1]}; lower --optim.lr or warm up longer, and see that the loss that tells"
            " them apart has a weight",
        )  # fmt: skip


def saturation(method: Method) -> Iterator[Finding]:
    for name, (value, low, high) in method.clamped().items():
        at = distributed.whole(value).item()
        distance = min(at - low, high - at) / (high - low)
        yield Finding(
            "saturation", name, at, high if high - at < at - low else low, distance < AT_END,
            f"{name} stands at {at:.3g}, an end of its range ({low:.3g} to {high:.3g}), and learns no more: if that is"
            " early in the run, lower --optim.lr, or look for pairs that the model knows by heart (little or repeated"
            " data)",
        )  # fmt: skip


def health(method: Method) -> Iterator[Finding]:
    for name, watched in method.watched().items():
        value = distributed.whole(watched.value).item()
        threshold = watched.low if abs(value - watched.low) < abs(value - watched.high) else watched.high
        yield Finding(
            "health", name, value, threshold, not watched.low <= value <= watched.high,
            f"{name.replace('_', ' ')} is {value:.3g}, not in {watched.low:g} to {watched.high:g}: {watched.advice}",
        )  # fmt: skip


def balance(norms: Mapping[str, float]) -> Iterator[Finding]:
    total = sum(norms.values())
    if not 0 < total < math.inf:
        return
    listed = ", ".join(f"{name} {norm / total:.1%}" for name, norm in sorted(norms.items(), key=lambda n: -n[1]))
    for name, norm in norms.items():
        yield Finding(
            "balance", name, norm / total, GRADIENT_SHARE, norm / total > GRADIENT_SHARE,
            f"{name} makes {norm / total:.1%} of the gradient ({listed}), so the others are hardly learned: lower its"
            " weight or raise theirs",
        )  # fmt: skip


def against_chance(losses: Mapping[str, float], chance: Mapping[str, float]) -> Iterator[Finding]:
    for name, guess in chance.items():
        if name in losses and guess > 0:
            share = losses[name] / guess
            yield Finding(
                "chance", name, share, CHANCE, share > CHANCE,
                f"{name} is {losses[name]:.4f} where guessing gives {guess:.4f}, so nothing of it is learned yet: check"
                " that its labels fit the samples, then raise its weight or --optim.lr, or train longer",
            )  # fmt: skip


def duplicates(marks: Mapping[str, Tensor]) -> Iterator[Finding]:
    for name, mark_G in marks.items():
        if name.startswith("same_"):
            rate = duplicate_rate(mark_G)
            yield Finding(
                "duplicates", name, rate, DUPLICATES, rate > DUPLICATES,
                f"{rate:.0%} of the rows of a batch repeat another ({name}) and are no negatives for it: use more data"
                " or a smaller --data.batch, or remove duplicates",
            )  # fmt: skip


def loading(waited: float, seconds: float, workers: int) -> Iterator[Finding]:
    share = waited / seconds
    yield Finding(
        "loading", "", share, WAITING, share > WAITING,
        f"loader-bound: {share:.0%} of the time goes by waiting for data; raise --train.workers ({workers} now), or"
        " pack the data into shards of smaller pictures (trivium data pack)",
        f"compute-bound: {share:.0%} of the time goes by waiting for data",
    )  # fmt: skip


def mfu(flops_per_second: float, ceiling: float) -> Iterator[Finding]:
    share = flops_per_second / ceiling
    yield Finding(
        "mfu", "", share, MFU, share < MFU,
        f"the model runs at {share:.0%} of what this device does in a matrix product ({flops_per_second / 1e12:.3g} of"
        f" {ceiling / 1e12:.3g} TFLOP/s): take more samples at once (--train.micro-batch auto), or --train.compile",
    )  # fmt: skip


def skipped(number: int, steps: int) -> Finding:
    """number: of the steps of a stream that this process took."""
    return Finding(
        "skipped", "", number, 0, True,
        f"skipped, since the gradient was not finite: {number:,} of {steps:,} steps so far, which changed nothing;"
        " lower --optim.lr, or look at the samples of this stream",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- when they look


@dataclass
class _Window:
    """What steps since the last look add up to."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: Counter[str] = field(default_factory=Counter)  # mean x count: sums over rows
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, result: StepResult, seconds: float, waited: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.waited += waited
        self.counts.update(result.counts)
        self.losses.update({name: loss * result.counts[name] for name, loss in result.losses.items()})

    def mean_losses(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.losses.items() if self.counts[name]}

    def mean_counts(self) -> dict[str, float]:
        return {name: total / self.steps for name, total in self.counts.items()}


class Monitors:
    """The monitors of one process. All of them look at the same steps; the first one writes and speaks.

    Args:
        path: monitors.jsonl. say: shows a sentence.
        every: steps between looks; 0: never, but skipped steps are told. first: steps done before this process began.
        warmup: steps of the learning rate's. workers: of the loader.
        flops: a second, of a matrix product on this device in the run's precision; None: `mfu` is not watched.
    """

    def __init__(
        self,
        path: Path,
        say: Callable[[str], None],
        method: Method,
        *,
        seed: int,
        every: int,
        first: int,
        warmup: int,
        workers: int,
        autocast: Context = nullcontext,
        flops: float | None = None,
    ) -> None:
        self.path, self.say, self.method = path, say, method
        self.seed, self.every, self.workers = seed, every, workers
        self.settled = warmup + PATIENCE * every
        self.autocast, self.flops = autocast, flops
        self._first = first
        self._last: dict[str, int] = {}  # stream -> its last step
        self._taken: Counter[str] = Counter()  # stream -> steps
        self._skipped: Counter[str] = Counter()
        self._of_run = _Window()
        self._of_stream: defaultdict[str, _Window] = defaultdict(_Window)
        self._forward_flops: dict[str, int] = {}  # stream -> of one micro-batch
        self._said: dict[tuple[str, str, str, bool], int] = {}

    def note(
        self, done: int, stream: Stream, batches: Sequence[Batch], result: StepResult, seconds: float, waited: float
    ) -> None:
        """Take note of one step, and look where it is time.

        done: steps done with this one. seconds: that it took, of which `waited` for its batches.
        """
        self._taken[stream.name] += 1
        if not result.accepted:
            self._skipped[stream.name] += 1
            number = self._skipped[stream.name]
            if number.bit_count() == 1:
                self._report(done, stream.name, [skipped(number, self._taken[stream.name])], quiet_looks=0)
            return
        if not self.every:
            return
        if done == self._first + 1:  # the workers have just been started
            seconds, waited = seconds - waited, 0.0
        before = self._last.get(stream.name, self._first)
        self._last[stream.name] = done
        for window in (self._of_run, self._of_stream[stream.name]):
            window.add(result, seconds, waited)
        if done % self.every == 0:
            self._report(done, "", list(loading(self._of_run.waited, self._of_run.seconds, self.workers)))
            self._of_run = _Window()
        if done // self.every > before // self.every:
            window = self._of_stream.pop(stream.name)
            self._report(done, stream.name, list(self._look(done, before, stream, batches, result, window)))

    def _look(
        self, done: int, before: int, stream: Stream, batches: Sequence[Batch], result: StepResult, window: _Window
    ) -> Iterator[Finding]:
        """What is seen after a step of one stream. before: its step before this one."""
        key = Key(self.seed, stream.name, done - 1)
        yield from duplicates(result.rows.marks)
        if self.flops is not None:
            if stream.name not in self._forward_flops:
                self._forward_flops[stream.name] = forward_flops(
                    self.method, batches[0], result.rows, key, self.autocast
                )
            useful = 3 * self._forward_flops[stream.name] * len(batches) * window.steps  # a backward is two forwards
            yield from mfu(useful / (window.seconds - window.waited), self.flops)
        if done < self.settled:
            return
        yield from collapse(result.rows)
        yield from saturation(self.method)
        yield from health(self.method)
        yield from against_chance(window.mean_losses(), self.method.chance(window.mean_counts()))
        names = [name for name in result.losses if self.method.weights[name]]
        balance_every = BALANCE_LOOKS * self.every
        if len(names) > 1 and done // balance_every > before // balance_every:
            yield from balance(gradient_norms(self.method, batches[0], result.rows, key, names, self.autocast))

    def _report(self, done: int, stream: str, findings: Sequence[Finding], quiet_looks: int = QUIET_LOOKS) -> None:
        if distributed.rank() > 0 or not findings:
            return
        lines = []
        for finding in findings:
            about = (stream, finding.monitor, finding.subject, finding.crossed)
            line = {"step": done, "stream": stream, **asdict(finding)}
            well, sentence = line.pop("well"), line.pop("sentence")
            sentence = sentence if finding.crossed else well
            if sentence and done - self._said.get(about, -math.inf) >= quiet_looks * self.every:
                self._said[about] = done
                line["sentence"] = sentence
                if finding.crossed:
                    self.say(f"step {done}{stream and f' ({stream})'}: {sentence}")
            lines.append(json.dumps(line) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
