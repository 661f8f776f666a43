"""The ways past torch's dispatcher in eager mode: they give what the op gives, not where torch listens."""

import pytest
import torch
from support import BF16, F32, F64, Dtypes, make_problem
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosface_kernels import cosface_loss, nearest_classes, ops
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


def _with_pending_sign(t):
    """As the imaginary part of a conjugate: memory holds -t."""
    return torch._neg_view(-t)


@pytest.mark.parametrize("whole_op", [False, True], ids=["one_call", "op"])
@pytest.mark.parametrize("name", ["x", "w", "upstream"])
def test_a_pending_sign_counts(backend, name, whole_op):
    problem = backend.problem(6, 60, 16, F32)

    def gradients(change):
        given = {"x": problem.x, "w": problem.w, "upstream": torch.linspace(-1, 2, 6, device=backend.device)}
        given[name] = change(given[name])
        x, w = (given[rows].detach().requires_grad_() for rows in "xw")
        result = backend.loss(x, w, problem.targets, reduction="none", return_stats=whole_op)
        loss = result[0] if whole_op else result
        return loss, *torch.autograd.grad(loss, (x, w), given["upstream"])

    torch.testing.assert_close(gradients(_with_pending_sign), gradients(lambda t: t))


def test_the_nearest_of_a_pending_sign(backend):
    problem = backend.problem(6, 60, 16, F32)
    want = nearest_classes(problem.x, problem.w, 3, backend=backend.name)
    for x, w in ((_with_pending_sign(problem.x), problem.w), (problem.x, _with_pending_sign(problem.w))):
        torch.testing.assert_close(nearest_classes(x, w, 3, backend=backend.name), want)


def test_a_loss_that_is_an_imaginary_part():
    problem = make_problem(6, 60, 16, F32)
    x = problem.x.requires_grad_()
    loss = cosface_loss(x, problem.w, problem.targets, backend="cpu")
    (want,) = torch.autograd.grad(-loss, x, retain_graph=True)
    (got,) = torch.autograd.grad(torch.complex(torch.zeros(()), loss).conj().imag, x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("place", range(4), ids=["x", "w", "targets", "scale"])
def test_a_subclass_in_any_place_is_seen(backend, place):
    """Its own memory, if it has any, is not what it stands for."""
    problem = backend.problem(6, 60, 16, F32)
    inputs = [problem.x, problem.w, problem.targets, problem.scale]
    want = ops.lmcl(*inputs, 0.35, backend.name)[0]
    inputs[place] = TwoTensor(inputs[place], inputs[place].clone())
    got = ops.lmcl(*inputs, 0.35, backend.name)[0]
    assert isinstance(got, TwoTensor)
    assert torch.equal(got.a, want)


@pytest.mark.parametrize("name", ["x", "w", "upstream"])
def test_zeros_that_are_not_stored_are_refused(name):
    problem = make_problem(6, 60, 16, F32)
    given = {"x": problem.x, "w": problem.w, "upstream": torch.ones(6)}
    given[name] = torch._efficientzerotensor(given[name].shape)
    x, w = given["x"].requires_grad_(), given["w"]
    with pytest.raises(ValueError, match=r"^The kernels got a tensor without memory of its own\.$"):
        cosface_loss(x, w, problem.targets, reduction="none", backend="cpu").backward(given["upstream"])
