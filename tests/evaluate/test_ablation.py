"""The ablation's table from finished runs whose numbers are known."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trivium.errors import TriviumError
from trivium.evaluate import ablation, ablation_page
from trivium.evaluate.ablation import BOTH_TOWERS, COLUMNS, FIGURES, MACRO_ROWS, Measured, Table, table
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.paper_tasks import DOMAINS
from trivium.evaluate.results import Result

UNITS = tuple(f"unit {number}" for number in range(200))
ABILITY = {"masked_words": "masked words", "itm.auroc": "matching"}
SHOWN = [figure for figure in FIGURES if not figure.name.startswith("retrieval.pairs")]


def able(column: str, figure: ablation.Figure) -> bool:
    kind = "retrieval" if figure.name.startswith("retrieval") else ABILITY.get(figure.name, figure.domain)
    return kind in COLUMNS[column].abilities


def run(column: str, seed: int, share: float) -> Measured:
    """Every figure of a column is this share: so many of its units are right."""
    results, kept = {}, {}
    for figure in SHOWN:
        if not able(column, figure):
            continue
        right = np.arange(len(UNITS)) < share * len(UNITS)
        statistic = "mean"
        values = right.astype(np.float32)
        if figure.name == "itm.auroc":  # a true pair scores 1 where it is right; the false ones lie between
            statistic, values = "auroc", np.stack([values, np.full(len(UNITS), 0.5, np.float32)], axis=1)
        elif figure.name == "glue.cola":
            truth = np.arange(len(UNITS)) % 2
            statistic, values = "matthews", np.stack([np.where(right, truth, 1 - truth), truth], 1).astype(np.float32)
        results[figure.name] = Result(share if statistic != "matthews" else 2 * share - 1, n=len(UNITS))
        kept[figure.name] = Outcomes(statistic, UNITS, values)  # type: ignore[arg-type]
    started = 30 * len(COLUMNS[column].starts_from)
    return Measured(column, seed, results, kept, updates=100, pair_updates=70, tower_updates=started, seconds=60.0)


def made(**shares: float) -> Table:
    return table([run(column, seed, share) for column, share in shares.items() for seed in (0, 1)])


def test_means_intervals_and_dashes() -> None:
    found = table([run("contrastive", 0, 0.4), run("contrastive", 3, 0.6), run("mim", 0, 0.3)])
    cell = found.cells["contrastive", "names.group"]
    assert cell.value == pytest.approx(0.5)
    assert found.seeds("contrastive") == [0, 3]
    # Seeds vary the most here: a mean of two draws of 0.4 and 0.6, and of the binomial noise of 200 units.
    assert cell.low is not None and cell.high is not None and cell.low < 0.4 and cell.high > 0.6
    alone = found.cells["mim", "probe.category"]
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 200)
    assert alone.low == pytest.approx(0.3 - spread, abs=0.02)
    assert alone.high == pytest.approx(0.3 + spread, abs=0.02)
    assert ("mim", "names.group") not in found.cells
    assert found.cells["contrastive", "glue.cola"].value == pytest.approx(0.0)
    assert not any(column == "mim" and row in ("language", "multimodal") for column, row in found.averages)


def test_a_figure_that_only_some_seeds_have_is_left_out_and_that_is_said() -> None:
    first, second = run("contrastive", 0, 0.4), run("contrastive", 1, 0.6)
    results = {name: result for name, result in second.results.items() if name != "glue.sst2"}
    found = table([first, replace(second, results=results)])
    assert ("contrastive", "glue.sst2") not in found.cells and ("contrastive", "glue.rte") in found.cells
    title = COLUMNS["contrastive"].title
    assert f"SST-2, linear probe is left out of {title}, since only some of its seeds have it" in found.missing
    assert not any("left out" in sentence for sentence in table([first, second]).missing)


def test_what_a_column_was_not_asked_for_is_named_and_counts_nowhere_as_zero() -> None:
    asked, other = run("contrastive", 0, 0.4), run("joint", 0, 0.6)
    results = {name: result for name, result in other.results.items() if not name.startswith("glue.")}
    found = table([asked, replace(other, results=results)])
    said = [sentence for sentence in found.missing if "left out" in sentence]
    assert len(said) == 3 and found.shared["language"] == ["names.group", "names.subgroup"]
    assert said[0] == "SST-2, linear probe is left out of FLAVA joint, no start, since none of its seeds have it"
    assert found.averages["joint", "macro, every dash 0"].value == pytest.approx(0.6)
    # Masked words and matching it cannot do: 2 of 3 and 4 of 5 figures.
    zeros = [0.4 * 2 / 3, 0.4, 0.4 * 4 / 5]
    assert found.averages["contrastive", "macro, every dash 0"].value == pytest.approx(np.mean(zeros))


def test_a_domain_is_averaged_over_what_all_its_columns_have_and_a_missing_one_counts_zero() -> None:
    found = made(mim=0.2, contrastive=0.4, joint=0.6)
    assert "masked_words" not in found.shared["language"] and "itm.auroc" not in found.shared["multimodal"]
    assert "glue.cola" in found.shared["language"]
    language = (5 - 1) * 0.6 + (2 * 0.6 - 1)
    assert found.averages["joint", "language"].value == pytest.approx(language / 5)
    assert found.averages["joint", "multimodal"].value == pytest.approx(0.6)
    assert found.averages["mim", "macro"].value == pytest.approx(0.2 / 3)
    assert found.averages["mim", "macro, every dash 0"].value == pytest.approx(0.2 / 3)
    domains = [found.averages["contrastive", domain].value for domain in DOMAINS]
    assert found.averages["contrastive", "macro"].value == pytest.approx(np.mean(domains))
    # Masked words and matching are dashes of the contrastive column: 5 of 6 and 4 of 5 figures are left.
    zeros = [domains[0] * 5 / 6, domains[1], domains[2] * 4 / 5]
    assert found.averages["contrastive", "macro, every dash 0"].value == pytest.approx(np.mean(zeros))
    assert "language" not in made(mim=0.2).shared or made(mim=0.2).shared["language"] == []


def test_orderings_say_what_holds_what_does_not_and_what_cannot_be_told() -> None:
    found = made(contrastive_local=0.3, contrastive=0.5, mm=0.4, joint=0.4, flava=0.7)
    by_pair = {(each.claim.first, each.claim.second): each for each in found.orderings}
    assert set(by_pair) == {("contrastive", "contrastive_local"), ("mm", "contrastive"), ("joint", "mm"),
                            ("flava", "joint")}  # fmt: skip
    higher = by_pair["contrastive", "contrastive_local"]
    assert higher.verdict == "holds"
    assert {d.domain: d.ours.value for d in higher.differences}["vision"] == pytest.approx(0.2)
    assert {d.domain: d.paper for d in higher.differences}["vision"] == pytest.approx(79.14 - 76.12)
    assert higher.sentence().startswith("Holds here: the global contrastive loss")
    assert by_pair["mm", "contrastive"].verdict == "does not hold"
    equal = by_pair["joint", "mm"]
    assert equal.verdict == "open"
    assert all((d.ours.low, d.ours.value, d.ours.high) == (0.0, 0.0, 0.0) for d in equal.differences)
    started = {d.domain: d for d in by_pair["flava", "joint"].differences}
    assert started[BOTH_TOWERS].paper == pytest.approx((78.19 - 75.55 + 79.44 - 78.29) / 2)
    assert by_pair["flava", "joint"].verdict == "holds"


def test_lower_where_the_paper_is_lower_holds() -> None:
    """Joint training: above on language, below on vision and on both together."""
    mm, joint = run("mm", 0, 0.5), run("joint", 0, 0.2)
    language = [figure.name for figure in SHOWN if figure.domain == "language"]
    higher = run("joint", 0, 0.8)
    joint.results.update({name: higher.results[name] for name in language})
    mixed = Measured(
        "joint", 0, joint.results, {**joint.outcomes, **{name: higher.outcomes[name] for name in language}}, 1, 1, 0, 1
    )
    [ordering] = table([mm, mixed]).orderings
    assert [difference.verdict for difference in ordering.differences] == ["holds"] * 3
    assert ordering.verdict == "holds"


def test_differences_are_paired_and_of_common_seeds_alone() -> None:
    """Ten units differ: paired, the interval is narrower than either column's own."""
    found = table([run("contrastive", 0, 0.55), run("contrastive", 7, 0.1), run("contrastive_local", 0, 0.5)])
    [ordering] = found.orderings
    assert ordering.seeds == (0,)
    [vision] = [each for each in ordering.differences if each.domain == "vision"]
    assert vision.ours.value == pytest.approx(0.05)
    assert vision.ours.low is not None and vision.ours.high is not None
    own = found.cells["contrastive_local", "probe.category"]
    assert own.low is not None and own.high is not None
    assert vision.ours.high - vision.ours.low < own.high - own.low
    assert vision.ours.low > 0


