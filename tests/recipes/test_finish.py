"""What the evaluation of a model alone knows of its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.recipes.shop import checkpoint
from trivium.evaluate import embedded
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.load import Bundle, load
from trivium.recipes.prepared import on_drawings


def test_a_model_folder_says_at_which_share_of_false_pairs_matching_was_trained(
    twenty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []

    def suite(bundle: Bundle, false_share: float = 0.5, say: Callable[[str], None] = print) -> Evaluation:
        """The suite itself, and what it does with the share, is tested in tests/evaluate/."""
        shares.append(false_share)
        return Evaluation({"itm.accuracy": Result(0.7)})

    monkeypatch.setattr(embedded, "run", suite)
    bundle = load(checkpoint(twenty, 20) / "model")
    found = on_drawings(bundle, print)
    assert found.not_applicable == []
    older = on_drawings(replace(bundle, false_pairs=None), print)
    assert "takes half of the training pairs as false" in older.not_applicable[0]
    assert shares == [0.1, 0.5]
