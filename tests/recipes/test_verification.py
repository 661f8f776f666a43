"""Protocols: cases computed by hand, definitions as plain loops, and scikit-learn where it has the measure."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import KFold
from torch import nn

from cosface_recipes.evaluation import protocols
from cosface_recipes.evaluation import verification as evaluation
from cosface_recipes.evaluation.plots import plot_cmc, plot_roc
from cosface_recipes.evaluation.protocols import (
    cross_validate,
    identify,
    pair_distances,
    tar_at_nearest_far,
    template_embeddings,
    video_embeddings,
)
from cosface_recipes.evaluation.verification import BINS, Histogram, Scores, compare_all, count_all, embed


def at_angles(*degrees: float) -> torch.Tensor:
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1)


def cosine(degrees: float) -> float:
    return math.cos(math.radians(degrees))


# Embeddings


class Columns(nn.Module):
    """The left and the right half of an image, each added up; 1 more while training."""

    def forward(self, images):
        halves = [half.sum((1, 2, 3)) for half in images.chunk(2, -1)]
        return torch.stack(halves, 1) + self.training


@pytest.mark.parametrize(("flip", "expected"), [("sum", [10, 10]), ("concatenate", [3, 7, 7, 3]), (None, [3, 7])])
def test_embeddings_with_the_mirror_image(flip, expected):
    images = torch.tensor([[[[1.0, 2, 3, 4]]]]).repeat(3, 1, 1, 1)
    network = Columns()
    embeddings, labels = embed(
        network, [(images[:2], torch.tensor([5, 6])), (images[2:], torch.tensor([7]))], flip
    )
    assert embeddings.tolist() == [expected] * 3
    assert labels.tolist() == [5, 6, 7]
    assert network.training
    assert torch.equal(embed(lambda x: Columns().eval()(x), [(images, labels)], flip)[0], embeddings)


def test_an_unknown_flip_is_refused():
    with pytest.raises(ValueError, match=r'flip must be "sum", "concatenate" or None, got \'mean\''):
        embed(Columns(), [], "mean")


# Every pair, counted


def exact_tar(genuine, impostor, far):
    """At the threshold that accepts most genuine pairs, of all that do not accept too many impostors."""
    thresholds = [-2.0, *genuine, *impostor]
    return max(
        np.mean(np.array(genuine) > t) for t in thresholds if np.mean(np.array(impostor) > t) <= far * (1 + 1e-12)
    )


multiples = st.integers(-64, 64).map(lambda i: i / 64)  # edges of bins: no two of them share a bin


@given(st.lists(multiples, min_size=1, max_size=30), st.lists(multiples, min_size=1, max_size=30), st.floats(0, 1))
def test_tar_at_far_is_the_best_that_the_rate_allows(genuine, impostor, far):
    histogram = Histogram(bins=128)
    histogram.add(torch.tensor(genuine), True)
    histogram.add(torch.tensor(impostor), False)
    sort = lambda values: torch.tensor(values).sort(descending=True).values  # noqa: E731
    scores = Scores(sort(genuine), sort(impostor), math.nan)
    assert histogram.pairs == scores.pairs == (len(genuine), len(impostor))
    if far * len(impostor) * (1 + 1e-12) < 1:
        assert math.isnan(histogram.tar_at_far(far))
        assert math.isnan(scores.tar_at_far(far))
    else:
        assert histogram.tar_at_far(far) == scores.tar_at_far(far) == exact_tar(genuine, impostor, far)


@pytest.mark.parametrize(
    ("far", "impostors", "passing"), [(0.29, 100, 29), (1 / 49, 49, 1), (0.289, 100, 28), (0.0, 9, 0), (1.0, 9, 9)]
)
def test_a_rate_allows_the_impostors_that_its_decimals_say(far, impostors, passing):
    assert evaluation.allowed(far, impostors) == passing


def test_the_histogram_is_off_by_no_more_than_a_bin():
    torch.manual_seed(1)
    genuine, impostor = (torch.randn(20_000) * 0.1 + 0.3).clamp(-1, 1), (torch.randn(50_000) * 0.1).clamp(-1, 1)
    histogram = Histogram()
    histogram.add(torch.cat([genuine, impostor]), torch.arange(70_000) < 20_000)
    exact, above = (
        Scores(g.sort(descending=True).values, impostor.sort(descending=True).values, 0)
        for g in (genuine, genuine - 2 / BINS)
    )
    for far in (1e-4, 1e-3, 1e-2, 0.5):
        assert above.tar_at_far(far) <= histogram.tar_at_far(far) <= exact.tar_at_far(far)
    assert histogram.tar_at_far(1.0) == 1.0


def test_the_ends_of_the_range_are_counted():
    histogram = Histogram()
    histogram.add(torch.tensor([1.0, 1.0000001, -1.0, -1.0000001]), True)
    histogram.add(torch.tensor([[0.0, -1.0]]), torch.tensor([[False, False]]))
    assert histogram.pairs == (4, 2)
    assert histogram.tar_at_far(0.5) == 0.5
    assert histogram.tar_at_far(1.0) == 1.0


@pytest.mark.parametrize("n", [2, 7, 8, 9, 40])
def test_tiles_count_every_pair_once(monkeypatch, n):
    monkeypatch.setattr(evaluation, "TILE", 8)
    embeddings, labels = torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3
    histogram = count_all(embeddings, labels)
    genuine = sum(int(labels[i] == labels[j]) for i in range(n) for j in range(i))
    assert histogram.pairs == (genuine, n * (n - 1) // 2 - genuine)
    if n > 3:
        exact = compare_all(embeddings, labels)
        assert histogram.roc(20)[1] == pytest.approx(exact.roc(20)[1], abs=1.01 / genuine)


def test_on_a_device_without_float64_the_cpu_counts():
    embeddings, labels = torch.randn(9, 3), torch.arange(9) // 3
    histogram = count_all(embeddings, labels, "mps")  # which this machine need not have
    assert histogram.counts.device.type == "cpu"
    assert torch.equal(histogram.counts, count_all(embeddings, labels).counts)


def test_memory_does_not_grow_with_the_pairs(monkeypatch):
    monkeypatch.setattr(evaluation, "TILE", 64)
    shapes = []
    add = Histogram.add
    monkeypatch.setattr(
        Histogram,
        "add",
        lambda self, similarity, same: shapes.append(similarity.numel()) or add(self, similarity, same),
    )
    histogram = count_all(torch.randn(300, 3), torch.arange(300) // 2)
    assert max(shapes) == 64**2
    assert sum(shapes) == sum(histogram.pairs) == 300 * 299 // 2


def test_what_is_not_finite_is_named():
    embeddings = torch.ones(5, 2)
    embeddings[3, 1] = math.nan
    for measure in (compare_all, count_all):
        with pytest.raises(ValueError, match=r"Embedding 3 of 5 is not finite"):
            measure(embeddings, torch.arange(5))
    for measure in (pair_distances, lambda x: protocols.template_embeddings(x.numpy(), *np.ones((2, 4), int))):
        with pytest.raises(ValueError, match=r"Embedding \d of \d is not finite"):
            measure(embeddings[1:])
    with pytest.raises(ValueError, match=r"Embedding 1 of 2 is not finite in float32"):
        evaluation.normalised(torch.tensor([[1.0, 0.0], [3e38, 3e38]]))


@given(st.one_of(st.integers(-149, 120), st.integers(-1000, 1000)), st.integers(0, 100))
def test_the_length_of_an_embedding_does_not_matter(exponent, seed):
    """Of float64 none, of float32 none whose length is a float32."""
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    x[3] = 0
    longer = (x if -149 <= exponent <= 120 else x.double()) * 2.0**exponent
    unit = evaluation.normalised(longer)
    if longer.dtype == torch.float64:  # of float32, those of 2^-120 have lost digits
        np.testing.assert_array_equal(pair_distances(longer), pair_distances(x))
    exact = torch.nn.functional.normalize(longer.double() * 2.0**-exponent)
    assert torch.allclose(unit.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("far", [-0.1, 1.5, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(far):
    scores = compare_all(torch.randn(6, 3), torch.arange(6) // 2)
    for measure in (scores.threshold, scores.tar_at_far):
        with pytest.raises(ValueError, match=r"must be from 0 to 1, got"):
            measure(far)


# LFW


def test_distances_by_hand():
    embeddings = at_angles(0, 60, 90, 270) * torch.tensor([[1.0], [5.0], [0.01], [2.0]])
    np.testing.assert_allclose(pair_distances(embeddings), [1, 4], rtol=1e-14)
    np.testing.assert_allclose(
        pair_distances(embeddings, torch.tensor([[0, 2], [1, 1], [3, 0]])), [2, 0, 2], rtol=1e-14
    )
    np.testing.assert_allclose(pair_distances(torch.tensor([[0.0, 0.0], [0.0, 1.0]])), [1])


def test_cross_validation_by_hand():
    distances = np.array([0.105, 0.205, 0.2955, 0.405, 0.105, 0.255, 0.305, 0.405])
    same = np.array([True, True, False, False, True, False, False, False])
    result = cross_validate(distances, same, folds=2)
    # Fold 0 is told with 0.11, the first that is right on all of fold 1; fold 1 with 0.21.
    assert result.thresholds.tolist() == pytest.approx([0.11, 0.21])
    assert result.accuracies.tolist() == [0.75, 1.0]
    assert result.accuracy == 0.875
    assert result.population_std == 0.125
    assert result.sample_std == pytest.approx(0.125 * math.sqrt(2))
    assert result.standard_error == pytest.approx(0.125)
    assert result.cosine_threshold == pytest.approx(1 - 0.16 / 2)
    # VAL: up to 0.295 fold 0 accepts no impostor, from 0.296 on one of two, so that fold 1 is told with 0.295002.
    assert result.vals.tolist() == [1.0, 1.0]
    assert result.fars.tolist() == [0.0, 1 / 3]


def cross_validate_slowly(distances, same, far):
    """The protocol as loops over thresholds, with scikit-learn's folds."""
    rows = []
    for train, test in KFold(10, shuffle=False).split(distances):
        accuracies = [np.mean((distances[train] < t) == same[train]) for t in np.arange(0, 4, 0.01)]
        threshold = np.arange(0, 4, 0.01)[np.argmax(accuracies)]
        accuracy = np.mean((distances[test] < threshold) == same[test])
        grid = np.arange(0, 4, 0.001)
        rates = [np.mean(distances[train][~same[train]] < t) for t in grid]
        strict = 0.0
        if max(rates) >= far:
            below = max(i for i in range(len(grid)) if rates[i] <= far)
            strict = grid[below]
            if rates[below] < far:
                strict += (far - rates[below]) / (rates[below + 1] - rates[below]) * 0.001
        accept = distances[test] < strict
        rows.append((accuracy, threshold, np.mean(accept[same[test]]), np.mean(accept[~same[test]])))
    return np.array(rows).T


