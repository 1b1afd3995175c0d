"""Exact nearest neighbours by brute force: a matrix product, a piece of the rows at a time.

A million rows of 768 numbers are 3 GB and take about a second for one query; nothing is approximated and nothing is
built beforehand.

Q queries, N rows, D width, K neighbours.
"""

from __future__ import annotations

import numpy as np

ROWS_AT_ONCE = 65_536  # bounds the memory that scores take


def unit_rows(vectors_ND: np.ndarray) -> np.ndarray:
    """The rows scaled to length 1, in float32, so that an inner product is a cosine. A row of zeros stays zero."""
    lengths_N1 = np.linalg.norm(vectors_ND.astype(np.float64), axis=-1, keepdims=True)
    return (vectors_ND / np.where(lengths_N1 > 0, lengths_N1, 1.0)).astype(np.float32)


def top_k(queries_QD: np.ndarray, rows_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows with the largest inner product with each query, best first; of equal ones the earlier row first.

    Returns:
        (scores_QK float32, indices_QK int64), with K = min(k, N).
    """
    assert k >= 1
    assert queries_QD.shape[1] == rows_ND.shape[1]
    scores_QK = np.empty((len(queries_QD), 0), np.float32)
    indices_QK = np.empty((len(queries_QD), 0), np.int64)
    for start in range(0, len(rows_ND), ROWS_AT_ONCE):
        piece = rows_ND[start : start + ROWS_AT_ONCE]
        indices_QP = np.broadcast_to(np.arange(start, start + len(piece)), (len(queries_QD), len(piece)))
        scores = np.concatenate([scores_QK, queries_QD @ piece.T], axis=1)
        indices = np.concatenate([indices_QK, indices_QP], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # earlier rows stand to the left: stable keeps them so
        scores_QK, indices_QK = np.take_along_axis(scores, best, 1), np.take_along_axis(indices, best, 1)
    return scores_QK, indices_QK
