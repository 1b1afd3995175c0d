"""The ladder that the benchmarks of steps share, on times that are known and on a step whose tricks are taken away."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import flava_pair
import flava_step
import pytest
import side_by_side
import torch
import unit_step

from trivium.layers.packing import Packing
from trivium.train import precision, run_folder


def test_a_rung_is_the_time_without_over_the_time_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    def timed(whole: Callable[[], object], lacking: Callable[[], object]) -> list[list[float]]:
        assert whole() == "whole"
        return {"slow": [[2.0, 1.0, 4.0], [9.0, 3.0, 3.0]], "fast": [[4.0, 2.0, 3.0], [1.0, 2.0, 0.5]]}[str(lacking())]

    without = {"a trick": lambda: "slow", "a cost": lambda: "fast"}
    assert side_by_side.ladder(lambda: "whole", without, timed=timed) == {"a trick": 1.5, "a cost": 0.333}
    assert side_by_side.ladder(lambda: "whole", without, min, timed) == {"a trick": 3.0, "a cost": 0.25}
    assert capsys.readouterr().out.splitlines()[:2] == ["  a trick: 1.5", "  a cost: 0.333"]


def test_a_new_case_stands_beside_those_that_this_machine_measured_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(case: str, factor: float, ladder: dict[str, float], command: str, precision: str = "bf16") -> None:
        monkeypatch.setattr("sys.argv", command.split()[1:])
        found = side_by_side.beside_what_is_there("a", {case: factor}, ladder, folder=tmp_path, precision=precision)
        side_by_side.write("a", found[0], command=found[2], folder=tmp_path, ladder=found[1], precision=precision)

    measured("one", 1.0, {"trick": 2.0}, "python a.py")
    measured("two", 3.0, {}, "python a.py --cases two")
    measured("two", 4.0, {}, "python a.py --cases two")
    there = json.loads((tmp_path / "a.json").read_text())
    assert (there["results"], there["ladder"]) == ({"one": 1.0, "two": 4.0}, {"trick": 2.0})
    assert there["command"] == "python a.py && python a.py --cases two"
    measured("two", 5.0, {}, "python a.py --cases two", precision="fp32")  # not alike: the others are gone
    there = json.loads((tmp_path / "a.json").read_text())
    assert (there["results"], there["ladder"], there["command"]) == ({"two": 5.0}, {}, "python a.py --cases two")
    measured("two", 6.0, {"trick": 3.0}, "python a.py", precision="fp32")  # alike, and nothing of them is left
    assert json.loads((tmp_path / "a.json").read_text())["command"] == "python a.py"


def test_both_take_turns_and_only_one_is_without_the_trick() -> None:
    held, calls = [False], []

    @contextmanager
    def patch() -> Iterator[None]:
        held[0] = True
        yield
        held[0] = False

    def step() -> None:
        calls.append(held[0])

    side_by_side.ladder(step, {"a trick": partial(side_by_side.under, patch, step)})
    assert calls == 3 * [False, True]  # a warm-up and two rounds
    calls.clear()
    side_by_side.ladder(
        step,
        {"a trick": partial(side_by_side.under, patch, step)},
        timed=partial(side_by_side.interleaved, rounds=4),
    )
    assert calls == 5 * [False, True]


def test_the_ladder_of_unit_has_a_rung_for_each_trick_and_the_exact_ones_leave_the_losses_as_they_are() -> None:
    pair = unit_step.Pair("tiny", nullcontext, torch.device("cpu"))
    batch = unit_step.make_batch(2, 64, 120)
    for patch in unit_step.WITHOUT.values():
        with patch():
            pair.same_losses(batch, pair.inputs(batch))
    ours = unit_step.Ours("tiny", "fp32", 2, keeps=False)

    def side(name: str, *arguments: str) -> object:
        return getattr(ours, name)(*arguments)

    rungs = unit_step.ladder(side, side)
    assert rungs.keys() == {*unit_step.WITHOUT, unit_step.GIVEN_BACK}
    assert all(math.isfinite(factor) and factor > 0 for factor in rungs.values())


@pytest.mark.parametrize("case", unit_step.CASES)
def test_a_row_of_unit_has_the_memory_of_both_sides(case: str) -> None:
    """Of several steps one after the other that of the largest."""
    ours, peer = unit_step.Ours("tiny", "fp32", 2, keeps=False), unit_step.Peer("tiny", "fp32", 2)

    def side(of: object, name: str, *arguments: str) -> object:
        return getattr(of, name)(*arguments)

    row = unit_step.compare_case(case, partial(side, ours), partial(side, peer), 1)
    assert row["rounds"] == 1 and row["memory_ratio"] == row["ours_bytes"] / row["peer_bytes"] > 0


def test_the_ladder_of_flava_has_a_rung_where_a_trick_can_matter_and_none_changes_the_losses() -> None:
    pair = flava_pair.Pair("tiny", nullcontext, torch.device("cpu"))
    for trick in flava_pair.WITHOUT.values():
        for modality in flava_pair.MODALITIES:
            if trick.touches(modality):
                batch = flava_pair.batch_of(pair.method.model.config, modality, 4, trick.inputs)
                inputs = flava_pair.peer_inputs(batch, pair.method, modality)
                with trick.without():
                    pair.same_losses(batch, inputs)
    for rows in (flava_step.LADDER_BATCH, 8):  # the trick is one at all
        lengths = torch.tensor(flava_pair.LENGTHS[:rows])
        assert Packing.of(torch.arange(max(lengths)) < lengths[:, None]) is not None
    ours = flava_step.Ours("tiny", "fp32", 4, keeps=False)

    def side(name: str, *arguments: str) -> object:
        return getattr(ours, name)(*arguments)

    rungs = flava_step.ladder(side, side, rounds=1)
    assert rungs.keys() == {*flava_pair.WITHOUT, flava_step.GIVEN_BACK}
    for name, trick in flava_pair.WITHOUT.items():
        assert set(rungs[name]) == {modality for modality in flava_pair.MODALITIES if trick.touches(modality)}
    assert set(rungs[flava_step.GIVEN_BACK]) == set(flava_pair.MODALITIES)
    assert all(math.isfinite(factor) and factor > 0 for rung in rungs.values() for factor in rung.values())


def test_a_step_on_another_class_of_processor_has_a_file_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in precision.HELD_TO_AVX2:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["benchmarks/a.py"])
    named = []
    for kind in ("AMX", "AVX512", "AVX2"):
        monkeypatch.setattr("trivium.train.precision.cpu_class", lambda kind=kind: kind)
        named.append(side_by_side.of_this_class("step"))
    assert named == ["step", "step_avx512", "step_avx2"]
    monkeypatch.setattr("trivium.train.precision.cpu_class", lambda: "AMX")
    for name, value in precision.HELD_TO_AVX2.items():
        monkeypatch.setenv(name, value)
        if name != list(precision.HELD_TO_AVX2)[-1]:
            with pytest.raises(SystemExit, match=r"ONEDNN_MAX_CPU_ISA.* alone, or with other values"):
                side_by_side.held_to_avx2()
    assert side_by_side.of_this_class("step") == "step_avx2"
    assert run_folder.machine()["held on"] == "AMX"  # in what a run writes too
    found = json.loads(side_by_side.write("step_avx2", {}, folder=tmp_path).read_text())
    assert (found["machine"]["class"], found["machine"]["held on"]) == ("AVX2", "AMX")
    held = "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2"
    assert found["command"] == f"{held} python benchmarks/a.py"
