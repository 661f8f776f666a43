"""Rows that move inside backward, and a gradient applied: the rules of torch.optim, and what they leave alone."""

import math
from dataclasses import replace

import pytest
import torch
from support import (
    DEFAULT_DEVICE,
    Problem,
    evaluate,
    evaluate_oracle,
    make_problem,
    plain_forward,
    random_upstream,
    relative_error,
    rules,
)
from support.updates import UPDATES, C, D, N, draw_inputs, draw_upstream, moved_rows, updates
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels import ops, optim, reference
from cosface_kernels.backends import BACKENDS
from cosface_kernels.backends import triton as backend_triton
from cosface_kernels.backends.triton import choice, launch
from cosface_kernels.backends.triton.tiles import INTERPRETED_TILE
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.options import Options, Update

CLIPPED = {"gradient_factor": 0.7, "max_row_norm": 0.05}


RULES = [
    *rules.RULES,
    pytest.param(FusedSGD, torch.optim.SGD, {"lr": 0.3, "weight_decay": 0.1}, id="sgd-decay"),
    pytest.param(FusedSGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, **CLIPPED}, id="sgd-clipped"),
    pytest.param(FusedAdamW, torch.optim.AdamW, {"lr": 0.01, **CLIPPED}, id="adamw-clipped"),
]


@pytest.mark.parametrize("name", ["classes", "updates", "cache_bytes", "gradient_tolerance"])
def test_an_option_is_taken_or_refused_by_its_name(backend, name):
    problem = backend.problem(2, 5, 3)
    values = {
        "classes": torch.tensor([0, 1], device=backend.device),
        "updates": True,
        "cache_bytes": 4096,
        "gradient_tolerance": 1e-3,
    }
    reason = BACKENDS[backend.name].unsupported(problem.x, problem.w, Options(**{name: values[name]}))
    assert reason == (f"option '{name}' is not on this backend yet." if name in backend.lacks else None)
    if name in backend.lacks and name != "updates":
        with pytest.raises(RuntimeError, match=f"'{backend.name}' cannot run: option '{name}' is not on this"):
            backend.lmcl(
                problem.x, problem.w, problem.targets, problem.scale, problem.margin, **{name: values[name]}
            )


def _batches(steps: int, w: Tensor) -> list[Problem]:
    """With an ignored sample each, and half of the samples near their class."""
    problems = []
    for step in range(steps):
        problem = make_problem(N, len(w), D, seed=step, scale=16.0, device=w.device)
        problem.x[::2] += 3 * w[problem.targets[::2]]
        problem.targets[3] = -1
        problems.append(replace(problem, w=w))
    return problems


def _clip(gradient: Tensor, gradient_factor: float = 1.0, max_row_norm: float = math.inf, **_) -> Tensor:
    gradient = gradient_factor * gradient
    return gradient * (max_row_norm / gradient.norm(dim=1, keepdim=True)).clamp_max(1).nan_to_num(1)


def _torchs(torchs, w: Tensor, options: dict) -> torch.optim.Optimizer:
    return torchs([w], **{name: value for name, value in options.items() if name not in CLIPPED})


def _train_torch(problems: list[Problem], torchs, options: dict, dtype: torch.dtype) -> Tensor:
    """The weight after steps of torch.optim on gradients of the specification or, in float32, of plain PyTorch."""
    w = problems[0].w.to(dtype, copy=True).requires_grad_()
    optimizer = _torchs(torchs, w, options)
    for problem in problems:
        problem = replace(problem, x=problem.x.to(dtype), scale=problem.scale.to(dtype), w=w.detach())
        upstream = random_upstream(problem, "loss")
        exact = dtype == torch.float64
        result = evaluate_oracle(problem, upstream) if exact else evaluate(plain_forward, problem, upstream)
        w.grad = _clip(result.dw, **options)
        with DEFAULT_DEVICE:  # where AdamW of torch 2.11 counts steps
            optimizer.step()
    return w.detach()


