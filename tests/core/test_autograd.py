"""What autograd expects of an operator: every output and input, hooks, graphs used twice, nothing mutated."""

import pytest
import torch
from support import BF16, F32, F64, check_backend, evaluate, random_upstream
from torch.utils.checkpoint import checkpoint

import cosface_kernels
from cosface_kernels import margin_softmax_loss
from cosface_kernels.optim import FusedSGD


@pytest.mark.parametrize(
    ("outputs", "missing"),
    [
        (("loss",), False),
        (("loss",), True),
        (("lse",), True),
        (("target_cos",), True),
        (("lse", "target_cos"), False),
        (("loss", "lse", "target_cos"), True),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "some_missing" if value else "all_targets",
)
def test_gradient_through_each_output(backend, dtypes, outputs, missing):
    problem = backend.problem(13, 530, 40, dtypes, scale=24.0)
    if missing:
        problem.targets[::4] = -1
    check_backend(backend, problem, random_upstream(problem, *outputs))


@pytest.mark.parametrize("outputs", [("loss",), ("lse",), ("target_cos",)], ids="+".join)
@pytest.mark.parametrize("num_classes", [1, 2])
def test_rows_without_negatives(backend, outputs, num_classes):
    """One class: lse = -inf and loss = 0, with zero gradients and no NaN."""
    problem = backend.problem(4, num_classes, 8, F32)
    check_backend(backend, problem, random_upstream(problem, *outputs))


@pytest.mark.parametrize("zeros", ["some", "all"])
def test_zero_upstream_gradients(backend, zeros):
    problem = backend.problem(9, 120, 16, F32)
    upstream = random_upstream(problem, "loss", "lse", "target_cos")
    for g in upstream:
        g[slice(None) if zeros == "all" else slice(2, 6)] = 0
    got = check_backend(backend, problem, upstream)
    assert not got.dx[2:6].any()


def test_largest_neighbour_is_not_differentiable(backend):
    problem = backend.problem(4, 9, 8, F32)
    x = problem.x.requires_grad_()
    *differentiable, max_neg = backend.lmcl(x, problem.w, problem.targets, problem.scale, problem.margin)
    assert not max_neg.requires_grad
    assert all(out.requires_grad for out in differentiable)


@pytest.mark.float64
@pytest.mark.parametrize("num_classes", [1, 2, 6])
def test_gradcheck_of_the_op(backend, num_classes):
    problem = backend.problem(5, num_classes, 4, F64, scale=3.0)
    problem.targets[3] = -1

    def op(x, w, scale):
        loss, lse, target_cos, _ = backend.lmcl(x, w, problem.targets, scale, problem.margin)
        return (loss, lse, target_cos) if num_classes > 1 else (loss, target_cos)

    scale = torch.linspace(1, 8, 5, dtype=torch.float64, device=backend.device)
    leaves = [t.detach().requires_grad_() for t in (problem.x, problem.w, scale)]
    assert torch.autograd.gradcheck(op, leaves, rtol=1e-5, atol=1e-7)


@pytest.mark.float64
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck_of_the_loss(backend, reduction):
    problem = backend.problem(5, 7, 4, F64)
    labels = problem.targets.clone()
    labels[1] = -100

    def loss(x, w, scale, sample_weight, m):
        return margin_softmax_loss(
            x,
            w,
            labels,
            margin=lambda cos: torch.cos(torch.acos(cos) + m) - m,
            scale=scale,
            sample_weight=sample_weight,
            reduction=reduction,
            backend=backend.name,
        )

    double = {"dtype": torch.float64, "device": backend.device}
    scale, m, factors = (fill * torch.ones(shape, **double) for fill, shape in ((3.0, ()), (0.3, ()), (0.6, 5)))
    leaves = [t.requires_grad_() for t in (problem.x, problem.w, scale, factors, m)]
    assert torch.autograd.gradcheck(loss, leaves, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "wanted", [("x",), ("w",), ("scale",), ("x", "w"), ("x", "scale"), ("w", "scale")], ids="+".join
)
def test_only_wanted_gradients(backend, dtypes, wanted):
    problem = backend.problem(8, 70, 16, dtypes)
    upstream = random_upstream(problem, "loss", "lse", "target_cos")
    every = evaluate(backend.lmcl, problem, upstream)
    inputs = {k: getattr(problem, k).detach().requires_grad_(k in wanted) for k in ("x", "w", "scale")}
    outputs = backend.lmcl(inputs["x"], inputs["w"], problem.targets, inputs["scale"], problem.margin)
    torch.autograd.backward(outputs[:3], list(upstream))
    for name, tensor in inputs.items():
        if name in wanted:
            assert torch.equal(tensor.grad, getattr(every, f"d{name}"))
        else:
            assert tensor.grad is None


def _saved(fn):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    return result, saved


def test_nothing_is_saved_without_grad(backend, dtypes):
    problem = backend.problem(8, 70, 16, dtypes)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    with torch.no_grad():
        loss, saved = _saved(lambda: backend.loss(x, w, problem.targets))
    assert loss.grad_fn is None
    assert saved == []
    loss, saved = _saved(lambda: backend.loss(x.detach(), w.detach(), problem.targets))
    assert loss.grad_fn is None
    assert saved == []
    with torch.inference_mode():
        assert backend.loss(x, w, problem.targets).is_inference()
    _, saved = _saved(lambda: backend.loss(x, w, problem.targets))
    assert saved, "the hook sees nothing at all: the test is broken"


def test_saves_no_copy_of_the_weight_and_no_logits(backend, dtypes):
    problem = backend.problem(8, 70, 16, dtypes)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    _, saved = _saved(lambda: backend.lmcl(x, w, problem.targets, problem.scale, problem.margin, cache_bytes=0)[0])
    inputs = {x.data_ptr(), w.data_ptr()}
    norms = 0 if backend.name in ("cpu", "reference") else (72 + 8) * 8  # of each row
    largest = max(norms, 8 * 8)  # a number of each sample
    assert max(t.nbytes for t in saved if t.data_ptr() not in inputs) <= largest


def test_backward_twice_and_nothing_saved_is_mutated(backend, dtypes):
    problem = backend.problem(8, 70, 16, dtypes)
    x, w, scale = (getattr(problem, k).requires_grad_() for k in ("x", "w", "scale"))
    upstream = list(random_upstream(problem, "loss", "lse", "target_cos"))
    outputs, saved = _saved(lambda: backend.lmcl(x, w, problem.targets, scale, problem.margin)[:3])
    watched = [*saved, *outputs, *upstream, x, w, scale]
    before = [(t.detach().clone(), t._version) for t in watched]
    first = torch.autograd.grad(outputs, (x, w, scale), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(outputs, (x, w, scale), upstream)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c), "the second backward wrote into the gradients of the first"
    for tensor, (value, version) in zip(watched, before, strict=True):
        assert tensor._version == version
        assert torch.equal(tensor, value)


def test_gradients_accumulate(backend):
    problem = backend.problem(8, 70, 16, F32)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    loss = backend.loss(x, w, problem.targets)
    loss.backward(retain_graph=True)
    once = x.grad.clone(), w.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(w.grad, 2 * once[1])


@pytest.mark.float64
def test_one_graph_many_uses(backend):
    """Two losses over one weight: their gradients add up."""
    problem = backend.problem(8, 70, 16, F64)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    a = backend.loss(x, w, problem.targets, scale=8.0)
    b = backend.loss(x.flip(0) * 2, w, problem.targets, scale=8.0, margin=0.1)
    together = torch.autograd.grad(3 * a - b, (x, w), retain_graph=True)
    apart = [
        3 * p - q for p, q in zip(torch.autograd.grad(a, (x, w)), torch.autograd.grad(b, (x, w)), strict=True)
    ]
    for got, want in zip(together, apart, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("changed", ["x", "w"])
def test_change_between_forward_and_backward_is_noticed(backend, changed):
    problem = backend.problem(8, 70, 16, F32)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    loss = backend.loss(x, w, problem.targets)
    with torch.no_grad():
        {"x": x, "w": w}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.float64
def test_second_derivative_is_refused_not_wrong(backend):
    problem = backend.problem(4, 9, 8, F64, scale=3.0)
    x = problem.x.requires_grad_()
    w, scale = problem.w.requires_grad_(), problem.scale.requires_grad_()
    for outputs in (
        backend.loss(x, w, problem.targets, scale=scale),
        torch.ops.cosface.lmcl(x, w, problem.targets, scale, 0.3, backend.name)[0].sum(),
    ):
        plain = torch.autograd.grad(outputs, (x, w, scale), retain_graph=True)
        gradients = torch.autograd.grad(outputs, (x, w, scale), create_graph=True)
        assert all(torch.equal(*pair) for pair in zip(gradients, plain, strict=True))
        for gradient in gradients:
            for of in (x, w, scale):
                with pytest.raises(NotImplementedError, match="no second derivative"):
                    torch.autograd.grad(outputs + gradient.square().sum(), of, retain_graph=True)


HEADS = [getattr(cosface_kernels, name) for name in cosface_kernels.__all__ if name.startswith("Fused")]


def _head(kind, **options):
    own = {"FusedMarginLoss": {"margin": 0.3}, "FusedKappaFaceLoss": {"class_counts": range(1, 13)}}
    return kind(12, 8, **own.get(kind.__name__, {}), **options)


@pytest.mark.parametrize("optimizer", [None, FusedSGD])
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_a_penalty_on_the_gradient_of_a_head_is_refused_not_dropped(kind, optimizer):
    head = _head(kind)
    owner = optimizer and optimizer(head.parameters(), lr=0.1)
    x, labels = torch.randn(4, 8, requires_grad=True), torch.arange(4)
    for asks in (
        lambda penalty: torch.autograd.grad(head(x, labels) + penalty, x),
        lambda penalty: penalty.backward(),
    ):
        (g,) = torch.autograd.grad(head(3 * x, labels), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="The loss has no second derivative"):
            asks(g.square().sum())
    if owner:
        owner.step()


@pytest.mark.parametrize("optimizer", [None, FusedSGD])
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_gradients_of_a_head_in_batches_are_refused(kind, optimizer):
    head = _head(kind, reduction="none")
    owner = optimizer and optimizer(head.parameters(), lr=0.1)
    x, labels, before = torch.randn(4, 8, requires_grad=True), torch.arange(4), head.weight.detach().clone()
    for ask in (
        lambda: torch.autograd.grad(head(x, labels), x, torch.eye(4), is_grads_batched=True),
        lambda: torch.autograd.functional.jacobian(lambda x: head(x, labels), x, vectorize=True),
    ):
        with pytest.raises(NotImplementedError, match="The gradients of the loss do not come in batches"):
            ask()
    assert torch.equal(head.weight, before)
    if owner:
        owner.step()


def test_a_penalty_on_the_gradient_of_a_checkpoint_is_refused(backend):
    problem = backend.problem(8, 70, 16, F32)
    x = problem.x.requires_grad_()
    loss = checkpoint(lambda x: backend.loss(x, problem.w, problem.targets), x, use_reentrant=False)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="The loss has no second derivative"):
        torch.autograd.grad(backend.loss(x, problem.w, problem.targets) + g.square().sum(), x)


def test_tensor_hooks(backend):
    problem = backend.problem(8, 70, 16, F32)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    want = torch.autograd.grad(backend.loss(x, w, problem.targets), (x, w))
    seen = []
    x.register_hook(lambda g: g * 3)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss = backend.loss(x, w, problem.targets)
    loss.register_hook(lambda g: g * 2)
    loss.backward()
    torch.testing.assert_close(x.grad, 6 * want[0])
    torch.testing.assert_close(w.grad, 2 * want[1])
    assert torch.equal(seen[0], w.grad)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["checkpoint", "reentrant_checkpoint"])
