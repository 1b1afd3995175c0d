"""`trivium pretrain` from the command line: what a run leaves behind, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.other_process import held_elsewhere, is_free_elsewhere
from tests.recipes.shop import (
    LOSSES,
    THINGS,
    checkpoint,
    data_of,
    drawing,
    flags,
    flip_a_bit,
    lines_of,
    trivium,
)
from trivium.cli.fields import page
from trivium.recipes import RECIPES, finish
from trivium.recipes.flava import flava
from trivium.recipes.grounding import GROUNDING
from trivium.recipes.retrieval import RETRIEVAL
from trivium.recipes.tasks import TASKS
from trivium.train import step as train_step
from trivium.train.config import leaves
from trivium.train.protocol import Key


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    """The one sentence of a command that fails before anything is written."""
    capsys.readouterr()
    assert trivium("pretrain", "flava", "--out", out, *words) == 2
    assert not out.exists()
    [*progress, sentence] = capsys.readouterr().err.splitlines()
    assert all(line.startswith("preparing data") for line in progress)
    assert sentence.startswith("trivium: ")
    return sentence


# ------------------------------------------------------------------------------------------ the run folder


def test_a_run_folder_holds_what_is_promised_and_nothing_else(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        *("config.json", "passport.json", "metrics.jsonl", "skipped.jsonl", "results.json", "report.html"),
        *("checkpoints", "monitors.jsonl", "outcomes.parquet", ".lock"),
    }
    assert [path.name for path in sorted((trained / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    for step in (3, 6):
        files = {str(path.relative_to(checkpoint(trained, step))) for path in checkpoint(trained, step).rglob("*.*")}
        model = ("config.json", "model.safetensors", "image_tokenizer.safetensors", "tokenizer.json")
        training = ("optimizer.safetensors", "optimizer.json", "method.safetensors", "tensors.json", "state.json")
        assert files == {
            *(f"model/{name}" for name in (*model, "preprocessor.json", "manifest.json")),
            *(f"training/{name}" for name in training),
            "manifest.json",
        }
    assert (trained / "skipped.jsonl").read_bytes() == b""
    passport = json.loads((trained / "passport.json").read_text())
    assert {"versions", "machine", "command", "date", "config_sha256", "resumed"} == passport.keys()


def test_all_six_losses_are_logged_of_the_stream_that_feeds_them(trained: Path) -> None:
    lines = lines_of(trained / "metrics.jsonl")
    by_stream = {line["stream"]: set(line["losses"]) for line in lines if "stream" in line}
    assert by_stream == {
        "pairs": {"contrastive", "itm", "mmm_image", "mmm_text"},
        "images": {"mim"},
        "text": {"mlm"},
    }
    assert [line["step"] for line in lines if "stream" in line] == [1, 2, 3, 4, 5, 6]
    [validated] = [line for line in lines if "results" in line]
    assert validated["results"]["losses"].keys() == set(LOSSES)
    assert all(value > 0 for value in validated["results"]["losses"].values())


def test_a_run_reports_losses_beside_chance_and_retrieval_on_its_validation_pairs(trained: Path) -> None:
    found = json.loads((trained / "results.json").read_text())
    named = set(found["results"])
    assert {f"losses.{loss}.{figure}" for loss in LOSSES for figure in ("final", "chance")} <= named
    assert {f"retrieval.pairs.{way}_r10" for way in ("text_to_image", "image_to_text")} <= named
    assert 0 < found["seconds"]["train"] < found["seconds"]["total"]
    assert json.loads((trained / "config.json").read_text())["arguments"] == {"size": "tiny"}
    assert "<h1>flava, tiny: what it learned</h1>" in (trained / "report.html").read_text(encoding="utf-8")
    logged = lines_of(trained / "metrics.jsonl")[-1]["results"]["losses"]
    assert {loss: found["results"][f"losses.{loss}.final"]["value"] for loss in LOSSES} == pytest.approx(logged)


def test_what_was_measured_at_the_end_of_training_is_not_measured_again(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    plain = train_step.measure

    def counting(method: object, batches: object, key: Key) -> dict[str, float]:
        measured.append(key.stream)
        return plain(method, batches, key)

    monkeypatch.setattr(train_step, "measure", counting)
    words = [*data_of(shop), "--data.validation", shop / "goods.csv", *flags(train__steps=1)]
    assert trivium("pretrain", "flava", "--out", tmp_path / "run", *words) == 0
    assert sorted(measured) == ["images", "pairs", "text"]


def test_a_run_holds_its_folder_until_its_report_is_written(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def write(out: Path, *parts: object, **more: object) -> Path:
        held.append(not is_free_elsewhere(out / ".lock"))
        return out / "report.html"

    monkeypatch.setattr(finish, "write", write)
    run, short = tmp_path / "run", flags(train__steps=1, train__save_every=1)
    assert trivium("pretrain", "flava", "--out", run, *data_of(shop), *short, "--validate", 0) == 0
    assert trivium("pretrain", run, "--resume") == 0
    assert held == [True, True]
    with held_elsewhere(run / ".lock"):
        assert trivium("pretrain", run, "--resume") == 2


def test_a_second_run_never_takes_the_folder_of_the_first(
    trained: Path, shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    assert trivium("pretrain", "flava", "--out", trained, *data_of(shop), *flags()) == 2
    assert f"holds a run already: continue it with `trivium pretrain {trained} --resume`" in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_what_depends_on_the_machine_is_settled_once_and_written_down(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # without --out the run stands in runs/
    budget = flags(train__minutes=0.002, train__micro_batch="auto")
    assert trivium("pretrain", "flava", "--size", "tiny", *data_of(shop), *budget) == 0
    [run] = (tmp_path / "runs").iterdir()
    assert run.name.startswith("flava-tiny-20")
    said = capsys.readouterr()
    assert "micro-batches of 8 of 8 samples fit into memory" in said.err
    assert f"report: runs/{run.name}/report.html" in said.out
    config = json.loads((run / "config.json").read_text())
    assert config["arguments"] == {"size": "tiny"}
    assert config["values"]["train.minutes"] is None
    assert config["values"]["train.micro_batch"] == 8
    steps = [line["step"] for line in lines_of(run / "metrics.jsonl") if "stream" in line]
    assert steps == list(range(1, config["values"]["train.steps"] + 1))


@pytest.mark.parametrize("budget", [{"train__steps": 2}, {"train__minutes": 0.0001}])
def test_a_warm_up_that_takes_the_whole_run_is_told(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: dict[str, float]
) -> None:
    words = [*data_of(shop), *flags(**budget, optim__warmup=10000), "--validate", 0]
    assert trivium("pretrain", "flava", "--out", tmp_path / "run", *words) == 0
    told = capsys.readouterr().err
    assert "a warm-up of 10000 steps leaves nothing of a run of" in told
    assert "give --optim.warmup a share, such as 0.06, or its learning rate rises to the end" in told


# --------------------------------------------------------------------------- bad samples while training


def test_bad_samples_are_replaced_and_named(tmp_path: Path) -> None:
    """A picture cut short, an empty one, a header of 50,000 x 50,000, a missing one, an empty caption, and a line that
    is not UTF-8: the run trains on the others and skipped.jsonl names each with its file and line."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for number, (colour, shape) in enumerate(THINGS):
        drawing(colour, shape).save(pictures / f"{number}.png")
        rows.append(f"pictures/{number}.png,a {colour} {shape}".encode())
    whole = (pictures / "1.png").read_bytes()
    (pictures / "1.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "2.png").write_bytes(b"")
    (pictures / "3.png").write_bytes(png_that_claims(50_000, 50_000))
    (pictures / "4.png").unlink()
    rows[5] = b"pictures/5.png,  "
    rows[6] = b"pictures/6.png,ein gr\xfcnes Quadrat"
    goods = tmp_path / "goods.csv"
    goods.write_bytes(b"image,caption\n" + b"\n".join(rows) + b"\n")

    run = tmp_path / "run"
    # Three epochs, so that every row has had its turn.
    words = flags(data__batch=24, train__steps=3, data__false_pairs=0)
    assert trivium("pretrain", "flava", "--out", run, "--data.pairs", goods, *words) == 0
    skipped = lines_of(run / "skipped.jsonl")
    assert all(line["stream"] == "pairs" and line["step"] in (1, 2, 3) for line in skipped)
    sentences = "\n".join(line["sample"] for line in skipped)
    for line, why in {
        3: "it is damaged",
        4: f"its picture {pictures}/2.png has zero bytes",
        5: "its header claims more pixels than the 64,000,000 allowed",
        6: f"its picture {pictures}/4.png does not exist",
        7: "its text is empty",
        8: "its text is not UTF-8 (byte 0xfc at position",
    }.items():
        assert f"{goods} (line {line}): {why}" in sentences
    assert len(skipped) >= 18  # 6 rows, 3 epochs; a substitute may be bad, too


def test_too_many_bad_samples_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, (colour, shape) in enumerate(THINGS):
        drawing(colour, shape).save(pictures / f"{number:02}.png")
        (pictures / f"{number:02}.txt").write_text(f"a {colour} {shape}")
        if number % 2:
            (pictures / f"{number:02}.png").write_bytes(b"")
    run = tmp_path / "run"
    words = flags(data__batch=96, train__steps=20)
    assert trivium("pretrain", "flava", "--out", run, "--data.pairs", pictures, *words) == 2
    err = capsys.readouterr().err
    assert "samples were bad (more than 1% of 10000)" in err
    assert f"{pictures}/" in err
    assert f"see {run}/skipped.jsonl" in err
    assert len(lines_of(run / "skipped.jsonl")) > 100


def png_that_claims(height: int, width: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_ten_megabytes_of_text_in_one_field_are_cut(shop: Path, tmp_path: Path) -> None:
    goods = tmp_path / "goods.csv"
    long = "word " * 2_000_000
    rows = [f"{shop}/pictures/{c}-{s}.png,a {c} {s}" for c, s in THINGS[1:]]
    goods.write_text(f"image,caption\n{shop}/pictures/red-circle.png,{long}\n" + "\n".join(rows) + "\n")
    run = tmp_path / "run"
    words = flags(data__batch=24, train__steps=1)
    assert trivium("pretrain", "flava", "--out", run, "--data.pairs", goods, *words) == 0
    assert lines_of(run / "skipped.jsonl") == []


# ------------------------------------------------------------------------------------------------ its help


@pytest.mark.parametrize("size", [None, "base"])
def test_the_help_of_a_recipe_lists_every_field_with_its_value(
    size: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert trivium("pretrain", "flava", *([] if size is None else ["--size", size]), "--help") == 0
    _, page = capsys.readouterr().out.split("\nfields of flava")
    recipe = flava() if size is None else flava(size)
    for path in leaves(recipe):
        assert f"  --{path.replace('_', '-')}" in page, path
    said = " ".join(page.split())
    assert f"--data.batch INT samples of one step, over all processes ({recipe.data.batch})" in said
    assert f"--optim.lr FLOAT ({recipe.optim.lr:g})" in said
    assert "--optim.clip none|global|per_tensor" in said
    assert "--optim.groups.0.rate FLOAT times the learning rate (1)" in said
    assert "--train.micro-batch INT|auto rows of one forward" in said
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"finetune"}))
def test_every_recipe_has_a_help(recipe: str) -> None:
    listed, tree = page(recipe, {}), RECIPES[recipe]()
    for path in leaves(tree):
        name = re.sub(r"^tasks\.\w+\.", "tasks.NAME.", path).replace("_", "-")
        assert (f"\n  --{name}" in listed) != (path in getattr(tree, "settled", ())), path


