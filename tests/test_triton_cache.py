"""Cosines that backend `triton` keeps from forward to backward, and what backward still computes."""

import pytest
import torch
from support import BF16, F16, F32, evaluate, evaluate_oracle, random_upstream, relative_error

from bench import launches

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

    with launches.through(count):
        return evaluate(forward, problem, upstream), blocks


PART = (2 * 20 * 300, 1, 2)  # bytes, and launches that read what is kept and that do not


@pytest.mark.parametrize(
    ("regime", "dtypes", "bytes_", "keeping", "others"),
    [
        *[(regime, dtypes, *PART) for regime in ("random", "confident", "wrong") for dtypes in (F32, BF16, F16)],
        *[("random", F32, 10**4, 0, 3), ("random", F32, 10**9, 3, 0)],
    ],
    ids=str,
)
def test_gradients_are_right_to_the_rounding_of_a_cosine(
    backend, regime, dtypes, bytes_, keeping, others, monkeypatch
):
    """None of the classes, the first 256 of 600, or all; in chunks of 256."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    problem = backend.problem(20, 600, 24, dtypes, regime=regime)
    upstream = random_upstream(problem, "loss", "lse")
    got, blocks = kept(backend, problem, upstream, bytes_)
    assert (blocks[True], blocks[False]) == (keeping, others)
    plain, _ = kept(backend, problem, upstream, 0)
    for name in ("loss", "lse", "target_cos", "max_neg"):
        assert torch.equal(getattr(got, name), getattr(plain, name))
    want = evaluate_oracle(problem, upstream)
    for name in ("dx", "dw", "dscale"):
        mine, exact = getattr(got, name), getattr(want, name)
        assert relative_error(mine, exact) <= 2 * relative_error(getattr(plain, name), exact) + 64 * STEP


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


def test_chosen_classes_with_reshaped_negatives(backend):
    problem = backend.problem(20, 600, 24)
    classes = torch.arange(0, 600, 2, device=backend.device)
    problem.targets.clamp_(max=299)
    thresholds = torch.linspace(-0.5, 0.5, 20, device=backend.device)
    options = {
        "classes": classes,
        "thresholds": thresholds,
        "negatives": torch.tensor([1.0, 0.2, 0.1], device=backend.device),
    }
    upstream = random_upstream(problem, "loss")
    got, blocks = kept(backend, problem, upstream, 10**9, **options)
    assert blocks[True] > 0 == blocks[False]
    plain, _ = kept(backend, problem, upstream, 0, **options)
    for mine, exact in zip(got, plain, strict=True):
        assert relative_error(mine, exact) <= 3 * 64 * STEP  # N' is at most 3


def test_backward_twice_gives_the_same_bits(backend):
    problem = backend.problem(20, 600, 24)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    loss = backend.lmcl(x, w, problem.targets, problem.scale, problem.margin, cache_bytes=10**9)[0].sum()
    first, second = (torch.autograd.grad(loss, (x, w), retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_the_cache_holds_whole_tiles_of_cosines(backend):
    problem = backend.problem(20, 600, 24)
    arguments = (problem.x, problem.w, problem.targets, problem.scale, 0.35, backend.name, None)
    sizes = {bytes_: torch.ops.cosface.lmcl(*arguments, bytes_)[5].numel() for bytes_ in (0, 10**4, 30_000, 10**9)}
    norms = sizes[0]
    assert sizes == {0: norms, 10**4: norms, 30_000: norms + 2 * 20 * 512, 10**9: norms + 2 * 20 * 768}


def test_a_weight_that_is_not_normalised_has_no_cosines(backend):
    problem = backend.problem(4, 20, 8)
    with pytest.raises(RuntimeError, match="cache_bytes must be 0 without normalize_weight"):
        backend.lmcl(
            problem.x,
            problem.w,
            problem.targets,
            problem.scale,
            problem.margin,
            cache_bytes=1000,
            normalize_weight=False,
        )


def test_opcheck(backend):
    problem = backend.problem(4, 300, 8)
    torch.library.opcheck(
        torch.ops.cosface.lmcl,
        (problem.x, problem.w, problem.targets, problem.scale, 0.35, backend.name, None, 9000),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
