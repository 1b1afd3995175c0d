"""Pictures that are the same, or look the same: fingerprints, and the pairs among many that lie close to each other.

Exact means equal pixels. Near means that two hashes of the lowest frequencies of the luma differ in at most DISTANCE of
64 bits ("pHash", Zauner 2010) and that the colours of 8 x 8 fields differ by at most COLOURS of 255 on average: the
hash alone takes a red heart for a light blue one. Between a photograph and its JPEG of quality 50, or of half the side,
99 % lie within 4 bits and 0.9; between different ones among a thousand no pair lies within 8 bits.

Legend: N pictures, P pairs, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DISTANCE = 6  # bits
COLOURS = 4.0  # of 255
SIDE = 32  # pixels; the DCT is taken of a luma of this side
FIELDS = 8  # on a side; their mean colours are compared
BITS = 64
AT_ONCE = 2_000_000  # pairs that are compared
_u, _v = np.indices((SIDE, SIDE))
LOWEST = np.lexsort((_u.ravel(), (_u + _v).ravel()))[
    1 : BITS + 1
]  # frequencies by u + v; the constant one says nothing


class Fingerprint(NamedTuple):
    """Of one picture."""

    pixels: bytes  # sha256 of its shape and its RGB pixels
    hash: int  # of its luma; 64 bits
    colours: bytes  # 8 x 8 fields, RGB
    height: int
    width: int


def fingerprint(picture_HWC: np.ndarray) -> Fingerprint:
    """Of a decoded picture, uint8 [H, W, 3]."""
    height, width, _ = picture_HWC.shape
    digest = hashlib.sha256(f"{height} {width} ".encode())
    digest.update(np.ascontiguousarray(picture_HWC).data)
    small = np.asarray(Image.fromarray(picture_HWC).resize((SIDE, SIDE), Image.Resampling.BOX))
    luma = small @ np.array([0.299, 0.587, 0.114])
    # Rounded, since the frequencies of one flat colour are nothing but rounding errors.
    frequencies = dctn(luma, norm="ortho").ravel()[LOWEST].round(3)
    bits = np.packbits(frequencies > np.median(frequencies))
    fields = small.reshape(FIELDS, SIDE // FIELDS, FIELDS, SIDE // FIELDS, 3).mean((1, 3)).round().astype(np.uint8)
    return Fingerprint(digest.digest(), int.from_bytes(bits.tobytes(), "big"), fields.tobytes(), height, width)


def close_pairs(hashes_N: np.ndarray, distance: int) -> np.ndarray:
    """Every pair of rows whose 64-bit hashes differ in at most `distance` bits, once: int64 [P, 2], smaller row first.

    The bits are cut into distance + 2 bands. Two hashes within the distance agree on at least two of them whole, so
    only rows that do are compared: for each two bands the rows are sorted by them, and equal ones stand in runs.
    hashes_N: uint64.
    """
    assert 0 <= distance < BITS - 2
    edges = np.linspace(0, BITS, distance + 3).astype(np.uint64)
    bands = [_band(hashes_N, edges, number) for number in range(distance + 2)]
    found = [np.empty((0, 2), np.int64)]
    for first, second in combinations(bands, 2):
        key = (first << np.uint64(32)) | second
        order = np.argsort(key, kind="stable")
        key = key[order]
        begin, step = np.arange(len(key)), 1
        while len(begin):  # begin: rows whose run is longer than `step`
            begin = begin[begin + step < len(key)]
            begin = begin[key[begin] == key[begin + step]]
            pairs = np.stack([order[begin], order[begin + step]], axis=1)
            found.append(pairs[_bits_apart(hashes_N[pairs[:, 0]], hashes_N[pairs[:, 1]]) <= distance])
            step += 1
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def near_pairs(pictures: Sequence[Fingerprint]) -> np.ndarray:
    """The rows of every two pictures that look the same, equal ones too: int64 [P, 2], smaller row first."""
    hashes_N, colours_NC = arrays(pictures)
    pairs = close_pairs(hashes_N, DISTANCE)
    return pairs[_alike(colours_NC, colours_NC, pairs)]


def arrays(pictures: Sequence[Fingerprint]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes uint64 [N] and colours uint8 [N, 192] of fingerprints."""
    hashes_N = np.array([picture.hash for picture in pictures], dtype=np.uint64)
    colours = np.frombuffer(b"".join(picture.colours for picture in pictures), np.uint8)
    return hashes_N, colours.reshape(-1, FIELDS**2 * 3)


