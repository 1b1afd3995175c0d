"""Block masks against BEiT's own algorithm and its figures; token masks against BERT's rule."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.masking import block_mask, mask_tokens
from trivium.data.order import keyed_generator

SPECIAL = (0, 100, 101, 102, 103)  # [PAD] [UNK] [CLS] [SEP] [MASK], as in BERT's vocabulary


def plain_block_mask(grid: int, target: int, smallest: int, rng: random.Random) -> np.ndarray:
    """Algorithm 1 of BEiT written out patch by patch, to compare with."""
    mask = np.zeros((grid, grid), dtype=bool)
    while mask.sum() < target:
        left_over = target - int(mask.sum())
        placed = False
        for _ in range(10):
            area = rng.uniform(smallest, left_over)
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height >= grid or width >= grid:
                continue
            top, left = rng.randint(0, grid - height), rng.randint(0, grid - width)
            block = np.zeros_like(mask)
            block[top : top + height, left : left + width] = True
            if 0 < (block & ~mask).sum() <= left_over:
                mask |= block
                placed = True
                break
        if not placed:
            break
    return mask.ravel()


def test_block_masks_have_the_figures_of_beit() -> None:
    """Means over 4,000 masks of 14 x 14: 74.49 patches hidden, exactly 75 in 67.5 %, never fewer than 60."""
    masks = np.stack([block_mask(keyed_generator("mask", number), 14, 14) for number in range(4000)])
    counts = masks.sum(axis=1)
    assert masks.dtype == bool
    assert masks.shape == (4000, 196)
    assert counts.max() == 75
    assert counts.min() >= 60
    assert counts.mean() == pytest.approx(74.49, abs=0.06)
    assert (counts == 75).mean() == pytest.approx(0.675, abs=0.03)
    assert (counts >= 70).mean() > 0.99


@pytest.mark.parametrize(("grid", "target", "smallest"), [(14, 75, 16), (8, 24, 5), (4, 6, 1)])
def test_block_masks_follow_the_plain_algorithm(grid: int, target: int, smallest: int) -> None:
    """Each patch is hidden as often, and counts fall as often, as with the plain form; other grids scale 75 and 16."""
    ours = np.stack([block_mask(keyed_generator("mask", number), grid, grid) for number in range(3000)])
    rng = random.Random(0)
    plain = np.stack([plain_block_mask(grid, target, smallest, rng) for _ in range(3000)])
    assert ours.sum(axis=1).max() == target
    assert ours.sum(axis=1).mean() == pytest.approx(plain.sum(axis=1).mean(), abs=0.1)
    assert np.abs(ours.mean(axis=0) - plain.mean(axis=0)).max() < 0.06  # about 5 standard errors
    together = ours[:, :1] & ours  # how far a block reaches from the corner
    assert np.abs(together.mean(axis=0) - (plain[:, :1] & plain).mean(axis=0)).max() < 0.06


@settings(max_examples=100, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_block_masks_never_exceed_the_target(height: int, width: int, share: float, seed: int) -> None:
    target = int(share * height * width)
    mask = block_mask(keyed_generator(seed), height, width, num_masked=target)
    assert mask.shape == (height * width,)
    assert mask.sum() <= target


def test_block_masks_are_pure() -> None:
    first, second = (block_mask(keyed_generator("same"), 14, 14) for _ in range(2))
    assert np.array_equal(first, second)


def draw_many(continues: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """40,000 ordinary tokens between [CLS] and [SEP], masked once."""
    ids = keyed_generator("ids").integers(200, 1000, 40_002)
    ids[0], ids[-1] = 101, 102
    masked_ids, selected = mask_tokens(
        keyed_generator("draw").random((3, len(ids))), ids, SPECIAL, 1000, 103, 0.15, continues
    )
    return ids, masked_ids, selected


def test_token_masks_are_80_10_10() -> None:
    ids, masked_ids, selected = draw_many()
    assert selected.mean() == pytest.approx(0.15, abs=0.006)
    hidden = masked_ids[selected] == 103
    kept = masked_ids[selected] == ids[selected]
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    assert kept.mean() == pytest.approx(0.1, abs=0.015)
    assert np.array_equal(masked_ids[~selected], ids[~selected])
    replaced = masked_ids[selected][~hidden & ~kept]
    assert not np.isin(replaced, SPECIAL).any()
    assert replaced.min() < 100  # from the whole vocabulary, ids below the special ones too
    assert replaced.max() < 1000


def test_random_tokens_are_uniform_over_ordinary_ids() -> None:
    """With a vocabulary of 8 ids of which 3 are special, the other five come equally often and only they."""
    ids = np.full(60_000, 7)
    masked_ids, _ = mask_tokens(keyed_generator("few").random((3, len(ids))), ids, (0, 3, 5), 8, 3, probability=1.0)
    replaced = masked_ids[(masked_ids != 3) & (masked_ids != 7)]
    counts = np.bincount(replaced, minlength=8)
    assert counts[[0, 3, 5, 7]].sum() == 0
    assert np.abs(counts[[1, 2, 4, 6]] - counts.sum() / 4).max() < 150


def test_whole_words_are_selected_together() -> None:
    continues = np.zeros(1000, dtype=bool)
    continues[600:] = True  # half of the ids are later pieces of a word
    ids, _, selected = draw_many(continues)
    piece_of_word_before = continues[ids]
    piece_of_word_before[1] = False  # nothing to continue after [CLS] but [CLS] itself
    inside = np.flatnonzero(piece_of_word_before[2:-1]) + 2
    assert np.array_equal(selected[inside], selected[inside - 1])
    assert selected.mean() == pytest.approx(0.15, abs=0.012)
    assert not selected[[0, -1]].any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 150), max_size=20), st.integers(0, 1000), st.floats(0, 1), st.booleans())
def test_special_tokens_stay(ids: list[int], seed: int, probability: float, whole_words: bool) -> None:
    before = np.array(ids, dtype=np.int64)
    continues = np.arange(151) % 2 == 0 if whole_words else None
    masked_ids, selected = mask_tokens(
        keyed_generator(seed).random((3, len(before))), before, SPECIAL, 151, 103, probability, continues
    )
    special = np.isin(before, SPECIAL)
    assert not selected[special].any()
    assert np.array_equal(masked_ids[special], before[special])
