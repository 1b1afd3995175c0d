"""The probe minimises scikit-learn's objective, and is fitted better than scikit-learn's default tolerance would."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression

from trivium.evaluate import linear_probe


def fitted(features_ND: torch.Tensor, labels_N: torch.Tensor, c: float) -> linear_probe.Probe:
    return linear_probe.Solver(features_ND, labels_N).solve(c)


def data(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "digits":
        features, labels = load_digits(return_X_y=True)
        return features / 16, labels
    features, labels = make_classification(800, 40, n_informative=15, n_classes=6, random_state=0)
    return features * np.logspace(-1, 0.5, 40) + 3, labels


@pytest.mark.parametrize("name", ["digits", "synthetic"])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_objective_and_accuracy_equal_scikit_learn(name: str, c: float) -> None:
    features, labels = data(name)
    probe = fitted(torch.tensor(features, dtype=torch.float32), torch.tensor(labels), c)
    oracle = LogisticRegression(C=c, tol=1e-8, max_iter=20_000, solver="newton-cg").fit(features, labels)

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = torch.from_numpy(features @ weight.T + bias)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
        return float(c * loss + 0.5 * (weight**2).sum())

    best = objective(oracle.coef_, oracle.intercept_)
    own = objective(probe.weight_KD.double().numpy(), probe.bias_K.double().numpy())
    assert own == pytest.approx(best, rel=1e-4)
    assert probe.objective == pytest.approx(own, rel=1e-4)
    predicted = probe.predict(torch.tensor(features, dtype=torch.float32)).numpy()
    assert (predicted == labels).mean() == pytest.approx(oracle.score(features, labels), abs=2e-3)
    assert probe.converged


def test_a_class_without_a_sample_is_never_answered_and_labels_keep_their_values() -> None:
    features = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    probe = fitted(features, torch.tensor([3, 3, 70, 70]), 100.0)
    assert probe.predict(features).tolist() == [3, 3, 70, 70]
    assert probe.classes_K.tolist() == [3, 70]


def test_constant_features_give_the_commonest_class() -> None:
    probe = fitted(torch.ones(10, 4), torch.tensor([0] * 3 + [1] * 7), 1.0)
    assert probe.predict(torch.ones(2, 4)).tolist() == [1, 1]
    assert torch.isfinite(probe.weight_KD).all()


def test_one_class_alone_is_answered() -> None:
    assert fitted(torch.randn(5, 3), torch.full((5,), 2), 1.0).predict(torch.randn(2, 3)).tolist() == [2, 2]


def test_rows_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = (torch.from_numpy(part) for part in data("synthetic"))
    whole = fitted(features, labels, 0.1)
    monkeypatch.setattr(linear_probe, "ROWS_AT_ONCE", 77)
    assert fitted(features, labels, 0.1).objective == pytest.approx(whole.objective, rel=1e-7)


def test_features_that_do_not_fit_on_the_device_give_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = (torch.from_numpy(part) for part in data("synthetic"))
    held = linear_probe.Solver(features, labels)
    monkeypatch.setattr(linear_probe, "free_bytes", lambda device: features.nbytes)
    monkeypatch.setattr(linear_probe, "ROWS_AT_ONCE", 77)
    streamed = linear_probe.Solver(features, labels)
    assert held.held_ND is not None and streamed.held_ND is None
    torch.testing.assert_close(held.solve(0.1).weight_KD, streamed.solve(0.1).weight_KD, rtol=1e-6, atol=1e-9)


def test_half_precision_features_are_fitted_in_single_precision() -> None:
    features, labels = (torch.from_numpy(part) for part in data("digits"))
    halves = features.half()
    exact = fitted(halves.float(), labels, 1.0)
    probe = fitted(halves, labels, 1.0)
    assert probe.weight_KD.dtype == torch.float32
    assert probe.objective == pytest.approx(exact.objective, rel=1e-6)
    assert torch.equal(probe.predict(halves), exact.predict(halves.float()))


def test_shifted_and_scaled_features_are_fitted_as_well() -> None:
    """The tolerance says the same of features of any size: scikit-learn's stops at once on small ones."""
    features, labels = (torch.from_numpy(part) for part in data("digits"))
    plain = fitted(features.float(), labels, 1.0)
    small = fitted((features / 1000 + 3).float(), labels, 1e6)
    assert small.objective == pytest.approx(1e6 * plain.objective, rel=1e-3)


