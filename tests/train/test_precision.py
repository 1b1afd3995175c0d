from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from trivium.errors import TriviumError
from trivium.train import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("slower", ["bf16", "fp32"])
def test_the_faster_of_two_steps_is_taken(slower: str) -> None:
    taken: list[str] = []

    def one_step(kind: str) -> None:
        taken.append(kind)
        time.sleep(0.05 if kind == slower else 0.0)

    assert precision.faster(one_step) == ({"bf16", "fp32"} - {slower}).pop()
    assert sorted(taken) == ["bf16"] * 3 + ["fp32"] * 3  # one of each is not counted


def test_auto_takes_the_faster() -> None:
    speed = precision.measure_matmul(CPU)
    assert speed["float32"] > 0.1  # GFLOP/s: any machine reaches it
    assert speed["bfloat16"] > 0
    ratio = speed["bfloat16"] / speed["float32"]
    if ratio < 0.5 or ratio > 2:  # else the choice may go either way
        assert precision.choose("auto", CPU) == ("bf16" if ratio > 1 else "fp32")
    assert precision.choose("bf16", CPU) == "bf16"
    assert precision.choose("fp32", CPU) == "fp32"


def test_autocast_computes_in_what_was_chosen() -> None:
    left = torch.randn(4, 4)
    with precision.autocast(CPU, "bf16"):
        assert (left @ left).dtype == torch.bfloat16
    with precision.autocast(CPU, "fp32"):
        assert (left @ left).dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx avx2 avx512f amx_bf16 amx_tile amx_int8", "AMX"),
        ("fpu avx avx2 avx512f avx512bw", "AVX512"),
        ("fpu avx avx2 fma", "AVX2"),
        ("fpu sse2", "other"),
    ],
)
def test_class_of_a_processor(tmp_path: Path, flags: str, expected: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert precision.cpu_class(file) == expected
    assert precision.cpu_name(file) == "Some CPU @ 2 GHz"
    assert precision.cpu_class(tmp_path / "absent") == "other"
    assert precision.cpu_name(tmp_path / "absent") == "unknown"


def test_device() -> None:
    assert precision.choose_device("cpu") == CPU
    assert precision.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(TriviumError, match=r"--train\.device potato cannot be used here .*: use auto or cpu"):
        precision.choose_device("potato")
    if not torch.cuda.is_available():
        with pytest.raises(TriviumError, match=r"--train\.device cuda cannot be used here"):
            precision.choose_device("cuda")
