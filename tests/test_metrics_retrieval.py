"""Retrieval, against torchmetrics and chance counted over every order."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_core.metrics.retrieval import chance_recall_at, recall_at, reciprocal_rank, search, similarity
from mmfm_core.models import _torchvision_ops  # noqa: F401

from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR  # isort: skip

pytestmark = pytest.mark.filterwarnings("error")

ONE = np.ones((1, 9))


def by_torchmetrics(metric, similarities, right):
    queries = torch.arange(len(similarities))[:, None].expand(similarities.shape)
    scores, matches = torch.from_numpy(similarities), torch.from_numpy(right)
    return float(metric(scores.flatten(), matches.flatten(), indexes=queries.flatten()))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_recall_and_mrr_are_those_of_torchmetrics_on_distinct_texts_in_both_directions(seed, repeated):
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 5 if repeated else 10**6, 9)
    # One column per distinct text; to torchmetrics' MRR, what scores 0 or less is not found.
    distinct = np.unique(texts)
    of_distinct = rng.permutation(9 * len(distinct)).reshape(9, -1) + 1.0
    right = texts[:, None] == distinct
    found = search(of_distinct[:, np.searchsorted(distinct, texts)], texts.astype(str).tolist())
    for direction, scores, matches in (
        (found.image_to_text, of_distinct, right),
        (found.text_to_image, of_distinct.T.copy(), right.T.copy()),
    ):
        for k in (1, 3):
            expected = by_torchmetrics(RetrievalHitRate(top_k=k), scores, matches)
            assert recall_at(k, direction)(ONE)[0] == pytest.approx(expected)
        assert reciprocal_rank(direction)(ONE)[0] == pytest.approx(by_torchmetrics(RetrievalMRR(), scores, matches))


def test_a_tie_with_a_wrong_candidate_is_lost():
    same, four = np.full((4, 4), 0.5), list("abcd")
    for direction in search(same, four):
        assert direction.ranks.tolist() == [4] * 4
    two_alike = search(same, ["a", "a", "b", "c"])
    assert two_alike.image_to_text.ranks.tolist() == [3] * 4  # three texts
    assert two_alike.text_to_image.ranks.tolist() == [3, 3, 4, 4]  # two wrong images, or three
    assert search(np.full((4, 4), np.nan), four).image_to_text.ranks.tolist() == [4] * 4


def test_a_text_that_many_studies_share_takes_one_place_and_asks_once():
    found = search(np.array([[0.9, 0.9, 0.8]] * 3), ["normal", "normal", "nodule"])
    assert found.image_to_text.ranks.tolist() == [1, 1, 2]
    # 'normal' finds one of its two images second, behind a tie; 'nodule' its only one third.
    assert found.text_to_image.ranks.tolist() == [2, 2, 3]
    assert recall_at(2, found.text_to_image)(np.ones((1, 3))) == pytest.approx(0.5)


def test_the_directions_are_rows_and_columns():
    similarities = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.3], [0.95, 0.6, 0.5]])
    found = search(similarities, list("abc"))
    assert found.image_to_text.ranks.tolist() == [1, 2, 3]
    assert found.text_to_image.ranks.tolist() == [2, 1, 1]


def test_similarity_is_the_cosine_of_rows():
    images, texts = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    np.testing.assert_allclose(similarity(images, texts), [[0.6, 0.8], [0, 1]])


def test_a_model_without_an_embedding_finds_nothing():
    found = search(similarity(torch.zeros(3, 2), torch.ones(3, 2)), list("abc"))
    assert found.image_to_text.ranks.tolist() == [3, 3, 3]


def test_chance_is_what_all_orders_give_on_average():
    texts = ["a", "b", "a", "c", "a", "b"]
    distinct = sorted(set(texts))
    for k in range(1, 8):
        of_images = [text in order[:k] for text in texts for order in permutations(distinct)]
        of_texts = [
            any(texts[candidate] == text for candidate in order[:k])
            for text in distinct
            for order in permutations(range(len(texts)))
        ]
        assert chance_recall_at(k, texts) == pytest.approx((np.mean(of_images), np.mean(of_texts)))
    assert chance_recall_at(10, [str(i) for i in range(400)]) == pytest.approx((10 / 400, 10 / 400))