@pytest.mark.parametrize("words", [["--model.tasks", "5"], ["--model.tasks.0.num-labels", "5"]])
def test_what_the_data_decides_is_neither_listed_nor_set(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--model.tasks" not in page("unit", {})
    assert trivium("pretrain", "unit", "--out", tmp_path / "run", *words) == 2
    assert "is not for anybody to set: it follows from the data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_task_of_fine_tuning_has_a_help() -> None:
    for task in (*TASKS, *RETRIEVAL, *GROUNDING):
        listed = page("finetune", {"task": task})
        for path in leaves(RECIPES["finetune"](task)):
            assert f"\n  --{path.replace('_', '-')}" in listed, (task, path)


def test_what_tasks_have_in_common_is_listed_once_with_what_each_of_them_has() -> None:
    said = " ".join(page("unit", {}).split())
    assert said.count(".ratio FLOAT") == 1 and said.count(".root STR") == 1
    assert "--tasks.NAME.batch INT rows of one step, over all processes (32)" in said
    assert "--tasks.NAME.num-queries INT (20)" in said
    assert "--tasks.NAME.num-queries INT (100: coco vg, 25: vqav2" in " ".join(page("unit", {"size": "base"}).split())
    assert "(0: coco, 1: vg, 3: vqav2, 9: snli_ve" in said


def test_the_help_of_a_recipe_of_ones_own_tells_its_own_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_run.py").write_text(
        "from dataclasses import dataclass\n"
        "from trivium.recipes.flava import FlavaRecipe, flava\n\n"
        "@dataclass(frozen=True)\n"
        "class Shop(FlavaRecipe):\n"
        "    shelves: int = 7  # of the '#' shop\n\n"
        "def shop():\n"
        "    return Shop(flava('small').model)\n"
    )
    assert trivium("pretrain", f"{tmp_path}/my_run.py:shop", "-h") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--shelves INT of the '#' shop (7)" in said
    assert "--model.width INT (384)" in said
    assert trivium("pretrain", "flavo", "--help") == 2
    assert "there is no recipe flavo: did you mean flava?" in capsys.readouterr().err


