"""Backend `cuda` with weights and states in float8 beyond the op's suite: chunks, kept cosines, the CPU's bits."""

import math
from dataclasses import replace

import pytest
import torch
from support import Backend, Dtypes, Problem, cuda_host, make_problem, relative_error
from torch import Tensor

from cosface_kernels import FusedCosFaceLoss, float8, ops, reference
from cosface_kernels.backends import BACKENDS
from cosface_kernels.float8 import FLOAT8
from cosface_kernels.optim import FusedAdamW
from cosface_kernels.options import Options, Update

HOST = Backend("cuda_host", interpreted=True)
CHUNK = "COSFACE_CUDA_CHUNK"
CHUNKS = ("1", "100000")  # the first is rounded up to 256 classes
X_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def _problem(samples: int, classes: int, dim: int, dtype: torch.dtype, **options) -> Problem:
    """One row of the weight is 0, and one sample has no target."""
    problem = make_problem(samples, classes, dim, Dtypes(dtype, dtype), **options)
    w, _ = float8.quantized(problem.w.double())
    w[7] = 0
    problem.targets[0] = -1
    return replace(problem, w=w)


def _inputs(problem: Problem) -> tuple[Tensor, ...]:
    return problem.x, problem.w, problem.targets, problem.scale


def _double(*tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype is torch.int64 else t.double() for t in tensors]


def _gradients(like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(like), generator=generator, dtype=torch.float64).to(like) for _ in range(2)]


