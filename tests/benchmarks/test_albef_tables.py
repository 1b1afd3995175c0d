"""What ALBEF's tables say of runs that are there, of some seeds or of all."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import albef_noise
import albef_real
import albef_table1
import numpy as np
import pytest
import side_by_side
from albef_runs import always_the_commonest

from trivium.cli.overrides import set_overrides
from trivium.data.labelled import LabelledRows, Row, Splits
from trivium.evaluate import outcomes, results, vqa
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.results import Result
from trivium.recipes.albef import albef
from trivium.train import config

NAMES = [str(number) for number in range(200)]


@pytest.fixture(autouse=True)
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pages and numbers go in place of the folder of results."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(side_by_side, "write", partial(side_by_side.write, folder=folder))
    return folder


def units(mean: float) -> Outcomes:
    """Right on so large a part of them."""
    values = [float(number < round(mean * len(NAMES))) for number in range(len(NAMES))]
    return Outcomes("mean", tuple(NAMES), np.array(values, dtype=np.float32))


def test_table_1_gives_verdicts_on_cells_of_all_seeds_and_marks_the_others(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gave = {row: {0: 0.50, 1: 0.51} for row in albef_table1.ROWS} | {"mlm-itm": {0: 0.20, 1: 0.21}, "hard": {0: 0.9}}
    monkeypatch.setattr(
        albef_table1, "COLUMNS", dict.fromkeys(albef_table1.COLUMNS, lambda cell: units(gave[cell.row][cell.seed]))
    )

    def cell(row: str, seed: int) -> albef_table1.Cell:
        photographs = albef_table1.Photographs(tmp_path, tmp_path / "out")
        return albef_table1.Cell(row, seed, photographs, 300, 300, 100, "cpu", 1)

    for row, seeds in gave.items():
        for seed in seeds:
            for folder in albef_table1.FOLDERS.values():
                (cell(row, seed).folder / folder).mkdir(parents=True, exist_ok=True)
                (cell(row, seed).folder / folder / "results.json").write_text("{}")
    albef_table1.table(cell, [0, 1], "the command", {"VE": Result(0.34, 0.32, 0.36)})
    lines = (written / "albef_table1.md").read_text().splitlines()
    [full, part] = [line for line in lines if line.startswith(("| ITC + MLM + ITM |", "| ITC + MLM + ITM_hard |"))]
    assert full.startswith("| ITC + MLM + ITM | 50.5 [") and "of 2 seeds" not in full
    assert part.startswith("| ITC + MLM + ITM_hard | 90.0 [") and part.count("1 of 2 seeds") == 5
    [whole, quarter] = [
        line
        for line in lines
        if line.startswith(("| ALBEF (Full + MoD downstream) |", "| ALBEF on a quarter of the pairs |"))
    ]
    assert " (97.83, at 14M 98.70) |" in whole and " (97.83) |" in quarter
    assert any("statements and questions on scenes" in line for line in lines)
    assert "| commonest answer of training | – | – | 34.0 [32.0, 36.0] | – | – |" in lines
    orderings = json.loads((written / "albef_table1.json").read_text())["orderings"]
    told = {name: {cell["verdict"] for cell in row.values()} for name, row in orderings.items()}
    assert told["itc over mlm-itm"] == {"holds"}
    assert told["hard over itc"] == told["itc-mod over hard"] == {"not all seeds"}
    assert told["albef over full"] == {"undecided"}
    assert orderings["itc over mlm-itm"]["TR"]["each seed"] == pytest.approx([0.3, 0.3])
    assert orderings["albef over quarter"]["TR"]["paper"] == pytest.approx(98.70 - 97.83)
    assert orderings["albef over full"]["TR"]["paper"] == pytest.approx(97.83 - 97.47)


def test_the_commonest_of_training_is_tried_on_the_test_rows() -> None:
    def splits(train: list[Row], test: list[Row], labels: tuple[str, ...] = ()) -> Splits:
        return Splits(LabelledRows(train, "pairs"), {"test": LabelledRows(test, "pairs")}, labels)

    def judged(label: int) -> Row:
        return Row("t.csv", "row", "0", image="a.png", label=label)

    def asked(*truths: str) -> Row:
        return Row("q.json", "entry", "0", image="a.png", answers={0: 1.0}, truths=truths)

    classes = splits([judged(1), judged(1), judged(0)], [judged(0), judged(1), judged(0)], ("no", "yes"))
    name, result = always_the_commonest(classes, "test")
    assert (name, result.value) == ("yes", pytest.approx(1 / 3))  # not the commonest of the test rows
    mixed = asked("two", *["red"] * 9)
    answers = splits([asked("Two", "two", "2"), asked("red")], [asked(*["2"] * 10), mixed, asked(*["red"] * 10)])
    name, result = always_the_commonest(answers, "test")
    assert (name, result.value) == ("2", pytest.approx((1 + vqa.score("2", mixed.truths) + 0) / 3))
    assert 0 < vqa.score("2", mixed.truths) < 1  # one of ten said so


def noisy(out: Path, mean: float, pairs: str, steps: int = 30) -> None:
    """A run whose figures by cosine are so good, and 0.05 better re-ranked."""
    out.mkdir(parents=True)
    told = {"train.steps": str(steps), "data.pairs": [str(out / pairs)]}
    tree = set_overrides(albef("tiny"), told).with_absolute_paths()
    config.save(config.Config("albef", {"size": "tiny"}, config.leaves(tree)), out / "config.json")
    (out / "results.json").write_text("{}")
    found = {}
    for direction in ("image_to_text", "text_to_image"):
        for order, more in (("", 0.0), ("_reranked", 0.05)):
            for cutoff in (1, 5, 10):
                found[f"retrieval.pairs.{direction}{order}_r{cutoff}"] = units(mean + more)
    outcomes.write(out / outcomes.NAME, found)


def test_noise_is_summed_up_over_runs_of_its_own_settings(tmp_path: Path, written: Path) -> None:
    out = tmp_path / "out"
    for seed in range(3):
        noisy(out / f"without-{seed}", 0.3 + 0.01 * seed, f"noise-0.4-{seed}.parquet")
        noisy(out / f"with-{seed}", 0.5 + 0.01 * seed, f"noise-0.4-{seed}.parquet")
    for way in ("with", "without"):
        noisy(out / f"{way}-3", 0.9, "noise-0.4-3.parquet", steps=31)  # longer
        noisy(out / f"{way}-4", 0.9, "noise-0.2-4.parquet")  # less noise
    albef_noise.sum_up(out, 0.4, 30)
    results = json.loads((written / "albef_noise.json").read_text())["results"]
    assert results["seeds"] == 3
    row = results["pictures of a text, R@10, by cosine"]
    assert row["verdict"] == "better" and row["each seed"] == pytest.approx([0.2, 0.2, 0.2])
    assert (
        row["difference"]["low"] < 0.2 - 2.77 * (2 / 3) ** 0.5 * 0.01 < 0.2 == pytest.approx(row["difference"]["value"])
    )
    again = results["re-ranking, pictures of a text, R@10, with distillation"]
    assert again["verdict"] == "better" and again["difference"]["value"] == pytest.approx(0.05)
    page = (written / "albef_noise.md").read_text()
    assert "seeds 0, 1, 2;" in page


def test_the_page_of_real_data_has_the_words_and_recall_before_and_after_fine_tuning(
    tmp_path: Path, written: Path
) -> None:
    out = tmp_path / "out"
    words = {"losses.mlm.final": Result(3.25), "losses.mlm.chance": Result(5.5)}
    for name, more, gain in (("flickr8k", words, 0.0), ("flickr8k fine-tuned", {}, 0.25)):
        noisy(out / albef_real.FOLDERS[name], 0.5, "pairs.parquet")
        found = {
            f"{way}_reranked_r{cutoff}": Result(0.01 * cutoff + gain, n=9)
            for way in albef_real.WAYS[name]
            for cutoff in (1, 5, 10)
        }
        path = out / albef_real.FOLDERS[name] / "results.json"
        results.write(path, found | more, command="", version="", machine={}, seconds={})
    albef_real.sum_up(albef_real.Photographs(tmp_path, out), 30, 30)
    page = (written / "albef_real.md").read_text()
    assert "| flickr8k | `losses.mlm.final` | 3.25 | – |\n| flickr8k | `losses.mlm.chance` | 5.5 | – |" in page
    assert f"| flickr8k | `{albef_real.RECALL}` | 0.05333 | – |" in page
    assert f"| flickr8k fine-tuned | `{albef_real.RECALL}` | 0.3033 | – |" in page