@pytest.mark.parametrize(("n", "far"), [(600, 1e-3), (603, 0.05), (107, 0.5), (200, 1.0)])
@pytest.mark.parametrize("closest", [0.0, 2.5])
def test_cross_validation_equals_plain_loops(n, far, closest):
    random = np.random.default_rng(n)
    same = random.permutation(np.arange(n) % 2 == 0)
    distances = np.where(same, random.uniform(0, 2.2, n), random.uniform(1, 4, n))
    distances[::7] = distances[::7].round(2)  # on a threshold
    distances = distances.clip(min=closest)
    result = cross_validate(distances, same, far=far)
    found = (result.accuracies, result.thresholds, result.vals, result.fars)
    np.testing.assert_allclose(found, cross_validate_slowly(distances, same, far), rtol=1e-12)
    assert result.population_std == np.std(result.accuracies)
    variance = np.square(result.accuracies - result.accuracy).sum() / 9  # LFW's definition, ten folds
    assert result.sample_std == pytest.approx(math.sqrt(variance))
    assert result.standard_error == pytest.approx(math.sqrt(variance / 10))


def test_an_impossible_rate_accepts_nothing():
    same = np.arange(40) % 2 == 0
    result = cross_validate(np.where(same, 0.5, 5.0), same)  # no threshold below 4 lets an impostor pass
    assert result.vals.tolist() == result.fars.tolist() == [0] * 10
    assert result.accuracies.tolist() == [1] * 10


