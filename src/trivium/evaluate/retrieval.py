"""Retrieval: where does the first right answer stand among all candidates?

    rank = 1 + number of wrong candidates that score at least as high as the best right one

Ties count against the model, so one that gives every candidate the same score gets the last rank and not the first.
A query may have several right answers. Q queries, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trivium.evaluate.results import Results, mean_of, median_of

CHUNK = 1024  # queries scored at once
CUTOFFS = (1, 5, 10)
FRONT = max(CUTOFFS)  # candidates of a query that are written into a file


def ranks(scores_QC: Tensor, right_QC: Tensor) -> Tensor:
    """Rank of the best right answer of each query, int64 [Q], 1 the best.

    Args:
        scores_QC: higher is better. NaN counts against us: as a wrong candidate it stands in front, as a right one
            behind everything.
        right_QC: bool; at least one in every row.
    """
    assert bool(right_QC.any(dim=1).all()), "a query without a right answer has no rank"
    best_Q1 = scores_QC.masked_fill(~right_QC, -torch.inf).max(dim=1, keepdim=True).values
    # "not lower" instead of "at least as high": with NaN on either side it is true.
    return 1 + (~right_QC & ~(scores_QC < best_Q1)).sum(dim=1)


def scores(queries_QD: Tensor, candidates_CD: Tensor) -> Tensor:
    """Cosine of every query with every candidate, float32 [Q, C].

    Summed in float64 and rounded: the order of summation then leaves equal vectors with equal scores.
    """
    queries = torch.nn.functional.normalize(queries_QD.double(), dim=-1)
    candidates = torch.nn.functional.normalize(candidates_CD.double(), dim=-1)
    return (queries @ candidates.T).float()


def ranks_by_cosine(queries_QD: Tensor, candidates_CD: Tensor, query_labels_Q: Tensor, labels_C: Tensor) -> Tensor:
    """Rank of the nearest candidate with the query's own label (int64), [Q]; a chunk of queries at a time."""
    parts = []
    for first in range(0, len(queries_QD), CHUNK):
        chunk = slice(first, first + CHUNK)
        right_QC = query_labels_Q[chunk, None] == labels_C[None]
        parts.append(ranks(scores(queries_QD[chunk], candidates_CD), right_QC))
    return torch.cat(parts)


def front_by_cosine(queries_QD: Tensor, candidates_CD: Tensor) -> Tensor:
    """The nearest candidates of each query, the nearest first: int64 [Q, at most FRONT]."""
    return torch.cat([front(scores(chunk_QD, candidates_CD)) for chunk_QD in queries_QD.split(CHUNK)])


def front(scores_QC: Tensor) -> Tensor:
    """The candidates of the highest scores, the highest first: int64 [Q, at most FRONT]."""
    return scores_QC.topk(min(FRONT, scores_QC.shape[1]), dim=1).indices


def mean_recall(found: Results, *names: str) -> float:
    """Mean of R@1, 5 and 10 over the directions of these names: what a model is chosen by (ALBEF, section 4.1)."""
    return float(np.mean([found[f"{name}_r{cutoff}"].value for name in names for cutoff in CUTOFFS]))


def recalls(ranks_Q: Tensor) -> np.ndarray:
    """The mean of R@1, 5 and 10 of each query, [Q]."""
    return np.mean([ranks_Q.numpy() <= cutoff for cutoff in CUTOFFS], axis=0)


def summary(
    ranks_Q: Tensor, name: str, queries: Sequence[str] | None = None, groups: Sequence[str] | None = None
) -> Results:
    """`<name>_r1`, `_r5`, `_r10`: share of queries with a right answer that high; `<name>_median_rank`.

    queries, groups: the name of each and what it is about, kept with its outcome."""
    found = ranks_Q.numpy()
    recalls = {f"{name}_r{cutoff}": mean_of(np.asarray(found <= cutoff), queries, groups) for cutoff in CUTOFFS}
    return recalls | {f"{name}_median_rank": median_of(found, queries, groups)}


def chance_recall(right_per_query_Q: Tensor, num_candidates: int, cutoff: int) -> float:
    """Expected recall at `cutoff` of a random order: 1 - C(C - r, k) / C(C, k), mean over the queries' counts r."""
    miss_Q = torch.ones(len(right_per_query_Q), dtype=torch.float64)
    for drawn in range(min(cutoff, num_candidates)):
        left = num_candidates - drawn
        miss_Q *= ((left - right_per_query_Q.double()) / left).clamp(min=0)
    return float(1 - miss_Q.mean())
