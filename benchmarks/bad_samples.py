"""A million synthetic samples, one in a hundred broken: no crash, an exact count, the order of the rest as it was.

    python benchmarks/bad_samples.py            # half an hour
    python benchmarks/bad_samples.py --samples 20000

Captioned pictures of 16 pixels go through the loader and its workers as any others do; what is broken is cut off,
empty, of another type, no UTF-8, or missing. The fatal rate is 5 %.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import side_by_side
import torch
from PIL import Image

from trivium.data import embedded
from trivium.data.collate import ImageInput, PairCollate, TextInput
from trivium.data.files import RowSource
from trivium.data.mixture import StreamMixture
from trivium.data.order import Order
from trivium.data.tokenizer import Tokenizer
from trivium.data.views import Views
from trivium.train.mishaps import Replaced
from trivium.train.protocol import Stream, hash64

BATCH = 1000
SHARD = 1000  # rows of a block
WHYS = ("zero bytes", "cut off", "another type", "no picture", "an empty text", "no UTF-8")


def encoded(format: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


class Synthetic(RowSource):
    """`bad`: of each row, which of WHYS is wrong with it, or -1."""

    kind = "pairs"

    def __init__(self, bad: np.ndarray) -> None:
        self.wrong = bad
        self.jpeg = encoded("JPEG")

    def __len__(self) -> int:
        return len(self.wrong)

    def where(self, row: int) -> tuple[str, str]:
        return "synthetic", str(row)

    def blocks(self) -> Sequence[range]:
        return [range(start, min(start + SHARD, len(self))) for start in range(0, len(self), SHARD)]

    def picture(self, row: int) -> bytes:
        wrong = self.wrong[row]
        if wrong == 3:
            raise self.bad(row, "it has no picture")
        return {0: b"", 1: self.jpeg[: len(self.jpeg) // 2], 2: b"<html>404</html>"}.get(wrong, self.jpeg)

    def captions(self, row: int) -> list[str]:
        wrong = self.wrong[row]
        return [self.utf8(row, {4: b" ", 5: b"caf\xe9"}.get(wrong, b"a red mug on a table, number %d" % row))]


def measured(total: int, workers: int) -> dict[str, float | bool]:
    """Send so many samples through the loader, and compare what comes out with what the order says."""
    wrong = np.full(total, -1)
    chosen = np.random.default_rng(0).permutation(total)[: total // 100]
    wrong[chosen] = np.arange(len(chosen)) % len(WHYS)
    source = Synthetic(wrong)
    order = Order(total, source.blocks(), 0, "pairs")

    rows = order.rows(np.arange(total))
    expected_rows, expected_bad = rows.copy(), []
    for place in np.flatnonzero(wrong[rows] >= 0).tolist():
        row, attempt = int(rows[place]), 0
        while wrong[row] >= 0:
            expected_bad.append(row)
            attempt += 1
            row = order.substitute(place, attempt)
        expected_rows[place] = row
    assert np.array_equal(np.sort(rows), np.arange(total))

    tokenizer = Tokenizer.wordpiece(embedded.bert_vocabulary())
    collate = PairCollate(ImageInput(Views(16), patch=8), TextInput(tokenizer, 16))
    mixture = StreamMixture([Stream("pairs", source, collate, BATCH, BATCH)], 0, workers=workers)
    named: list[int] = []
    misplaced = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        replaced = Replaced(Path(folder) / "skipped.jsonl", rate=0.05)
        for step, [batch] in enumerate(mixture.loader(0, 0, 1, total // BATCH)):
            named += [int(sentence.partition("(")[2].partition(")")[0]) for sentence in batch.bad]
            expected = [hash64(source.identity(row)) >> 1 for row in expected_rows[step * BATCH :][:BATCH].tolist()]
            misplaced += int((batch.images[0].same_B != torch.tensor(expected)).sum())
            replaced.note(step + 1, [batch])
        logged = len((Path(folder) / "skipped.jsonl").read_text().splitlines())
    return {
        "samples": total,
        "broken": len(chosen),
        "replaced": len(named),
        "expected": len(expected_bad),
        "count_exact": named == expected_bad and logged == len(named),
        "misplaced": misplaced,
        "fatal_rate": 0.05,
        "workers": workers,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measured(arguments.samples, arguments.workers)
    print(result)
    assert result["count_exact"] and not result["misplaced"]
    if arguments.samples == 1_000_000:
        side_by_side.write("bad_samples", {"a million samples": result})


if __name__ == "__main__":
    main()