# ----------------------------------------------------------------------- mistakes found before training


def test_a_field_that_does_not_exist(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word, meant in {"optim.learning-rate": "optim.lr", "lr": "optim.lr", "data.pair": "data.pairs"}.items():
        sentence = refused(capsys, tmp_path / "run", *data_of(shop), f"--{word}", "1")
        assert f"the recipe has no option {word.replace('-', '_')}" in sentence
        if word != "optim.learning-rate":
            assert f"did you mean {meant}?" in sentence
    assert "optim.lr takes a number" in refused(capsys, tmp_path / "run", *data_of(shop), "--optim.lr", "fast")


def test_a_config_with_a_field_of_another_version(shop: Path, tmp_path: Path, trained: Path, capsys) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["values"]["optim.warm_up"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentence = refused(capsys, tmp_path / "run", "--config", tmp_path / "config.json")
    assert "no option optim.warm_up: did you mean optim.warmup?" in sentence


@pytest.mark.parametrize(
    ("kind", "name", "content", "says"),
    [
        ("pairs", "x.csv", b"image,words\n1.png,a\n", "has no column caption|captions|text|title; its columns"),
        ("pairs", "x.csv", b"", "x.csv is empty: its first line must name the columns"),
        ("pairs", "x.csv", b"image,caption\n", "x.csv has no rows below its header"),
        ("pairs", "x.csv", b'image,caption\n1.png,"never closed\n2.png,b\n', "a quote opened in the row at line 2"),
        ("pairs", "x.jsonl", b"no object\n", "x.jsonl holds no JSON object"),
        ("pairs", "x.docx", b"PK", "x.docx has a suffix we do not know"),
        ("text", "x.txt", b"\n \n", "x.txt holds no text: one sample stands on each line"),
        ("images", "empty", None, "empty holds no picture (.jpg,"),
        ("images", "nowhere", b"", "nowhere does not exist: check the path"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str, content: bytes | None, says: str
) -> None:
    if content is None:
        (tmp_path / name).mkdir()
    elif name != "nowhere":
        (tmp_path / name).write_bytes(content)
    assert says in refused(capsys, tmp_path / "run", f"--data.{kind}", tmp_path / name, *flags())


def test_a_column_that_is_named_and_missing(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.pairs", shop / "goods.csv", "--data.text-column", "title"]
    sentence = refused(capsys, tmp_path / "run", *words, *flags())
    assert 'goods.csv has no column "title"; its columns are image, caption: name one' in sentence


def test_a_model_folder_that_is_damaged_is_not_begun_from(
    trained: Path, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint(trained, 6) / "model", model)
    flip_a_bit(model / "model.safetensors")
    words = [*data_of(shop), "--init", model, *flags()]
    assert "model.safetensors: its bytes changed" in refused(capsys, tmp_path / "run", *words)
    os.truncate(model / "model.safetensors", 1000)
    assert "model.safetensors: 1000 bytes where" in refused(capsys, tmp_path / "run", *words)
    (model / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refused(capsys, tmp_path / "run", *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.freeze", "picture.*"], 'no parameter is called "picture.*"'),
        (["--optim.freeze", "*"], "leaves no parameter to train"),
        (["--optim.betas", "0.9", "1.0"], "--optim.betas 0.9 1.0: this must be two numbers of 0 or more and below 1"),
        (["--optim.final", "-1"], "--optim.final -1.0: this must be 0 or more"),
        (["--optim.weight-decay-final", "-1"], "--optim.weight-decay-final -1.0: this must be 0 or more"),
        (["--optim.weight-decay", "0", "--optim.weight-decay-final", "0.4"], "give --optim.weight-decay a number"),
        (["--optim.groups.0.rate", "-1", "--optim.groups.0.pattern", "*"], "--optim.groups.0.rate -1.0: this must be"),
        (["--train.micro-batch", "0"], "--train.micro-batch 0: this must be a whole number of 1 or more"),
        (["--train.patience", "3"], "--train.patience 3: this recipe chooses no checkpoint by a figure"),
        (["--data.vocabulary", "none.json"], "none.json does not exist"),
        (["--init", "nothing"], "nothing does not exist"),
        (["--objectives.mimm", "1"], "did you mean objectives.mim?"),
        (["--objectives.foo", "1"], "the recipe has no option objectives.foo\n"),
        (["--optm.lr", "1"], "did you mean optim.lr?"),
    ],
)
def test_values_that_fit_no_run(
    shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert says in refused(capsys, tmp_path / "run", *data_of(shop), *flags(), *words) + "\n"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def shop():\n    return (1\n", "line 2: '(' was never closed: mend the file"),
        ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named"),
        ("def shop():\n    x = 1\n    return flava()\n", "line 3: NameError: name 'flava' is not defined"),
        (
            "def shop():\n    from trivium.recipes.flava import flava\n    return flava('big')\n",
            "there is no FLAVA of size",
        ),
    ],
)
def test_a_mistake_in_a_recipe_of_ones_own_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    (tmp_path / "my_run.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert trivium("pretrain", "my_run.py:shop", "--out", "run") == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert says in sentence
    assert "size" in says or f"{tmp_path}/my_run.py, " in sentence


def test_what_a_config_states_is_not_stated_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(trained / "config.json")]
    assert "--size is stated by the config" in refused(capsys, tmp_path / "run", *config, "--size", "small")
    other = json.loads((trained / "config.json").read_text()) | {"recipe": "albef"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    sentence = refused(capsys, tmp_path / "run", "--config", tmp_path / "other.json")
    assert "other.json is a config of the recipe albef, not of flava" in sentence
    assert trivium("pretrain", "flava", "--out", trained, "--resume", *config) == 2
    assert "leave out --config" in capsys.readouterr().err


def test_resuming_names_the_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trivium("pretrain", "flava", "--resume") == 2
    assert "--resume needs the run folder: trivium pretrain RUN --resume" in capsys.readouterr().err
    assert trivium("pretrain", "my_run.py:shop", "--out", trained, "--resume") == 2
    assert "is a config of the recipe flava, not of my_run.py:shop" in capsys.readouterr().err
    assert trivium("pretrain", "flava", "--out", tmp_path / "none", "--resume") == 2
    assert "there is no such config file" in capsys.readouterr().err
    assert trivium("pretrain", trained, "--resume", "--optim.lr", "1") == 2
    assert "was started with optim.lr = " in capsys.readouterr().err
    assert trivium("pretrain", trained, "--resume", "--train.minutes", "8") == 2
    assert f"the steps of {trained} are settled, 6: leave out --train.minutes" in capsys.readouterr().err
    run = shutil.copytree(trained, tmp_path / "run")
    assert trivium("pretrain", run, "--resume", "--train.minutes", "null") == 0  # as it has it


def test_a_run_goes_on_under_a_version_that_has_more_options(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text())
    assert config["values"].pop("optim.decay_vectors") is False
    (run / "config.json").write_text(json.dumps(config))
    assert trivium("pretrain", run, "--resume", "--optim.decay-vectors", "true") == 2
    assert "was begun by a version that had no optim.decay_vectors" in capsys.readouterr().err
    assert trivium("pretrain", run, "--resume") == 0
    assert "begun by a version that had no optim.decay_vectors: the default" in capsys.readouterr().err
    config["values"]["optim.an_option_of_the_past"] = 1.0
    (run / "config.json").write_text(json.dumps(config))
    assert trivium("pretrain", run, "--resume") == 2


# -------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_leaves_the_checkpoints_that_are_whole(shop: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: logs fit under it, weights do not."""
    run = tmp_path / "run"
    code = (
        "import resource, sys; from trivium.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["pretrain", "flava", "--out", run, *data_of(shop), *flags(train__save_every=3)]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], text=True, capture_output=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith(f"trivium: {run}/checkpoints/step-00000003")
    assert ".tmp-" not in sentence
    assert "step-00000003" in sentence
    assert "could not be written" in sentence
    assert "free some space" in sentence
    assert list((run / "checkpoints").iterdir()) == []
    steps = [line["step"] for line in lines_of(run / "metrics.jsonl")]
    assert steps[:3] == [1, 2, 3]  # those that it took while the save failed are logged too
    assert not (run / "results.json").exists()
    # With space again it begins anew from its first step.
    assert trivium("pretrain", run, "--resume") == 0
    assert (run / "results.json").is_file()
