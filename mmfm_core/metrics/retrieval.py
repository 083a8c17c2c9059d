"""Retrieval between two modalities of the same studies, in both directions.

Texts that are the same are one text: among the candidates it stands once (a search that lists it ten times over has
found one), and as a query it asks once, however many studies share it.
"""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, ratio_of
from mmfm_core.models import _torchvision_ops  # noqa: F401  (torchmetrics imports torchvision)

from torchmetrics.functional import pairwise_cosine_similarity  # isort: skip


class Direction(NamedTuple):
    """One direction of a search.

    Attributes:
        ranks: [N], of each study's query the rank (1 is best) of the first right candidate.
        queries: [N], how much of a query each study is: 1, or one over the number of studies that share its text.
    """

    ranks: Floats
    queries: Floats


class Both(NamedTuple):
    """The images' search among the texts, and the texts' among the images."""

    image_to_text: Direction
    text_to_image: Direction


def similarity(images: Tensor, texts: Tensor) -> Floats:
    """Cosine similarity [N, N] of two tables of embeddings [N, D]: a row per image, a column per text."""
    result: Floats = pairwise_cosine_similarity(images.double(), texts.double()).numpy()
    return result


def search(similarities: Floats, texts: Sequence[str]) -> Both:
    """Every image's search among the distinct texts, and every distinct text's among the images.

    Pessimistic: a wrong candidate that ties with the right one comes before it, so that a model which says the same of
    every study does not look good; a similarity that is not a number counts as such a tie.

    Args:
        similarities: [N, N], the image of study i with the text of study j.
        texts: [N]; equal where studies have the same text. Each of their images is right for it.
    """
    _, first, text, sizes = np.unique(np.asarray(texts), return_index=True, return_inverse=True, return_counts=True)
    right = text[:, None] == text[None, :]
    return Both(
        Direction(_first_right(similarities[:, first], right[:, first]), np.ones(len(text))),
        Direction(_first_right(similarities.T, right), 1 / sizes[text]),
    )


def recall_at(k: int, direction: Direction) -> Statistic:
    """Share of queries whose right match is among the first `k` of all candidates.

    Weights weigh the queries; the candidates they are ranked against stay.
    """
    return ratio_of((direction.ranks <= k) * direction.queries, direction.queries)


def reciprocal_rank(direction: Direction) -> Statistic:
    """Mean reciprocal rank (Voorhees, TREC-8, 1999)."""
    return ratio_of(direction.queries / direction.ranks, direction.queries)


def chance_recall_at(k: int, texts: Sequence[str]) -> tuple[float, float]:
    """Recall@k of a random order in closed form, in both directions.

    A query with g right ones among N misses by C(N-g, k) / C(N, k). An image has one right text among the distinct
    ones, and a text the images of all studies that share it. Arguments as of `search`.
    """
    _, sizes = np.unique(np.asarray(texts), return_counts=True)
    of_texts = [_chance(k, int(size), len(texts)) for size in sizes]
    return _chance(k, 1, len(sizes)), float(np.mean(of_texts))


def _chance(k: int, right: int, candidates: int) -> float:
    return 1 - comb(candidates - right, k) / comb(candidates, k) if k < candidates else 1.0


def _first_right(similarities: Floats, right: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Floats:
    best = np.where(right, similarities, -np.inf).max(1, keepdims=True)
    ahead: Floats = (~right & ~(similarities < best)).sum(1).astype(float)
    return ahead + 1
