"""The GPU benchmark at a small size, on whatever device there is: what it reports, and what a run cut off leaves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import clip_step  # noqa: E402
import gpu  # noqa: E402
import gpu_report  # noqa: E402
from step_pair import Trick  # noqa: E402

CASES = [row.name for row in gpu.PLAN if row.variant != gpu.LADDER]
LADDERS = [f"{row.family}/{row.modality}" for row in gpu.PLAN if row.variant == gpu.LADDER]
MOST_WANTED = "flava/multimodal/as_used/eager"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def measured(out: Path, minutes: float, *more: str) -> tuple[dict[str, Any], str]:
    """What a small run of so many minutes wrote and printed; what it did measure is checked here."""
    program = str(ROOT / "benchmarks" / "gpu.py")
    done = run(program, "--size", "tiny", "--minutes", str(minutes), "--out", str(out), *more)
    assert done.returncode == 0, done.stderr
    assert "recompile_limit" not in done.stderr
    found = json.loads((out / ("gpu_rows.json" if "--rows" in more else "gpu.json")).read_text())
    ceiling = max(found["matmul"].values())
    for name, row in found["results"].items():
        assert "peer_failed" not in row, row
        assert row["compiled_while_timed"] == 0, f"{name}: the steps that were timed were not yet compiled"
        assert row["flops"] > 0
        alone = name.endswith("ours alone")
        assert ("peer" in row) != alone
        if not alone:
            assert row["ratio"] == pytest.approx(row["peer"] / row["ours"])
        for side in ("ours",) if alone else ("ours", "peer"):
            assert row[f"{side}_bytes"] > 0
            assert row[f"{side}_mfu"] == pytest.approx(row["flops"] / row[side] / ceiling)
    assert ("THE DEVICE IS A CPU" in done.stdout) != torch.cuda.is_available()
    assert ("(floor" in done.stdout) == torch.cuda.is_available()
    return found, done.stdout


@pytest.mark.slow
def test_a_small_run_measures_every_row(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, 8)
    assert found["not_measured"] == {}
    assert list(found["results"]) == CASES
    for name in LADDERS:
        assert len(found["ladder"][name]) >= 9
        assert all(math.isfinite(factor) for factor in found["ladder"][name].values())


def test_rows_are_chosen_by_pattern_and_by_how_their_names_begin(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, 8, "--rows", "clip/*/eager", "albef/*/eager", MOST_WANTED)
    assert list(found["results"]) == [MOST_WANTED, "clip/pairs/as_used/eager", "albef/pairs/equal/eager"]
    assert found["not_measured"] == {} == found["ladder"]
    done = run(str(ROOT / "benchmarks" / "gpu.py"), "--size", "tiny", "--rows", "unit")
    assert done.returncode == 2 and MOST_WANTED in done.stderr


def test_a_profile_says_where_the_time_of_a_row_goes() -> None:
    done = run(str(ROOT / "benchmarks" / "gpu.py"), "--size", "tiny", "--profile", MOST_WANTED)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heading = next(place for place, text in enumerate(lines) if "a step, MFU" in text)
    shares = [float(text.split()[2].removesuffix("%")) for text in lines[heading + 1 : heading + 40]]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100.5


def test_a_run_cut_off_keeps_what_it_has_and_names_the_rest(tmp_path: Path) -> None:
    done = run(str(ROOT / "benchmarks" / "gpu.py"), "--size", "tiny", "--minutes", "0.4", "--out", str(tmp_path))
    found, printed = json.loads((tmp_path / "gpu.json").read_text()), done.stdout
    assert done.returncode == (0 if found["results"] else 1), done.stderr  # a busy machine may get nowhere
    assert list(found["results"]) == CASES[: len(found["results"])]
    for section, why in found["not_measured"].items():
        assert f"not measured to its end: {section}: {why}" in printed
    assert len(found["results"]) + len(found["not_measured"]) >= len(CASES)


def test_a_run_without_time_says_so_for_every_section_and_writes(tmp_path: Path) -> None:
    done = run(str(ROOT / "benchmarks" / "gpu.py"), "--size", "tiny", "--minutes", "0", "--out", str(tmp_path))
    assert done.returncode != 0 and "nothing was measured" in done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["results"] == {}
    missing = {f"{family}: losses were not compared" for family in gpu.FAMILIES}
    assert set(found["not_measured"].values()) <= {"no time was left"} | missing


def test_it_needs_nothing_of_ours_beside_torch_numpy_and_the_peer() -> None:
    program = """
