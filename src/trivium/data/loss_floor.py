"""The contrastive loss that no model can fall below, because its batch asks for what nobody can tell apart.

Two pictures of one batch with the same caption: whoever reads it cannot say which of the two is asked for, and pays
ln 2. The same holds for a picture that stands there twice with two captions. Pairs that share their number (`same_B` of
a batch) are not each other's negatives and cost nothing.

B pairs of a global batch, E kinds of pairs: a query and an answer, up to what is equal.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

ROUNDS = 1000
ENOUGH = 1e-10  # change of the mean loss in a round


def contrastive_floor(pictures_B: np.ndarray, captions_B: np.ndarray, same_B: np.ndarray) -> float:
    """The smallest mean over a batch of the symmetric contrastive loss (see ``objectives.contrastive``), in nats.

    Args:
        pictures_B, captions_B: equal numbers = nobody can tell them apart. int64, as all three.
        same_B: equal numbers = the same picture or concept: left out of each other's softmax.
    """
    one, other = _one_way(pictures_B, captions_B, same_B), _one_way(captions_B, pictures_B, same_B)
    return 0.5 * (one + other)


def _one_way(queries_B: np.ndarray, answers_B: np.ndarray, same_B: np.ndarray) -> float:
    """Mean over the rows of ln(sum of the scores of the columns that a row sees) - ln(score of its answer), minimal.

    Equal queries see equal scores and equal answers have equal scores, so the unknowns are one score for each kind of
    pair that occurs; any other is 0. Without numbers that are shared, the scores are (pairs of this kind) / (columns
    with this answer). With them they are found by the rounds of Hunter 2004 for the models of Luce, section 4, each of
    which lowers the loss.
    """
    _, query_B = np.unique(queries_B, return_inverse=True)
    _, answer_B = np.unique(answers_B, return_inverse=True)
    width = int(answer_B.max()) + 1
    keys_E, kind_B, wins_E = np.unique(query_B * width + answer_B, return_inverse=True, return_counts=True)
    query_E, answer_E = keys_E // width, keys_E % width
    columns_E = np.bincount(answer_B)[answer_E]  # that show this answer
    hidden_BE = _hidden(query_B, answer_B, same_B, keys_E, width)
    scores_E = wins_E / columns_E
    loss = np.inf
    for _ in range(ROUNDS):
        totals_B = np.bincount(query_E, scores_E * columns_E)[query_B] - hidden_BE @ scores_E
        before, loss = loss, float(np.mean(np.log(totals_B) - np.log(scores_E[kind_B])))
        if before - loss < ENOUGH:
            break
        seen_E = columns_E * np.bincount(query_B, 1 / totals_B)[query_E] - hidden_BE.T @ (1 / totals_B)
        scores_E = wins_E / seen_E
        scores_E /= np.bincount(query_E, scores_E)[query_E]  # their scale is free; keep it from running away
    return loss


def _hidden(query_B: np.ndarray, answer_B: np.ndarray, same_B: np.ndarray, keys_E: np.ndarray, width: int) -> csr_array:
    """How many columns of the answer of each kind are left out of a row's softmax, for the kinds of its query: [B, E].

    Those are the columns that share the row's number, but for the row's own.
    """
    order = np.argsort(same_B, kind="stable")
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    begin, step = np.arange(len(order)), 1
    while len(begin):  # begin: places whose run of one number is longer than `step`
        begin = begin[begin + step < len(order)]
        begin = begin[same_B[order[begin]] == same_B[order[begin + step]]]
        rows += [order[begin], order[begin + step]]
        columns += [order[begin + step], order[begin]]
        step += 1
    row, column = np.concatenate(rows), np.concatenate(columns)
    key = query_B[row] * width + answer_B[column]
    kind = np.searchsorted(keys_E, key).clip(max=len(keys_E) - 1)
    known = keys_E[kind] == key  # else no pair of this kind occurs, and its score is 0
    return csr_array(
        (np.ones(int(known.sum())), (row[known], kind[known])), shape=(len(query_B), len(keys_E)), dtype=np.float64
    )