def test_the_papers_columns() -> None:
    """Tables 4 and C.1, as printed or, where the print is known to be wrong, as corrected."""
    expected = {
        "mim": (None, 57.46, None, 19.15), "mlm": (71.55, None, None, 23.85),
        "contrastive_local": (62.99, 76.12, 66.42, 68.51), "contrastive": (64.80, 79.14, 66.25, 70.06),
        "mm": (74.22, 79.35, 69.11, 74.23), "mm_init": (75.78, 79.55, 70.61, 75.31),
        "joint": (75.55, 78.29, 67.32, 73.72), "flava": (78.19, 79.44, 69.92, 75.85),
        "flava_mim": (77.40, 78.65, 69.23, 75.09), "clip": (46.44, 76.12, 62.02, 61.53),
    }  # fmt: skip
    assert list(expected) == list(COLUMNS)
    for name, numbers in expected.items():
        found = [ablation._paper_average(COLUMNS[name], row) for row in (*DOMAINS, "macro")]
        assert found == [number if number is None else pytest.approx(number) for number in numbers], name
    cells = made(flava=0.5).cells
    papers = {name: cell.paper for (_, name), cell in cells.items() if cell.paper is not None}
    assert papers == {"glue.sst2": 90.94, "glue.cola": 50.65, "glue.rte": 57.76}


