"""Full training steps of FLAVA against transformers.FlavaForPreTraining: forward, backward, optimizer.

    python benchmarks/flava_step.py                 # base size, batch 8: 15 to 30 minutes on two cores
    python benchmarks/flava_step.py --size tiny     # a minute, to see that it runs

Same weights, same pictures and words, same masks, same optimizer, threads and precision on both sides; the losses of
both agree to 1e-5 in float32, or nothing is timed. Three sets of rows:

    as_used   each as it is used: the peer with 77 tokens and codes made in the step, ours with the captions' real
              length and cached codes (`trivium data codes`)
    equal     real length and cached codes for both
    online    77 tokens and codes made in the step for both

The ladder takes one trick away at a time: its factor is the time without the trick over the time with all.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import side_by_side
from flava_pair import LENGTHS, MODALITIES, PADDED, WITHOUT, Pair, make_batches, peer_inputs

from trivium.train import precision
from trivium.train.protocol import Batch

LADDER_BATCH = 4  # of the ladder, which times 21 cases


def compare(pair: Pair, ours: dict[str, Batch], theirs: dict[str, Batch]) -> dict[str, Any]:
    rows = {}
    for modality in MODALITIES:
        inputs = peer_inputs(theirs[modality], pair.method, modality)
        rows[modality] = pair.compare(modality, ours[modality], inputs)
    return rows


def ladder(pair: Pair, cached: dict[str, Batch], padded: dict[str, Batch], online: dict[str, Batch]) -> dict[str, Any]:
    """Factor of each trick on each modality: the time without it over the time with all."""
    batches_of = {"equal": cached, "padded": padded, "online": online}
    rungs: dict[str, Any] = {trick: {} for trick in WITHOUT}
    for modality in MODALITIES:
        print(f" ladder, {modality}", flush=True)
        without = {
            trick: partial(side_by_side.under, patch, partial(pair.step, batches_of[inputs][modality]))
            for trick, (patch, inputs) in WITHOUT.items()
        }
        for trick, factor in side_by_side.ladder(partial(pair.step, cached[modality]), without).items():
            rungs[trick][modality] = factor
    return rungs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-ladder", action="store_true")
    arguments = parser.parse_args()
    if arguments.size == "base":
        side_by_side.refuse_a_busy_machine()
    device = precision.choose_device("auto")
    kind = precision.choose("auto", device)
    pair = Pair(arguments.size, lambda: precision.autocast(device, kind), device)
    config = pair.method.model.config

    real = make_batches(config, arguments.batch, None, with_codes=True)
    online = make_batches(config, arguments.batch, PADDED if config.max_length >= PADDED else None, with_codes=False)
    results = {}
    for name, batches in (("equal", real), ("online", online)):  # before any step: afterwards weights may drift apart
        print(f"losses, {name}", flush=True)
        for modality in MODALITIES:
            pair.same_losses(batches[modality], peer_inputs(batches[modality], pair.method, modality))
    pair.ready(kind)
    for name, ours, theirs in (("equal", real, real), ("online", online, online), ("as_used", real, online)):
        print(f"{name} ({kind})", flush=True)
        results[name] = compare(pair, ours, theirs)
    few = min(arguments.batch, LADDER_BATCH)
    rungs = (
        {}
        if arguments.no_ladder
        else ladder(
            pair,
            make_batches(config, few, None, with_codes=True),
            make_batches(config, few, PADDED if config.max_length >= PADDED else None, with_codes=True),
            make_batches(config, few, None, with_codes=False),
        )
    )
    if arguments.size == "base":
        side_by_side.write(
            "flava_step",
            results,
            ladder=rungs,
            precision=kind,
            batch=arguments.batch,
            ladder_batch=few,
            token_lengths=LENGTHS,
        )


if __name__ == "__main__":
    main()