@updates
@pytest.mark.parametrize(("fused", "torchs", "options"), RULES)
def test_training_is_torchs_on_the_specifications_gradients(backend, fused, torchs, options):
    """Two steps of several chunks, with ignored samples; at most twice as far off as PyTorch in float32 is."""
    start = backend.problem(1, C, D).w
    problems = _batches(2, start)
    want, plain = (_train_torch(problems, torchs, options, dtype) for dtype in (torch.float64, torch.float32))
    w = start.clone().requires_grad_()
    optimizer = fused([w], **options)
    for problem in problems:
        upstream = random_upstream(problem, "loss")
        loss = optim.lmcl(w, problem.x, w, problem.targets, problem.scale, problem.margin, backend.name)[0]
        loss.backward(upstream.loss)
        optimizer.step()
    errors = [(v.detach().double() - want).norm() for v in (w, plain)]
    moved = (want - start.double()).norm()
    assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(torch.float32).eps * want.norm()
    assert errors[0] <= 1e-3 * moved


@updates
@pytest.mark.parametrize(("fused", "torchs", "options"), RULES)
def test_gradient_that_exists_is_applied_as_torch_does(backend, fused, torchs, options):
    """Element by element, in ulps of the largest value that the element has had; the state as well."""
    w = torch.randn(C, D, device=backend.device).requires_grad_()
    other = w.detach().double().requires_grad_()
    optimizer, theirs = fused([w], **options), _torchs(torchs, other, options)
    largest = other.detach().abs()
    for step in range(1, 6):
        gradient = torch.randn(C, D, device=backend.device)
        with optimizer._next_update(w, optimizer.param_groups[0]) as (update, state):
            ops.apply_update_(w.detach(), gradient, state, *update.flat(), backend.name)
        assert update.step == step
        other.grad = _clip(gradient.double(), **options)
        with DEFAULT_DEVICE:
            theirs.step()
        largest = largest.maximum(other.detach().abs())
    ulps = (w - other).detach().abs() / largest / torch.finfo(torch.float32).eps
    assert float(ulps.max()) < 16
    for name in optimizer.state_names_of(optimizer.param_groups[0]):
        values = theirs.state[other][name]
        torch.testing.assert_close(optimizer.state[w][name].double(), values, rtol=1e-5, atol=1e-6)


@updates
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", UPDATES)
def test_rows_are_given_the_length_that_is_asked_for(backend, rule, dtype):
    """After the rule, whatever their lengths were; a row of zeros has none."""
    w, state = draw_inputs(rule, dtype, C, backend.device)
    dw = torch.randn(C, D, device=backend.device).to(dtype)
    w[4], dw[4] = 0, 0
    for values in state:
        values[4] = 0
    exact, means = w.double(), [values.double() for values in state]
    update = replace(UPDATES[rule], weight_norm=0.7)
    reference.move_rows(exact, dw.double(), means, update)
    ops.apply_update_(w, dw, state, *update.flat(), backend.name)
    assert torch.equal(w[4], torch.zeros_like(w[4]))
    others = torch.arange(C, device=backend.device) != 4
    lengths = w.double().norm(dim=1)[others]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.7), rtol=4 * eps, atol=0)
    assert float((w - exact)[others].abs().max()) < 2 * eps
    for got, want in zip(state, means, strict=True):  # which do not change with it
        assert relative_error(got, want) < eps


