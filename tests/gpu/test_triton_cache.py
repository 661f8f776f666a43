"""Cosines that backend `triton` keeps from forward to backward: what backward still computes, and their size."""

import pytest
import torch
from support import evaluate, random_upstream, relative_error

from bench.launches import through
from cosface_kernels.backends.triton import forward_pass, unavailable
from cosface_kernels.backends.triton.cache import Saved
from cosface_kernels.backends.triton.tiles import INTERPRETED_TILE
from cosface_kernels.options import PLAIN

pytestmark = pytest.mark.triton_only
STEP = 2.0**-16  # by which a cosine may be off


def kept(backend, problem, upstream, bytes_, **options):
    """The result, and the blocks of the kernel of the logits' gradients, by whether they read kept cosines."""
    blocks = {True: 0, False: 0}

    def count(name, launch, arguments):
        launch()
        if name == "logit_gradients":
            blocks[launch.keywords["KEPT"]] += 1

    def forward(*inputs):
        return backend.lmcl(*inputs, cache_bytes=bytes_, **options)

    with through(count):
        return evaluate(forward, problem, upstream), blocks


@pytest.mark.parametrize(("bytes_", "keeping", "others"), [(10**4, 0, 3), (2 * 20 * 300, 1, 2), (10**9, 3, 0)])
def test_kept_classes_need_no_product(backend, bytes_, keeping, others, monkeypatch):
    """None of the classes, the first 256 of 600, or all; in chunks of 256."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    problem = backend.problem(20, 600, 24)
    _, launches = kept(backend, problem, random_upstream(problem, "loss"), bytes_)
    assert launches == {True: keeping, False: others}


def test_a_chunk_half_of_whose_classes_are_kept(backend, monkeypatch):
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "512")
    problem = backend.problem(20, 600, 24)
    upstream = random_upstream(problem, "loss")
    got, blocks = kept(backend, problem, upstream, 2 * 20 * 256)
    assert blocks == {True: 1, False: 2}
    plain, _ = kept(backend, problem, upstream, 0)
    for mine, exact in zip(got, plain, strict=True):
        assert relative_error(mine, exact) <= 64 * STEP
    assert not torch.equal(got.dw, plain.dw)


def test_the_cache_holds_whole_tiles_of_cosines(backend):
    problem = backend.problem(20, 600, 24)
    arguments = (problem.x, problem.w, problem.targets, problem.scale, 0.35, backend.name, None)
    sizes = {bytes_: torch.ops.cosface.lmcl(*arguments, bytes_)[5].numel() for bytes_ in (0, 10**4, 30_000, 10**9)}
    norms = sizes[0]
    assert sizes == {0: norms, 10**4: norms, 30_000: norms + 2 * 20 * 512, 10**9: norms + 2 * 20 * 768}


def test_a_cosine_beyond_1_is_kept_as_1(backend):
    """As sums in few bits may make it: in 16 bits it would wrap around to -1."""
    assert unavailable() is None  # it imports triton
    problem = backend.problem(20, 300, 24)
    x, w = problem.w[:20].contiguous(), problem.w.clone()
    w[1::2] *= -1
    cache = torch.zeros(20, 512, dtype=torch.int16, device=backend.device)
    saved = Saved(w.norm(dim=1) / 1.01, x.norm(dim=1), cache)
    forward_pass.forward(x, w, saved, problem.targets, problem.scale, 0.0, PLAIN, INTERPRETED_TILE)
    assert cache.diagonal().tolist() == [32767, -32767] * 10
