"""Any strides: views, transposes, slices, expanded rows, odd offsets."""

from dataclasses import replace

import pytest
import torch
from support import F32, check_backend, evaluate, random_upstream


def _transposed(t):
    return t.T.contiguous().T


def _every_other_row(t):
    return torch.stack([t, torch.full_like(t, 7.0)], dim=1).flatten(0, 1)[::2]


def _every_other_column(t):
    return torch.stack([t, torch.full_like(t, 7.0)], dim=2).flatten(1)[:, ::2]


def _column_slice(t):
    return torch.cat([torch.full_like(t, 7.0), t, torch.full_like(t, 7.0)], dim=1)[:, t.shape[1] : 2 * t.shape[1]]


def _odd_offset(t):
    return torch.cat([t.new_full((1,), 7.0), t.reshape(-1)])[1:].view(t.shape)


def _expanded_rows(t):
    return t[:1].expand(t.shape)


def _expanded_columns(t):
    return t[:, :1].expand(t.shape)


LAYOUTS = {
    f.__name__.strip("_"): f
    for f in (
        _transposed,
        _every_other_row,
        _every_other_column,
        _column_slice,
        _odd_offset,
        _expanded_rows,
        _expanded_columns,
    )
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["x", "w", "x_and_w"])
def test_any_strides(backend, dtypes, operand, layout):
    problem = backend.problem(6, 530, 20, dtypes)
    changed = {k: LAYOUTS[layout](getattr(problem, k)) for k in operand.split("_and_")}
    check_backend(backend, replace(problem, **changed))


@pytest.mark.parametrize("operand", ["x", "w"])
def test_gradient_of_an_expanded_row_is_the_sum(backend, operand):
    """Autograd sums over the rows of the view: the gradient of each must be there."""
    problem = backend.problem(6, 40, 8, F32)
    rows = {"x": problem.x, "w": problem.w}
    row = rows[operand][:1].clone().requires_grad_()
    rows[operand] = row.expand(rows[operand].shape)
    backend.loss(rows["x"], rows["w"], problem.targets, reduction="sum").backward()
    dense = {k: v.detach().contiguous().requires_grad_() for k, v in rows.items()}
    backend.loss(dense["x"], dense["w"], problem.targets, reduction="sum").backward()
    torch.testing.assert_close(row.grad, dense[operand].grad.sum(0, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.strided_weight
def test_strides_change_nothing(backend):
    """The same numbers in another layout give the same result, to rounding."""
    problem = backend.problem(7, 300, 33, F32)
    upstream = random_upstream(problem, "loss")
    want = evaluate(backend.lmcl, problem, upstream)
    for layout in (_transposed, _every_other_row, _every_other_column, _column_slice, _odd_offset):
        moved = replace(problem, x=layout(problem.x), w=layout(problem.w))
        for got, expected in zip(evaluate(backend.lmcl, moved, upstream), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_strided_upstream_gradient(backend):
    problem = backend.problem(6, 50, 8, F32)
    g = torch.randn(12, device=backend.device)
    x = problem.x.requires_grad_()
    loss = backend.loss(x, problem.w, problem.targets, reduction="none")
    (strided,) = torch.autograd.grad(loss, x, g[::2], retain_graph=True)
    (dense,) = torch.autograd.grad(loss, x, g[::2].clone(), retain_graph=True)
    (expanded,) = torch.autograd.grad(loss, x, g[:1].expand(6), retain_graph=True)
    (repeated,) = torch.autograd.grad(loss, x, g[:1].repeat(6))
    assert torch.equal(strided, dense)
    assert torch.equal(expanded, repeated)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_of_any_integer_dtype_and_stride(backend, dtype):
    problem = backend.problem(9, 100, 8, F32)
    want = backend.loss(problem.x, problem.w, problem.targets, reduction="none")
    labels = problem.targets.to(dtype)
    strided = torch.stack([labels, labels * 0 + 99], dim=1)[:, 0]
    assert not strided.is_contiguous()
    for variant in (labels, strided):
        assert torch.equal(backend.loss(problem.x, problem.w, variant, reduction="none"), want)
