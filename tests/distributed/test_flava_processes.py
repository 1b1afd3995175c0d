"""A step is the same on 1, 2 and 4 gloo processes and at any micro-batch: every loss, every gradient.

What `trivium doctor --distributed` compares, with batches beside that are hard on the rule.
"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import Tensor

from trivium import invariance
from trivium.cli import main
from trivium.invariance import Layout, flava
from trivium.train.protocol import Batch, Method

HARD = {
    "the first half is false": partial(flava.case, "pairs", false_rows=tuple(range(flava.ROWS // 2))),
}
HARDER = HARD | {
    "some processes have no share of the masked pass": partial(flava.case, "pairs", masked_share=0.1),
    "all are false": partial(flava.case, "pairs", false_rows=tuple(range(flava.ROWS))),
    "nothing is masked": partial(flava.case, "pairs", masked=False),
    "sigmoid": partial(flava.case, "pairs", false_rows=(3,), contrastive_form="sigmoid"),
}


def assert_all_within(found: list[invariance.Deviation], layouts: int) -> None:
    assert len(found) == layouts
    assert all(each.within for each in found), "\n".join(map(str, found))
    assert any(each.worst > 0 for each in found)  # something was compared


def test_one_and_two_processes() -> None:
    assert_all_within(invariance.compare(invariance.CASES | HARD, worlds=(1, 2)), layouts=2 * (4 + 1 + 3 + 1))


@pytest.mark.slow
def test_one_two_and_four_processes() -> None:
    assert_all_within(invariance.compare(invariance.CASES | HARDER), layouts=2 * (4 + 1 + 3 + 1 + 2 + 1))


@pytest.mark.slow
def test_the_doctor_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--distributed"]) == 0
    *table, sentence = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 24
    assert sentence.startswith("a step means the same at all 24 layouts")


class Divided(Method):
    """Divides by the rows of its own micro-batch, the mistake that the comparison exists for."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = torch.nn.Linear(1, 1).to(dtype)
        torch.nn.init.ones_(self.model.weight)
        self.weights = {"square": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"square": torch.tensor(1.0)}

    def separate(self, batch: Batch, *_: object) -> dict[str, Tensor]:
        values_B1 = self.model(batch.rows_B[:, None].to(self.model.weight.dtype))
        return {"square": values_B1.square().mean()}


def divided(dtype: torch.dtype, dropout: float) -> tuple[Method, Batch]:
    return Divided(dtype), Batch("numbers", torch.arange(16), torch.arange(16))


def test_a_mean_over_a_micro_batch_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = invariance.compare({"mean": divided}, worlds=(1,))
    wrong = {each.layout for each in found if not each.within}
    assert wrong == {Layout(1, parts, 0.0, precision) for parts in (2, 4, 8) for precision in invariance.TOLERANCE}
    monkeypatch.setattr(invariance, "compare", lambda: found)
    assert main(["doctor", "--distributed"]) == 1
    said = capsys.readouterr().out
    assert "a step does not mean the same at 6 of 10 layouts" in said
    assert "mean: " in said and "TOO MUCH" in said
    assert main(["doctor", "--distributed", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)) == 10
