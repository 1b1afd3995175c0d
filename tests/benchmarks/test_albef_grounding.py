"""Where a tiny ALBEF looks: what its figures stand beside."""

from __future__ import annotations

import argparse
from pathlib import Path

import albef_grounding
import torch

import trivium
from tests.recipes.shop import make_shop
from trivium.cli.overrides import set_overrides
from trivium.recipes import RECIPES
from trivium.recipes.albef import albef
from trivium.train import config


def test_random_weights_are_those_that_the_run_began_with(tmp_path: Path) -> None:
    told = {"data.pairs": [str(make_shop(tmp_path) / "goods.csv")], "train.seed": ["3"], "validate": ["0"]}
    prepared = set_overrides(albef("tiny"), told).prepare("albef", {})
    began = {name: tensor.clone() for name, tensor in prepared.bundle.model.state_dict().items()}
    for parameter in prepared.bundle.model.parameters():
        parameter.data += 1
    drawn = albef_grounding.untrained(prepared.bundle, prepared.recipe).model.state_dict()
    for name, tensor in began.items():
        assert torch.equal(drawn[name], tensor), name


def test_what_was_fine_tuned_is_measured_beside_what_it_started_from(tmp_path: Path) -> None:
    lists, data = albef_grounding.make_data(tmp_path / "scenes", 24, 4)
    values = {
        "size": "tiny", "model.width": 32, "model.mlp-width": 64, "model.num-heads": 2, "model.projection-width": 16,
        "model.image-layers": 1, "model.text-layers": 1, "model.fusion-layers": 2,
        "model.image-size": albef_grounding.SIDE, "data.pairs": lists, "data.batch": 8, "train.steps": 2,
        "objectives.pool": 4, "validate": 0,
    }  # fmt: skip
    start = albef_grounding.run(tmp_path / "run", ["pretrain", "albef"], values, "cpu", 1)
    tuned = albef_grounding.fine_tuned(start, tmp_path / "scenes" / "refcoco", 2, "cpu", 1)
    recipe = config.build(config.load(start), RECIPES)
    found = albef_grounding.measure(start, tuned, recipe, data, 8)
    cases = ["itm, block 0", "itc, last block"]
    assert list(found) == [*cases, "random weights", *(f"fine-tuned: {case}" for case in cases)]
    first, second = trivium.load(start).model, trivium.load(tuned).model
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert [row["pointing"].n for row in found.values()] == [8] * 5


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
