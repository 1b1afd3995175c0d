"""The probe minimises scikit-learn's objective, and is fitted better than scikit-learn's default tolerance would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression

from trivium.evaluate import linear_probe


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
    probe = linear_probe.fit(torch.tensor(features, dtype=torch.float32), torch.tensor(labels), c)
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
    probe = linear_probe.fit(features, torch.tensor([3, 3, 70, 70]), 100.0)
    assert probe.predict(features).tolist() == [3, 3, 70, 70]
    assert probe.classes_K.tolist() == [3, 70]


def test_constant_features_give_the_commonest_class() -> None:
    probe = linear_probe.fit(torch.ones(10, 4), torch.tensor([0] * 3 + [1] * 7), 1.0)
    assert probe.predict(torch.ones(2, 4)).tolist() == [1, 1]
    assert torch.isfinite(probe.weight_KD).all()


def test_one_class_alone_is_answered() -> None:
    assert linear_probe.fit(torch.randn(5, 3), torch.full((5,), 2), 1.0).predict(torch.randn(2, 3)).tolist() == [2, 2]


def test_rows_in_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = (torch.from_numpy(part) for part in data("synthetic"))
    whole = linear_probe.fit(features, labels, 0.1)
    monkeypatch.setattr(linear_probe, "ROWS_AT_ONCE", 77)
    assert linear_probe.fit(features, labels, 0.1).objective == pytest.approx(whole.objective, rel=1e-7)


def test_sweep_takes_the_c_that_validates_best_and_warm_starts_end_at_the_same_place() -> None:
    features, labels = (torch.from_numpy(part) for part in data("synthetic"))
    train, check = slice(0, 300), slice(300, 800)
    grid = (1e-4, 1e-2, 1.0)
    best = linear_probe.sweep(features[train], labels[train], features[check], labels[check], grid)
    cold = {c: linear_probe.fit(features[train], labels[train], c) for c in grid}
    accuracy = {c: int((probe.predict(features[check]) == labels[check]).sum()) for c, probe in cold.items()}
    assert accuracy[best.c] == max(accuracy.values())
    assert best.objective == pytest.approx(cold[best.c].objective, rel=1e-5)
