"""What a checkpoint keeps of tensors and generators: their numbers, of any dtype and view, or a refusal by key."""

from __future__ import annotations

import pytest
import torch
from support.ranks import Odd
from torch import nn

from cosface_kernels import FusedCosFaceLoss, checkpoint

DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(torch.tensor([[1.0, -2.0]], dtype=dtype.to_real()))
    try:
        return torch.tensor([0, 1, 1]).to(dtype)
    except (RuntimeError, NotImplementedError):  # no number becomes one of these
        return torch.empty(3, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_comes_back_or_is_refused(tmp_path, dtype):
    """By its key, when it is saved: a checkpoint that no one can load takes the place of one that could be."""
    saved, loaded = Odd(tensor_of(dtype)), Odd(None)
    refusal = ""
    try:
        checkpoint.save(tmp_path, 1, odd=saved)
    except TypeError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"odd/value is in {dtype}, which safetensors does not give back: ")
        assert dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64)
        assert not list(tmp_path.iterdir())
    else:
        checkpoint.load(tmp_path, odd=loaded)
        assert loaded.value.dtype == dtype
        assert torch.equal(loaded.value.view(torch.uint8), saved.value.view(torch.uint8))


def test_views_that_change_numbers_are_saved_as_what_they_are(tmp_path):
    """The bit of a conjugate or a negative is in no file, and one has the memory of what it is of."""
    z, x = torch.tensor([1 + 2j, 3 - 1j]), torch.tensor([1.0, 2.0])
    saved = [z, z.conj(), x, torch._neg_view(x), z.conj().imag, z.conj()[:1]]
    for values in (saved, saved[::-1], *([each] for each in saved)):
        loaded, buffers = Odd(None), nn.ParameterList([nn.Parameter(torch.zeros_like(each)) for each in values])
        checkpoint.save(tmp_path, 1, odd=Odd(values), buffers=nn.ParameterList(values))
        checkpoint.load(tmp_path, odd=loaded, buffers=buffers)
        for want, got, buffer in zip(values, loaded.value, buffers, strict=True):
            assert torch.equal(got, want)
            assert torch.equal(buffer, want)


def test_tensors_without_memory_are_refused(tmp_path):
    head, meta = FusedCosFaceLoss(5, 4), FusedCosFaceLoss(5, 4, device="meta")
    optimizers = [torch.optim.AdamW(each.parameters()) for each in (head, meta)]
    head(torch.ones(1, 4), torch.tensor([0])).backward()
    optimizers[0].step()
    checkpoint.save(tmp_path, 1, head=head, optimizer=optimizers[0])
    for call, place in (
        (lambda: checkpoint.save(tmp_path, 2, head=meta), "head/weight"),
        (lambda: checkpoint.load(tmp_path, head=meta), "head/weight"),
        (lambda: checkpoint.load(tmp_path, optimizer=optimizers[1]), "optimizer/state/0"),
    ):
        with pytest.raises(TypeError, match=rf"^{place} is on the device meta, without numbers: call to_empty"):
            call()
    checkpoint.load(tmp_path, head=meta.to_empty(device="cpu"))
    assert torch.equal(meta.weight, head.weight)


class OfAnotherDevice(torch.Generator):
    """Whose state has another length, as a GPU's has."""

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8)


def test_generators_are_those_that_were_saved(tmp_path):
    saved, layer = torch.Generator().manual_seed(3), nn.Linear(2, 2)
    checkpoint.save(tmp_path, 1, layer=layer, generators={"data": saved})
    before = layer.weight.detach().zero_().clone()
    for name, other, message in (
        ("daten", torch.Generator(), r"holds generators \['data'\], but no daten\."),
        (
            "data",
            OfAnotherDevice(),
            r"^generators/data/0 has 5056 bytes in the checkpoint, but 16 on the device of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path, layer=layer, generators={name: other})
        assert torch.equal(layer.weight, before)
    for wrong in ([saved], saved, {"data": 3}):
        for call in (checkpoint.load, checkpoint.save):
            arguments = (tmp_path, 2) if call is checkpoint.save else (tmp_path,)
            with pytest.raises(TypeError, match=r"generators must be a dict of torch.Generator by name, got "):
                call(*arguments, layer=layer, generators=wrong)
    loaded = torch.Generator()
    checkpoint.load(tmp_path, generators={"data": loaded})
    assert torch.equal(loaded.get_state(), saved.get_state())