SMOOTH = {"thresholds": torch.full((9,), 0.2), "negatives": torch.tensor([1.0, 0.6, 0.04])}  # N' has no step there
OPTIONS = {
    "all": Options(cache_bytes=0),
    "some": Options(cache_bytes=0, classes=torch.arange(0, 1023, 2)),
    "some kept": Options(cache_bytes=10_000),
    "all kept": Options(cache_bytes=10**6),
    "reshaped": Options(cache_bytes=0, **SMOOTH),
    "moments": Options(cache_bytes=0, moments=True, g_moments=torch.linspace(-1, 1, 18).view(2, 9), **SMOOTH),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@X_DTYPES
def test_any_number_of_chunks(dtype, options, monkeypatch):
    """As near the reference in float64 as a weight in the dtype of x, in which its rows are multiplied."""
    problem = _problem(9, 1023, 24, dtype, scale=8.0)
    if options.classes is not None:
        problem.targets.div_(2, rounding_mode="floor")
    inputs, eps = _inputs(problem), torch.finfo(problem.scale.dtype).eps
    w = problem.w if options.classes is None else problem.w[options.classes]
    double = _double(problem.x, w, *inputs[2:])
    if options.g_moments is not None:
        options = replace(options, g_moments=options.g_moments.to(problem.scale))
    off = 1e-3 if options.cache_bytes and dtype != torch.float64 else 0.0  # a kept cosine
    for chunk in CHUNKS:
        monkeypatch.setenv(CHUNK, chunk)
        *rows, cache, _ = cuda_host.forward(*inputs, 0.35, options)
        want = reference.forward(*double, 0.35, options)
        for got, row in zip(rows, want, strict=True):
            assert relative_error(got, row) <= 64 * eps
        upstream = *rows[1:3], *_gradients(rows[0])
        dx, _, dscale = cuda_host.backward(*inputs, *upstream, cache, options=options, need_dx=True, need_dw=False)
        want_dx, _, want_dscale = reference.backward(*double, *_double(*upstream), options=options)
        assert relative_error(dx, want_dx) <= 4 * HOST.rounding(Dtypes(dtype, FLOAT8)) + 16 * eps + off
        assert relative_error(dscale, want_dscale) <= 256 * eps + off


SIGMOIDS = {
    "cross_entropy": Options(
        sigmoid="cross_entropy",
        polynomials=torch.tensor([[0.1, 0.4, 0.3, 0.1, 0.1], [1.0, 2.0, -3.0, 4.0, 5.0]], dtype=torch.float64),
    ),
    "angle": Options(sigmoid="angle"),
}


@pytest.mark.parametrize("form", SIGMOIDS)
@X_DTYPES
def test_sigmoids_of_any_number_of_chunks(dtype, form, monkeypatch):
    """Rows that move are read before."""
    problem, options = _problem(6, 600, 24, dtype, scale=8.0), SIGMOIDS[form]
    bias = problem.scale * (1.4 if form == "angle" else -0.2)  # p is neither 0 nor 1
    inputs = *_inputs(problem), bias, *_gradients(bias)
    want = BACKENDS["reference"].sigmoid(*_double(*inputs), options=options, need_dx=True, need_dw=True)
    eps = torch.finfo(bias.dtype).eps
    for chunk in CHUNKS:
        monkeypatch.setenv(CHUNK, chunk)
        sums, dx, _, dscale = cuda_host.sigmoid(*inputs, options=options, need_dx=True, need_dw=False)
        assert relative_error(sums, want[0]) <= 128 * eps
        assert relative_error(dx, want[1]) <= 4 * HOST.rounding(Dtypes(dtype, FLOAT8)) + 128 * eps
        assert float((dscale - want[3]).norm()) <= 128 * eps * (float(want[3].norm()) + eps)
        x, w, targets, scale, _, *upstream = inputs
        moved, state = w.clone(), [torch.zeros(len(w), dtype=torch.int8)]
        of_update = {"state": state, "finite": None, "update": replace(SGD, momentum=0.0), "options": options}
        cache = torch.empty(cuda_host.cache_size(x, w, options), dtype=torch.uint8)
        rows = torch.zeros_like(bias), -bias, *upstream, cache
        same = cuda_host.backward_update_(x, moved, targets, scale, *rows, need_dx=True, **of_update)
        assert torch.equal(same[0], dx)
        assert torch.equal(same[1], dscale)
        assert not torch.equal(moved.view(torch.uint8), w.view(torch.uint8))


# -- rows that move ----------------------------------------------------------------------------------------------

SGD = Update("sgd", 2, 7, 1.0, math.inf, lr=1.0, weight_decay=0.0, momentum=0.5)
# Whose products are exact where gradients have few bits, so that no fma shows.
ADAMW = Update("adamw", 2, 7, 0.5, math.inf, lr=0.5, weight_decay=0.0, beta1=0.5, beta2=0.5, eps=2.0**-10)
RULES = pytest.mark.parametrize("update", [SGD, ADAMW], ids=lambda update: update.rule)


def _stored(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Rows in a dtype, and their exponents where it has some."""
    if dtype is not FLOAT8:
        return rows.to(dtype), []
    q, exponents = float8.quantized(rows)
    return q, [exponents]


def _state(update: Update, w: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    kept = [_stored(torch.rand(w.shape, generator=generator), dtype) for dtype in dtypes]
    return [rows for rows, _ in kept] + [each for _, exponents in kept for each in exponents]


def _assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    """But for the sign of a nan."""
    for k, pair in enumerate(zip(got, want, strict=True)):
        nans = [torch.isnan(each.float()) for each in pair]
        assert torch.equal(*nans), f"tensor {k}"
        assert torch.equal(*(each.float()[~nan] for each, nan in zip(pair, nans, strict=True))), f"tensor {k}"


MIXTURES = {
    "all": [FLOAT8] * 4,
    "weight": [FLOAT8, torch.float32, torch.bfloat16, torch.float32],
    "state beside float32": [torch.float32, *[FLOAT8] * 3],
    "state beside bfloat16": [torch.bfloat16, *[FLOAT8] * 3],
    "one state": [torch.float32, FLOAT8, torch.float32, torch.bfloat16],
    "squares": [FLOAT8, torch.float32, FLOAT8, torch.bfloat16],
}


@pytest.mark.parametrize(("count", "width"), [(300, 1), (300, 24), (300, 33), (9, 515), (9, 1026), (9, 2112)])
@pytest.mark.parametrize("mixture", MIXTURES)
@RULES
def test_rows_have_the_bits_of_the_cpu(update, mixture, count, width, monkeypatch):
    """Of zeros, with a nan and with an infinity too; whatever the chunk."""
    of_weight, *of_state = MIXTURES[mixture]
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(count, width, generator=generator)
    rows[2] = 0
    w, exponents = _stored(rows, of_weight)
    states = _state(update, w, of_state[: 1 if update.rule == "sgd" else 3])
    tensors = sum(each.dtype != torch.int8 for each in states)
    before = [w, *states[:tensors], *exponents, *states[tensors:]]
    g = torch.randint(-128, 128, w.shape, generator=generator) / 256
    g[2] = 0
    g[3, -1], g[4, 0] = math.nan, math.inf
    g = g.bfloat16() if of_weight is torch.bfloat16 else g

    def moved(backend: str, chunk: str = "1") -> list[Tensor]:
        monkeypatch.setenv(CHUNK, chunk)
        v, *state = (each.clone() for each in before)
        ops.apply_update_(v, g, state, *update.flat(), backend)
        return [v, *state]

    want = moved("cpu")
    assert not torch.equal(want[0].float(), w.float())
    for chunk in CHUNKS:
        _assert_same_bits(moved("cuda_host", chunk), want)


@pytest.mark.parametrize("options", ["all", "some", "all kept"])
@RULES
def test_rows_move_inside_backward_by_the_bits_of_a_gradient_that_exists(update, options, monkeypatch):
    """That of the same rows in float32; a row that is clipped too."""
    problem, options = _problem(9, 1023, 31, torch.float32, scale=8.0), OPTIONS[options]
    update = replace(update, weight_decay=0.125, max_row_norm=0.01)
    classes = options.classes
    if classes is not None:
        problem.targets.div_(2, rounding_mode="floor")
    w, exponents = problem.w, torch.randint(-9, 9, (1023,), generator=torch.Generator().manual_seed(4))
    state = _state(update, w, [FLOAT8] * (1 if update.rule == "sgd" else 3))
    tensors = len(state) // 2
    state.insert(tensors, exponents.to(torch.int8))
    inputs = _inputs(problem)
    in_float32 = problem.x, w.float(), *inputs[2:]
    for chunk in CHUNKS:
        monkeypatch.setenv(CHUNK, chunk)
        _, top, log_sum, *_, cache, _ = cuda_host.forward(*inputs, 0.35, options)
        upstream = top, log_sum, *_gradients(top), cache
        want_dx, of_rows, want_dscale = cuda_host.backward(
            *in_float32, *upstream, options=options, need_dx=True, need_dw=True
        )
        dw = of_rows if classes is None else torch.zeros(w.shape).index_copy_(0, classes, of_rows)
        want, got = ([each.clone() for each in (w, *state)] for _ in range(2))
        cuda_host.apply_update_(want[0], dw, want[1:], update)
        dx, dscale = cuda_host.backward_update_(
            problem.x, got[0], *inputs[2:], *upstream,
            state=got[1:], finite=None, update=update, options=options, need_dx=True,
        )  # fmt: skip
        assert torch.equal(dx, want_dx)  # no later chunk has seen a row that moved
        assert torch.equal(dscale, want_dscale)
        taking_part = torch.ones(1023, dtype=torch.bool)
        if classes is not None:
            taking_part = torch.zeros(1023, dtype=torch.bool).index_fill_(0, classes, True)
        for mine, theirs, before in zip(got, want, (w, *state), strict=True):
            assert torch.equal(mine.float()[taking_part], theirs.float()[taking_part])
            assert torch.equal(mine.float()[~taking_part], before.float()[~taking_part])


@X_DTYPES
@RULES
def test_rows_move_by_the_gradient_of_any_embeddings(update, dtype):
    """Within the rounding of the format, and of the products' operands."""
    problem = _problem(9, 300, 24, dtype, scale=8.0)
    state = _state(update, problem.w, [FLOAT8] * (1 if update.rule == "sgd" else 3))
    state.insert(len(state) // 2, torch.full((300,), -8, dtype=torch.int8))
    _, top, log_sum, *_, cache, _ = cuda_host.forward(*_inputs(problem), 0.35, Options())
    upstream = top, log_sum, *_gradients(top)
    _, dw, _ = reference.backward(*_double(*_inputs(problem), *upstream))
    before, *others = _held(update, problem.w, state)
    want = before.clone()
    reference.move_rows(want, dw * 2**8, others, update)
    w = problem.w.clone()
    cuda_host.backward_update_(
        problem.x, w, *_inputs(problem)[2:], *upstream, cache,
        state=state, finite=None, update=update, options=Options(), need_dx=False,
    )  # fmt: skip
    got = _held(update, w, state)[0]
    of_gradient = 8 * HOST.rounding(Dtypes(dtype, FLOAT8)) * (want - before).abs().amax(1, keepdim=True)
    of_format = want.abs() / 8 + want.abs().amax(1, keepdim=True) * 2.0**-16
    assert bool(((got - want).abs() <= of_gradient + of_format).all())
    assert relative_error(got - before, want - before) < 0.1


def _held(update: Update, w: Tensor, state: list[Tensor]) -> list[Tensor]:
    """What a weight and its state, all in float8, stand for, in float64."""
    tensors = len(state) // 2
    pairs = enumerate(zip((w, *state[:tensors]), state[tensors:], strict=True))
    values = [(k, float8.values(rows, exponents, torch.float64)) for k, (rows, exponents) in pairs]
    return [held.square() if update.rule == "adamw" and k > 1 else held for k, held in values]


# -- what the driver asks for and takes --------------------------------------------------------------------------


@X_DTYPES
def test_norms_are_made_once(dtype, monkeypatch):
    problem = _problem(5, 1023, 24, dtype)
    monkeypatch.setenv(CHUNK, "1")
    with cuda_host.Calls() as of_forward:
        _, top, log_sum, *_, cache, _ = cuda_host.forward(*_inputs(problem), 0.35, Options())
    rows = top, log_sum, *_gradients(top), cache
    with cuda_host.Calls() as of_backward:
        cuda_host.backward(*_inputs(problem), *rows, options=Options(), need_dx=True, need_dw=False)
    assert of_forward.launches == {"row_norms": 5, "class_statistics": 4, "merge_statistics": 1}
    of_w_hat = 4 if dtype is torch.float16 else 0
    assert of_backward.launches == {"normalize_rows": 1 + of_w_hat, "logit_gradients": 4, "project_rows": 1}


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@X_DTYPES
def test_chunks_fit_into_the_workspace(dtype, some):
    """Of 32 KiB, with rows as operands and, in float16, normalised as well."""
    problem = _problem(2, 2000, 4, dtype)
    options = Options(cache_bytes=0, classes=torch.arange(0, 2000, 2) if some else None)
    _, top, log_sum, *_, cache, _ = cuda_host.forward(*_inputs(problem), 0.35, options)
    with cuda_host.Calls() as calls:
        cuda_host.backward_update_(
            *(each.clone() for each in _inputs(problem)), top, log_sum, *_gradients(top), cache,
            state=[torch.zeros(2000, dtype=torch.int8)], finite=None, update=replace(SGD, momentum=0.0),
            options=options, need_dx=True,
        )  # fmt: skip
    taken = [of_memory.itemsize * count for of_memory, count in calls.sizes if count >= 2 * 256]
    of_operands = {torch.float16: 3, torch.bfloat16: 2}.get(dtype, 1)  # elsewhere G lies over the products
    assert len(taken) == 2 + of_operands + some
    assert sum(taken) <= 1 << 15


def test_a_gradient_of_float8_is_refused():
    problem = _problem(3, 8, 4, torch.float32)
    _, top, log_sum, *_, cache, _ = cuda_host.forward(*_inputs(problem), 0.35, Options())
    rows = top, log_sum, top, top, cache
    with pytest.raises(TypeError, match=r"A weight in float8 has no gradient of its own\."):
        cuda_host.backward(*_inputs(problem), *rows, options=Options(), need_dx=True, need_dw=True)


def test_a_head_trains_as_on_the_cpu():
    """Random rounding is by the same numbers, so that few entries differ where gradients do by an ulp."""
    weights, losses = [], []
    for backend in ("cpu", "cuda_host"):
        torch.manual_seed(0)
        head = FusedCosFaceLoss(300, 24, scale=16.0, dtype=FLOAT8, backend=backend)
        optimizer = FusedAdamW(head.parameters(), lr=0.05, state_dtype=FLOAT8)
        x, labels = torch.randn(32, 24), torch.randint(300, (32,))
        steps = []
        for _ in range(6):
            steps.append(head(x, labels))
            steps[-1].backward()
            optimizer.step()
        losses.append(torch.stack(steps).detach())
        weights.append(head.weight.detach().view(torch.uint8))
    assert float(losses[1][-1]) < 0.7 * float(losses[1][0])
    assert relative_error(*losses) < 1e-3
    assert float((weights[0] == weights[1]).double().mean()) > 0.99


def test_rows_of_float8_are_given_a_length():
    """As on the CPU, but for entries that another order of a row's sum rounds to the other side."""
    rows = torch.randn(300, 515, generator=torch.Generator().manual_seed(5))
    w, exponents = float8.quantized(rows)
    moved = []
    for backend in ("cpu", "cuda_host"):
        q, e = w.clone(), exponents.clone()
        update = replace(SGD, momentum=0.0, lr=0.01, weight_norm=0.7)
        ops.apply_update_(q, rows.sin(), [e], *update.flat(), backend)
        moved.append((q.float(), e))
        lengths = float8.values(q, e, torch.float64).norm(dim=1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.7), rtol=0.05, atol=0)  # of rounding
    assert float((moved[0][0] == moved[1][0]).double().mean()) > 0.999
    assert torch.equal(moved[0][1], moved[1][1])