@pytest.mark.parametrize(
    ("distances", "same", "message"),
    [
        (np.ones(9), np.ones(9, bool), "9 pairs cannot make 10 folds"),
        (np.ones(20), np.ones(21, bool), "There are 20 distances and 21 pairs"),
        (np.ones(40), np.arange(40) < 20, "Fold 0, or the others together, lack genuine or impostor pairs"),
    ],
)
def test_pairs_that_make_no_folds_are_refused(distances, same, message):
    with pytest.raises(ValueError, match=message):
        cross_validate(distances, same)


# YTF


def test_videos_by_hand():
    frames = torch.tensor([[1.0, 0], [0, 4], [3, 0], [0, 1], [5, 0]])
    embeddings, ids = video_embeddings(frames, torch.tensor([7, 3, 7, 7, 9]))
    assert ids.tolist() == [3, 7, 9]
    np.testing.assert_allclose(embeddings, [[0, 4], [4 / 3, 1 / 3], [5, 0]])
    np.testing.assert_allclose(pair_distances(embeddings, np.array([[0, 2]])), [2])


# IJB


def test_templates_by_hand():
    embeddings = np.float32([[2, 0], [0, 4], [0, 2], [1, 1], [6, 8]])
    templates, media, scores = (
        np.array([5, 5, 5, 2, 5]),
        np.array([1, 9, 9, 1, 0]),
        np.float32([1, 0.5, 1, 0.25, 0]),
    )
    result, ids = template_embeddings(embeddings, templates, media, scores)
    assert ids.tolist() == [2, 5]
    # Template 5: image 1 gives (2, 0), video 9 the mean of (0, 2) and (0, 2), the last has no weight.
    np.testing.assert_allclose(result, [[math.sqrt(0.5)] * 2] * 2, rtol=1e-12)
    result, _ = template_embeddings(embeddings, templates, media)
    np.testing.assert_allclose(result[1], np.array([2 + 6, 3 + 8]) / math.hypot(8, 11), rtol=1e-12)


