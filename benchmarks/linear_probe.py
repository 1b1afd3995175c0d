"""The linear probe beside scikit-learn's LogisticRegression, on the same float32 features, C by C in the same order and
from the same starts.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python benchmarks/linear_probe.py
    ... --cases search                                # one of them alone, beside what the results file has
    ... --cases cifar10 --data FOLDER                 # which holds cifar10/train.parquet and cifar10/test.parquet

Cases:

    grid      a sweep over five values of C from strong to weak regularisation, each from the weights of the last; of
              both the tolerance is 1e-4 on the gradient per sample (scikit-learn's default). None is left out
    search    the suite's own choice of C (CLIP's search, at most 15 of 97 values), with its own tolerance: fitted on
              four fifths, judged on the last. scikit-learn, with its default tolerance, visits the values that ours
              went to, each from the same neighbour's weights, and is judged on the same rows
    cifar10   50,000 photographs as 8 x 8 pixels, each C from nothing, tolerance 1e-5 for both: how far accuracy on the
              test pictures and objective lie apart

The first two are on 50,000 features of width 768 in 100 classes, made to be like those of a vision transformer: their
variance falls as a power of the rank over turned axes, their mean is not zero, and no plane parts the classes. Default
threads. The file has iterations, objective and accuracy of both at each C (of `grid` on the training rows): ours must
not be above the peer's objective by more than 1e-4 of it there, and may be below, where the peer stops early.
"""

from __future__ import annotations

import argparse
import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import side_by_side
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from trivium.evaluate import linear_probe
from trivium.evaluate.datasets.pictures import held_out
from trivium.evaluate.linear_probe import Probe

SAMPLES, WIDTH, CLASSES = 50_000, 768, 100
CASES = ("grid", "search", "cifar10")
OF_PIXELS = (0.01, 1.0, 100.0)  # values of C
PEERS_TOLERANCE = 1e-4  # scikit-learn's default

Rows = tuple[Tensor, Tensor]  # features [N, D] float32 and labels [N]
Plan = Sequence[tuple[float, float | None]]  # each C, and that of the fit that it starts from
Fit = tuple[Tensor, Tensor, int]  # weights [K, D], bias [K], iterations


def synthetic(samples: int, width: int, classes: int) -> Rows:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(samples) % classes
    spread_D = 2 * torch.arange(1, width + 1).float() ** -0.5
    centres_KD = 0.15 * torch.randn(classes, width, generator=generator)
    noise_ND = torch.randn(samples, width, generator=generator)
    axes_DD, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    mean_D = torch.randn(width, generator=generator)
    return ((centres_KD[labels_N] + noise_ND) * spread_D) @ axes_DD + mean_D, labels_N


def pixels(file: Path) -> Rows:
    """Pictures of 32 pixels a side as 8 x 8, which need no model."""
    table = pq.read_table(file, columns=["image", "label"])
    pictures = [Image.open(io.BytesIO(data)).reduce(4) for data in table["image"].to_pylist()]
    features_ND = np.stack([np.asarray(picture, dtype=np.float32).ravel() for picture in pictures]) / 255
    return torch.from_numpy(features_ND), torch.from_numpy(table["label"].to_numpy().copy())


class Recorded(linear_probe.Solver):
    """Remembers where it went, and from where."""

    def __init__(self, rows: Rows, tolerance: float, max_iterations: int) -> None:
        super().__init__(*rows, tolerance=tolerance, max_iterations=max_iterations)
        self.plan: list[tuple[float, float | None]] = []
        self.fits: dict[float, Probe] = {}

    def solve(self, c: float, start: Probe | None = None) -> Probe:
        self.plan.append((c, None if start is None else start.c))
        self.fits[c] = super().solve(c, start)
        return self.fits[c]


