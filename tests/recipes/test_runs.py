"""Runs as their users meet them: repeated, stopped and resumed, damaged, continued, of one's own recipe, shared out."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from markupsafe import escape
from safetensors.torch import load_file
from torch import Tensor

import trivium as library
from tests.recipes.shop import (
    SHAPES,
    checkpoint,
    data_of,
    digests,
    drawing,
    flags,
    flip_a_bit,
    lines_of,
    trivium,
)
from trivium import manifest


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(checkpoint(run, step) / "model" / "model.safetensors")


def without_its_end(run: Path, copy: Path) -> Path:
    """The run as a crash after the first of its two checkpoints leaves it."""
    shutil.copytree(run, copy)
    shutil.rmtree(checkpoint(copy, 20))
    return copy


def process(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "trivium", *map(str, words)], text=True, capture_output=True, timeout=300
    )


def settings_without(names: Sequence[str], **changes: object) -> list[str]:
    """`flags` less some of them."""
    pairs = zip(*[iter(flags(**changes))] * 2, strict=True)
    return [word for name, value in pairs if not name.startswith(tuple(names)) for word in (name, value)]


# ------------------------------------------------------------------------------------- the same run again


def test_a_config_repeats_a_run_to_the_bit(twenty: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert trivium("pretrain", "flava", "--config", twenty / "config.json", "--out", again) == 0
    assert (again / "config.json").read_bytes() == (twenty / "config.json").read_bytes()
    for step in (10, 20):
        assert digests(checkpoint(again, step)) == digests(checkpoint(twenty, step))


def test_monitors_leave_no_trace_in_a_checkpoint(twenty: Path, tmp_path: Path) -> None:
    """Every loss of FLAVA has its gradient measured on the way, at every fifth step."""
    watched = tmp_path / "watched"
    words = ["--config", twenty / "config.json", "--train.monitor-every", 1]
    assert trivium("pretrain", "flava", *words, "--out", watched) == 0
    assert lines_of(twenty / "monitors.jsonl") == []
    lines = lines_of(watched / "monitors.jsonl")
    measured = {line["subject"] for line in lines if line["monitor"] == "balance"}
    assert measured == {"contrastive", "itm", "mmm_image", "mmm_text"}
    assert digests(checkpoint(watched, 20)) == digests(checkpoint(twenty, 20))
    page = (watched / "report.html").read_text(encoding="utf-8")
    said = [line["sentence"] for line in lines if "sentence" in line]
    assert str(escape(said[-1])) in page
    assert "While it trained" in page
    assert "While it trained" not in (twenty / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("workers", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_ten_and_ten_steps_are_twenty(
    twenty: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = without_its_end(twenty, tmp_path / "run")
    hashed: Counter[Path] = Counter()
    digest_of = manifest.sha256

    def counted(path: Path) -> str:
        hashed[path] += 1
        return digest_of(path)

    monkeypatch.setattr(manifest, "sha256", counted)
    assert trivium("pretrain", "flava", "--out", run, "--resume", "--train.workers", workers) == 0
    assert digests(checkpoint(run, 20)) == digests(checkpoint(twenty, 20))
    begun_from = checkpoint(run, 10)
    files = {path for path in begun_from.rglob("*") if path.is_file() and path.parent != begun_from}
    assert {path: times for path, times in hashed.items() if begun_from in path.parents} == dict.fromkeys(files, 1)
    steps = [line["step"] for line in lines_of(run / "metrics.jsonl") if "stream" in line]
    assert steps == list(range(1, 21))


def test_a_run_is_taken_up_and_measured_from_any_folder(
    twenty: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun among its data, with paths that hold there alone, its own recipe's among them."""
    (shop / "my_run.py").write_text(
        "from trivium.recipes.flava import flava\n\ndef shop():\n    return flava('tiny')\n"
    )
    (shop / "tokenizer.json").write_bytes((checkpoint(twenty, 20) / "model" / "tokenizer.json").read_bytes())
    run = tmp_path / "run"
    data = [str(Path(word).relative_to(shop)) if word.startswith("/") else word for word in data_of(shop)]
    words = [*data, "--data.validation", "goods.csv", "--data.vocabulary", "tokenizer.json"]
    monkeypatch.chdir(shop)
    settings = flags(train__steps=4, train__save_every=2)
    assert trivium("pretrain", "my_run.py:shop", "--out", run, *words, "--init", twenty, *settings) == 0
    whole = digests(checkpoint(run, 4))
    shutil.rmtree(checkpoint(run, 4))
    monkeypatch.chdir(tmp_path)
    assert trivium("pretrain", "run", "--resume") == 0
    assert digests(checkpoint(run, 4)) == whole
    assert trivium("evaluate", "run") == 0
    assert "retrieval on the validation pairs" in capsys.readouterr().err
    # Its recipe may also be named, as it reads from here.
    named = f"{os.path.relpath(shop, tmp_path)}/my_run.py:shop"
    assert trivium("pretrain", os.path.abspath(shop) + "/my_run.py:shop", "--out", run, "--resume") == 0
    assert trivium("pretrain", named, "--config", run, "--out", "again", "--train.steps", 1) == 0