def test_templates_equal_plain_loops():
    random = np.random.default_rng(0)
    embeddings, scores = random.normal(size=(200, 5)).astype(np.float32), random.random(200).astype(np.float32)
    templates, media = random.integers(0, 20, 200), random.integers(0, 4, 200)
    result, ids = template_embeddings(embeddings, templates, media, scores)
    for row, template in zip(result, ids, strict=True):
        total = 0
        for medium in set(media[templates == template]):
            chosen = (templates == template) & (media == medium)
            total = total + np.mean(embeddings[chosen].astype(float) * scores[chosen, None].astype(float), axis=0)
        np.testing.assert_allclose(row, total / np.linalg.norm(total), rtol=1e-12)


def nearest_by_hand(scores, same, fars):
    """From (1, 1) down, but for points midway between their neighbours; the first of the nearest."""
    points = [(np.sum(~same & (scores >= t)), np.sum(same & (scores >= t))) for t in np.unique(scores)]
    midway = [
        all(2 * b == a + c for a, b, c in zip(*points[i - 1 : i + 2], strict=True))
        for i in range(1, len(points) - 1)
    ]
    kept = [
        *points[:1],
        *(point for point, out in zip(points[1:-1], midway, strict=True) if not out),
        *points[1:][-1:],
    ]
    curve = [(impostors / np.sum(~same), genuine / np.sum(same)) for impostors, genuine in [*kept, (0, 0)]]
    return [min(curve, key=lambda point: abs(point[0] - wanted))[1] for wanted in fars]


# Few different values, so that many scores are equal; long runs of one kind, whose inner points are left out.
@given(
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=60).filter(
        lambda pairs: len({same for _, same in pairs}) == 2
    )
)
def test_the_nearest_point_of_the_curve_counts(pairs):
    scores, same = np.array([s for s, _ in pairs]) / 8, np.array([same for _, same in pairs])
    fars = (1e-6, 0.1, 0.25, 0.5, 0.9)
    assert tar_at_nearest_far(scores, same, fars) == nearest_by_hand(scores, same, fars)


def test_the_nearest_point_of_a_long_curve():
    random = np.random.default_rng(0)
    same = random.random(50_000) < 0.01
    scores = random.normal(same * 3.0)
    fars = [10.0**-k for k in range(6, 0, -1)]
    exact = Scores(*(torch.tensor(np.sort(scores[kind])[::-1].copy()) for kind in (same, ~same)), rank1=0)
    found = tar_at_nearest_far(scores, same, fars)
    assert found[-3:] == pytest.approx([exact.tar_at_far(f) for f in fars[-3:]], abs=0.01)


# MegaFace


def test_identification_by_hand():
    probes, labels = at_angles(0, 20, 50, 200), torch.tensor([0, 0, 0, 1])
    distractors = at_angles(-35, 100, 45, 21)
    result = identify(probes, labels, distractors, sizes=[4, 2, 3], ranks=2)
    # Pairs (i, j), angle between them, and distractors nearer to j, of the first 2, 3 and 4:
    #   (20, 0) 20: none, none, none     (50, 0) 50: one (35), two, three   (0, 20) 20: none, none, one
    #   (50, 20) 30: none, one, two      (0, 50) 50: none (50 is as near), one, two   (20, 50) 30: none, one, two
    np.testing.assert_allclose(result.rates[2], [5 / 6, 1])
    np.testing.assert_allclose(result.rates[3], [2 / 6, 5 / 6])
    np.testing.assert_allclose(result.rates[4], [1 / 6, 2 / 6])
    assert result.curve.pairs == (3, 16)
    # Impostors nearest first: 1, 5, 21, 25, 29 ...; genuine: 20, 30, 50.
    assert result.curve.tar_at_far(2 / 16) == 1 / 3
    assert result.curve.tar_at_far(5 / 16) == 2 / 3