class Ours:
    def __init__(self, rows: Rows, tolerance: float, max_iterations: int = linear_probe.MAX_ITERATIONS) -> None:
        self.made = rows, tolerance, max_iterations
        self.plan: Plan = []
        self.fits: dict[float, Fit] = {}

    def run(self, plan: Plan) -> None:
        def solve(solver: Recorded) -> None:
            for c, start in plan:
                solver.solve(c, None if start is None else solver.fits[start])

        self._keep(solve)

    def search(self, checks: Rows) -> None:
        self._keep(lambda solver: linear_probe.search(solver, *checks))

    def _keep(self, work: Callable[[Recorded], object]) -> None:
        solver = Recorded(*self.made)
        work(solver)
        self.plan = solver.plan
        self.fits = {c: (probe.weight_KD, probe.bias_K, probe.iterations) for c, probe in solver.fits.items()}


class Peer:
    def __init__(self, rows: Rows, tolerance: float, max_iterations: int = linear_probe.MAX_ITERATIONS) -> None:
        self.features_ND, self.labels_N = (part.numpy() for part in rows)
        self.settings = {"tol": tolerance, "max_iter": max_iterations, "warm_start": True}
        self.fits: dict[float, Fit] = {}

    def run(self, plan: Plan, checks: Rows | None = None) -> None:
        """checks: rows that each fit is judged on."""
        from sklearn.linear_model import LogisticRegression

        self.fits = {}
        for c, start in plan:
            model = LogisticRegression(C=c, **self.settings)
            if start is not None:
                model.coef_, model.intercept_ = (part.numpy() for part in self.fits[start][:2])
            model.fit(self.features_ND, self.labels_N)
            self.fits[c] = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_), int(model.n_iter_[0])
            if checks is not None:
                model.score(*(part.numpy() for part in checks))


def objective(rows: Rows, fit: Fit, c: float) -> float:
    """In float64, for both sides alike."""
    weight_KD, bias_K, _ = fit
    loss = 0.0
    for features, labels in zip(rows[0].split(4096), rows[1].split(4096), strict=True):
        logits = F.linear(features.double(), weight_KD.double(), bias_K.double())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return c * loss + 0.5 * float(weight_KD.double().square().sum())


def accuracy(rows: Rows, fit: Fit) -> float:
    answers_N = F.linear(rows[0], fit[0].float(), fit[1].float()).argmax(dim=1)
    return float((answers_N == rows[1]).double().mean())


def timed(
    ours: Ours, peer: Peer, run_ours: Callable[[], None], run_peer: Callable[[], None], rounds: int
) -> dict[str, Any]:
    """Both in turns, after no warm-up. run_peer is called when ours has a plan."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for name, side, run, taken in (("ours", ours, run_ours, times[0]), ("peer", peer, run_peer, times[1])):
            taken.append(side_by_side.seconds(run))
            print(f"{name} {taken[-1]:.1f} s, iterations {[fit[2] for fit in side.fits.values()]}", flush=True)
    return side_by_side.row(*times)


def fits_of(ours: Ours, peer: Peer, learned: Rows, judged: Rows) -> list[dict[str, Any]]:
    """Of each C, in the order of C: what both came to, and by which share of it ours is above the peer's objective."""
    told = []
    for c in sorted(ours.fits):
        entry: dict[str, Any] = {"c": c}
        for name, fit in (("ours", ours.fits[c]), ("peer", peer.fits[c])):
            found = {"objective": objective(learned, fit, c), "accuracy": accuracy(judged, fit), "iterations": fit[2]}
            entry[name] = found
        entry["above"] = entry["ours"]["objective"] / entry["peer"]["objective"] - 1
        print(entry)
        told.append(entry)
    return told


def grid_case(rows: Rows, grid: Sequence[float], rounds: int) -> dict[str, Any]:
    ours, peer = Ours(rows, PEERS_TOLERANCE), Peer(rows, PEERS_TOLERANCE)
    steps = sorted(grid)
    plan = list(zip(steps, [None, *steps[:-1]], strict=True))
    result = timed(ours, peer, lambda: ours.run(plan), lambda: peer.run(plan), rounds)
    fits = fits_of(ours, peer, rows, rows)
    assert all(each["above"] <= 1e-4 for each in fits), "ours is not fitted as well"
    return result | {"fits": fits}


