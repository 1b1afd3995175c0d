"""What ALBEF's benchmarks stand on: which captions are exchanged, which differences count, which runs do."""

from __future__ import annotations

import fcntl
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import albef_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seeds

from trivium.cli import main as trivium
from trivium.evaluate import outcomes
from trivium.evaluate.outcomes import Outcomes

FILES = [f"{number}.jpg" for number in range(120)]


@pytest.fixture
def photographs(tmp_path: Path) -> albef_runs.Photographs:
    (tmp_path / "flickr8k").mkdir()
    columns = {"image": [file.encode() for file in FILES], "file": FILES, "captions": [[f"of {f}"] for f in FILES]}
    for part in (0, 1):
        table = pa.table({name: values[part::2] for name, values in columns.items()})
        pq.write_table(table, tmp_path / "flickr8k" / f"train-{part}.parquet")
    return albef_runs.Photographs(tmp_path, tmp_path / "out")


def rows(path: Path) -> dict[str, str]:
    return {row["file"]: row["captions"][0] for row in pq.read_table(path).to_pylist()}


def test_noise_exchanges_its_share_of_captions_and_leaves_none_of_those_its_own(
    photographs: albef_runs.Photographs,
) -> None:
    plain, noisy = rows(photographs.written("pairs")), rows(photographs.written("noisy", noise=0.4, seed=3))
    exchanged = [file for file in plain if noisy[file] != plain[file]]
    assert list(noisy) == list(plain) and len(exchanged) == round(0.4 * len(plain))
    assert sorted(noisy[file] for file in exchanged) == sorted(plain[file] for file in exchanged)
    assert rows(photographs.written("other", noise=0.4, seed=4)) != noisy