def test_the_files_say_the_same(tmp_path: Path) -> None:
    found = made(mim=0.2, contrastive=0.4, flava=0.6)
    page = ablation_page.write(tmp_path, found, command="trivium ablate", machine={}, version="0", settings=["<Data>."])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    by_title = {(row["domain"], row["figure"]): row for row in rows}
    row = by_title["Vision", "average"]
    assert (row["mim"], row["flava"], row["flava paper"]) == ("20.00", "60.00", "79.44")
    assert by_title["Language", "average"]["mim"] == ""
    assert by_title["", "updates of its towers"]["flava"] == "60"
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["averages"]["vision"]["mim"]["value"] == pytest.approx(0.2)
    assert document["columns"]["flava"]["updates in all"] == 100
    assert {each["claim"] for each in document["orderings"]} == {o.claim.sentence for o in found.orderings}
    assert set(document["averages"]) == {*DOMAINS, *MACRO_ROWS}
    text = page.read_text()
    assert "&lt;Data&gt;." in text and "no run of CLIP, local gradient is finished" in text
    assert "–" in text and "79.44" in text


def test_what_differs_between_seeds_is_a_mean_with_its_range(tmp_path: Path) -> None:
    """Of a joint column: the steps until so many pairs were drawn hang on the seed."""
    runs = [
        replace(run("joint", seed, 0.5), updates=updates, tower_updates=30 * seed, seconds=seconds)
        for seed, updates, seconds in ((0, 100, 60.0), (1, 107, 61.5), (2, 101, 1300.04))
    ]
    page = ablation_page.write(tmp_path, table([*runs, run("mim", 0, 0.2)]), command="", machine={}, version="0")
    joint = json.loads((tmp_path / "table.json").read_text())["columns"]["joint"]
    assert (joint["updates in all"], joint["ranges"]["updates in all"]) == (102.7, [100, 107])
    assert (joint["updates of its towers"], joint["ranges"]["updates of its towers"]) == (30, [0, 60])
    assert (joint["updates on pairs"], joint["ranges"]["updates on pairs"]) == (70, [70, 70])
    rows = {row["figure"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    row = rows["updates in all"]
    assert (row["joint"], row["joint low"], row["joint high"], row["joint paper"]) == ("102.7", "100", "107", "")
    assert rows["seeds"]["joint"] == "0, 1, 2"
    text = page.read_text()
    assert "<td>102.7<small>100 – 107</small></td>" in text and "<small>60 – 1,300</small>" in text
    assert "<td>70</td>" in text  # equal in all: no range


def test_a_run_without_outcomes_has_a_mean_and_no_interval() -> None:
    bare = Measured("mim", 1, run("mim", 1, 0.5).results, {}, 1, 1, 0, 1.0)
    cell = table([run("mim", 0, 0.3), bare]).cells["mim", "knn.category"]
    assert (cell.value, cell.low, cell.high) == (pytest.approx(0.4), None, None)


def test_no_finished_run_is_told() -> None:
    with pytest.raises(TriviumError, match="no run of the ablation is finished"):
        table([])
