"""Full training steps of FLAVA against transformers.FlavaForPreTraining: forward, backward, optimizer.

    python benchmarks/flava_step.py                 # base size, batch 8: 15 to 20 minutes on two cores with AMX
    python benchmarks/flava_step.py --only table    # without the ladder: half of it
    python benchmarks/flava_step.py --only ladder   # the other half, into the file that the table is in
    python benchmarks/flava_step.py --size tiny     # a minute, to see that it runs

Same weights, same pictures and words, same masks, same optimizer, threads and precision on both sides; the losses of
both agree to 1e-5 in float32, or nothing is timed. Three sets of rows:

    as_used   each as it is used: the peer with 77 tokens and codes made in the step, ours with the captions' real
              length and cached codes (`trivium data codes`)
    equal     real length and cached codes for both
    online    77 tokens and codes made in the step for both; ours leaves pads out, as always on a processor

Each side has a process of its own, and its allocator as it is used: ours keeps the memory of a step for the next, as
the trainer does (train/memory.py), the peer's is as it comes. What is counted against ours: see step_pair.py.

`flops` of a row are those that our step needs (methods/flava_flops.py), MFU what that is, of either side's time, beside
the fastest matrix product measured here. The ladder takes one trick away at a time, where it can make a difference: its
factor is the time without the trick over the time with all, of the fastest steps.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import side_by_side
import torch
from flava_pair import INPUTS, LENGTHS, MODALITIES, WITHOUT, Pair, batch_of, peer_inputs
from step_pair import compare

from trivium.train import precision
from trivium.train.memory import keep_freed

CASES = {  # inputs of ours and of the peer, by name in INPUTS
    "equal": ("equal", "equal"),
    "online": ("padded, online", "padded, online"),
    "as_used": ("equal", "padded, online"),
}
LADDER_BATCH = 4  # of the ladder, which times 30 cases
GIVEN_BACK = "memory of a step kept for the next"  # a trick that is not taken away by a patch
CPU = torch.device("cpu")

Side = Callable[..., Any]  # a side_by_side.Apart: the name of a method, and its arguments
Kind = Literal["fp32", "bf16"]
Case = tuple[str, str]  # modality and inputs


class Ours:
    """Our step, in a process of its own. keeps: as the trainer does, the memory of a step for the next one."""

    def __init__(self, size: str, kind: Kind, rows: int, keeps: bool) -> None:
        if keeps:
            keep_freed()
        self.pair = Pair(size, lambda: precision.autocast(CPU, kind), CPU)
        self.pair.ready(kind)
        config = self.pair.method.model.config
        self.batches = {
            (name, inputs): batch_of(config, name, rows, inputs) for name in MODALITIES for inputs in INPUTS
        }
        del self.pair.peer, self.pair.peer_optimizer
        gc.collect()

    def step(self, modality: str, inputs: str) -> None:
        self.pair.step(self.batches[modality, inputs])

    def without(self, trick: str, modality: str) -> None:
        with WITHOUT[trick].without():
            self.pair.step(self.batches[modality, WITHOUT[trick].inputs])

    def memory(self, modality: str, inputs: str) -> int:
        return self.pair.memory(self.batches[modality, inputs])

    def flops(self, modality: str, inputs: str) -> float:
        return self.pair.flops(self.batches[modality, inputs])


class Peer:
    """The peer's step, in a process of its own, with the allocator as it comes."""

    def __init__(self, size: str, kind: Kind, rows: int) -> None:
        self.pair = Pair(size, lambda: precision.autocast(CPU, kind), CPU)
        method = self.pair.method
        self.inputs = {}
        for inputs in sorted({theirs for _, theirs in CASES.values()}):
            print(f"losses, {inputs}", flush=True)
            for modality in MODALITIES:  # before any step: afterwards weights may drift apart
                batch = batch_of(method.model.config, modality, rows, inputs)
                self.inputs[modality, inputs] = peer_inputs(batch, method, modality)
                self.pair.same_losses(batch, self.inputs[modality, inputs])
        del self.pair.optimizer, method.model, method.image_tokenizer
        gc.collect()

    def step(self, modality: str, inputs: str) -> None:
        self.pair.peer_step(self.inputs[modality, inputs])

    def memory(self, modality: str, inputs: str) -> int:
        return self.pair.memory(self.inputs[modality, inputs])