STOPPING = """
import os, signal
from dataclasses import fields
from trivium.recipes.flava import FlavaRecipe, flava

class Stopping(FlavaRecipe):
    def prepare(self, name, arguments, resume_from=None):
        prepared = super().prepare(name, arguments, resume_from)
        method = prepared.run.method
        plain = method.after_step

        def after_step(step, everyone, stats):
            plain(step, everyone, stats)
            if step == 6 and resume_from is None:
                os.kill(os.getpid(), signal.SIGTERM)

        method.after_step = after_step
        return prepared

def shop():
    recipe = flava("tiny")
    return Stopping(**{field.name: getattr(recipe, field.name) for field in fields(recipe)})
"""


def test_a_run_that_is_told_to_stop_saves_and_resumes_to_the_same_weights(
    twenty: Path, shop: Path, tmp_path: Path
) -> None:
    """The recipe of this run sends it SIGTERM in its seventh step, as a scheduler would."""
    (tmp_path / "stopping.py").write_text(STOPPING)
    recipe, run = f"{tmp_path}/stopping.py:shop", tmp_path / "run"
    settings = flags(train__steps=20, train__save_every=10, train__workers=1)
    done = process("pretrain", recipe, "--out", run, *data_of(shop), *settings)
    assert done.returncode == 0, done.stderr
    assert f"saved after step 7 of 20; to go on: trivium pretrain {run} --resume\n" in done.stdout
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000007"]
    assert not (run / "results.json").exists()
    assert trivium("pretrain", run, "--resume") == 0
    assert digests(checkpoint(run, 20)) == digests(checkpoint(twenty, 20))
    assert (run / "results.json").is_file()


# ----------------------------------------------------------------------------------------------- damage


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(twenty, run)
    flip_a_bit(checkpoint(run, 20) / "model" / "model.safetensors")
    assert trivium("pretrain", "flava", "--out", run, "--resume") == 0
    captured = capsys.readouterr()
    assert "step-00000020 is damaged and is passed over" in captured.out + captured.err
    assert "resuming after step 10 of 20" in captured.out
    assert digests(checkpoint(run, 20)) == digests(checkpoint(twenty, 20))  # trained again, to the same bit


