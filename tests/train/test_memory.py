"""Freed memory that is kept: what comes of it is the same, and no page is asked for twice."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

# Two layers wide enough for blocks above and below what glibc gives back at once. Prints the faults of each step, and
# the sums of the gradients.
SCRIPT = """
import json, resource, sys
import torch
from trivium.train.memory import keep_freed
torch.set_num_threads(1)
kept = keep_freed() if sys.argv[1] == "kept" else None
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(16, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 16))
x = torch.randn(4352, 16)
faults = []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers.zero_grad(set_to_none=True)
    loss = layers(x).square().mean()
    loss.backward()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
sums = [parameter.grad.double().sum().item() for parameter in layers.parameters()]
print(json.dumps({"kept": kept, "faults": faults, "loss": loss.item(), "sums": sums}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told to keep memory")
def test_a_step_finds_the_memory_of_the_one_before_and_gives_the_same() -> None:
    found = {}
    for how in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True, timeout=120
        )
        found[how] = json.loads(done.stdout)
    assert found["kept"]["kept"] is True
    # The heap takes some steps to find its shape.
    kept, given_back = (sum(found[how]["faults"][-4:]) for how in ("kept", "given back"))
    assert given_back > 50_000, "blocks of 34 MB are given back: there is something to keep"
    assert kept < given_back / 5
    assert (found["kept"]["loss"], found["kept"]["sums"]) == (found["given back"]["loss"], found["given back"]["sums"])