def compare_apart(ours: Side, mine: Case, peer: Side, theirs: Case) -> dict[str, Any]:
    steps = partial(ours, "step", *mine), partial(peer, "step", *theirs)
    return compare(mine[0], *steps, lambda: (ours("memory", *mine), peer("memory", *theirs)))


def table(ours: Side, peer: Side, cases: Sequence[str], product: float) -> dict[str, Any]:
    """Rows of each case and modality. product: FLOP/s of a matrix product."""
    results: dict[str, Any] = {}
    for case, inputs in ((name, CASES[name]) for name in cases):
        print(case, flush=True)
        results[case] = {}
        for modality in MODALITIES:
            mine, theirs = ((modality, name) for name in inputs)
            row = compare_apart(ours, mine, peer, theirs)
            row["flops"] = ours("flops", *mine)
            results[case][modality] = row | {
                f"{side}_mfu": row["flops"] / row[f"{side}_min"] / product for side in ("ours", "peer")
            }
    return results


def ladder(ours: Side, given_back: Side, rounds: int) -> dict[str, dict[str, float]]:
    """Factor of each trick on each modality where it can make a difference. given_back: ours without `keeps`."""
    timed = partial(side_by_side.interleaved, rounds=rounds)
    rungs: dict[str, dict[str, float]] = {trick: {} for trick in (*WITHOUT, GIVEN_BACK)}
    for modality in MODALITIES:
        print(f" ladder, {modality}", flush=True)
        climbed = {
            name: (trick.whole or "equal", partial(ours, "without", name, modality))
            for name, trick in WITHOUT.items()
            if trick.touches(modality)
        }
        climbed[GIVEN_BACK] = ("equal", partial(given_back, "step", modality, "equal"))
        for name, (inputs, lacking) in climbed.items():
            whole = partial(ours, "step", modality, inputs)
            rungs[name][modality] = side_by_side.ladder(whole, {name: lacking}, min, timed)[name]
    return rungs


def measure_table(size: str, kind: Kind, rows: int, cases: Sequence[str]) -> dict[str, Any]:
    product = 1e9 * precision.measure_matmul(CPU, seconds=1.0)["bfloat16" if kind == "bf16" else "float32"]
    print(f"a matrix product makes {product / 1e9:.0f} GFLOP/s", flush=True)
    peer, ours = side_by_side.Apart(Peer, size, kind, rows), side_by_side.Apart(Ours, size, kind, rows, True)
    results = table(ours, peer, cases, product)
    peer.end()
    ours.end()
    return results


def measure_ladder(size: str, kind: Kind, rows: int, rounds: int) -> dict[str, Any]:
    ours, given_back = (side_by_side.Apart(Ours, size, kind, rows, keeps) for keeps in (True, False))
    rungs = ladder(ours, given_back, rounds)
    ours.end()
    given_back.end()
    return rungs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=("table", "ladder"), help="the ladder goes into the file of the table")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="of the table")
    parser.add_argument("--rounds", type=int, default=4, help="of each trick of the ladder")
    arguments = parser.parse_args()
    size, rows, few = arguments.size, arguments.batch, min(arguments.batch, LADDER_BATCH)
    if size == "base":
        side_by_side.refuse_a_busy_machine()
    kind = precision.choose("auto", CPU)
    print(f"both in {kind}", flush=True)
    name = side_by_side.of_this_class("flava_step")
    same = {"precision": kind, "batch": rows, "ladder_batch": few, "token_lengths": list(LENGTHS)}

    def keep(results: dict[str, Any], rungs: dict[str, Any]) -> None:
        if size == "base":
            results, rungs, command = side_by_side.beside_what_is_there(name, results, rungs, **same)
            side_by_side.write(name, results, command=command, ladder=rungs, **same)

    if arguments.only != "ladder":
        keep(measure_table(size, kind, rows, arguments.cases), {})  # not lost where the ladder is cut off
    elif size == "base" and not side_by_side.beside_what_is_there(name, {}, {}, **same)[0]:
        sys.exit(f"{name}.json was measured otherwise, or on another machine: measure its table here first")
    if arguments.only != "table":
        keep({}, measure_ladder(size, kind, few, arguments.rounds))


if __name__ == "__main__":
    main()
