"""Where a tiny ALBEF looks: what its figures stand beside."""

from __future__ import annotations

import argparse
from pathlib import Path

import albef_grounding
import torch

from tests.recipes.shop import make_shop
from trivium.cli.overrides import set_overrides
from trivium.recipes.albef import albef


def test_random_weights_are_those_that_the_run_began_with(tmp_path: Path) -> None:
    told = {"data.pairs": [str(make_shop(tmp_path) / "goods.csv")], "train.seed": ["3"], "validate": ["0"]}
    prepared = set_overrides(albef("tiny"), told).prepare("albef", {})
    began = {name: tensor.clone() for name, tensor in prepared.bundle.model.state_dict().items()}
    for parameter in prepared.bundle.model.parameters():
        parameter.data += 1
    drawn = albef_grounding.untrained(prepared.bundle, prepared.recipe).model.state_dict()
    for name, tensor in began.items():
        assert torch.equal(drawn[name], tensor), name


def test_the_page_says_the_threads_that_were_given_and_what_the_minutes_came_to() -> None:
    arguments = argparse.Namespace(
        minutes=25.0, scenes=8000, rows=1500, threads=None, out=Path("/somewhere"), fine_tune=0
    )
    command = albef_grounding.command_of(arguments)
    assert command == "python benchmarks/albef_grounding.py --minutes 25 --scenes 8000 --rows 1500 --out RUNS"
    arguments.threads, arguments.fine_tune = 1, 600
    command = albef_grounding.command_of(arguments)
    assert command.endswith(" --rows 1500 --fine-tune 600 --threads 1 --out RUNS")
    page = albef_grounding.page({}, command, 25.0, 1751)
    assert f"`{command}`" in page and "The 25 minutes of training were 1,751 steps." in page
