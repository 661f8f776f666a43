"""Identification by the nearest images equals identification by all similarities, and takes less memory."""

import json

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support import run_python
from support.memory import FORGET
from torch import Tensor

from cosface_recipes.evaluation import search as module
from cosface_recipes.evaluation.search import search

MIB = 2**20


def by_all_similarities(
    probes: Tensor, labels: Tensor, gallery: Tensor, known: Tensor, ranks: int
) -> tuple[list[float], list[float], list[float]]:
    """Rates by rank; scores of mates, -inf where another identity is as similar; the best of non-mated probes."""
    unit, against = (x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-30) for x in (probes, gallery))
    places, genuine, impostor = [], [], []
    for similarity, label in zip((unit @ against.T).tolist(), labels.tolist(), strict=True):
        best: dict[int, float] = {}
        for score, identity in zip(similarity, known.tolist(), strict=True):
            best[identity] = max(score, best.get(identity, -np.inf))
        if label not in best:
            impostor.append(max(best.values()))
            continue
        ahead = sum(score >= best[label] for identity, score in best.items() if identity != label)
        places.append(ahead + 1)
        genuine.append(-np.inf if ahead else best[label])
    rates = [float(np.mean(np.array(places) <= k)) for k in range(1, ranks + 1)]
    return rates, sorted(genuine, reverse=True), sorted(impostor, reverse=True)


def check(probes: Tensor, labels: Tensor, gallery: Tensor, known: Tensor, ranks: int) -> None:
    if not torch.isin(labels, known).any():
        with pytest.raises(ValueError, match=f"None of the {len(labels)} probes is of one of the gallery's"):
            search(probes, labels, gallery, known, ranks)
        return
    rates, genuine, impostor = by_all_similarities(probes, labels, gallery, known, ranks)
    found = search(probes, labels, gallery, known, ranks)
    assert found.rates.tolist() == rates
    assert found.open_set.rank1 == rates[0]
    assert found.open_set.genuine.tolist() == genuine
    assert found.open_set.impostor.tolist() == impostor


def signs(n: int, dim: int, rng: torch.Generator) -> Tensor:
    """Rows of -1 and 1 times 0 or a power of two: cosines are multiples of 2 / dim, without rounding."""
    rows = torch.randint(2, (n, dim), generator=rng) * 2.0 - 1
    return rows * torch.tensor([0, 0.25, 1, 1, 1, 8])[torch.randint(6, (n, 1), generator=rng)]


@hypothesis.given(
    probes=st.integers(1, 40),
    images=st.integers(1, 200),
    identities=st.integers(1, 60),
    dim=st.sampled_from([4, 16]),
    ranks=st.sampled_from([1, 2, 5, 100]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 999),
)
def test_any_search_with_equal_scores(probes, images, identities, dim, ranks, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    labels, known = (torch.randint(identities, (n,), generator=rng) * 3 - 7 for n in (probes, images))
    check(signs(probes, dim, rng).to(dtype), labels, signs(images, dim, rng).to(dtype), known, ranks)


@pytest.mark.parametrize("ranks", [1, 3, 50])
def test_one_image_of_each_identity(ranks):
    """Images as similar as the mate are many, before it in the gallery and after it."""
    rng = torch.Generator().manual_seed(ranks)
    gallery = signs(16, 4, rng)[torch.randint(16, (300,), generator=rng)]
    check(signs(90, 4, rng), torch.randint(320, (90,), generator=rng), gallery, torch.arange(300), ranks)


def test_a_mate_behind_many_images_of_few(monkeypatch):
    """499 images of three others are more similar. The search goes on until it sees one behind the mate."""
    calls = []
    nearest = module.nearest_classes
    monkeypatch.setattr(module, "nearest_classes", lambda *args: (calls.append(args[2]), nearest(*args))[1])
    probe, others = torch.ones(1, 4), torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, -1]])
    gallery = others[[0] * 499 + [1] + [2] * 500]
    known = torch.cat([torch.arange(499) % 3, torch.arange(499, 1000)])
    check(probe, torch.tensor([499]), gallery, known, ranks=10)
    assert calls == [1, 11, 22, 44, 88, 176, 352, 704]
    assert search(probe, torch.tensor([499]), gallery, known, 10).rates.tolist() == [0.0] * 3 + [1.0] * 7
    calls.clear()
    check(probe, torch.tensor([499]), gallery, torch.arange(1000), ranks=10)  # ten others are enough
    assert calls == [1, 11]


def test_the_same_images_under_two_names():
    """Equal rows have equal scores wherever they are, so that neither name is at rank 1; of any other, one is."""
    rng = torch.Generator().manual_seed(0)
    photos = torch.randn(333, 37, generator=rng)
    for order in (torch.arange(666), torch.randperm(666, generator=rng)):
        gallery, known = torch.cat([photos, photos])[order], torch.arange(666)[order]
        result = search(photos + 0.01, torch.arange(333), gallery, known, ranks=3)
        assert result.rates.tolist() == [0.0, 1.0, 1.0]
        assert result.open_set.genuine.isinf().all()


def test_no_block_of_probes_changes_the_result(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    probes, gallery = torch.randn(100, 9, generator=rng), torch.randn(400, 9, generator=rng)
    labels, known = (torch.randint(60, (n,), generator=rng) for n in (100, 400))
    want = search(probes, labels, gallery, known, ranks=7)
    for block in (1, 13, 99):
        monkeypatch.setattr(module, "BLOCK", block)
        got = search(probes, labels, gallery, known, ranks=7)
        assert got.rates.tolist() == want.rates.tolist()
        assert torch.equal(got.open_set.genuine, want.open_set.genuine)
        assert torch.equal(got.open_set.impostor, want.open_set.impostor)


@pytest.mark.parametrize("part", ["probes", "gallery"])
def test_what_is_no_number_is_refused(part):
    probes, gallery = torch.eye(3), torch.eye(3)
    {"probes": probes, "gallery": gallery}[part][1, 0] = torch.nan
    with pytest.raises(ValueError, match="Embedding 1 of 3 is not finite"):
        search(probes, torch.arange(3), gallery, torch.arange(3))


PEAK = """
import json, torch
from support.memory import raised_by
from cosface_recipes.evaluation.search import search
torch.set_num_threads(2)
peaks = {}
for images in (1, 4):
    probes, gallery = torch.randn(1000, 16), torch.randn(50_000, 16)
    labels, known = torch.randint(15_000, (1000,)), torch.arange(50_000) // images
    peaks[images] = raised_by(lambda: search(probes, labels, gallery, known, 20))
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not FORGET.exists(), reason="reads peaks from Linux's /proc")
def test_memory_is_not_that_of_the_similarities():
    """Which are 191 MiB; the gallery is 3, and normalised in float64."""
    done = run_python(PEAK, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout).values()) < 32 * MIB, done.stdout
