"""A step of FLAVA is the same on 1, 2 and 4 gloo processes and at any micro-batch: every loss, every gradient.

One world of processes for this file: it runs all cases, and each process writes what it found to a file of its own.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.flava_batches import flava_method, gradients, make_batch, random_flava, split
from trivium.train import distributed
from trivium.train.protocol import Key
from trivium.train.step import backward, measure, step

ROWS = 8  # of the global batch


@dataclass(frozen=True)
class Case:
    stream: str
    false_rows: tuple[int, ...] = ()
    masked_share: float = 1.0
    masked: bool = True


CASES = {
    "images": Case("images"),
    "text": Case("text"),
    "pairs": Case("pairs", false_rows=(1, 6)),
    "pairs: the first half is false": Case("pairs", false_rows=(0, 1, 2, 3)),
    "pairs: all are false": Case("pairs", false_rows=tuple(range(ROWS))),
    "pairs: some processes have no share of the masked pass": Case("pairs", masked_share=0.3),
    "pairs: nothing is masked": Case("pairs", masked=False),
}
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # of the tensor's norm


def run_case(case: Case, dtype: torch.dtype, micro_batches: int) -> dict[str, Tensor]:
    """Losses, summed gradients and validation losses, as this process sees them."""
    method = flava_method(random_flava(dtype=dtype), masked_share=case.masked_share)
    batch = make_batch(case.stream, ROWS, false_rows=case.false_rows, masked=case.masked)
    batches = split(batch, micro_batches)
    per_process = micro_batches // distributed.world()
    mine = batches[distributed.rank() * per_process :][:per_process]
    key = Key(0, case.stream, 0)
    method.train()
    sums, counts, _ = backward(method, mine, key)
    distributed.sum_gradients(list(method.parameters()))
    sums = distributed.sum_over_processes(sums)
    found = {f"loss/{name}": value / counts[name].clamp(min=1) for name, value in sums.items()}
    found |= {f"grad/{name}": grad.clone() for name, grad in gradients(method.model).items()}
    method.zero_grad(set_to_none=True)
    found |= {f"measured/{n}": torch.tensor(v).double() for n, v in measure(method, [mine], key).items()}
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    if distributed.rank() == distributed.world() - 1:  # one process alone sees something that is not finite
        method.model.logit_scale.register_hook(lambda grad: grad * float("nan"))
        method.model.image.class_token.register_hook(lambda grad: grad * float("nan"))
        method.model.text.norm.bias.register_hook(lambda grad: grad * float("nan"))
    accepted = step(method, mine, key, optimizer).accepted
    return found | {"accepted": torch.tensor(float(accepted))}


def micro_batch_numbers(world: int) -> list[int]:
    return [number for number in (1, 2, 4, 8) if number % world == 0 and number <= 2 * world]


def process(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start()
    assert (distributed.rank(), distributed.world()) == (rank, world)
    found = {}
    for name, case in CASES.items():
        for precision in TOLERANCE:
            for micro_batches in micro_batch_numbers(world):
                for tensor, value in run_case(case, getattr(torch, precision), micro_batches).items():
                    found[f"{name}|{precision}|{micro_batches}|{tensor}"] = value.contiguous()
    gathered = distributed.any_process(rank == world - 1), distributed.any_process(False)
    assert gathered == (True, False)
    save_file(found, Path(folder) / f"{rank}.safetensors")
    distributed.stop()


def run_world(world: int, folder: Path) -> list[dict[str, Tensor]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (world, port, str(folder)), nprocs=world)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(world)]


Found = dict[int, list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return {2: run_world(2, tmp_path_factory.mktemp("two"))}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return {4: run_world(4, tmp_path_factory.mktemp("four"))}


def assert_equals_one_process(found: Found, name: str, precision: str) -> None:
    case, dtype = CASES[name], getattr(torch, precision)
    whole = run_case(case, dtype, 1)
    whole.pop("accepted")
    layouts = {("1 process", n): run_case(case, dtype, n) for n in (2, 4)}
    for world, processes in found.items():
        for rank, tensors in enumerate(processes):
            for n in micro_batch_numbers(world):
                prefix = f"{name}|{precision}|{n}|"
                part = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
                layouts[f"process {rank} of {world}", n] = part
    for layout, tensors in layouts.items():
        assert tensors.pop("accepted") == 0, f"{layout}: one process saw a NaN and this one stepped"
        assert set(tensors) == set(whole), (layout, set(tensors) ^ set(whole))
        for tensor, expected in whole.items():
            mine, reference = tensors[tensor].double(), expected.double()
            if tensor.endswith("qkv.bias"):  # the key third has a true gradient of zero: only noise to compare
                third = len(reference) // 3
                mine, reference = (torch.cat([t[:third], t[2 * third :]]) for t in (mine, reference))
            error = float((mine - reference).norm())
            assert error <= TOLERANCE[precision] * float(reference.norm()), (
                f"{layout}, {tensor}: differs by {error:.3g}"
            )


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(two: Found, name: str, precision: str) -> None:
    assert_equals_one_process(two, name, precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(four: Found, name: str, precision: str) -> None:
    assert_equals_one_process(four, name, precision)
