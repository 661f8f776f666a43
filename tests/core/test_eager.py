"""The ways past torch's dispatcher in eager mode: they give what the op gives, not where torch listens."""

import pytest
import torch
from support import BF16, F32, F64, Dtypes, make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels import cosface_loss, ops
from cosface_kernels.reference import compute_dtype

LABELS = {
    "valid": {},
    "ignored": {1: -100, 4: -100},
    "out of range": {2: 60, 5: -7},
    "none": dict.fromkeys(range(9), -100),
}


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def _gradients(problem, labels, upstream, **options):
    x, w = (rows.detach().clone().requires_grad_() for rows in (problem.x, problem.w))
    result = cosface_loss(x, w, labels, backend="cpu", scale=20.0, validate_labels=False, **options)
    loss = result[0] if options.get("return_stats") else result
    loss.backward(upstream if loss.dim() else upstream[0])
    return loss, x.grad, w.grad


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dtypes", [F64, F32, BF16, Dtypes(torch.bfloat16, torch.float64)], ids=str)
def test_one_call_gives_what_the_op_gives(dtypes, kind, reduction):
    problem = make_problem(9, 60, 24, dtypes)
    labels = problem.targets.clone()
    for row, label in LABELS[kind].items():
        labels[row] = label
    problem.x[4] = torch.nan if kind == "ignored" else problem.x[4]
    upstream = torch.tensor([2.0, -1, 0, 3, 1, 0.5, 0, 1, 1], dtype=compute_dtype(problem.x, problem.w))
    loss, *got = _gradients(problem, labels, upstream, reduction=reduction)
    assert loss.grad_fn.name() == "_LossBackward"
    want_loss, *want = _gradients(problem, labels, upstream, reduction=reduction, return_stats=True)
    assert want_loss.grad_fn.name() != "_LossBackward"
    assert torch.equal(loss.nan_to_num(-1), want_loss.nan_to_num(-1))
    for of_one_call, of_the_op in zip(got, want, strict=True):
        eps = torch.finfo(of_the_op.dtype).eps
        torch.testing.assert_close(
            of_one_call, of_the_op, rtol=8 * eps, atol=8 * eps * of_the_op.abs().max().item()
        )


def test_gradients_that_are_not_wanted():
    problem = make_problem(5, 40, 16, F32)
    for needed in ((True, False), (False, True)):
        x, w = (
            rows.detach().requires_grad_(wanted)
            for rows, wanted in zip((problem.x, problem.w), needed, strict=True)
        )
        cosface_loss(x, w, problem.targets, backend="cpu").backward()
        assert [rows.grad is not None for rows in (x, w)] == list(needed)


def test_a_mode_sees_the_ops(backend):
    problem = backend.problem(5, 40, 16, F32)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    with _Seen() as seen:
        loss = backend.loss(x, w, problem.targets)
        loss.backward()
    assert {"cosface.targets.default", "cosface.lmcl.default", "cosface.lmcl_backward.default"} <= set(seen.names)
    want = torch.autograd.grad(backend.loss(x, w, problem.targets), (x, w))
    torch.testing.assert_close((x.grad, w.grad), want)


def test_no_op_is_dispatched_in_eager_mode(backend, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the dispatcher was asked")

    for op in (ops.targets, ops.lmcl, ops.lmcl_backward):
        monkeypatch.setattr(op, "registered", refuse)
    problem = backend.problem(5, 40, 16, F32)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    loss, _ = backend.loss(x, w, problem.targets, return_stats=True)
    loss.backward()
    assert bool(w.grad.any())


def test_tensors_without_memory_take_the_op():
    x, w = torch.empty(4, 8, device="meta"), torch.empty(20, 8, device="meta")
    loss = cosface_loss(x, w, torch.zeros(4, dtype=torch.int64, device="meta"), backend="reference")
    assert loss.device.type == "meta"
    assert loss.shape == ()