def test_activation_checkpointing(backend, use_reentrant):
    problem = backend.problem(8, 70, 16, F32)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()

    def step(x):
        return backend.loss(x.tanh(), w, problem.targets)

    want = torch.autograd.grad(step(x), (x, w))
    loss = checkpoint(step, x, use_reentrant=use_reentrant)
    loss.backward()
    assert torch.equal(x.grad, want[0])
    assert torch.equal(w.grad, want[1])


def test_inside_a_network_a_step_lowers_the_loss(backend):
    torch.manual_seed(3)
    net = torch.nn.Linear(12, 8, device=backend.device)
    w = torch.nn.Parameter(torch.randn(20, 8, device=backend.device))
    data, labels = torch.randn(64, 12, device=backend.device), torch.randint(20, (64,), device=backend.device)
    optimizer = torch.optim.SGD([*net.parameters(), w], lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = backend.loss(net(data), w, labels, scale=16.0, margin=0.1)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtypes", [F32, BF16], ids=str)
def test_no_output_aliases_an_input(backend, dtypes):
    problem = backend.problem(8, 70, 16, dtypes)
    got = evaluate(backend.lmcl, problem, random_upstream(problem, "loss"))
    pointers = [
        t.untyped_storage().data_ptr() for t in (*got, problem.x, problem.w, problem.targets, problem.scale)
    ]
    assert len(set(pointers)) == len(pointers)
