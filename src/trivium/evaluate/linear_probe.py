"""The linear probe (CLIP, Radford et al. 2021, appendix A.3; FLAVA section 4.2): logistic regression on features.

    minimise  C x sum over samples of cross-entropy + 1/2 x squares of the weights      (the bias is free)

which is scikit-learn's objective. L-BFGS with a strong-Wolfe line search, in the dtype and on the device of the
features. Raw features converge slowly, so the solver works in other coordinates, which leave the objective as it is:

* features are centred, since the free bias takes up any shift;
* they are turned to their principal axes, since a rotation keeps the squares of the weights;
* each axis is scaled by the root of the Hessian's diagonal at zero weights, so that all directions start equally steep.

The sweep over C shares the rotation, goes from strong to weak regularisation, and starts each fit from the last.
N samples, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

C_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)
ROWS_AT_ONCE = 65536  # of one product; the gradient is exact, only its memory is cut
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
        """The most probable label, int64 [N]."""
        return self.classes_K[F.linear(features_ND, self.weight_KD, self.bias_K).argmax(dim=1)]


def fit(features_ND: Tensor, labels_N: Tensor, c: float) -> Probe:
    """The probe at one C. labels_N: int64, any values."""
    return _Problem(features_ND, labels_N).solve(c)


def sweep(
    features_ND: Tensor,
    labels_N: Tensor,
    validation_features_ND: Tensor,
    validation_labels_N: Tensor,
    grid: Sequence[float] = C_GRID,
) -> Probe:
    """The fit whose C gives the best accuracy on the validation samples; of equals the strongest regularisation.

    Two fits in a row that are worse than the best end the sweep: the weaker regularisations that are left take longest.
    """
    problem = _Problem(features_ND, labels_N)
    fits: list[Probe] = []
    right: list[int] = []
    for c in sorted(grid):
        fits.append(problem.solve(c, fits[-1] if fits else None))
        right.append(int((fits[-1].predict(validation_features_ND) == validation_labels_N).sum()))
        if len(right) > 2 and max(right[-2:]) < max(right):
            break
    return fits[right.index(max(right))]


class _Problem:
    """One set of samples in the solver's coordinates."""

    def __init__(self, features_ND: Tensor, labels_N: Tensor) -> None:
        self.classes_K, self.targets_N = labels_N.unique(return_inverse=True)
        self.mean_D = features_ND.mean(dim=0)
        centred_ND = features_ND - self.mean_D
        variances_D, self.axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND))
        self.variances_D = variances_D.clamp(min=0)
        self.rotated_ND = centred_ND @ self.axes_DD

    def solve(self, c: float, start: Probe | None = None) -> Probe:
        N, D = self.rotated_ND.shape
        K = len(self.classes_K)
        curvature = max((K - 1) / K**2, 1e-6)  # of the cross-entropy in one logit, all classes equally probable
        scale_D = (curvature * self.variances_D + 1 / (c * N)).rsqrt()
        bias_scale = curvature**-0.5

        parameters = self.rotated_ND.new_zeros(K, D + 1)
        if start is not None:
            parameters[:, :D] = start.weight_KD @ self.axes_DD / scale_D
            parameters[:, D] = (start.bias_K + start.weight_KD @ self.mean_D) / bias_scale
        parameters.requires_grad_()

        def loss_per_sample() -> Tensor:
            """Sets the gradient; written out, since autograd would hold three [N, K] tensors where one serves."""
            with torch.no_grad():
                weight_KD, bias_K = parameters[:, :D] * scale_D, parameters[:, D] * bias_scale
                loss = weight_KD.square().sum() / (2 * c * N)
                grad = torch.cat([weight_KD / (c * N), torch.zeros_like(bias_K)[:, None]], dim=1)
                for first in range(0, N, ROWS_AT_ONCE):
                    rows = slice(first, first + ROWS_AT_ONCE)
                    log_p_NK = F.log_softmax(F.linear(self.rotated_ND[rows], weight_KD, bias_K), dim=1)
                    target_N1 = self.targets_N[rows, None]
                    loss -= log_p_NK.gather(1, target_N1).sum() / N
                    error_NK = log_p_NK.exp_()
                    error_NK.scatter_add_(1, target_N1, error_NK.new_full(target_N1.shape, -1.0))
                    grad[:, :D] += error_NK.T @ self.rotated_ND[rows] / N
                    grad[:, D] += error_NK.sum(dim=0) / N
                grad[:, :D] *= scale_D
                grad[:, D] *= bias_scale
                parameters.grad = grad
            return loss

        solver = torch.optim.LBFGS(
            [parameters],
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=TOLERANCE,
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
            converged=iterations < MAX_ITERATIONS,
        )