@updates
@pytest.mark.parametrize("most", [0.5, math.inf])
def test_a_weight_that_is_infinite_leaves_its_state_alone(backend, most):
    """A gradient that is applied is the weight's own: nothing of it lies along the weight."""
    update = replace(UPDATES["adamw"], weight_decay=0.0, max_row_norm=most)
    w, state = draw_inputs("adamw", torch.float32, 4, backend.device)
    w[0, 1], dw = torch.inf, torch.ones_like(w)
    exact, means = w.double(), [values.double() for values in state]
    reference.move_rows(exact, dw.double(), means, update)
    ops.apply_update_(w, dw, state, *update.flat(), backend.name)
    for got, want in zip((w, *state), (exact, *means), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@updates
def test_gradient_of_any_strides_is_applied(backend):
    gradient = torch.randn(D, C, device=backend.device).T
    moved = [torch.ones(C, D, device=backend.device) for _ in range(2)]
    for w, dw in zip(moved, (gradient, gradient.contiguous()), strict=True):
        ops.apply_update_(w, dw, [], *Update("sgd", 1, 0, 1.0, math.inf, 0.5, 0.0).flat(), backend.name)
    assert torch.equal(moved[0], 1 - 0.5 * gradient)
    assert torch.equal(*moved)


@pytest.mark.option("updates")
@pytest.mark.parametrize("rule", UPDATES)
def test_what_is_not_finite_moves_nothing(backend, rule):
    w, state = draw_inputs(rule, torch.float32, C, backend.device)
    upstream = draw_upstream(w, 4)
    flags = (torch.tensor(flag, device=backend.device) for flag in (True, False))
    moved, stayed = (moved_rows(backend.name, w, state, UPDATES[rule], upstream, finite=flag) for flag in flags)
    for mine, want in zip(moved, moved_rows(backend.name, w, state, UPDATES[rule], upstream), strict=True):
        assert torch.equal(mine, want)
    for mine, want in zip(stayed, (*moved[:2], w, *state), strict=True):
        assert torch.equal(mine, want)


SUBSETS = {"all": None, "some": torch.tensor([2, 3, 40, 299]), "many": torch.arange(300) + 1}


@pytest.mark.option("updates", "classes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("rule", UPDATES)
def test_op_is_the_reference_and_moves_nothing_else(backend, rule, subset, dtype):
    """From one state, in the middle of training."""
    w, state = draw_inputs(rule, dtype, C, backend.device)
    classes = None if subset == "all" else SUBSETS[subset].to(backend.device)
    upstream = draw_upstream(w, 4)
    moved, wanted = (
        moved_rows(name, w, state, UPDATES[rule], upstream, classes) for name in (backend.name, "reference")
    )
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e3 * torch.finfo(dtype).eps
    for mine, want in zip(moved, wanted, strict=True):
        torch.testing.assert_close(mine, want, rtol=tolerance, atol=tolerance)
    if classes is not None:
        others = torch.ones(C, dtype=torch.bool, device=backend.device)
        others[classes] = False
        for mine, before in zip(moved[2:], (w, *state), strict=True):
            assert torch.equal(mine[others], before[others])
            assert not bool((mine[classes] == before[classes]).all(1).any())


@updates
@pytest.mark.parametrize("rule", UPDATES)
def test_gradient_of_embeddings_sees_the_weight_before_the_step(backend, rule):
    """A step so large that a row read after it would be seen, in more than one chunk."""
    w, state = draw_inputs(rule, torch.float32, 600, backend.device)
    upstream = draw_upstream(w, 600, 12)
    update = replace(UPDATES[rule], lr=1e4)
    dx, dscale, moved, *_ = moved_rows(backend.name, w, state, update, upstream)
    x, *rows = upstream
    cache = ops.lmcl(x, w, *rows[:2], 0.0, backend.name)[5]
    want, _, want_dscale = torch.ops.cosface.lmcl_backward(x, w, *rows, cache, True, False, backend.name)
    assert relative_error(dx, want) < 1e-5
    assert relative_error(dscale, want_dscale) < 1e-5
    assert float((moved - w).norm()) > 100 * float(w.norm())


@updates
def test_without_a_gradient_of_embeddings_rows_move_alike(backend):
    w, state = draw_inputs("sgd", torch.float32, C, backend.device)
    upstream = draw_upstream(w, C)
    with_dx = moved_rows(backend.name, w, state, UPDATES["sgd"], upstream)
    without = moved_rows(backend.name, w, state, UPDATES["sgd"], upstream, need_dx=False)
    assert without[0].numel() == 0
    for one, other in zip(with_dx[1:], without[1:], strict=True):
        assert torch.equal(one, other)


@updates
@pytest.mark.parametrize("samples", [0, 3], ids=["no_samples", "ignored"])
def test_without_a_gradient_momentum_and_decay_move_the_rows(backend, samples):
    w, (momentum,) = draw_inputs("sgd", torch.float32, C, backend.device)
    x, y, scale, top, log_sum, g_lse, g_cos = draw_upstream(w, 4, samples)
    upstream = [x * torch.nan, torch.full_like(y, -1), scale, top, log_sum, g_lse * 0, g_cos * 0]
    dx, _, moved, new_momentum = moved_rows(backend.name, w, [momentum], UPDATES["sgd"], upstream)
    want = 0.9 * momentum + 0.9 * 0.2 * w
    torch.testing.assert_close(new_momentum, want)
    torch.testing.assert_close(moved, w - 0.1 * want)
    assert not bool(dx.any())


@updates
def test_row_that_is_too_long_by_far_and_a_row_without_gradient(backend):
    w = torch.ones(40, D, device=backend.device)
    gradient = torch.randn(40, D, device=backend.device)
    gradient[3], gradient[5], gradient[7, 2] = 0, 1e18, torch.nan
    ops.apply_update_(w, gradient, [], *Update("sgd", 1, 0, -2.0, 0.25, 1.0, 0.0).flat(), backend.name)
    lengths = (w - 1).norm(dim=1)
    assert float(lengths[3]) == 0
    assert bool(w[7].isnan().any())
    lengths[[3, 7]] = 0.25
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.25))
    assert bool(((w - 1).sign() == gradient.sign())[[0, 1, 2, 4, 5]].all()), "the factor is negative"


