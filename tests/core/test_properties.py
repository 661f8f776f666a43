"""Any shape, dtype, stride and label that hypothesis can think of."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from support import (
    F32,
    F64,
    MIXED_DTYPES,
    SAME_DTYPES,
    Backend,
    check_backend,
    evaluate_oracle,
    random_upstream,
    relative_error,
)
from test_layouts import LAYOUTS

OUTPUTS = ("loss", "lse", "target_cos")
layouts = st.sampled_from([lambda t: t, *LAYOUTS.values()])


def embedding_sizes(backend: Backend) -> st.SearchStrategy[int]:
    """On a GPU few: every size compiles the kernels anew."""
    return st.sampled_from([1, 16, 33, 64]) if backend.device == "cuda" else st.integers(1, 80)


@st.composite
def problems(draw: st.DrawFn, backend: Backend):
    """A problem whose tensors have any strides and whose labels repeat or are missing."""
    accepted = [d for d in (*SAME_DTYPES, *MIXED_DTYPES) if set(d) <= set(backend.dtypes)]
    num_samples, num_classes = draw(st.integers(0, 40)), draw(st.integers(1, 700))
    problem = backend.problem(
        num_samples,
        num_classes,
        draw(embedding_sizes(backend)),
        draw(st.sampled_from(accepted)),
        regime=draw(st.sampled_from(["random", "confident", "wrong"])),
        scale=draw(st.sampled_from([1.0, 4.0, 30.0, 64.0, 128.0])),
        margin=draw(st.floats(0, 0.9)),
        seed=draw(st.integers(0, 1000)),
    )
    if num_samples and draw(st.booleans()):
        labels = draw(st.lists(st.integers(-1, num_classes - 1), min_size=num_samples, max_size=num_samples))
        problem = replace(problem, targets=torch.tensor(labels, device=backend.device))
    problem = replace(problem, x=draw(layouts)(problem.x), w=draw(layouts)(problem.w))
    if backend.contiguous_weight:
        problem = replace(problem, w=problem.w.contiguous())
    note(f"x {tuple(problem.x.shape)} {problem.x.stride()} w {tuple(problem.w.shape)} {problem.w.stride()}")
    note(f"{problem.dtypes} targets {problem.targets.tolist()}")
    return problem


@given(data=st.data())
def test_agrees_with_float64(backend, data):
    problem = data.draw(problems(backend))
    outputs = data.draw(st.lists(st.sampled_from(OUTPUTS), min_size=1, unique=True))
    check_backend(backend, problem, random_upstream(problem, *outputs, seed=data.draw(st.integers(0, 1000))))


@given(data=st.data())
def test_only_directions_count(backend, data):
    """Powers of two times the rows of x and w change no bit of the loss: only exponents move."""
    dtypes = data.draw(st.sampled_from([d for d in (F32, F64) if d.x in backend.dtypes]))
    problem = backend.problem(6, data.draw(st.integers(1, 100)), 16, dtypes)
    factors = st.integers(-20, 20).map(lambda e: 2.0**e)
    loss = backend.loss(problem.x, problem.w, problem.targets, reduction="none")
    again = backend.loss(
        problem.x * data.draw(factors), problem.w * data.draw(factors), problem.targets, reduction="none"
    )
    assert torch.equal(loss, again)


@given(data=st.data())
def test_gradient_is_orthogonal_to_its_row(backend, data):
    """The loss does not depend on lengths, so that <dx_i, x_i> = 0 and <dw_j, w_j> = 0."""
    problem = backend.problem(
        data.draw(st.integers(1, 20)), data.draw(st.integers(2, 300)), data.draw(embedding_sizes(backend))
    )
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    backend.loss(x, w, problem.targets).backward()
    for leaf in (x, w):
        inner = (leaf.detach().double() * leaf.grad.double()).sum(1).abs()
        assert bool((inner <= 1e-5 * leaf.detach().double().norm(dim=1) * 64 / leaf.norm(dim=1)).all())


@given(data=st.data())
def test_order_of_classes_and_samples_is_free(backend, data):
    problem = backend.problem(9, data.draw(st.integers(1, 600)), 24, seed=data.draw(st.integers(0, 100)))
    rows = torch.tensor(data.draw(st.permutations(range(9))), device=backend.device)
    generator = torch.Generator(backend.device).manual_seed(data.draw(st.integers(0, 99)))
    classes = torch.randperm(problem.w.shape[0], generator=generator, device=backend.device)
    loss = backend.loss(problem.x, problem.w, problem.targets, reduction="none")
    shuffled = backend.loss(
        problem.x[rows], problem.w[classes], classes.argsort()[problem.targets[rows]], reduction="none"
    )
    torch.testing.assert_close(shuffled, loss[rows], rtol=1e-4, atol=1e-7)


@given(
    value=st.integers(-(2**40), 2**40),
    row=st.integers(0, 5),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_labels_are_in_range_or_refused(backend, value, row, dtype):
    """No label is ever taken for another: in range it counts, else the message names it and its row."""
    if dtype == torch.int32:
        value = max(min(value, 2**31 - 1), -(2**31))
    problem = backend.problem(6, 9, 4)
    labels = problem.targets.to(dtype)
    labels[row] = value
    if 0 <= value < 9:
        want = evaluate_oracle(replace(problem, targets=labels.long()), random_upstream(problem, "loss")).loss
        got = backend.loss(problem.x, problem.w, labels, reduction="none")
        assert relative_error(got, want) < 1e-5
    elif value != -100:
        with pytest.raises(ValueError, match=f"got {value} at row {row}"):
            backend.loss(problem.x, problem.w, labels, validate_labels=True)
