from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.search import index
from trivium.search.index import top_k, unit_rows


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 50), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_equals_a_full_sort_with_ties_by_row(rows: int, width: int, k: int, at_once: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Small whole numbers: products are exact in float32 and ties are common.
    rows_ND = rng.integers(-2, 3, (rows, width)).astype(np.float32)
    queries_QD = rng.integers(-2, 3, (3, width)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "ROWS_AT_ONCE", at_once)
        scores, indices = top_k(queries_QD, rows_ND, k)
    exact = queries_QD @ rows_ND.T
    for query in range(3):
        order = sorted(range(rows), key=lambda row: (-exact[query, row], row))[:k]
        assert indices[query].tolist() == order
        assert scores[query].tolist() == exact[query, order].tolist()


def test_unit_rows_gives_cosines_and_leaves_a_row_of_zeros() -> None:
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [1e30, 1e30]], np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [1, 0], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