# -- backend triton ----------------------------------------------------------------------------------------------


@pytest.mark.triton_only
@pytest.mark.parametrize(
    ("rule", "classes"), [("sgd", None), ("adamw", torch.arange(1, 530))], ids=["sgd-all", "adamw-chosen"]
)
def test_chunk_of_classes_changes_no_bit_of_a_step(backend, rule, classes, monkeypatch):
    w, state = draw_inputs(rule, torch.bfloat16, 530, backend.device)
    classes = None if classes is None else classes.to(backend.device)
    upstream = draw_upstream(w, 500)
    moved = []
    for chunk in ("256", "1000000"):
        monkeypatch.setenv("COSFACE_TRITON_CHUNK", chunk)
        moved.append(moved_rows(backend.name, w, state, UPDATES[rule], upstream, classes))
    assert relative_error(moved[0][0], moved[1][0]) < 1e-5
    for one, other in zip(moved[0][2:], moved[1][2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.triton_only
@pytest.mark.parametrize("dim", [1, 2, 17, 1024, 1500])
def test_rows_of_any_length(backend, dim):
    """Rows in one block of columns and in two, of more than one row and of one."""
    torch.manual_seed(1)
    w, dw, momentum = torch.randn(3, 5, dim, device=backend.device)
    moved = []
    for name in (backend.name, "reference"):
        v, m = w.clone(), momentum.clone()
        ops.apply_update_(v, dw, [m], *replace(UPDATES["sgd"], max_row_norm=0.5).flat(), name)
        moved.append((v, m))
    for mine, want in zip(*moved, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.triton_only
@pytest.mark.parametrize("num_classes", [200, 430])
@pytest.mark.parametrize("chosen", [False, True], ids=["all", "chosen"])
def test_choosing_tiles_moves_nothing(backend, num_classes, chosen, monkeypatch):
    """Kernels are timed on a sample of the classes, which may leave targets outside, or end within a chunk."""
    w, state = draw_inputs("sgd", torch.float32, num_classes, backend.device)
    upstream = draw_upstream(w, num_classes - 1)
    classes = torch.arange(1, num_classes, device=backend.device) if chosen else None
    want = moved_rows(backend.name, w, state, UPDATES["sgd"], upstream, classes)
    tile, timed = INTERPRETED_TILE, []
    tiles = (tile, replace(tile, n=16))
    for module in (backend_triton, choice):
        monkeypatch.setattr(module, "candidates", lambda *_: tiles)
    for known in ("_chosen", "_latest", "_complaints", "_milliseconds"):
        monkeypatch.setattr(choice, known, {})
    monkeypatch.setattr(choice, "_milliseconds_of", lambda launch: timed.append(launch()) or len(timed))
    monkeypatch.setattr(launch, "TRIAL_FLOPS", 2 * 256 * upstream[0].numel())
    monkeypatch.delenv("COSFACE_TRITON_TUNE", raising=False)
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    new_empty = torch.Tensor.new_empty

    def noisy(self, *size, **options):
        tensor = new_empty(self, *size, **options)
        return tensor.uniform_(-1, 1) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", noisy)  # nothing that no kernel wrote may count
    got = moved_rows(backend.name, w, state, UPDATES["sgd"], upstream, classes)
    assert len(timed) == 8  # two tiles of each kernel with a matrix product
    assert list(choice._complaints.values()) == [None] * 4
    for mine, other in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


class _Allocations(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) or "zeros" in str(func):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.triton_only
def test_no_gradient_of_the_weight_is_allocated(backend, monkeypatch):
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    monkeypatch.setenv("COSFACE_TRITON_TUNE", "0")  # which would allocate as well
    w, state = draw_inputs("sgd", torch.float32, 1500, backend.device)
    x, *rows = draw_upstream(w, 1500, 3)
    cache = ops.lmcl(x, w, *rows[:2], 0.0, backend.name)[5]
    with _Allocations() as allocations:
        backend_triton.backward_update_(
            x,
            w,
            *rows,
            cache,
            state=state,
            finite=None,
            update=UPDATES["sgd"],
            options=Options(),
            need_dx=True,
        )
    assert 256 * D <= allocations.largest < 1500 * D / 2
