"""Retrieval between two modalities of the same studies, in both directions."""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, mean_of
from mmfm_core.models import _torchvision_ops  # noqa: F401  (torchmetrics imports torchvision)

from torchmetrics.functional import pairwise_cosine_similarity  # isort: skip


class Ranks(NamedTuple):
    """Of each study [N], the rank (1 is best) of the first right match, in either direction."""

    image_to_text: Floats
    text_to_image: Floats


def similarity(images: Tensor, texts: Tensor) -> Floats:
    """Cosine similarity [N, N] of two tables of embeddings [N, D]: a row per image, a column per text."""
    result: Floats = pairwise_cosine_similarity(images.double(), texts.double()).numpy()
    return result


def ranks(similarities: Floats, groups: Sequence[str] | None = None) -> Ranks:
    """Rank of the first right match of every image among all texts, and of every text among all images.

    Pessimistic: a wrong candidate that ties with the right one comes before it, so that a model which says the same of
    every study does not look good; a similarity that is not a number counts as such a tie.

    Args:
        similarities: [N, N], the image of study i with the text of study j.
        groups: [N]; texts of one group are identical, so each of them is right for each of their images. None: no two
            are identical.
    """
    _, group = np.unique(np.arange(len(similarities)) if groups is None else np.asarray(groups), return_inverse=True)
    right = group[:, None] == group[None, :]
    return Ranks(_first_right(similarities, right), _first_right(similarities.T, right))


def recall_at(k: int, ranks_of_studies: Floats) -> Statistic:
    """Share of studies whose right match is among the first `k` of all candidates, from ranks [N].

    Weights weigh the queries; the candidates they are ranked against stay all N.
    """
    return mean_of((ranks_of_studies <= k).astype(float))


def reciprocal_rank(ranks_of_studies: Floats) -> Statistic:
    """Mean reciprocal rank, from ranks [N] (Voorhees, TREC-8, 1999)."""
    return mean_of(1 / ranks_of_studies)


def chance_recall_at(k: int, groups: Sequence[str]) -> float:
    """Recall@k of a random order, in closed form: a query with g right ones among N misses by C(N-g, k) / C(N, k)."""
    count = len(groups)
    _, group, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    found = [1 - comb(count - int(size), k) / comb(count, k) if k < count else 1.0 for size in sizes]
    return float(np.mean(np.asarray(found)[group]))


def _first_right(similarities: Floats, right: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Floats:
    best = np.where(right, similarities, -np.inf).max(1, keepdims=True)
    ahead: Floats = (~right & ~(similarities < best)).sum(1).astype(float)
    return ahead + 1
