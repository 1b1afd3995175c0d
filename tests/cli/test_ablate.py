"""`trivium ablate` as a user runs it: again, several at once, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.other_process import held_elsewhere
from tests.recipes.shop import THINGS, TINY, checkpoint, data_of, digests, trivium
from trivium.evaluate import results
from trivium.evaluate.results import Result
from trivium.train import trainer
from trivium.train.run import Run

STAGES = ("text", "dino", "mim")


def words(shop: Path) -> list[str]:
    given = {name: value for name, value in TINY.items() if name not in ("train.steps", "data.schedule")}
    given |= {"data.batch": 8, "train.save-every": 2, "train.keep-last": 2, "model.vocab-size": 300}
    given |= {f"{stage}.batch": 8 for stage in STAGES}
    given |= {"dino.crops.global-size": 32, "dino.crops.local-size": 16, "dino.crops.num-local": 2}
    given |= {"dino.head-width": 16, "dino.bottleneck-width": 8, "dino.num-prototypes": 16}
    return [*data_of(shop), *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """SST-2, CoLA and RTE of a few lines, as a flag."""
    root = tmp_path_factory.mktemp("research")
    sentence, both = "sentence\tlabel\n", "index\tsentence1\tsentence2\tlabel\n"
    things = [f"the {colour} {shape}" for colour, shape in THINGS[:12]]
    for task, head, line in (
        ("SST-2", sentence, "{thing}\t{label}"),
        ("CoLA", "", "x\t{label}\t\t{thing}"),
        ("RTE", both, "0\t{thing}\tit is red\t{said}"),
    ):
        (root / "glue" / task).mkdir(parents=True)
        lines = [line.format(thing=thing, label=number % 2, said=("entailment", "not_entailment")[number % 2])
                 for number, thing in enumerate(things)]  # fmt: skip
        for split in ("train", "dev"):
            (root / "glue" / task / f"{split}.tsv").write_text(head + "\n".join(lines) + "\n")
    return ["--data.root", root]


@pytest.fixture(scope="module")
def ablated(shop: Path, glue: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One column, one seed."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    begun = trivium("ablate", "--out", out, "--steps", 4, "--columns", "mlm", "--seeds", 0, *words(shop), *glue)
    assert begun == 0
    return out


def test_a_column_is_a_run_of_its_own_and_the_table_says_what_is_missing(
    ablated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.name for path in ablated.iterdir()} == {
        "config.json", "locks", "shared", "mlm-seed0", "report.html", "table.csv", "table.json",
    }  # fmt: skip
    results = json.loads((ablated / "mlm-seed0" / "results.json").read_text())["results"]
    assert {name for name in results if not name.startswith("seconds")} == {
        "updates", "updates.pairs", "names.group", "names.subgroup", "masked_words", "glue.sst2", "glue.cola",
        "glue.rte",
    }  # fmt: skip
    assert results["glue.cola"]["n"] == 12 and results["glue.cola"]["value"] >= -1
    table = json.loads((ablated / "table.json").read_text())
    assert list(table["columns"]) == ["mlm"]
    assert table["figures"]["names.group"]["mlm"]["value"] == results["names.group"]["value"]
    assert table["figures"]["glue.rte"]["mlm"]["value"] == results["glue.rte"]["value"]
    assert "names of embedded drawings and SST-2, CoLA and RTE" in table["settings"][1]
    assert len(table["missing"]) == 9
    capsys.readouterr()
    assert trivium("ablate", "--out", ablated, "--table") == 0  # states nothing anew, trains nothing
    assert "missing: no run of FLAVA-MM is finished" in capsys.readouterr().out


def test_what_is_done_is_not_repeated_and_what_was_killed_goes_on(
    ablated: Path, glue: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ablated / "mlm-seed0"
    whole = digests(checkpoint(run, 4))
    before = json.loads((run / "results.json").read_text())["results"]
    (run / "results.json").unlink()
    shutil.rmtree(checkpoint(run, 4))  # killed after step 2
    capsys.readouterr()
    assert trivium("ablate", "--out", ablated, "--columns", "mlm", "--seeds", 0, 3, *glue) == 0
    assert "resuming after step 2 of 4" in capsys.readouterr().out
    assert digests(checkpoint(run, 4)) == whole
    after = json.loads((run / "results.json").read_text())["results"]
    assert {n: r for n, r in after.items() if "seconds" not in n} == {
        n: r for n, r in before.items() if "seconds" not in n
    }
    written = (run / "results.json").stat().st_mtime_ns
    assert trivium("ablate", "--out", ablated, "--columns", "mlm", "--seeds", 0, 3) == 0
    assert (run / "results.json").stat().st_mtime_ns == written
    assert json.loads((ablated / "table.json").read_text())["columns"]["mlm"]["seeds"] == "0, 3"


def test_a_run_that_was_evaluated_otherwise_is_measured_again_and_not_trained(
    ablated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ablated / "mlm-seed0"
    assert trivium("evaluate", run) == 0
    assert "updates" not in json.loads((run / "results.json").read_text())["results"]
    assert trivium("ablate", "--out", ablated, "--columns", "mlm", "--seeds", 0) == 0
    assert "resuming after step 4 of 4" in capsys.readouterr().out
    assert "updates" in json.loads((run / "results.json").read_text())["results"]


def test_where_glue_is_given_later_finished_runs_are_measured_again_and_not_trained(
    ablated: Path, glue: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ablated / "mlm-seed0"
    again = ("ablate", "--out", ablated, "--columns", "mlm", "--seeds", 0)
    (run / "results.json").unlink()
    assert trivium(*again) == 0
    assert "glue.sst2" not in json.loads((run / "results.json").read_text())["results"]
    weights = digests(checkpoint(run, 4))
    capsys.readouterr()
    assert trivium(*again, *glue) == 0
    assert "resuming after step 4 of 4" in capsys.readouterr().out
    assert {"glue.sst2", "glue.cola", "glue.rte"} <= json.loads((run / "results.json").read_text())["results"].keys()
    assert digests(checkpoint(run, 4)) == weights


def test_a_signal_stops_the_work_with_the_exit_code_of_a_run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "out", trainer.one_step
    signals = {1: signal.SIGTERM, 3: signal.SIGINT}

    def one_step(recipe: Run, optimizer: torch.optim.Optimizer, step: int, *rest: Any) -> Any:
        if step in signals:
            os.kill(os.getpid(), signals[step])
        return plain(recipe, optimizer, step, *rest)

    monkeypatch.setattr(trainer, "one_step", one_step)
    for code, step in ((0, 2), (130, 4)):
        given = ["--out", out, "--steps", 6, "--columns", "mlm", "--seeds", 0, *words(shop)]
        assert trivium("ablate", *given) == code
        assert checkpoint(out / "mlm-seed0", step).is_dir()
        assert not (out / "mlm-seed0" / "results.json").exists() and not (out / "report.html").exists()


def test_a_run_that_another_process_has_taken_is_left_to_it(ablated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with held_elsewhere(ablated / "locks" / "mlm-seed1"):
        assert trivium("ablate", "--out", ablated, "--columns", "mlm", "--seeds", 0, 1) == 0
    assert "the runs that are left are being done by others" in capsys.readouterr().err
    assert not (ablated / "mlm-seed1").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--steps", 5], "was begun with train.steps = 4, not 5"),
        (["--data.batch", 4], "was begun with data.batch = 8, not 4"),
        (["--size", "small"], "holds another ablation or another run"),
        (["--columns", "mnm"], "there is no column mnm"),
        (["--train.minutes", 5], "--train.minutes is not for the ablation"),
        (["--seeds", -1], "--seeds -1: a seed is 0 or more"),
        (["--data.root", "nowhere"], "--data.root nowhere: there is no such folder"),
        (["--table", "--columns", "mlm"], "leave out --columns"),
        (["--table", "--seeds", 0], "leave out --seeds"),
        (["--table", "--data.root", "."], "leave out --data.root"),
    ],
)
def test_mistakes_are_told(ablated: Path, given: list, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert trivium("ablate", "--out", ablated, *given) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--steps", 0], "--steps 0: these are updates, at least 1"),
        (["--tower-steps", 0], "--tower-steps 0: these are updates"),
        (["--optim.lr", -1], "--optim.lr -1"),
        (["--data.root", "."], "holds no SST-2/train.tsv"),
    ],
)
def test_a_mistake_leaves_no_folder_that_keeps_it(
    tmp_path: Path, given: list, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trivium("ablate", "--out", "out", *given) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_columns_that_learned_next_to_nothing_from_pairs_are_named(
    ablated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(ablated / "config.json", out / "config.json")  # of batches of 8: a blind guess has 2.08
    figures = {"updates": Result(4), "updates.pairs": Result(3), "names.group": Result(0.5)}
    for name, ends in (("clip", (2.05, 2.0)), ("contrastive", (2.05, 1.5)), ("mlm", (None, None))):
        for seed, end in enumerate(ends):
            folder = out / f"{name}-seed{seed}"
            folder.mkdir()
            results.write(folder / "results.json", figures, command="", version="0", machine={}, seconds={"train": 1})
            losses = {"mlm": 3.0} if end is None else {"contrastive": end}
            lines = [{"step": step, "losses": losses} for step in (1, 2)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trivium("ablate", "--out", out, "--table") == 0
    said = [each for each in json.loads((out / "table.json").read_text())["settings"] if "next to nothing" in each]
    assert len(said) == 1 and "where a blind guess has 2.08: CLIP, local gradient (2.00 to 2.05)." in said[0]


def test_no_run_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trivium("ablate", "--out", tmp_path / "out", "--table") == 2
    assert "no run of the ablation is finished yet" in capsys.readouterr().err


def test_a_column_without_its_towers_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"updates": Result(4), "updates.pairs": Result(3)}
    for name, found in (("flava-seed0", figures), ("tower-text-seed0", figures), ("tower-dino-seed0", {})):
        (tmp_path / name).mkdir()
        results.write(
            tmp_path / name / "results.json", found, command="", version="0", machine={}, seconds={"train": 1}
        )
    assert trivium("ablate", "--out", tmp_path, "--table") == 2
    assert "flava-seed0 starts from tower-dino-seed0" in capsys.readouterr().err


def test_pairs_without_held_out_ones_leave_dashes_and_that_is_said(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(bundle: object, abilities: tuple[str, ...], *more: object) -> dict[str, Result]:
        asked.append((abilities, more[1]))
        return {"knn.category": Result(0.5)}

    monkeypatch.setattr("trivium.evaluate.ablation_figures.measure", measured)
    out = tmp_path / "out"
    assert trivium("ablate", "--out", out, "--steps", 1, "--columns", "clip", "--seeds", 0, *words(shop)) == 0
    assert asked == [(("vision", "language"), None)]
    says = "Retrieval and matching are not measured, since no pairs were held out, and stand as dashes"
    assert says in capsys.readouterr().err
    page = (out / "report.html").read_text()
    assert says in page and "Measured on: vision, the embedded drawings of the held-out style" in page
    assert f"Trained on: {shop / 'goods.csv'}, {shop / 'goods.jsonl'}." in page
    averages = json.loads((out / "table.json").read_text())["averages"]
    assert averages["vision"]["clip"]["value"] == 0.5 and averages["multimodal"] == {}


@pytest.mark.slow
def test_columns_with_and_without_towers_end_in_one_table(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    columns = ("mim", "contrastive_local", "contrastive", "flava", "clip")
    held_out = ("--data.validation", shop / "goods.csv")
    assert (
        trivium("ablate", "--out", out, "--steps", 3, "--seeds", 0, "--columns", *columns, *words(shop), *held_out) == 0
    )
    config = json.loads((out / "flava-seed0" / "config.json").read_text())["values"]
    assert config["init_text"] == str(out / "tower-text-seed0") and config["init_image"] == str(
        out / "tower-dino-seed0"
    )
    table = json.loads((out / "table.json").read_text())
    assert list(table["columns"]) == list(columns)
    flava = table["columns"]["flava"]
    assert (flava["updates on pairs"], flava["updates of its towers"]) == (3, 6)
    assert flava["updates in all"] > 3
    assert table["averages"]["language"].keys() == {"contrastive_local", "contrastive", "flava", "clip"}
    assert table["figures"]["retrieval.pairs.text_to_image_r10"].keys() == {
        "contrastive_local", "contrastive", "flava", "clip",
    }  # fmt: skip
    assert list(table["figures"]["itm.auroc"]) == ["flava"]
    assert len(table["orderings"]) == 1
