"""Equal embeddings have equal cosines: whatever stands beside them, in every protocol that compares them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosface_recipes.evaluation import protocols, verification
from cosface_recipes.evaluation import search as searching
from cosface_recipes.evaluation.protocols import identify
from cosface_recipes.evaluation.search import rank_images, retrieve, search
from cosface_recipes.evaluation.verification import compare_all, cosines, count_all, normalised, on_grid


@settings(max_examples=25)
@given(n=st.integers(1, 20), m=st.integers(1, 100), dim=st.integers(1, 700), seed=st.integers(0, 999))
def test_a_cosine_depends_on_its_two_rows_alone(n, m, dim, seed):
    rng = torch.Generator().manual_seed(seed)
    x, y = (normalised(torch.randn(rows, dim, generator=rng)) for rows in (n, m))
    a, b = on_grid(x), on_grid(y)
    found, order = cosines(a, b), torch.randperm(m, generator=rng)
    assert torch.equal(cosines(a, b[order]), found[:, order])
    assert torch.equal(torch.cat([cosines(row, b) for row in a.split(1)]), found)
    assert torch.equal(torch.cat([cosines(a, rows) for rows in b.split(7)], 1), found)
    assert torch.equal(cosines(a.repeat(m, 1)[:, None], b.repeat_interleave(n, 0)[:, None]).view(m, n).T, found)
    places = torch.randperm(dim, generator=rng)  # another order of the sum
    assert torch.equal(cosines(a[:, places], b[:, places]), found)
    torch.testing.assert_close(found.double(), x.double() @ y.double().T, rtol=0, atol=2**-24)


class Copies:
    """People with a photo x and a photo y, which a stranger has too, among others who are like nobody."""

    def __init__(self, seed: int):
        rng = torch.Generator().manual_seed(seed)
        self.people, dim = (int(torch.randint(*ends, (), generator=rng)) for ends in ((1, 20), (16, 300)))
        self.x = torch.randn(self.people, dim, generator=rng)
        self.y = self.x + 0.3 * torch.randn(self.people, dim, generator=rng)
        others = torch.randn(int(torch.randint(60, (), generator=rng)), dim, generator=rng)
        gallery = torch.cat([self.y, self.y, others])
        order = torch.randperm(len(gallery), generator=rng)
        self.gallery, self.known = gallery[order], order  # of people 0, 1, ..., of strangers more
        self.labels = torch.arange(self.people)

    def everyone(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.gallery, self.x]), torch.cat([self.known, self.labels])


def rank_1_of_all(copies: Copies) -> float:
    """The stranger's copy of y is as similar to x as y is, and more similar to y than x is."""
    return compare_all(*copies.everyone()).rank1


def rank_1_of_identify(copies: Copies) -> float:
    """x and y in turn: x among copies of y finds y, which ties, and y among copies of itself does not find x."""
    probes, labels = torch.cat([copies.x, copies.y]), torch.cat([copies.labels] * 2)
    return identify(probes, labels, copies.gallery, [len(copies.gallery)]).rates[len(copies.gallery)][0] * 2


MEASURES = {
    "all pairs": (rank_1_of_all, 0.0),
    "MegaFace": (rank_1_of_identify, 1.0),
    "TinyFace": (lambda c: rank_images(c.x, c.labels, c.gallery, c.known, [1]).rates[1], 0.0),
    "identification": (lambda c: search(c.x, c.labels, c.gallery, c.known, 1).rates[0], 0.0),
    "retrieval": (lambda c: retrieve(c.x, c.labels, c.gallery, c.known, (2,)).recall[2], 1.0),
}


@pytest.mark.parametrize("block", [None, 13])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_copy_ties(measure, block, monkeypatch):
    if block:
        for module, name in (
            (verification, "ROWS"),
            (searching, "ROWS"),
            (searching, "BLOCK"),
            (protocols, "BLOCK"),
        ):
            monkeypatch.setattr(module, name, block)
    rate, expected = MEASURES[measure]
    assert [rate(Copies(seed)) for seed in range(10)] == [expected] * 10


def test_counts_of_copies_share_a_bin(monkeypatch):
    copies = Copies(3)
    embeddings, labels = copies.everyone()
    want = count_all(embeddings, labels).counts
    for tile in (7, 100):
        monkeypatch.setattr(verification, "TILE", tile)
        assert torch.equal(count_all(embeddings, labels).counts, want)
