from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from trivium import doctor
from trivium.cli import main


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_says_what_this_machine_has(report: doctor.Report) -> None:
    assert report.torch == torch.__version__
    assert report.cores == len(os.sched_getaffinity(0))
    assert report.gflops["float32"] > 0.1
    assert report.precision == ("bf16" if report.gflops["bfloat16"] > report.gflops["float32"] else "fp32")
    assert report.memory_gib is not None
    assert 0 < report.memory_gib < 1e5
    assert report.disk_free_gib > 0


def test_printed_plain_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    stated = json.loads(capsys.readouterr().out)
    assert set(stated) == {field.name for field in dataclasses.fields(doctor.Report)}
    assert main(["doctor"]) == 0
    plain = capsys.readouterr().out
    assert torch.__version__ in plain
    assert "GFLOP/s" in plain
    assert all(f"advice: {sentence}" in plain for sentence in stated["advice"])


def test_a_broken_package_is_found_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.py").write_text("raise RuntimeError('operator torn::nms does not exist')")
    (tmp_path / "sound.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert doctor.state_of_import("torn") == "RuntimeError: operator torn::nms does not exist"
    assert "torn" not in sys.modules
    assert doctor.state_of_import("sound") == "works"
    assert doctor.state_of_import("nowhere_at_all") == "absent"


def test_every_extra_of_the_package_is_looked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    packages = {extra: re.split(r"[\[>=]", needs[0])[0] for extra, needs in project["optional-dependencies"].items()}
    del packages["dev"]
    assert {extra: package.replace("_", "-") for extra, (package, _) in doctor.EXTRAS.items()} == packages


def test_advice_names_the_remedy(report: doctor.Report) -> None:
    poor = dataclasses.replace(
        report,
        device="cpu",
        gflops={"float32": 140.0, "bfloat16": 1.0},
        threads=64,
        cores=2,
        memory_gib=2.0,
        disk_free_gib=1.0,
        torchvision="RuntimeError: operator torchvision::nms does not exist",
        simplejpeg=False,
        extras={"track": False, "hub": True},
    )
    advice = "\n".join(doctor.advise(poor))
    for remedy in (
        "pip uninstall torchvision",
        "OMP_NUM_THREADS=2",
        "precision at auto",
        "pip install simplejpeg",
        "pip install 'trivium[track]'",
        "checkpoint",
        "size tiny",
    ):
        assert remedy in advice
    assert "trivium[hub]" not in advice
    rich = dataclasses.replace(
        poor,
        device="cuda:0",
        gflops={"float32": 1e4, "bfloat16": 1e5},
        threads=2,
        memory_gib=64.0,
        disk_free_gib=500.0,
        torchvision="absent",
        simplejpeg=True,
        extras={"track": True, "hub": True},
    )
    assert doctor.advise(rich) == []
