"""Resuming at any place of a billion samples: seconds from nothing to the rows of the first global batch.

    python benchmarks/order.py            # half a minute
    python benchmarks/order.py --quick    # a million samples; writes nothing

A simulated index: 10^9 samples in 10^6 shards of unequal lengths. Each time, everything is made anew: the list of
blocks, the order, the mixture with its three streams of which one has the billion, the digest of the blocks that is
compared with the checkpoint's, the place of the step, and the rows of its global batch. There is no peer to compare
with: the loaders in use keep a state or a table of the whole epoch.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import side_by_side

from trivium.data.mixture import StreamMixture
from trivium.train import agreement
from trivium.train.protocol import Blocks, Sample, Stream

BATCH = 8192


class Index:
    """Shards of 999 to 1,001 samples that nobody reads."""

    def __init__(self, num_shards: int) -> None:
        sizes = 999 + np.arange(num_shards) % 3
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def blocks(self) -> Blocks:
        return Blocks(self.bounds[np.diff(self.bounds, prepend=-1) > 0])  # anew each time, as `TarShards` makes them

    def read(self, image_row: int, text_row: int) -> Sample:
        raise AssertionError("only the order is asked for")

    def lengths(self) -> None:
        return None


class Rows:
    false_pairs = 0.1
    sort_by_length = False


def resume(index: Index, small: Index, step: int) -> np.ndarray:
    """The rows of the global batch of a step, by a mixture that nobody has asked before; and what the trainer compares
    with the checkpoint's state first, the digest of all blocks."""
    streams = [
        Stream("pairs", index, Rows(), BATCH, BATCH, 0.70),
        Stream("images", small, Rows(), BATCH, BATCH, 0.15),
        Stream("text", small, Rows(), BATCH, BATCH, 0.15),
    ]
    mixture = StreamMixture(streams, seed=0)
    drawn = {stream.name: stream for stream in map(mixture.stream_at, range(1000))}
    agreement.facts_of(drawn.values())
    while mixture.stream_at(step).name != "pairs":
        step += 1
    return mixture.readers["pairs"].plan(mixture.place_at(step)).image_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    if not quick:
        side_by_side.refuse_a_busy_machine()
    index, small = Index(1000 if quick else 10**6), Index(1000)
    steps_per_epoch = round(len(index) / BATCH / 0.70)
    results = {}
    for share in (0.0, 0.37, 0.999, 12.5):  # of an epoch
        step = int(share * steps_per_epoch)
        times = []
        for _ in range(1 if quick else 5):
            started = time.perf_counter()
            rows = resume(index, small, step)
            times.append(time.perf_counter() - started)
        assert len(rows) == len(np.unique(rows)) == BATCH
        results[f"after {share:g} epochs"] = {
            "step": step,
            "seconds": statistics.median(times),
            "seconds_min": min(times),
            "seconds_max": max(times),
            "shards_of_the_batch": len(np.unique(np.searchsorted(index.bounds, rows, side="right"))),
        }
        print(f"  after {share:g} epochs, step {step}: {statistics.median(times):.2f} s", flush=True)
    peak = side_by_side.peak_memory(lambda: resume(index, small, steps_per_epoch // 2))
    print(f"  {peak / 2**20:.0f} MiB")
    if not quick:
        side_by_side.write("order", results, samples=len(index), shards=10**6, batch=BATCH, peak_bytes=peak)


if __name__ == "__main__":
    main()