import importlib.abc, sys, tomllib
from pathlib import Path
import torch, transformers
from transformers import BertModel, CLIPModel, FlavaForPreTraining, ViTModel

project = tomllib.loads(Path(sys.argv[1], "pyproject.toml").read_text())["project"]
lists = [project["dependencies"], *project["optional-dependencies"].values()]
names = {name.partition(">")[0].partition("[")[0].replace("-", "_") for each in lists for name in each}
absent = {"PIL" if name == "pillow" else name for name in names} - {"torch", "numpy", "safetensors", "transformers"}
for name in [name for name in sys.modules if name.partition(".")[0] in absent]:
    del sys.modules[name]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
sys.path.insert(0, str(Path(sys.argv[1], "benchmarks")))
import gpu
"""
    done = run("-c", program, str(ROOT))
    assert done.returncode == 0, done.stderr


def report() -> tuple[gpu_report.Report, list[dict[str, Any]]]:
    written: list[dict[str, Any]] = []
    return gpu_report.Report(1.0, lambda report: written.append(dict(report.not_measured))), written


def test_each_row_stands_beside_the_floors_with_both_of_its_own_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = report()
    found.rows |= {
        "a/as_used/eager": {"ratio": 3.0, "ours_mfu": 0.25},
        "a/as_used/ours alone": {"ours_mfu": 0.45},
        "b/as_used/eager": {"ratio": 9.0, "ours_mfu": 0.9},
    }
    gpu_report.print_floors(found, "a/as_used/")
    assert capsys.readouterr().out.splitlines() == [
        "a/as_used/eager: 3.00 times the peer (floor 2.5), MFU 25.0% (floor 40%)",
        "a/as_used/ours alone: no peer (floor 2.5), MFU 45.0% (floor 40%)",
    ]


def test_a_section_that_takes_too_long_is_ended_and_what_it_found_stays() -> None:
    found, written = report()

    def slow() -> None:
        found.rows["before"] = {}
        time.sleep(60)

    started = time.monotonic()
    assert not found.section("slow", 0.2, slow)
    assert time.monotonic() - started < 30
    assert "before" in found.rows and "slow" in written[0]
    assert found.section("next", 10.0, lambda: None)  # and no alarm is left over
    time.sleep(0.3)


def test_a_section_that_fails_is_named_with_its_error_and_the_next_goes_on() -> None:
    found, written = report()

    def fails() -> None:
        raise ValueError("the second line\nis not said")

    assert not found.section("fails", 1.0, fails)
    assert found.section("next", 1.0, lambda: None)
    assert written == [{"fails": "ValueError: the second line"}] * 2


def test_memory_that_runs_out_halves_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[int] = []

    def needs(limit: int, error: Exception, rows: int) -> int:
        tried.append(rows)
        if rows > limit:
            raise error
        return rows

    full = torch.OutOfMemoryError("CUDA out of memory")
    assert gpu.with_fewer_rows(192, lambda rows: needs(50, full, rows)) == 48
    assert tried == [192, 96, 48]
    assert "192 rows: trying 96" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        gpu.with_fewer_rows(4, lambda rows: needs(0, full, rows))
    with pytest.raises(ValueError, match="another"):
        gpu.with_fewer_rows(4, lambda rows: needs(0, ValueError("another"), rows))


@pytest.mark.slow
def test_a_ladder_that_is_cut_off_keeps_its_rungs_and_halves_the_rows_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    @contextmanager
    def needs_memory() -> Iterator[None]:
        tried.append(len(tried))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    @contextmanager
    def fails() -> Iterator[None]:
        raise ValueError("no such kernel")
        yield

    tricks = {"memory": Trick(needs_memory), "none": Trick(nullcontext), "a failure": Trick(fails)}
    monkeypatch.setattr(clip_step, "WITHOUT", tricks)
    found, _ = report()
    row = gpu.Row("clip", "pairs", "equal", gpu.LADDER, 60)
    gpu.Bench(found, "tiny", torch.device("cpu"), "fp32", "eager").measure(row)
    assert list(found.ladder["clip/pairs"]) == ["memory", "none"]
    assert all(factor > 0 for factor in found.ladder["clip/pairs"].values())
    assert len(tried) == 1 + min(2, gpu.TURNS) * (
        1 + gpu.STEPS
    )  # the turn that had no room for its rows, and a whole rung
    assert found.not_measured == {row.name: "ValueError: no such kernel"}