def near_across(
    hashes_N: np.ndarray, colours_NC: np.ndarray, others_M: np.ndarray, other_colours_MC: np.ndarray
) -> np.ndarray:
    """Rows of one set beside rows of another that look the same: int64 [P, 2], at most one pair for each of the M.

    What looks alike inside one set is not looked at: simple drawings do by the million. Of several near rows of the
    first set, any one is given.
    """
    return close_across(hashes_N, others_M, DISTANCE, lambda pairs: _alike(colours_NC, other_colours_MC, pairs))


def close_across(
    hashes_N: np.ndarray,
    others_M: np.ndarray,
    distance: int,
    keep: Callable[[np.ndarray], np.ndarray] = lambda pairs: np.ones(len(pairs), dtype=bool),
) -> np.ndarray:
    """Rows whose hashes differ in at most `distance` bits: int64 [P, 2], at most one pair for each of the M.

    keep: of pairs [P, 2] those that count, bool [P]; those of other rows are looked for on.
    """
    edges = np.linspace(0, BITS, distance + 3).astype(np.uint64)
    near_M = np.full(len(others_M), -1, dtype=np.int64)
    for one, other in combinations(range(distance + 2), 2):
        left = np.flatnonzero(near_M < 0)
        key_N, key_M = (
            (_band(hashes, edges, one) << np.uint64(32)) | _band(hashes, edges, other)
            for hashes in (hashes_N, others_M[left])
        )
        order = np.argsort(key_N, kind="stable")
        begin = np.searchsorted(key_N[order], key_M, side="left")
        count = np.searchsorted(key_N[order], key_M, side="right") - begin
        for first in np.split(np.arange(len(left)), np.flatnonzero(np.diff(count.cumsum() // AT_ONCE)) + 1):
            row_M = np.repeat(first, count[first])
            place = np.arange(len(row_M)) - np.repeat(count[first].cumsum() - count[first], count[first])
            pairs = np.stack([order[begin[row_M] + place], left[row_M]], axis=1)
            pairs = pairs[_bits_apart(hashes_N[pairs[:, 0]], others_M[pairs[:, 1]]) <= distance]
            pairs = pairs[keep(pairs)]
            near_M[pairs[:, 1]] = pairs[:, 0]
    found = np.flatnonzero(near_M >= 0)
    return np.stack([near_M[found], found], axis=1)


def _band(hashes: np.ndarray, edges: np.ndarray, number: int) -> np.ndarray:
    low, high = edges[number], edges[number + 1]
    return (hashes >> low) & ((np.uint64(1) << (high - low)) - np.uint64(1))


def _alike(colours_NC: np.ndarray, other_colours_MC: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether the fields of the two pictures of each pair have nearly the same colours: bool [P]."""
    apart = [
        np.abs(colours_NC[part[:, 0]].astype(np.int16) - other_colours_MC[part[:, 1]]).mean(axis=1)
        for part in np.array_split(pairs, 1 + len(pairs) // 100_000)
    ]
    return np.concatenate(apart) <= COLOURS


def groups(pairs: np.ndarray, size: int) -> list[list[int]]:
    """Rows out of range(size) that `pairs` link, directly or through others: each group rising, the largest first."""
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    _, number = connected_components(graph, directed=False)
    rows = np.unique(pairs)
    linked: dict[int, list[int]] = {}
    for row in rows.tolist():
        linked.setdefault(int(number[row]), []).append(row)
    return sorted(linked.values(), key=lambda group: (-len(group), group))


def _bits_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Hamming distances of uint64 hashes: int64 [P]."""
    return np.unpackbits((one ^ other).view(np.uint8)).reshape(len(one), BITS).sum(axis=1, dtype=np.int64)