def test_a_distractor_as_similar_as_the_mate_does_not_count():
    probes = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    result = identify(probes, torch.tensor([0, 0]), torch.tensor([[0, 0, 1.0]]), sizes=[1])
    assert result.rates[1].tolist() == [1.0]


@pytest.mark.parametrize("block", [1, 7, 100])
def test_identification_equals_plain_loops(monkeypatch, block):
    monkeypatch.setattr(protocols, "BLOCK", block)
    probes, labels, distractors = torch.randn(30, 6), torch.randint(8, (30,)), torch.randn(50, 6)
    sizes = (1, 3, 20, 50)
    result = identify(probes, labels, distractors, sizes, ranks=5)
    unit, others = (torch.nn.functional.normalize(x) for x in (probes, distractors))
    for n in sizes:
        ranks = [
            1 + int((others[:n] @ unit[j] > unit[i] @ unit[j]).sum())
            for i in range(30) for j in range(30) if i != j and labels[i] == labels[j]
        ]  # fmt: skip
        np.testing.assert_allclose(result.rates[n], [np.mean(np.array(ranks) <= k) for k in range(1, 6)])
    assert result.curve.pairs == (len(ranks) // 2, 30 * 50)


def test_rank_1_without_distractors_of_its_own_is_that_of_all_pairs():
    """compare_all's impostors are the other identities; here the same people are the distractors."""
    images, labels = torch.randn(20, 4), torch.tensor([0, 0, *range(1, 19)])
    rank1 = compare_all(images, labels).rank1
    assert identify(images[:2], labels[:2], images[2:], [18]).rates[18].tolist() == [rank1]


@pytest.mark.parametrize(
    ("labels", "sizes", "message"),
    [
        ([0, 1], [3], r"None of the 2 identities has two photos"),
        ([0, 0], [4], r"sizes must be from 1 to 3, the number of distractors, got \[4\]"),
        ([0, 0], [], r"sizes must be from 1 to 3"),
        ([0, 0], [0, 2], r"got \[0, 2\]"),
    ],
)
def test_an_impossible_identification_is_refused(labels, sizes, message):
    with pytest.raises(ValueError, match=message):
        identify(torch.eye(2), torch.tensor(labels), torch.ones(3, 2), sizes)


# Plots


def test_curves_are_drawn(tmp_path):
    scores = Scores(torch.tensor([0.9, 0.6]), torch.tensor([0.8, 0.1]), 1.0)
    histogram = Histogram()
    histogram.add(scores.genuine, True)
    histogram.add(scores.impostor, False)
    plot_roc({"exact": scores, "counted": histogram}, tmp_path / "new" / "roc.png")
    plot_cmc({"N = 2": [0.5, 1.0]}, tmp_path / "cmc.png", "MegaFace")
    for path in (tmp_path / "new" / "roc.png", tmp_path / "cmc.png"):
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(set(image.convert("L").tobytes())) > 10


# Ties and edges


def test_an_image_of_another_as_similar_as_the_mate_counts_as_nearer():
    assert compare_all(torch.eye(2)[[0, 0, 0, 1, 1]], torch.tensor([0, 0, 1, 2, 2])).rank1 == 2 / 4


def test_a_histogram_of_four_bins_by_hand():
    histogram = Histogram(bins=4)
    histogram.add(torch.tensor([0.2, -0.6]), same=False)
    histogram.add(torch.tensor([0.7, -0.4]), same=True)
    assert histogram.counts.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert histogram.threshold(0.5) == -0.5
    assert histogram.tar_at_far(0.5) == 1.0
    histogram.add(torch.tensor(0.9), same=False)  # after what was read
    assert histogram.pairs == (2, 3)
    assert histogram.threshold(0.34) == 0.5
    assert histogram.tar_at_far(0.34) == 0.5


@pytest.mark.parametrize(("genuine", "val"), [(1.0004, 1.0), (1.0006, 0.0)])
def test_the_threshold_of_val_lies_between_thousandths(genuine, val):
    """All impostors are between 1 and 1.001, where the rate of 0.5 is at 1.0005."""
    result = cross_validate(np.array([genuine, 1.0005] * 4), np.array([True, False] * 4), folds=2, far=0.5)
    assert result.vals.tolist() == [val] * 2
