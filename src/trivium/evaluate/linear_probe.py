"""The linear probe (CLIP, Radford et al. 2021, appendix A.3; FLAVA section 4.2): logistic regression on features.

    minimise  C x sum over samples of cross-entropy + 1/2 x squares of the weights      (the bias is free)

which is scikit-learn's objective. L-BFGS with a strong-Wolfe line search, float32 on the device. Raw features converge
slowly, so the solver works in other coordinates, which leave the objective as it is:

* features are centred, since the free bias takes up any shift;
* they are turned to their principal axes, since a rotation keeps the squares of the weights;
* each axis is scaled by the root of the Hessian's diagonal at zero weights, so that all directions start equally steep.

One solver serves every C: mean and axes are found once, and each fit starts from a neighbour's. It ends where no entry
of the gradient, per sample and in those coordinates, exceeds the tolerance: unlike scikit-learn's, which is taken in
the coordinates of the features, this says the same of features of any size.

N samples, D width, K classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

C_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)
COARSE_GRID = tuple(10.0**power for power in range(-6, 7, 2))  # CLIP's search begins with these
STEPS_PER_DECADE = 8  # and ends with steps so fine: 97 values from 1e-6 to 1e6
ROWS_AT_ONCE = 4096  # of one product: its logits stay in the cache of a CPU
TOLERANCE = 1e-5
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """A fitted probe. A class that no training sample had is never answered."""

    weight_KD: Tensor
    bias_K: Tensor
    classes_K: Tensor  # int64, the labels as they were given
    c: float
    objective: float  # as in the head of this file
    iterations: int
    converged: bool  # False: the iterations ran out

    def predict(self, features_ND: Tensor) -> Tensor:
        """The most probable label, int64 [N], on the device of the probe."""
        parts = []
        for rows_ND in features_ND.split(ROWS_AT_ONCE):
            rows_ND = rows_ND.to(self.weight_KD)
            parts.append(self.classes_K[F.linear(rows_ND, self.weight_KD, self.bias_K).argmax(dim=1)])
        return torch.cat(parts)


def sweep(
    solver: Solver,
    validation_features_ND: Tensor,
    validation_labels_N: Tensor,
    grid: Sequence[float] = C_GRID,
) -> Probe:
    """The fit whose C gives the best accuracy on the validation samples; of equals the strongest regularisation.

    Two fits in a row that are worse than the best end the sweep: the weaker regularisations that are left take longest.
    """
    chosen, _ = _sweep(solver, validation_features_ND, validation_labels_N, grid)
    return chosen


def search(solver: Solver, validation_features_ND: Tensor, validation_labels_N: Tensor) -> Probe:
    """`sweep` from coarse to fine, as CLIP does: 1e-6, 1e-4, ... 1e6, then the two neighbours of the best at half the
    distance, until there are eight values of C to a decade. At most 15 fits of the 97 that the whole grid holds."""
    best, fits = _sweep(solver, validation_features_ND, validation_labels_N, COARSE_GRID)
    right = {probe.c: _right(probe, validation_features_ND, validation_labels_N) for probe in fits}
    by_c = {probe.c: probe for probe in fits}
    step = 1.0  # decades
    while step >= 1 / STEPS_PER_DECADE:
        for c in (best.c * 10**-step, best.c * 10**step):
            if COARSE_GRID[0] * 0.99 < c < COARSE_GRID[-1] * 1.01:
                nearest = min(by_c, key=lambda other: abs(math.log(other / c)))
                by_c[c] = solver.solve(c, by_c[nearest])
                right[c] = _right(by_c[c], validation_features_ND, validation_labels_N)
        best = by_c[max(sorted(right), key=right.__getitem__)]  # of equals the first, which is the smallest C
        step /= 2
    return best


def _sweep(solver: Solver, features_ND: Tensor, labels_N: Tensor, grid: Sequence[float]) -> tuple[Probe, list[Probe]]:
    fits: list[Probe] = []
    right: list[int] = []
    for c in sorted(grid):
        fits.append(solver.solve(c, fits[-1] if fits else None))
        right.append(_right(fits[-1], features_ND, labels_N))
        if len(right) > 2 and max(right[-2:]) < max(right):
            break
    return fits[right.index(max(right))], fits


def _right(probe: Probe, features_ND: Tensor, labels_N: Tensor) -> int:
    return int((probe.predict(features_ND) == labels_N.to(probe.classes_K.device)).sum())


class Solver:
    """One set of samples in the solver's coordinates. labels_N: int64, any values.

    Features that do not fit beside themselves on the device stay where they are, in any dtype; each evaluation then
    takes them there a few rows at a time. The gradient is the same.
    """

    def __init__(
        self,
        features_ND: Tensor,
        labels_N: Tensor,
        device: torch.device | None = None,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> None:
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.device = features_ND.device if device is None else device
        self.dtype = torch.float64 if features_ND.dtype == torch.float64 else torch.float32
        self.features_ND = features_ND
        self.classes_K, self.targets_N = labels_N.to(self.device).unique(return_inverse=True)
        N, D = features_ND.shape
        self.held_ND: Tensor | None = None
        self.mean_D = torch.zeros(D, dtype=self.dtype, device=self.device)
        self.mean_D = torch.stack([self._centred(rows).sum(dim=0) / N for rows in self._rows()]).sum(dim=0)
        if N * D * self.mean_D.element_size() < free_bytes(self.device) / 2:
            self.held_ND = features_ND.to(self.device, self.dtype) - self.mean_D
        covariance_DD = torch.zeros(D, D, dtype=self.dtype, device=self.device)
        for rows in self._rows():
            centred_ND = self._centred(rows)
            covariance_DD += centred_ND.T @ centred_ND / N
        variances_D, self.axes_DD = torch.linalg.eigh(covariance_DD)
        self.variances_D = variances_D.clamp(min=0)

    def solve(self, c: float, start: Probe | None = None) -> Probe:
        """The fit at this C. start: of another C or of other samples, whose weights it begins with."""
        N, D = self.features_ND.shape
        K = len(self.classes_K)
        curvature = max((K - 1) / K**2, 1e-6)  # of the cross-entropy in one logit, all classes equally probable
        scale_D = (curvature * self.variances_D + 1 / (c * N)).rsqrt()
        bias_scale = curvature**-0.5

        parameters = self.mean_D.new_zeros(K, D + 1)
        if start is not None:
            known_K = torch.isin(self.classes_K, start.classes_K)  # other samples may have other classes
            rows = torch.searchsorted(start.classes_K, self.classes_K[known_K])
            weight_KD = start.weight_KD[rows]
            parameters[known_K, :D] = weight_KD @ self.axes_DD / scale_D
            parameters[known_K, D] = (start.bias_K[rows] + weight_KD @ self.mean_D) / bias_scale
        parameters.requires_grad_()

        def loss_per_sample() -> Tensor:
            """Sets the gradient; written out, since autograd would hold three [N, K] tensors where one serves."""
            with torch.no_grad():
                weight_KD = (parameters[:, :D] * scale_D) @ self.axes_DD.T
                bias_K = parameters[:, D] * bias_scale
                loss = weight_KD.square().sum() / (2 * c * N)
                grad_KD, grad_K = weight_KD / (c * N), torch.zeros_like(bias_K)
                for rows in self._rows():
                    centred_ND, target_N1 = self._centred(rows), self.targets_N[rows, None]
                    log_p_NK = F.log_softmax(F.linear(centred_ND, weight_KD, bias_K), dim=1)
                    loss -= log_p_NK.gather(1, target_N1).sum() / N
                    error_NK = log_p_NK.exp_()
                    error_NK.scatter_add_(1, target_N1, error_NK.new_full(target_N1.shape, -1.0))
                    grad_KD.addmm_(error_NK.T, centred_ND, alpha=1 / N)
                    grad_K += error_NK.sum(dim=0) / N
                grad_KD = grad_KD @ self.axes_DD * scale_D
                parameters.grad = torch.cat([grad_KD, grad_K[:, None] * bias_scale], dim=1)
            return loss

        solver = torch.optim.LBFGS(
            [parameters],
            max_iter=self.max_iterations,
            max_eval=2 * self.max_iterations,
            tolerance_grad=self.tolerance,
            tolerance_change=1e-9,  # below what float32 resolves: the loss has to stand still
            line_search_fn="strong_wolfe",
            history_size=10,
        )
        solver.step(loss_per_sample)
        loss, iterations = float(loss_per_sample()), solver.state[parameters]["n_iter"]
        weight_KD = (parameters.detach()[:, :D] * scale_D) @ self.axes_DD.T
        return Probe(
            weight_KD=weight_KD,
            bias_K=parameters.detach()[:, D] * bias_scale - weight_KD @ self.mean_D,
            classes_K=self.classes_K,
            c=c,
            objective=loss * c * N,
            iterations=iterations,
            converged=iterations < self.max_iterations,
        )

    def _rows(self) -> Iterator[slice]:
        return (slice(first, first + ROWS_AT_ONCE) for first in range(0, len(self.features_ND), ROWS_AT_ONCE))

    def _centred(self, rows: slice) -> Tensor:
        if self.held_ND is not None:
            return self.held_ND[rows]
        return self.features_ND[rows].to(self.device, self.dtype) - self.mean_D


def free_bytes(device: torch.device) -> int:
    """What the device's memory has left (Linux, for a CPU)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