def test_a_start_from_samples_with_other_classes_ends_at_the_same_place() -> None:
    features, labels = (torch.from_numpy(part) for part in data("synthetic"))
    some = (labels != 2) & (labels != 4)
    start = fitted(features[some], labels[some], 0.1)
    assert start.classes_K.tolist() == [0, 1, 3, 5]
    solver = linear_probe.Solver(features, labels)
    assert solver.solve(0.1, start).objective == pytest.approx(solver.solve(0.1).objective, rel=1e-6)
    fewer = linear_probe.Solver(features[some], labels[some])
    assert fewer.solve(0.1, solver.solve(0.1)).objective == pytest.approx(start.objective, rel=1e-6)


def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    features, labels = (torch.from_numpy(part) for part in data("synthetic"))
    return features[:300], labels[:300], features[300:], labels[300:]


def test_sweep_takes_the_c_that_validates_best_and_warm_starts_end_at_the_same_place() -> None:
    features, labels, checks, check_labels = split()
    grid = (1e-4, 1e-2, 1.0)
    best = linear_probe.sweep(linear_probe.Solver(features, labels), checks, check_labels, grid)
    cold = {c: fitted(features, labels, c) for c in grid}
    accuracy = {c: int((probe.predict(checks) == check_labels).sum()) for c, probe in cold.items()}
    assert accuracy[best.c] == max(accuracy.values())
    assert best.objective == pytest.approx(cold[best.c].objective, rel=1e-5)


def test_the_search_ends_on_clips_grid_at_its_best_value_near_the_coarse_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, checks, check_labels = split()
    solver = linear_probe.Solver(features, labels)
    tried: list[float] = []
    solve = solver.solve
    monkeypatch.setattr(solver, "solve", lambda c, start=None: (tried.append(c), solve(c, start))[1])
    best = linear_probe.search(solver, checks, check_labels)
    decades = np.log10(tried)
    np.testing.assert_allclose(decades * 8, np.round(decades * 8), atol=1e-6)  # of the 97 values of the whole grid
    assert len(set(np.round(decades * 8))) == len(tried) <= 15
    assert abs(decades.min()) <= 6 + 1e-9 and decades.max() <= 6 + 1e-9

    def right(c: float) -> int:
        return int((fitted(features, labels, c).predict(checks) == check_labels).sum())

    assert right(best.c) >= max(right(c) for c in tried) - 1  # a warm and a cold start may part on one sample
    coarse = linear_probe.sweep(solver, checks, check_labels, linear_probe.COARSE_GRID)
    assert right(best.c) >= right(coarse.c)


@pytest.mark.data
@pytest.mark.slow
def test_on_cifar10_scikit_learn_agrees() -> None:
    """Features of 50,000 photographs: 8 x 8 pixels, which need no model."""
    root = Path(os.environ["TRIVIUM_DATA"]) / "cifar10"
    sets = []
    for name in ("train", "test"):
        table = pq.read_table(root / f"{name}.parquet", columns=["image", "label"])
        pictures = [Image.open(io.BytesIO(data)).reduce(4) for data in table["image"].to_pylist()]
        pixels = np.stack([np.asarray(picture, dtype=np.float32).ravel() for picture in pictures]) / 255
        sets.append((pixels, table["label"].to_numpy()))
    (features, labels), (queries, answers) = sets
    assert len(features) == 50_000
    oracle = LogisticRegression(C=1.0, tol=1e-5, max_iter=2000).fit(features, labels)
    probe = linear_probe.Solver(torch.from_numpy(features), torch.from_numpy(labels), tolerance=1e-5).solve(1.0)
    found = float((probe.predict(torch.from_numpy(queries)).numpy() == answers).mean())
    assert found == pytest.approx(oracle.score(queries, answers), abs=2e-3)
    logits = torch.from_numpy(oracle.decision_function(features).astype(np.float64))
    loss = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum"))
    assert probe.objective == pytest.approx(loss + 0.5 * float((oracle.coef_**2).sum()), rel=1e-4)
