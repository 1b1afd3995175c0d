"""Metrics against brute force and scikit-learn, on the cases that go wrong: ties, constants, NaN, missing classes."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, top_k_accuracy_score
from torch.nn.functional import normalize

from trivium.evaluate import knn, losses, matching, retrieval, zero_shot
from trivium.train.protocol import Batch, Images, Texts


def brute_rank(scores: list[float], right: list[bool]) -> int:
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    return 1 + sum(score >= best for score, is_right in zip(scores, right, strict=True) if not is_right)


@given(st.data())
def test_rank_is_one_plus_the_wrong_candidates_that_score_at_least_as_high(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 12))
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.5000001, 2.0]), min_size=num, max_size=num))
    right = data.draw(st.lists(st.booleans(), min_size=num, max_size=num).filter(any))
    rank = retrieval.ranks(torch.tensor([scores], dtype=torch.float64), torch.tensor([right]))
    assert rank.item() == brute_rank(scores, right)


def test_equal_scores_count_against_us() -> None:
    right = torch.tensor([[True, False, False, True]])
    assert retrieval.ranks(torch.zeros(1, 4), right).item() == 3  # both wrong ones; the other right one does not


def test_nan_never_helps() -> None:
    right = torch.tensor([[True, False, False]])
    assert retrieval.ranks(torch.tensor([[math.nan, 0.0, 1.0]]), right).item() == 3
    assert retrieval.ranks(torch.tensor([[0.5, math.nan, 0.0]]), right).item() == 2
    assert retrieval.ranks(torch.full((1, 3), math.nan), right).item() == 3


def test_a_query_without_a_right_answer_is_refused() -> None:
    with pytest.raises(AssertionError, match="without a right answer"):
        retrieval.ranks(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool))


def test_a_collapsed_model_gets_the_last_rank_whatever_the_order_of_summation() -> None:
    vectors = torch.randn(1, 96, generator=torch.Generator().manual_seed(0)).expand(2500, 96)
    labels = torch.arange(2500)
    ranks = retrieval.ranks_by_cosine(vectors, vectors, labels, labels)
    assert (ranks == 2500).all()


def test_ranks_by_cosine_over_several_chunks_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", 7)
    generator = torch.Generator().manual_seed(1)
    queries, candidates = torch.randn(30, 5, generator=generator), torch.randn(40, 5, generator=generator)
    query_labels, labels = torch.arange(30) % 6, torch.arange(40) % 6
    cosine = (normalize(queries.double(), dim=1) @ normalize(candidates.double(), dim=1).T).float()
    expected = [
        brute_rank(row.tolist(), (labels == own).tolist()) for row, own in zip(cosine, query_labels, strict=True)
    ]
    assert retrieval.ranks_by_cosine(queries, candidates, query_labels, labels).tolist() == expected


def test_summary_counts_recall_and_median() -> None:
    found = retrieval.summary(torch.tensor([1, 2, 6, 11]), "x")
    assert {name: result.value for name, result in found.items()} == {
        "x_r1": 0.25, "x_r5": 0.5, "x_r10": 0.75, "x_median_rank": 4.0,
    }  # fmt: skip
    assert all(result.n == 4 and result.low <= result.value <= result.high for result in found.values())


def test_chance_recall_equals_random_orders() -> None:
    right = torch.tensor([1, 3])
    rng = np.random.default_rng(0)
    drawn = [[rng.permutation(20)[:5].min() < count for _ in range(20_000)] for count in (1, 3)]
    assert retrieval.chance_recall(right, 20, 5) == pytest.approx(np.mean(drawn), abs=0.01)
    assert retrieval.chance_recall(torch.tensor([1]), 1678, 10) == pytest.approx(10 / 1678)
    assert retrieval.chance_recall(torch.tensor([2]), 4, 10) == 1.0  # fewer candidates than the cutoff


def brute_knn(query, gallery, labels, k, temperature, skip) -> int:  # type: ignore[no-untyped-def]
    cosine = [float(normalize(query, dim=0) @ normalize(row, dim=0)) for row in gallery]
    order = sorted((index for index in range(len(gallery)) if not skip[index]), key=lambda index: -cosine[index])[:k]
    votes: dict[int, float] = {}
    for index in order:
        votes[int(labels[index])] = votes.get(int(labels[index]), 0) + math.exp(cosine[index] / temperature)
    return max(sorted(votes), key=lambda label: votes[label])


@pytest.mark.parametrize("k", [1, 5, 100])
def test_knn_equals_brute_force_with_and_without_its_own_concept(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    queries, gallery = torch.randn(20, 6, generator=generator), torch.randn(50, 6, generator=generator)
    labels, own, theirs = torch.arange(50) % 7, torch.arange(20) % 10, torch.arange(50) % 10
    plain = knn.predict(queries, gallery, labels, k=k)
    other = knn.predict(queries, gallery, labels, k=k, left_out=(own, theirs))
    for row in range(20):
        assert plain[row] == brute_knn(queries[row], gallery, labels, k, 0.07, [False] * 50)
        assert other[row] == brute_knn(queries[row], gallery, labels, k, 0.07, (theirs == own[row]).tolist())


def test_knn_survives_constant_features_a_tiny_temperature_and_an_empty_class() -> None:
    gallery, labels = torch.ones(6, 3), torch.tensor([4, 4, 4, 0, 0, 4])  # no row has the labels 1, 2, 3
    assert knn.predict(torch.ones(2, 3), gallery, labels, temperature=1e-4).tolist() == [4, 4]


def test_knn_answers_minus_one_where_nobody_is_left() -> None:
    left_out = (torch.tensor([1, 2]), torch.tensor([1, 1]))
    assert knn.predict(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), left_out=left_out).tolist() == [-1, 1]


def test_class_vector_is_the_mean_of_unit_vectors() -> None:
    table = {"cat": torch.tensor([10.0, 0.0]), "a picture of cat": torch.tensor([0.0, 0.1])}
    vectors = zero_shot.class_vectors(
        [("cat",)], lambda texts: torch.stack([table.get(t, table["cat"]) for t in texts])
    )
    assert torch.allclose(vectors, normalize(torch.tensor([[2 / 3, 1 / 3]]), dim=1))  # the longer one weighs no more


def test_neighbours_are_the_same_whatever_is_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    queries, gallery = torch.randn(30, 8), torch.randn(101, 8)
    labels, concepts = torch.randint(0, 5, (101,)), torch.randint(0, 40, (101,))
    asked = torch.randint(0, 40, (30,))
    for left_out in (None, (asked, concepts)):
        whole = knn.predict(queries, gallery, labels, k=7, left_out=left_out)
        cosine = torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(gallery, dim=-1).T
        if left_out is not None:
            cosine[asked[:, None] == concepts[None]] = -torch.inf
        plain = []
        for row in cosine:
            near = row.argsort(descending=True)[:7]
            votes = torch.zeros(5).index_add_(0, labels[near], ((row[near] - 1) / 0.07).exp())
            plain.append(int(votes.argmax()))
        assert whole.tolist() == plain
        for queries_at_once, gallery_at_once in ((4, 10), (100, 3), (1, 101), (7, 100)):
            monkeypatch.setattr(knn, "QUERIES", queries_at_once)
            monkeypatch.setattr(knn, "GALLERY", gallery_at_once)
            assert torch.equal(knn.predict(queries, gallery, labels, k=7, left_out=left_out), whole)
    monkeypatch.setattr(knn, "GALLERY", 10)
    alone = knn.predict(queries[:1], gallery, labels, left_out=(torch.zeros(1), torch.zeros(101)))
    assert alone.tolist() == [-1]


def test_zero_shot_reads_each_name_of_a_class_as_it_stands() -> None:
    assert zero_shot.prompts(("food", "drink"), ("{}", "some {}")) == ["food", "some food", "drink", "some drink"]
    assert zero_shot.prompts(("AC/DC, black & white",), ("a {}",)) == ["a AC/DC, black & white"]
    assert zero_shot.predict(torch.tensor([[3.0, 0.1], [0.0, 9.0]]), torch.eye(2)).tolist() == [0, 1]


def test_the_right_class_among_the_nearest_with_ties_against_it() -> None:
    images = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    for count, right in ((1, [False, False, False]), (2, [True, False, False]), (3, [True, True, True])):
        assert zero_shot.among_nearest(images, torch.eye(3), torch.tensor([1, 2, 0]), count).tolist() == right
    broken = torch.full((1, 3), torch.nan)
    assert zero_shot.among_nearest(broken, torch.eye(3), torch.tensor([1]), 2).tolist() == [False]
    assert zero_shot.among_nearest(images, torch.eye(3), torch.tensor([0, 0, 1]), 2).tolist() == [True, False, True]


@given(st.data())
@settings(deadline=None)
def test_the_share_among_the_nearest_is_scikit_learns_with_ties_against_it(data: st.DataObject) -> None:
    """Ties, constant pictures, zeros, classes that no picture has. Of equal scores scikit-learn takes the later class
    first; a little less for the right one puts it behind all that it is equal to."""
    classes, num, count = (data.draw(st.integers(low, high)) for low, high in ((3, 8), (1, 12), (1, 5)))
    scores = st.lists(st.sampled_from([-2, -1, 0, 0, 1, 3]), min_size=classes, max_size=classes)
    images_BK = torch.tensor(data.draw(st.lists(scores, min_size=num, max_size=num)), dtype=torch.float32)
    labels_B = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=num, max_size=num)))
    right_B = zero_shot.among_nearest(images_BK, torch.eye(classes), labels_B, count)
    behind_BK = images_BK - 0.5 * torch.eye(classes)[labels_B]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of as many places as classes
        theirs = top_k_accuracy_score(labels_B.numpy(), behind_BK.numpy(), k=count, labels=np.arange(classes))
    assert float(right_B.double().mean()) == pytest.approx(theirs, abs=1e-12)


def test_log_odds_take_off_the_prior_of_training() -> None:
    """Two Gaussians: the right posterior at share s, corrected, is the likelihood ratio."""
    x, s = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.2
    true, false = torch.exp(-((x - 1) ** 2) / 2) * (1 - s), torch.exp(-((x + 1) ** 2) / 2) * s
    logits = torch.stack([false.log(), true.log()], dim=1)
    assert torch.allclose(matching.log_odds(logits, s), 2 * x)
    assert torch.equal(matching.log_odds(logits, 0.5), logits[:, 1] - logits[:, 0])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1))
def test_auroc_equals_scikit_learn_with_ties(pairs: list[tuple[float, float]]) -> None:
    true, false = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    expected = roc_auc_score([1] * len(true) + [0] * len(false), np.concatenate([true, false]))
    assert matching.auroc(true, false) == pytest.approx(expected)


def test_balanced_counts_no_answer_as_wrong() -> None:
    nothing = matching.balanced(torch.zeros(5), torch.zeros(5))
    assert nothing["accuracy"].value == 0.0
    assert nothing["auroc"].value == 0.5
    found = matching.balanced(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    assert found["accuracy"].value == 0.75
    assert found["accuracy"].n == found["auroc"].n == 4


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(6, 5000))
def test_chance_is_the_best_constant_guess(labels: list[int], size: int) -> None:
    chance = losses.chance(torch.tensor(labels), size)
    shares = np.bincount(labels) / len(labels)
    assert chance == pytest.approx(min(math.log(size), -sum(p * math.log(p) for p in shares if p)))
    assert -1e-12 <= chance <= math.log(size)


def test_chances_of_all_six() -> None:
    found = losses.chances({"mim": torch.arange(4), "mlm": torch.zeros(9).long()}, {"mim": 512, "mlm": 99}, 0.25, 128)
    assert found == pytest.approx(
        {
            "mim": math.log(4),
            "mlm": 0.0,
            "itm": 0.75 * math.log(4 / 3) + 0.25 * math.log(4),
            "contrastive": math.log(128),
        }
    )
    assert losses.binary_entropy(0.0) == 0
    # The best constant score of the sigmoid loss: sigmoid = 1/128, asked once for the answer and 127 times else.
    sigmoid = losses.chances({}, {}, 0.25, 128, sigmoid=True)["contrastive"]
    assert sigmoid == pytest.approx(-math.log(1 / 128) - 127 * math.log(127 / 128))


def test_labels_are_those_at_masked_positions_of_true_pairs() -> None:
    image = Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2))
    text = Texts(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool), torch.arange(2))
    masks = {
        "image_mask": torch.tensor([[True, False], [True, True]]),
        "selected": torch.tensor([[False, True, True], [True, False, False]]),
    }
    rows = {"rows_B": torch.arange(2), "places_B": torch.arange(2)}
    pairs = Batch(
        "pairs", **rows, images=(image,), texts=(text,), targets=masks | {"matched": torch.tensor([True, False])}
    )
    alone = Batch("images", **rows, images=(image,), targets={"image_mask": masks["image_mask"]})
    words = Batch("text", **rows, texts=(text,), targets={"selected": masks["selected"]})
    found = losses.labels_of([pairs, alone, words, words], lambda batch: torch.tensor([[7, 8], [9, 10]]))
    assert {name: labels.tolist() for name, labels in found.items()} == {
        "mmm_image": [7], "mmm_text": [2, 3], "mim": [7, 9, 10], "mlm": [2, 3, 4, 2, 3, 4],
    }  # fmt: skip


def test_a_class_goes_where_the_template_says_and_other_braces_stay() -> None:
    """The copies of data sets write {c}; ours write {}."""
    assert zero_shot.prompts(("cat",), ("a photo of a {c}.", "{} {x}")) == ["a photo of a cat.", "cat {x}"]
    asked: list[str] = []
    zero_shot.class_vectors([("cat",), ("dog",)], lambda texts: (asked.extend(texts), torch.eye(2))[1], ("a {c}",))
    assert asked == ["a cat", "a dog"]
