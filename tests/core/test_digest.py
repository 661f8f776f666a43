"""The digest by which ranks compare tables: of every bit and its place, and read no oftener than they change."""

import pytest
import torch
from torch import nn

from cosface_kernels import collectives
from cosface_kernels.collectives import digest

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
def test_of_equal_tensors_it_is_equal_and_of_others_not(dtype, size, monkeypatch):
    monkeypatch.setattr(collectives, "AT_ONCE", 64)
    table = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert digest(table) == digest(table.clone())
    seen = {int(digest(table))}
    for place in range(min(size, 100)):
        other = table.clone()
        other[place] = 0 if bool(table[place]) else 1
        seen.add(int(digest(other)))
    assert len(seen) == 1 + min(size, 100)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_of_lazy_signs_it_is_that_of_the_values(size):
    z = torch.randn(size, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    for lazy, plain in ((z.conj(), z.conj().resolve_conj()), (z.conj().imag, -z.imag)):
        assert digest(lazy) == digest(plain.clone())
        assert size == 0 or digest(lazy) != digest(2 * plain)


def test_the_order_counts_and_so_does_a_constant():
    table = torch.rand(1000)
    constants = [torch.full((2**21,), value) for value in (0.25, 0.5, 1.0)]
    digests = [digest(each) for each in (table, table.flip(0), table.sort().values, *constants)]
    assert len({int(each) for each in digests}) == len(digests)


@pytest.mark.parametrize("learns", [False, True])
def test_a_table_is_read_again_when_it_has_changed_and_no_oftener(learns, monkeypatch):
    reads = []
    mixed = collectives._mixed
    monkeypatch.setattr(collectives, "_mixed", lambda *args: reads.append(1) or mixed(*args))
    table = nn.Parameter(torch.rand(10), requires_grad=learns)
    first, again = digest(table), digest(table)
    assert first == again
    assert len(reads) == (2 if learns else 1)
    with torch.no_grad():
        table[3] += 1
    assert digest(table) != first
    table.data = torch.rand(10)
    assert digest(table) == digest(table.detach().clone())


def test_of_a_table_made_in_inference_mode_changes_are_seen():
    """In which autograd counts none."""
    with torch.inference_mode():
        table = torch.rand(10)
        first = digest(table)
        table[3] += 1
        assert digest(table) != first
