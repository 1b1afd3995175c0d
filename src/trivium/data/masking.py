"""Which patches and which tokens are hidden: BEiT's block masks and BERT's token masks.

Only ``Generator.random`` is drawn from: its stream is the same in every numpy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection

import numpy as np

FLAVA_GRID = 14 * 14
FLAVA_MASKED = 75  # of the 14 x 14 patches
FLAVA_MIN_PATCHES = 16  # of one block
ATTEMPTS_PER_BLOCK = 10


def block_mask(
    rng: np.random.Generator,
    grid_height: int,
    grid_width: int,
    num_masked: int | None = None,
    min_patches: int | None = None,
    aspect: float = 0.3,
) -> np.ndarray:
    """Block-wise patch mask, exactly the algorithm of BEiT (Bao et al. 2021, Algorithm 1) as FLAVA uses it.

    Blocks are added until `num_masked` patches are hidden: area ~ U(min_patches, what is left) (the bounds may stand
    reversed near the end), height / width log-uniform in [aspect, 1 / aspect], both strictly smaller than the grid.
    A block counts when it hides at least one new patch and no more than what is left. After ten attempts without
    such a block the mask stays as it is: the count is *at most* num_masked (on 14 x 14: 74.49 on average, exactly 75
    in two of three masks).

    num_masked: default 75 of 196, scaled to the grid. min_patches: of one block; default 16 of 196, scaled to the
    grid, at least 1: 16 on 14 x 14, 5 on 8 x 8, 1 on 4 x 4 (where 16 would be the whole grid).
    Returns bool [grid_height * grid_width], line by line; True = hidden.
    """
    num_patches = grid_height * grid_width
    target = round(num_patches * FLAVA_MASKED / FLAVA_GRID) if num_masked is None else num_masked
    smallest = max(1, round(num_patches * FLAVA_MIN_PATCHES / FLAVA_GRID)) if min_patches is None else min_patches
    rectangles = _rectangles(grid_height, grid_width)
    log_aspect = math.log(aspect)
    # The mask is one Python integer with a bit for each patch: overlap is an `and`, a count is bit_count. That is
    # ten times faster than slices of a small array.
    mask, count = 0, 0
    draws: list[float] = []
    while count < target:
        left_over = target - count
        for _ in range(ATTEMPTS_PER_BLOCK):
            if len(draws) < 4:
                draws = rng.random(64).tolist()
            area = smallest + draws.pop() * (left_over - smallest)
            ratio = math.exp((2.0 * draws.pop() - 1.0) * log_aspect)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < height < grid_height and 0 < width < grid_width):
                continue
            top = int(draws.pop() * (grid_height - height + 1))
            left = int(draws.pop() * (grid_width - width + 1))
            block = rectangles[height][width] << (top * grid_width + left)
            num_new = (block & ~mask).bit_count()
            if 0 < num_new <= left_over:
                mask |= block
                count += num_new
                break
        else:
            break
    packed = np.frombuffer(mask.to_bytes(-(-num_patches // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=num_patches, bitorder="little").astype(bool)


@functools.lru_cache(maxsize=16)
def _rectangles(grid_height: int, grid_width: int) -> list[list[int]]:
    """rectangles[h][w]: the bits of an h x w block in the upper left corner of the grid."""
    return [
        [sum(((1 << width) - 1) << (line * grid_width) for line in range(height)) for width in range(grid_width)]
        for height in range(grid_height)
    ]


def mask_tokens(
    uniform_3T: np.ndarray,
    ids: np.ndarray,
    special: Collection[int],
    vocab_size: int,
    mask_id: int,
    probability: float = 0.15,
    continues: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's token masks (Devlin et al. 2018, section 3.1), drawn anew each time as RoBERTa does.

    Each token that is not special is selected with `probability`; of the selected 80 % become [MASK], 10 % a random
    token that is never a special one, 10 % stay. With `continues` (bool [vocab_size], True where a piece continues
    the word before it) whole words are selected, all pieces or none; what then becomes of a piece is drawn for each.

    uniform_3T: numbers in [0, 1), three for each token. ids: int64 [T], of one text or of several one after the other,
    each beginning with a special token. special: ids that are never selected nor drawn. Returns (masked_ids int64 [T],
    selected bool [T]); selected may be empty.
    """
    is_special, ordinary_ids = _vocabulary(frozenset(special), vocab_size)
    select, fate, replacement = uniform_3T
    maskable = ~is_special[ids]
    if continues is not None:
        begins = ~(continues[ids] & maskable)
        select = select[np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))]  # of the word's first piece
    selected = (select < probability) & maskable
    masked_ids = ids.copy()
    masked_ids[selected & (fate < 0.8)] = mask_id
    randomised = selected & (fate >= 0.9)
    masked_ids[randomised] = ordinary_ids[(replacement[randomised] * len(ordinary_ids)).astype(np.int64)]
    return masked_ids, selected


@functools.lru_cache(maxsize=16)
def _vocabulary(special: frozenset[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which ids are special, bool [vocab_size], and the ids that are not."""
    is_special = np.zeros(vocab_size, dtype=bool)
    is_special[list(special)] = True
    return is_special, np.flatnonzero(~is_special)
