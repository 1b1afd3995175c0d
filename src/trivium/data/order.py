"""Which row of a source stands at which place: a pure function of (seed, stream, place), with no state to save.

A *place* is the position of a sample in its stream, a *row* its position in the source. Places count on without end;
every ``num_rows`` of them are one epoch, in which each row stands exactly once.

The order inside an epoch keeps reads cheap: the source's blocks (a tar shard, a row group) are permuted, and rows are
mixed only inside windows of a few consecutive permuted blocks, so a reader has no more than one window open at a time.
Rows are permuted by a keyed bijection instead of a table, so any place of a source of 10^9 rows is reached at once;
only the blocks, of which there are few, are laid out in a table per epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.errors import TriviumError
from trivium.train.protocol import Blocks, hash64, uniform64

WINDOW = 16  # blocks that are mixed with each other, and so read at once

FEISTEL_ROUNDS = 6


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of range(size), evaluated at `index` alone; size and key are given per element.

    An alternating Feistel network over a grid of lines x columns >= size cells (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002): each round shifts one coordinate by a hash of the other, which can be undone
    and so is a bijection of the grid. A cell past the end is sent through again until it falls inside range(size);
    the grid is hardly larger than `size`, so a second pass is rare.

    index, size: int64 of one shape [n], 0 <= index < size < 2^52. key: uint64 [n]. Returns int64 [n].
    """
    columns = np.ceil(np.sqrt(size)).astype(np.int64)
    lines = -(-size // columns)
    cell = index.copy()
    walking = np.arange(len(index))  # positions whose cell is not inside yet
    while len(walking):
        keys, num_columns, num_lines = key[walking], columns[walking], lines[walking]
        line, column = np.divmod(cell[walking], num_columns)
        for number in range(FEISTEL_ROUNDS):  # modulo: both summands are below the bound, and a division is slow
            if number % 2 == 0:
                column += _below(num_columns, keys, line, number)
                column -= num_columns * (column >= num_columns)
            else:
                line += _below(num_lines, keys, column, number)
                line -= num_lines * (line >= num_lines)
        cell[walking] = line * num_columns + column
        walking = walking[cell[walking] >= size[walking]]
    return cell


def _below(bound: np.ndarray, key: np.ndarray, index: np.ndarray, round_number: int) -> np.ndarray:
    """One integer in [0, bound) for each (key, index, round)."""
    with np.errstate(over="ignore"):
        mixed = key + index.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)  # any odd number serves
    return (uniform64(round_number, mixed) * bound).astype(np.int64)


def _keys(seed: int, numbers: np.ndarray) -> np.ndarray:
    """One uint64 key for each of `numbers`."""
    return (uniform64(seed, numbers) * 2.0**53).astype(np.uint64)


@dataclass(frozen=True)
class Draws:
    """The random choices of one sample: a generator for each name, a pure function of (seed, stream, place, name)."""

    seed: int
    stream: str
    place: int

    def generator(self, name: str) -> np.random.Generator:
        """A fresh generator. `name` says what is drawn (crop, mask), so that one choice never shifts another."""
        return keyed_generator(self.seed, self.stream, self.place, name)


def keyed_generator(*parts: str | int) -> np.random.Generator:
    """A generator whose whole stream is a function of `parts`; made in about 5 microseconds."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=32).digest()
    words: Any = _Words(np.frombuffer(digest, dtype=np.uint64))  # numpy takes it, its stubs do not know
    return np.random.Generator(np.random.PCG64(words))


class _Words(np.random.bit_generator.ISeedSequence):
    """Hands four ready 64-bit words to PCG64: 5 times faster than numpy's own SeedSequence, which would hash again."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> np.ndarray:
        assert n_words == len(self.words) and dtype is np.uint64  # what PCG64 asks for
        return self.words


