"""Retrieval and 1:N identification against hand-computed cases and plain loops."""

import math

import numpy as np
import pytest
import torch

from cosface_recipes.evaluation import search as module
from cosface_recipes.evaluation.search import rank_images, retrieve, search


def at_angles(*degrees: float) -> torch.Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


# Retrieval


def test_retrieval_by_hand():
    """Nearest first: to 0 degrees (3) 5 (7), 10 (3), 40 (3), 100 (7); to 90 degrees (7) 100 (7), 40 (3), 10, 5."""
    gallery, offered = at_angles(5, 10, 40, 100), torch.tensor([7, 3, 3, 7])
    result = retrieve(at_angles(0, 90, 50) * 3, torch.tensor([3, 7, 9]), gallery, offered, ks=(1, 2, 4))
    assert result.queries == 2  # nobody in the gallery is 9
    assert result.recall == {1: 0.5, 2: 1.0, 4: 1.0}
    # R = 2. Of the first: wrong, right with precision 1/2, over R; of the second: right, wrong.
    assert result.map_at_r == pytest.approx(((1 / 2) / 2 + 1 / 2) / 2)


def test_a_query_does_not_find_itself():
    """Two pairs of equal images, and one that is alone."""
    embeddings, labels = at_angles(0, 0, 90, 90, 45), torch.tensor([1, 1, 2, 2, 3])
    result = retrieve(embeddings, labels, ks=(1,))
    assert (result.recall, result.map_at_r, result.queries) == ({1: 1.0}, 1.0, 4)
    wrong = retrieve(embeddings[:4], torch.tensor([1, 2, 1, 2]), ks=(1, 3))
    assert (wrong.recall, wrong.map_at_r) == ({1: 0.0, 3: 1.0}, 0.0)
    equal = retrieve(at_angles(*[0] * 6), torch.tensor([1, 1, 2, 2, 3, 3]), ks=(1,))  # the first is the nearest
    assert equal.recall == {1: pytest.approx(2 / 6)}


@pytest.mark.parametrize("own", [False, True])
def test_retrieval_equals_plain_loops(own):
    queries, labels = torch.randn(30, 5), torch.randint(9, (30,))
    gallery, offered = (queries, labels) if own else (torch.randn(40, 5), torch.randint(7, (40,)))
    result = retrieve(queries, labels, *(() if own else (gallery, offered)), ks=(1, 3, 100))
    precision, hits = [], []
    for i, query in enumerate(queries):
        cosines = torch.cosine_similarity(query[None], gallery)
        order = [j for j in cosines.argsort(descending=True).tolist() if not (own and j == i)]
        right = [bool(offered[j] == labels[i]) for j in order]
        if r := sum(right):
            precision.append(sum(sum(right[: j + 1]) / (j + 1) for j in range(r) if right[j]) / r)
            hits.append([any(right[:k]) for k in (1, 3, 100)])
    assert result.map_at_r == pytest.approx(np.mean(precision))
    assert list(result.recall.values()) == pytest.approx(np.mean(hits, 0))
    assert result.queries == len(hits)


def test_nothing_to_retrieve_is_refused():
    with pytest.raises(ValueError, match="None of the 3 queries has another image of its identity"):
        retrieve(at_angles(0, 1, 2), torch.tensor([1, 2, 3]))


# Identification

GALLERY, KNOWN = at_angles(0, 20, 90, 180), torch.tensor([1, 1, 2, 4])


def test_search_by_hand():
    """Mated: 31 (1) is 11 from 20; 70 (1) is 50 from 20 and 20 from 90; 95 (2) is 5 from 90; 178 (4) is 2 away.

    Non-mated: 12, 25, 40 and 80 degrees are 8, 5, 20 and 10 from the nearest image.
    """
    probes = at_angles(31, 12, 70, 25, 95, 40, 178, 80)
    result = search(probes, torch.tensor([1, 3, 1, 5, 2, 0, 4, 9]), GALLERY, KNOWN, ranks=3)
    assert result.rates.tolist() == [0.75, 1.0, 1.0]
    assert result.open_set.pairs == (4, 4)
    # FPIR 1/4 lets the impostor at 5 degrees in: the threshold is at 8, and the mates at 5 and 2 pass.
    assert result.open_set.tar_at_far(0.25) == 0.5
    assert result.open_set.tar_at_far(0.5) == 0.5  # the threshold is at 10, and the mate at 11 does not exceed it
    assert result.open_set.tar_at_far(0.75) == 0.75
    assert result.open_set.tar_at_far(1.0) == 0.75  # all but the mate at rank 2
    assert math.isnan(result.open_set.tar_at_far(0.2))