def search_case(rows: Rows, rounds: int) -> dict[str, Any]:
    """With the C that each would take: of equals the smallest."""
    held_N = torch.from_numpy(held_out(rows[1].numpy()))
    learned, checks = (rows[0][~held_N], rows[1][~held_N]), (rows[0][held_N], rows[1][held_N])
    ours, peer = Ours(learned, linear_probe.TOLERANCE), Peer(learned, PEERS_TOLERANCE)
    result = timed(ours, peer, lambda: ours.search(checks), lambda: peer.run(ours.plan, checks), rounds)
    fits = fits_of(ours, peer, learned, checks)
    chosen = {name: max(fits, key=lambda each: each[name]["accuracy"])["c"] for name in ("ours", "peer")}
    return result | {"order": [c for c, _ in ours.plan], "chosen": chosen, "fits": fits}


def cifar10_case(learned: Rows, judged: Rows, rounds: int) -> dict[str, Any]:
    ours, peer = Ours(learned, 1e-5, 2000), Peer(learned, 1e-5, 2000)
    plan: Plan = [(c, None) for c in OF_PIXELS]
    result = timed(ours, peer, lambda: ours.run(plan), lambda: peer.run(plan), rounds)
    fits = fits_of(ours, peer, learned, judged)
    apart = max(abs(each["ours"]["accuracy"] - each["peer"]["accuracy"]) for each in fits)
    return result | {"accuracy_apart": apart, "fits": fits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, help="by default all, cifar10 where --data is given")
    parser.add_argument(
        "--data", type=Path, help="the folder that holds cifar10/train.parquet and cifar10/test.parquet"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of both sides, interleaved, after no warm-up")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="fewer are a try and write no results")
    parser.add_argument("--grid", type=float, nargs="+", default=list(linear_probe.C_GRID), help="likewise another")
    arguments = parser.parse_args()
    cases = arguments.cases or [case for case in CASES if case != "cifar10" or arguments.data is not None]
    if "cifar10" in cases and arguments.data is None:
        parser.error("the case cifar10 reads what --data names")
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        if name in os.environ:
            raise SystemExit(f"{name} is set, which changes the peer's products: unset it")
    warnings.filterwarnings("ignore", message=".*lbfgs failed to converge.*")  # its iterations are in the file
    side_by_side.refuse_a_busy_machine()
    size = f"{arguments.samples:,} x {WIDTH} x {CLASSES}"
    results: dict[str, Any] = {}
    if {"grid", "search"} & set(cases):
        rows = synthetic(arguments.samples, WIDTH, CLASSES)
        if "grid" in cases:
            results[f"{size}, {len(arguments.grid)} values of C"] = grid_case(rows, arguments.grid, arguments.rounds)
        if "search" in cases:
            results[f"{size}, the search for C"] = search_case(rows, arguments.rounds)
    if "cifar10" in cases:
        learned, judged = (pixels(arguments.data / "cifar10" / f"{name}.parquet") for name in ("train", "test"))
        case = f"CIFAR-10 as 8 x 8 pixels, {len(OF_PIXELS)} values of C"
        results[case] = cifar10_case(learned, judged, arguments.rounds)
    for case, result in results.items():
        print(f"{case}: ours {result['ours']:.1f} s, peer {result['peer']:.1f} s, ratio {result['ratio']:.2f}")
    if arguments.samples == SAMPLES and sorted(arguments.grid) == sorted(linear_probe.C_GRID):
        typed = side_by_side.typed().replace(str(arguments.data), "DATA")
        results, _, command = side_by_side.beside_what_is_there("linear_probe", results, {}, command=typed)
        side_by_side.write("linear_probe", results, command=command)


if __name__ == "__main__":
    main()