def test_when_every_checkpoint_is_damaged(twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(twenty, run)
    flip_a_bit(checkpoint(run, 20) / "training" / "optimizer.safetensors")
    os.truncate(checkpoint(run, 10) / "model" / "model.safetensors", 1000)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert trivium("pretrain", "flava", "--out", run, "--resume") == 2
    assert (
        "every checkpoint is damaged; use another copy, or begin a new run in another folder" in capsys.readouterr().err
    )
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


# --------------------------------------------------------------------------------- going on from a run


def test_init_takes_weights_tokenizer_and_codebook_and_a_frozen_tower_stays(
    twenty: Path, shop: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--init", twenty, "--optim.freeze", "image.*", "--optim.lr", "0.01"]
    assert trivium("pretrain", "flava", "--out", run, *data_of(shop), *flags(train__steps=3), *words) == 0
    before, after = weights(twenty, 20), weights(run, 3)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in moved if name.startswith("image.")}
    assert {name.split(".")[0] for name in moved} >= {"text", "multimodal"}
    old, new = digests(checkpoint(twenty, 20)), digests(checkpoint(run, 3))
    for file in ("model/tokenizer.json", "model/image_tokenizer.safetensors"):
        assert old[file] == new[file]


def test_init_starts_where_the_other_run_ended(twenty: Path, shop: Path, tmp_path: Path) -> None:
    """With a rate of nothing the weights are those of the other run, shapes and all, whatever --size says."""
    run = tmp_path / "run"
    words = settings_without(["--model."], train__steps=1)
    still = ["--optim.lr", "0", "--init", twenty]
    assert trivium("pretrain", "flava", "--out", run, *data_of(shop), *words, *still) == 0
    before, after = weights(twenty, 20), weights(run, 1)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_begins_from_shards(twenty: Path, shop: Path, tmp_path: Path) -> None:
    run, shards = tmp_path / "run", tmp_path / "shards"
    assert trivium("convert", twenty, "--to", "trivium", "--out", shards, "--shard-mb", "0.05") == 0
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    still = ["--optim.lr", "0", "--init", shards]
    assert trivium("pretrain", "flava", "--out", run, *data_of(shop), *flags(train__steps=1), *still) == 0
    before, after = weights(twenty, 20), weights(run, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_whose_checkpoints_are_in_shards_goes_on(
    twenty: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved in shards, resumed, saved whole: the last checkpoint is that of a run that knows no shards."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(library.load.Bundle, "save", partialmethod(library.load.Bundle.save, shard_bytes=50_000))
        words = [*data_of(shop), *flags(train__steps=20, train__save_every=10)]
        assert trivium("pretrain", "flava", "--out", run, *words) == 0
    assert len(list((checkpoint(run, 10) / "model").glob("model-*.safetensors"))) > 1
    assert digests(checkpoint(run, 20)) != digests(checkpoint(twenty, 20))
    shutil.rmtree(checkpoint(run, 20))
    assert trivium("pretrain", run, "--resume") == 0
    assert digests(checkpoint(run, 20)) == digests(checkpoint(twenty, 20))


def test_a_recipe_of_ones_own(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_run.py").write_text(
        "from dataclasses import replace\n"
        "from trivium.recipes.flava import flava\n\n"
        "def shop():\n"
        "    recipe = flava('tiny')\n"
        "    model = replace(recipe.model, width=16, num_heads=2)\n"
        "    return replace(recipe, model=model, objectives=replace(recipe.objectives, mim=0.0))\n"
    )
    recipe, run = f"{tmp_path}/my_run.py:shop", tmp_path / "run"
    settings = settings_without(["--model.width", "--model.num-heads"], train__steps=3)
    assert trivium("pretrain", recipe, "--out", run, *data_of(shop), *settings) == 0
    bundle = library.load(run)
    assert bundle.model.config.width == 16
    seen = {name for line in lines_of(run / "metrics.jsonl") if "stream" in line for name in line["losses"]}
    assert seen == {"mlm", "mmm_image", "mmm_text", "itm", "contrastive"}
    assert trivium("pretrain", recipe, "--config", run, "--out", tmp_path / "again") == 0
    assert digests(checkpoint(tmp_path / "again", 3)) == digests(checkpoint(run, 3))
    assert trivium("pretrain", f"{tmp_path}/my_run.py:shops", "--out", tmp_path / "no") == 2
    assert "my_run.py has no function shops" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ using it


def test_five_lines_of_python(twenty: Path, shop: Path) -> None:
    bundle = library.load(twenty)
    image = bundle.encode_image(sorted((shop / "pictures").iterdir()))
    text = bundle.encode_text(["a red circle", "a blue square"])
    similarity = text.projected @ image.projected.T
    belongs = bundle.match(shop / "pictures" / "red-circle.png", "a red circle")

    assert torch.allclose(similarity[0, 3], bundle.encode_text("a red circle").projected[0] @ image.projected[3])
    assert similarity.abs().max() <= 1 + 1e-6
    assert 0 < float(belongs) < 1
    # A picture is the same as a path, as bytes and as a Pillow picture, alone or among others.
    for shape in SHAPES:
        path = shop / "pictures" / f"red-{shape}.png"
        row = image.projected[sorted((shop / "pictures").iterdir()).index(path)]
        for form in (path, path.read_bytes(), drawing("red", shape)):
            assert torch.allclose(bundle.encode_image(form).projected[0], row, atol=1e-6)


# ------------------------------------------------------------------------------------------ processes


def torchrun(*words: object, at: Path) -> subprocess.CompletedProcess[str]:
    """The command line in two processes that share a run; `at` is where they stand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m", "trivium"]
    sources = str(Path(library.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, words)],
        cwd=at, env={**os.environ, "PYTHONPATH": sources}, text=True, capture_output=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [4, "auto"])
def test_two_processes_make_the_step_of_one(shop: Path, tmp_path: Path, micro_batch: int | str) -> None:
    """Both cut the batch into two micro-batches; which process takes which is not part of the recipe."""
    alone = tmp_path / "alone"
    # Pairs alone, so that the one step holds the contrastive loss, gathered over the processes. Adam's first step shows
    # little more than the gradient's sign; with rate 1, eps 1 and no clipping it is about the gradient itself.
    plain = ["--optim.lr", "1", "--optim.eps", "1", "--optim.warmup", "0", "--optim.clip", "none"]
    words = ["--data.pairs", str(shop / "goods.csv"), *plain]
    assert trivium("pretrain", "flava", "--out", alone, *words, *flags(train__steps=1, train__micro_batch=4)) == 0
    done = torchrun(
        "pretrain", "flava", *words, *flags(train__steps=1, train__micro_batch=micro_batch), at=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [shared] = (tmp_path / "runs").iterdir()  # one folder, named by the first process
    one, two = weights(alone, 1), weights(shared, 1)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    [line], [line_alone] = (
        [line for line in lines_of(run / "metrics.jsonl") if "stream" in line] for run in (shared, alone)
    )
    assert line["losses"] == pytest.approx(line_alone["losses"], rel=1e-5)
    assert line["grad_norm"] == pytest.approx(line_alone["grad_norm"], rel=1e-4)
    assert line["grad_norm"] > 1  # so that 1e-5 is small beside what moved
    assert (shared / "report.html").is_file()
    assert done.stderr.count("preparing data and model for") == 1


# ----------------------------------------------------------------------------------------- other sizes, fewer streams


def test_pictures_alone_need_no_words(shop: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert trivium("pretrain", "flava", "--out", out, "--data.images", shop / "pictures", *flags(train__steps=2)) == 0
    assert {line["stream"] for line in lines_of(out / "metrics.jsonl") if "stream" in line} == {"images"}
    assert library.load(out).encode_image(shop / "pictures" / "red-bar.png").projected.shape == (1, 16)


def test_pictures_of_another_size_interpolate_the_positions(shop: Path, twenty: Path, tmp_path: Path) -> None:
    """32 pixels to 48: the model keeps its table of positions, and its transform takes the new size."""
    out = tmp_path / "run"
    start = ("--init", twenty, "--data.image-size", 48)
    assert trivium("pretrain", "flava", "--out", out, *start, *data_of(shop), *flags(train__steps=3)) == 0
    bundle = library.load(out)
    assert bundle.transform.size == 48
    before, after = weights(twenty, 20)["image.positions"], weights(out, 3)["image.positions"]
    assert before.shape == after.shape == (1, 17, 32)
    assert not torch.equal(before[:, 1:], after[:, 1:])  # the gradient goes through the interpolation
    assert bundle.encode_image(shop / "pictures" / "red-bar.png").states.shape[1] == 1 + 6 * 6
    assert (
        trivium("pretrain", "flava", "--out", tmp_path / "no", "--data.image-size", 50, *data_of(shop), *flags()) == 2
    )