def test_the_threshold_is_not_that_of_all_probes():
    """With every other identity's score among the impostors, no mate could be missed at FPIR 1/2 here."""
    probes = at_angles(10, 95, 1, 91)
    result = search(probes, torch.tensor([1, 2, 8, 9]), at_angles(0, 90), torch.tensor([1, 2]), ranks=1)
    assert result.open_set.tar_at_far(0.5) == 0.0
    assert result.rates.tolist() == [1.0]


def test_an_identity_as_similar_is_ahead():
    result = search(at_angles(0), torch.tensor([2]), at_angles(45, 45), torch.tensor([1, 2]), ranks=2)
    assert result.rates.tolist() == [0.0, 1.0]
    assert result.open_set.pairs == (1, 0)
    assert math.isnan(result.open_set.tar_at_far(0.1))


def test_search_equals_plain_loops(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 9)
    probes, labels = torch.randn(60, 4), torch.randint(12, (60,))
    gallery, known = torch.randn(30, 4), 2 * torch.randint(6, (30,))
    result = search(probes, labels, gallery, known, ranks=4)
    ranks, mates, maxima = [], [], []
    for probe, label in zip(probes, labels.tolist(), strict=True):
        cosines = torch.cosine_similarity(probe[None], gallery)
        best = {i: float(cosines[known == i].max()) for i in set(known.tolist())}
        if label not in best:
            maxima.append(max(best.values()))
            continue
        ranks.append(1 + sum(value >= best[label] for i, value in best.items() if i != label))
        mates.append(best[label])
    np.testing.assert_allclose(result.rates, [np.mean(np.array(ranks) <= k) for k in range(1, 5)])
    for passing in range(1, len(maxima)):
        threshold = sorted(maxima, reverse=True)[passing]
        tpir = np.mean([rank == 1 and mate > threshold for rank, mate in zip(ranks, mates, strict=True)])
        assert result.open_set.tar_at_far(passing / len(maxima)) == pytest.approx(tpir)


def test_a_search_without_mates_is_refused():
    with pytest.raises(ValueError, match="None of the 1 probes is of one of the gallery's 3 identities"):
        search(at_angles(0), torch.tensor([3]), GALLERY, KNOWN)


# Ranked images (TinyFace)


def test_ranked_images_by_hand():
    """Nearest first: to 0 degrees (7) 10 (7), 20, 50 (7), 90 (8), 200; to 60 degrees (8) 50 (7), 90 (8) ..."""
    gallery, offered = at_angles(10, 50, 90, 20, 200), torch.tensor([7, 7, 8, -100, -100])
    result = rank_images(at_angles(0, 60) * 2, torch.tensor([7, 8]), gallery, offered, ks=(1, 2))
    assert result.rates == {1: 0.5, 2: 1.0}
    first = ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2  # precision before and at each of its two places, 1 and 3
    assert result.mean_average_precision == pytest.approx((first + (0 + 1 / 2) / 2) / 2)
    with pytest.raises(ValueError, match="The gallery has no image of identity 9, which a probe is of"):
        rank_images(at_angles(0), torch.tensor([9]), gallery, offered, ks=(1,))


def test_ranked_images_equal_the_area_below_precision_over_recall(monkeypatch):
    """TinyFace's compute_AP: trapezoids between all places of the ranking, precision 1 at recall 0."""
    monkeypatch.setattr(module, "ROWS", 7)
    labels, offered = (
        torch.randint(6, (25,)),
        torch.cat([torch.arange(26) % 6, torch.full((40,), -100)]),
    )
    probes, gallery = torch.randn(25, 4), torch.randn(66, 4)
    result = rank_images(probes, labels, gallery, offered, ks=(1, 3, 20))
    areas, places = [], []
    for probe, label in zip(probes, labels, strict=True):
        hit = (offered == label)[torch.cosine_similarity(probe[None], gallery).argsort(descending=True)].double()
        precision = torch.cat([torch.ones(1), hit.cumsum(0) / torch.arange(1, 67)])
        recall = torch.cat([torch.zeros(1), hit.cumsum(0) / hit.sum()])
        areas.append(float(torch.trapezoid(precision, recall)))
        places.append(int(hit.argmax()) + 1)
    assert result.mean_average_precision == pytest.approx(np.mean(areas))
    assert result.rates == {k: np.mean(np.array(places) <= k) for k in (1, 3, 20)}


def test_an_image_as_similar_is_ahead():
    gallery, offered = torch.eye(2)[[0, 0, 1]], torch.tensor([-100, 7, 7])
    result = rank_images(torch.eye(2)[:1], torch.tensor([7]), gallery, offered, ks=(1, 2))
    assert result.rates == {1: 0.0, 2: 1.0}
    assert result.mean_average_precision == pytest.approx(((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