def test_premises_that_are_held_out_are_never_trained_on(photographs: albef_runs.Photographs) -> None:
    held_out = {file for file in FILES if albef_runs.tenth(file) == 0}
    assert held_out and set(rows(photographs.written("pairs"))) == set(FILES) - held_out
    assert len(rows(photographs.written("pairs-4", every=4))) == -(-(len(FILES) - len(held_out)) // 4)


def test_each_split_of_entailment_has_photographs_of_its_own(
    photographs: albef_runs.Photographs, tmp_path: Path
) -> None:
    triples = [{"file": file, "hypothesis": f"{n} of {file}", "label": "neutral"} for file in FILES for n in range(3)]
    pq.write_table(pa.Table.from_pylist(triples), tmp_path / "flickr8k" / "entailment.parquet")
    for split, path in photographs.entailment().items():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        tenths = {albef_runs.tenth(Path(line["image"]).name) for line in lines}
        assert tenths == {0} if split == "test" else 0 not in tenths
        assert all((path.parent / line["image"]).is_file() for line in lines)


def test_several_figures_of_a_unit_are_one_and_its_group_is_kept(tmp_path: Path) -> None:
    names, groups = ("a, caption 1", "a, caption 2", "b, caption 1"), ("a", "a", "b")
    found = {figure: Outcomes("mean", names, np.array(values, dtype=np.float32), groups)
             for figure, values in (("r1", [1, 0, 0]), ("r5", [1, 1, 0]))}  # fmt: skip
    outcomes.write(tmp_path / outcomes.NAME, found)
    gave = albef_runs.units(tmp_path, ["r1", "r5"])
    assert (gave.units, gave.groups, gave.values.tolist()) == (names, groups, [1, 0.5, 0])
    mean = albef_runs.mean_over([gave])
    assert (mean.value, mean.low, mean.high) == (0.5, 0, 0.75), "a twice or b twice: never the captions of a apart"


def of(values: dict[str, float]) -> Outcomes:
    return Outcomes("mean", tuple(values), np.array(list(values.values())))


def test_a_difference_is_of_the_same_units_and_every_seed_must_agree() -> None:
    other = [of({str(n): float(n % 2) for n in range(40)})] * 2
    better = [replace(other[0], values=other[0].values + 1)] * 2
    gap = albef_runs.difference(better, other)
    assert (gap.value, gap.low, gap.high, gap.n) == (1.0, 1.0, 1.0, 40)
    none = seeds.Spread(0.0, 2)
    assert albef_runs.compared(better, other, none, 2)[1:] == ("better", [1.0, 1.0])
    assert albef_runs.compared(other, better, none, 2)[1] == "worse"
    assert albef_runs.compared(better, other, none, 3)[1] == "not all seeds"
    against = replace(other[0], values=other[0].values - 0.1)
    assert albef_runs.difference([better[0], against], other).low > 0  # type: ignore[operator]
    assert albef_runs.compared([better[0], against], other, none, 2)[1] == "undecided"
    wide = albef_runs.spread([better, [better[0], against]])  # 0 and 0, 0.55 and -0.55: 0.605 of two runs
    assert wide == pytest.approx((0.3025, 2))
    gap, said, _ = albef_runs.compared(better, other, wide, 2)
    assert said == "undecided" and gap.low == pytest.approx(1 - 4.302653 * 0.55)


def test_one_seed_tells_nothing_and_says_so() -> None:
    one, other = [of({"a": 1.0, "b": 1.0, "c": 0.5})], [of({"a": 0.0, "b": 0.5, "c": 0.0})]
    gap, said, each = albef_runs.compared(one, other, albef_runs.spread([one, other]), 1)
    assert said == "undecided" and each == pytest.approx([2 / 3])
    assert albef_runs.per_cent(gap) == "66.7 [one seed]" and gap.as_json()["low"] is None


def test_differences_by_chance_are_seldom_called_real() -> None:
    """Rows of a table that are all alike: the spread of the seeds alone makes none of them better in 19 of 20."""
    draw, called, told = np.random.default_rng(0), 0, 0
    for _ in range(60):
        rows = [[of({str(n): value for n, value in enumerate(draw.normal(seed, 0.35, 300).tolist())})
                 for seed in draw.normal(0.3, 0.05, 2)] for _ in range(6)]  # fmt: skip
        over = albef_runs.spread(rows)
        for mine, other in itertools.pairwise(rows):
            told += 1
            called += albef_runs.compared(mine, other, over, 2)[1] != "undecided"
    assert called / told < 0.08


def test_a_run_that_is_done_counts_only_for_its_own_settings(tmp_path: Path) -> None:
    out, words = tmp_path / "run", ["pretrain", "albef"]
    values = {"size": "tiny", "train.steps": 3, "data.pairs": [tmp_path / "a.csv"], "optim.lr": 3e-4,
              "data.crop-scale": [1, 1], "objectives.queue": None}  # fmt: skip
    from trivium.cli.overrides import set_overrides
    from trivium.recipes.albef import albef
    from trivium.train import config

    told = {"train.steps": "3", "data.pairs": [str(tmp_path / "a.csv")], "optim.lr": "3e-4",
            "data.crop_scale": ["1", "1"], "objectives.queue": "null"}  # fmt: skip
    tree = set_overrides(albef("tiny"), told).with_absolute_paths()
    out.mkdir()
    config.save(config.Config("albef", {"size": "tiny"}, config.leaves(tree)), out / "config.json")
    (out / "results.json").write_text("{}")
    assert albef_runs.run(out, words, values, "cpu", 2) == out
    with pytest.raises(SystemExit, match=r"made with train\.steps = 3, not 4"):
        albef_runs.run(out, words, values | {"train.steps": 4}, "cpu", 2)
    timed = {name: value for name, value in values.items() if name != "train.steps"} | {"train.minutes": 25.0}
    assert albef_runs.run(out, words, timed, "cpu", 2) == out, "minutes are settled as steps"
    with pytest.raises(SystemExit, match=r"b\.csv"):
        albef_runs.run(out, words, values | {"data.pairs": [tmp_path / "b.csv"]}, "cpu", 2)
    with pytest.raises(SystemExit, match="small"):
        albef_runs.run(out, words, values | {"size": "small"}, "cpu", 2)
    with pytest.raises(SystemExit, match="is a run of albef"):
        albef_runs.run(out, ["finetune", "retrieval"], {"train.steps": 3}, "cpu", 2)


def test_nobody_else_makes_what_is_being_made(tmp_path: Path) -> None:
    with (tmp_path / ".run.lock").open("w") as other:
        with albef_runs.alone(tmp_path / "run"), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_command_that_a_script_gives_is_the_one_that_is_stated(tmp_path: Path) -> None:
    before = list(sys.argv)
    flags = ["--size", "tiny", "--train.steps", "1", "--data.batch", "8", "--validate", "0", "--train.workers", "0"]
    command = ["pretrain", "albef", *flags, "--out", str(tmp_path / "run")]
    assert trivium(command) == 0 and sys.argv == before
    for name in ("results.json", "passport.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["command"] == " ".join(["trivium", *command])
