from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trivium.errors import TriviumError
from trivium.layers.attention import attend
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


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs an H100 or H200"
)
@pytest.mark.parametrize("length", [26, 197, 224])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_hopper_is_as_near_to_the_truth_as_torch_s_choice(length: int, masked: bool) -> None:
    """Values and gradients in bfloat16, beside the plain form in float64 of the same numbers."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    inputs = torch.randn(3, 8, 12, length, 64, device=device, dtype=torch.bfloat16)
    weight = torch.randn(8, 12, length, 64, device=device, dtype=torch.bfloat16)
    seen = torch.arange(length, device=device) < torch.randint(5, length + 1, (8, 1), device=device)
    mask = seen if masked else None

    def found(attended: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [part.to(dtype).requires_grad_() for part in inputs]
        out = attended(*leaves)
        grads = torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)
        return [each.double() for each in (out.detach(), *grads)]

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) / 8
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return scores.softmax(-1) @ value

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, mask, 0.0)

    truth, choice = found(plain, torch.float64), found(ours, torch.bfloat16)
    with precision.autocast(device, "bf16"):
        here = found(ours, torch.bfloat16)
    for exact, by_torch, by_hopper in zip(truth, choice, here, strict=True):
        assert float((by_hopper - exact).norm()) <= 1.2 * float((by_torch - exact).norm()) + 1e-9