class Order:
    """place -> row.

    num_rows: of the source. blocks: ranges that are cheap to read together, in order, all rows once; one block where
    every row is as cheap as any other. window: how many permuted blocks are mixed with each other.
    """

    def __init__(self, num_rows: int, blocks: Sequence[range], seed: int, stream: str, window: int = WINDOW) -> None:
        if num_rows < 1:
            raise TriviumError(f"stream {stream!r} has no samples: give it a source with at least one")
        assert window >= 1
        self.num_rows = num_rows
        self.seed = seed
        self.stream = stream
        self.window = window
        bounds = Blocks.of(blocks).bounds
        assert bounds[-1] == num_rows, "blocks must cover every row exactly once"
        self.block_starts, self.block_sizes = bounds[:-1], np.diff(bounds)
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The row at each place. places: int64 [n], in any order, from any epochs. Returns int64 [n]."""
        places = np.asarray(places, dtype=np.int64)
        epochs = places // self.num_rows
        result = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            result[here] = self._rows_of_epoch(epoch, places[here] - epoch * self.num_rows)
        return result

    def substitute(self, place: int, attempt: int) -> int:
        """The row that stands in for an unreadable sample: drawn from all rows by (seed, stream, place, attempt)."""
        return hash64(self.seed, self.stream, "substitute", place, attempt) % self.num_rows

    def _rows_of_epoch(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        blocks, starts = self._layout(epoch)  # permuted blocks, and the position where each begins
        window_starts = np.append(starts[: -1 : self.window], self.num_rows)
        window = np.searchsorted(window_starts, positions, side="right") - 1
        begin = window_starts[window]
        key = _keys(hash64(self.seed, self.stream, "rows", epoch), window)
        positions = begin + permute(positions - begin, window_starts[window + 1] - begin, key)
        nth = np.searchsorted(starts, positions, side="right") - 1
        return self.block_starts[blocks[nth]] + positions - starts[nth]

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one epoch: the permuted block numbers, and their first positions followed by num_rows."""
        if epoch not in self._layouts:
            if len(self._layouts) >= 2:  # a global batch touches two epochs at most, save where the source is tiny
                self._layouts.clear()
            key = _keys(hash64(self.seed, self.stream, "blocks"), np.array([epoch]))
            number = np.arange(len(self.block_sizes))
            blocks = permute(number, np.full_like(number, len(number)), np.repeat(key, len(number)))
            blocks = blocks[self.block_sizes[blocks] > 0]
            starts = np.concatenate([[0], np.cumsum(self.block_sizes[blocks])])
            self._layouts[epoch] = (blocks, starts)
        return self._layouts[epoch]


def rotate_captions(
    rows: np.ndarray, places: np.ndarray, rate: float, seed: int, stream: str, *, exact: bool = False
) -> np.ndarray:
    """The text row beside each image row, some of them false pairs on purpose.

    Each place is chosen with probability `rate` by (seed, stream, place); the captions of the chosen ones are rotated
    by one among them, so every caption still stands exactly once and language alone betrays nothing. One chosen
    place alone stays true. rows, places: int64 [G] of the GLOBAL batch. Returns int64 [G].

    exact: choose rate x G places, rounded, instead: a few hundred samples that are measured should hold the share that
    a loss is compared at, not what chance makes of it.
    """
    text_rows = rows.copy()
    draws = uniform64(hash64(seed, stream, "false pair"), places)
    chosen = np.sort(draws.argsort()[: round(rate * len(rows))]) if exact else np.flatnonzero(draws < rate)
    text_rows[chosen] = np.roll(rows[chosen], 1)
    return text_rows


def pair_rows(places: np.ndarray, order: Order, rate: float, seed: int, stream: str) -> tuple[np.ndarray, np.ndarray]:
    """The image row and the text row at each place of a GLOBAL batch: two int64 [G]. See ``rotate_captions``."""
    image_rows = order.rows(places)
    return image_rows, rotate_captions(image_rows, places, rate, seed, stream)
