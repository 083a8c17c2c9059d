"""Retrieval, against torchmetrics and chance counted over every order."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_core.metrics.retrieval import chance_recall_at, ranks, recall_at, reciprocal_rank, similarity
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
def test_recall_and_mrr_are_those_of_torchmetrics_in_both_directions(seed, repeated):
    rng = np.random.default_rng(seed)
    similarities = rng.permutation(81).reshape(9, 9) + 1.0  # to torchmetrics' MRR, what scores 0 or less is not found
    groups = rng.integers(0, 5 if repeated else 10**6, 9)
    right = groups[:, None] == groups[None]
    found = ranks(similarities, groups.astype(str).tolist())
    for of_query, scores in ((found.image_to_text, similarities), (found.text_to_image, similarities.T.copy())):
        for k in (1, 3):
            expected = by_torchmetrics(RetrievalHitRate(top_k=k), scores, right)
            assert recall_at(k, of_query)(ONE)[0] == pytest.approx(expected)
        assert reciprocal_rank(of_query)(ONE)[0] == pytest.approx(by_torchmetrics(RetrievalMRR(), scores, right))


def test_a_tie_with_a_wrong_candidate_is_lost():
    same = np.full((4, 4), 0.5)
    assert ranks(same).image_to_text.tolist() == ranks(same).text_to_image.tolist() == [4] * 4
    assert ranks(same, ["a", "a", "b", "c"]).image_to_text.tolist() == [3, 3, 4, 4]
    assert ranks(np.full((4, 4), np.nan)).image_to_text.tolist() == [4] * 4


def test_the_directions_are_rows_and_columns():
    similarities = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.3], [0.95, 0.6, 0.5]])
    found = ranks(similarities)
    assert found.image_to_text.tolist() == [1, 2, 3]
    assert found.text_to_image.tolist() == [2, 1, 1]


def test_similarity_is_the_cosine_of_rows():
    images, texts = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    np.testing.assert_allclose(similarity(images, texts), [[0.6, 0.8], [0, 1]])


def test_a_model_without_an_embedding_finds_nothing():
    assert ranks(similarity(torch.zeros(3, 2), torch.ones(3, 2))).image_to_text.tolist() == [3, 3, 3]


def test_chance_is_what_all_orders_give_on_average():
    groups = ["a", "b", "a", "c", "a", "b"]
    for k in range(1, 8):
        found = [
            any(groups[candidate] == group for candidate in order[:k])
            for group in groups
            for order in permutations(range(len(groups)))
        ]
        assert chance_recall_at(k, groups) == pytest.approx(np.mean(found))
    assert chance_recall_at(10, [str(i) for i in range(400)]) == pytest.approx(10 / 400)
