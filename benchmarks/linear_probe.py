"""The linear probe's sweep over C beside scikit-learn's LogisticRegression with warm starts, on one float32 matrix.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python benchmarks/linear_probe.py

50,000 features of width 768 in 100 classes, made to be like those of a vision transformer: their variance falls as a
power of the rank over turned axes, their mean is not zero, and no plane parts the classes. Both fit the whole grid
from strong to weak regularisation, each C from the weights of the last, with the default threads, tolerance 1e-4 on the
gradient per sample (scikit-learn's default) and at most 1,000 iterations (CLIP's). Neither leaves a C out, while the
suite's own search visits at most 15 of CLIP's 97 values and is not timed here. The file has the objective of both at
each C: ours must not be above the peer's by more than 1e-4 of it, and may be below, where the peer stops early.
"""

from __future__ import annotations

import argparse
import os
import warnings
from typing import Any

import numpy as np
import side_by_side
import torch
from torch.nn import functional as F

from trivium.evaluate import linear_probe
from trivium.evaluate.linear_probe import Probe

SAMPLES, WIDTH, CLASSES = 50_000, 768, 100
TOLERANCE = 1e-4


def synthetic(samples: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, D] float32 and labels [N]."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(samples) % classes
    spread_D = 2 * torch.arange(1, width + 1).float() ** -0.5
    centres_KD = 0.15 * torch.randn(classes, width, generator=generator)
    noise_ND = torch.randn(samples, width, generator=generator)
    axes_DD, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    mean_D = torch.randn(width, generator=generator)
    return ((centres_KD[labels_N] + noise_ND) * spread_D) @ axes_DD + mean_D, labels_N


class Ours:
    def __init__(self, features_ND: torch.Tensor, labels_N: torch.Tensor, grid: list[float]) -> None:
        self.features_ND, self.labels_N, self.grid = features_ND, labels_N, grid
        self.fits: list[Probe] = []

    def run(self) -> None:
        solver = linear_probe.Solver(self.features_ND, self.labels_N, tolerance=TOLERANCE)
        self.fits = []
        for c in self.grid:
            self.fits.append(solver.solve(c, self.fits[-1] if self.fits else None))

    def found(self, place: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        probe = self.fits[place]
        return probe.weight_KD, probe.bias_K, probe.iterations


class Peer:
    def __init__(self, features_ND: np.ndarray, labels_N: np.ndarray, grid: list[float]) -> None:
        self.features_ND, self.labels_N, self.grid = features_ND, labels_N, grid
        self.fits: list[tuple[np.ndarray, np.ndarray, int]] = []

    def run(self) -> None:
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(tol=TOLERANCE, max_iter=linear_probe.MAX_ITERATIONS, warm_start=True)
        self.fits = []
        for c in self.grid:
            model.set_params(C=c).fit(self.features_ND, self.labels_N)
            self.fits.append((model.coef_.copy(), model.intercept_.copy(), int(model.n_iter_[0])))

    def found(self, place: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        weight_KD, bias_K, iterations = self.fits[place]
        return torch.from_numpy(weight_KD), torch.from_numpy(bias_K), iterations


def objective(
    features_ND: torch.Tensor, labels_N: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor, c: float
) -> float:
    """In float64, for both sides alike."""
    loss = 0.0
    for features, labels in zip(features_ND.split(4096), labels_N.split(4096), strict=True):
        logits = F.linear(features.double(), weight_KD.double(), bias_K.double())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return c * loss + 0.5 * float(weight_KD.double().square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of both sides, interleaved, after no warm-up")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="fewer are a try and write no results")
    parser.add_argument("--grid", type=float, nargs="+", default=list(linear_probe.C_GRID), help="likewise another")
    arguments = parser.parse_args()
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        if name in os.environ:
            raise SystemExit(f"{name} is set, which changes the peer's products: unset it")
    warnings.filterwarnings("ignore", message=".*lbfgs failed to converge.*")  # its iterations are in the file
    side_by_side.refuse_a_busy_machine()
    features_ND, labels_N = synthetic(arguments.samples, WIDTH, CLASSES)
    grid = sorted(arguments.grid)
    ours, peer = Ours(features_ND, labels_N, grid), Peer(features_ND.numpy(), labels_N.numpy(), grid)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(arguments.rounds):
        times[0].append(side_by_side.seconds(ours.run))
        print(f"ours {times[0][-1]:.1f} s, iterations {[fit.iterations for fit in ours.fits]}", flush=True)
        times[1].append(side_by_side.seconds(peer.run))
        print(f"peer {times[1][-1]:.1f} s, iterations {[fit[2] for fit in peer.fits]}", flush=True)
    fits: list[dict[str, Any]] = []
    for place, c in enumerate(grid):
        entry: dict[str, Any] = {"c": c}
        for name, side in (("ours", ours), ("peer", peer)):
            weight_KD, bias_K, iterations = side.found(place)
            answers_N = F.linear(features_ND, weight_KD.float(), bias_K.float()).argmax(dim=1)
            entry[name] = {
                "objective": objective(features_ND, labels_N, weight_KD, bias_K, c),
                "accuracy": float((answers_N == labels_N).float().mean()),
                "iterations": iterations,
            }
        print(entry)
        assert entry["ours"]["objective"] <= entry["peer"]["objective"] * (1 + 1e-4), "ours is not fitted as well"
        fits.append(entry)
    case = f"{arguments.samples:,} x {WIDTH} x {CLASSES}, {len(grid)} values of C"
    result = side_by_side.row(*times)
    print(case, result)
    if arguments.samples == SAMPLES and grid == sorted(linear_probe.C_GRID):
        side_by_side.write("linear_probe", {case: result}, fits=fits)


if __name__ == "__main__":
    main()
