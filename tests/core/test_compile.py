"""torch's machinery around the ops: opcheck, torch.compile, autocast, fake tensors, torch.export."""

import io

import pytest
import torch
from support import BF16, F32, F64, Dtypes, evaluate, random_upstream
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_structure

from cosface_kernels import FusedCosFaceLoss, cosface_loss, margin_softmax_loss


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtypes", [F32, F64, BF16, Dtypes(torch.bfloat16, torch.float32)], ids=str)
def test_opcheck_lmcl(backend, dtypes):
    """Schema, autograd registration, fakes against the real outputs, and dynamic shapes."""
    problem = backend.problem(5, 30, 8, dtypes)
    problem.targets[2] = -1
    x, w, scale = (t.requires_grad_() for t in (problem.x, problem.w, problem.scale))
    torch.library.opcheck(
        torch.ops.cosface.lmcl,
        (x, w, problem.targets, scale, problem.margin, backend.name),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("need_dx", [False, True])
@pytest.mark.parametrize("need_dw", [False, True])
def test_opcheck_lmcl_backward(backend, need_dx, need_dw):
    problem = backend.problem(5, 30, 8, Dtypes(torch.float32, torch.bfloat16))
    arguments = (problem.x, problem.w, problem.targets, problem.scale)
    _, top, log_sum, *_, cache, _ = torch.ops.cosface.lmcl(*arguments, problem.margin, backend.name)
    upstream = random_upstream(problem, "lse", "target_cos")
    torch.library.opcheck(
        torch.ops.cosface.lmcl_backward,
        (
            *arguments,
            top,
            log_sum,
            upstream.lse,
            upstream.target_cos,
            cache,
            need_dx,
            need_dw,
            backend.name,
        ),
    )


def test_opcheck_targets():
    for dtype in (torch.int64, torch.int32, torch.uint8):
        torch.library.opcheck(torch.ops.cosface.targets, (torch.tensor([3, 9, 0], dtype=dtype), 5, 9))


def test_fakes_have_the_shapes_dtypes_and_strides_of_results(backend, dtypes):
    problem = backend.problem(6, 30, 8, dtypes)
    upstream = random_upstream(problem, "loss")
    want = evaluate(backend.lmcl, problem, upstream)
    with FakeTensorMode(allow_non_fake_inputs=True):
        got = evaluate(backend.lmcl, problem, upstream)
    for name in want._fields:
        fake, real = getattr(got, name), getattr(want, name)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), name


def _network(backend, dim, num_classes, **options):
    """A layer, a head on it, and a batch."""
    net, head = torch.nn.Linear(12, dim, device=backend.device), backend.head(num_classes, dim, **options)
    data = torch.randn(6, 12, device=backend.device)
    return net, head, data, torch.randint(num_classes, (6,), device=backend.device)


def _forward_and_backward(function, *leaves):
    loss = function(*leaves)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def test_compiled_loss_is_the_same(backend):
    """One graph, forward and backward, with the default compiler; other batch sizes need no other code."""
    labels = torch.tensor([1, 0, 29, -100, 7, 7], device=backend.device)

    def loss(x, w, scale):
        return cosface_loss(2 * x, w, labels[: x.shape[0]], scale=scale, backend=backend.name)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for num_samples in (6, 5, 4):
        leaf = {"device": backend.device, "requires_grad": True}
        x, w, scale = torch.randn(num_samples, 8, **leaf), torch.randn(30, 8, **leaf), torch.tensor(16.0, **leaf)
        got, want = _forward_and_backward(compiled, x, w, scale), _forward_and_backward(loss, x, w, scale)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_compiled_module_is_the_same(backend):
    """The module with its statistics in one graph; run by the eager ops, so that only tracing is on trial."""
    net, head, data, labels = _network(backend, 8, 30, scale=16.0)

    def step(data, labels):
        loss, stats = head(net(data), labels, return_stats=True)
        return loss, stats.accuracy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    parameters = [*net.parameters(), *head.parameters()]
    got, want = compiled(data, labels), step(data, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got[0], parameters),
        torch.autograd.grad(want[0], parameters),
        rtol=1e-5,
        atol=1e-6,
    )


def test_compiled_general_margin_is_the_same(backend):
    labels = torch.randint(30, (6,), device=backend.device)

    def loss(x, w):
        def margin(cos):
            return torch.cos(torch.acos(cos.clamp(-0.999, 0.999)) + 0.5)

        weights = torch.linspace(0, 1, 6, device=backend.device)
        return margin_softmax_loss(
            x, w, labels, margin=margin, scale=x.norm(dim=1), sample_weight=weights, backend=backend.name
        )

    leaves = [torch.randn(rows, 8, device=backend.device, requires_grad=True) for rows in (6, 30)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        _forward_and_backward(compiled, *leaves), _forward_and_backward(loss, *leaves), rtol=1e-5, atol=1e-6
    )


def test_compiled_code_still_checks_labels(backend):
    x, w = (torch.randn(rows, 3, device=backend.device) for rows in (2, 5))
    compiled = torch.compile(
        lambda labels: cosface_loss(x, w, labels, validate_labels=True, backend=backend.name), backend="aot_eager"
    )
    assert compiled(torch.tensor([0, 4], device=backend.device)).isfinite()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) .*got 5 at row 1"):
        compiled(torch.tensor([0, 5], device=backend.device))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_nothing_inside(backend, low):
    """A backbone's output is low precision under autocast; the head's arithmetic and weight stay float32."""
    net, head, data, labels = _network(backend, 64, 300)
    with torch.autocast(backend.device, dtype=low):
        x = net(data).detach().requires_grad_()
        loss = head(x, labels)
        logits = head.get_logits(x)
    assert x.dtype == low
    assert loss.dtype == logits.dtype == torch.float32
    got = torch.autograd.grad(loss, (x, head.weight))
    want_loss = head(x, labels)
    want = torch.autograd.grad(want_loss, (x, head.weight))
    assert torch.equal(loss, want_loss)
    assert torch.equal(logits, head.get_logits(x))
    assert [g.dtype for g in got] == [low, torch.float32]
    assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))
    with torch.autocast(backend.device, dtype=low):  # some call backward inside
        loss = head(x, labels)
        inside = torch.autograd.grad(loss, (x, head.weight))
    assert all(torch.equal(g, e) for g, e in zip(inside, want, strict=True))


def test_autocast_around_a_whole_network(backend):
    net, head, data, labels = _network(backend, 64, 300)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        loss = head(net(data), labels)
    loss.backward()
    assert {p.grad.dtype for p in (*net.parameters(), *head.parameters())} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (*net.parameters(), *head.parameters()))


@pytest.mark.parametrize(
    "call",
    [
        lambda head, x, labels: head(x, labels),
        lambda head, x, labels: head.topk(x, 3),
        lambda head, x, labels: head(x, labels, return_stats=True),
        lambda head, x, labels: head(x, labels, return_stats=2, entropy=True)[1],
        lambda head, x, labels: {"sparsity": head(x, labels, return_stats=True)[1].sparsity},
    ],
    ids=["loss", "topk", "loss and stats", "all stats", "sparsity"],
)
def test_what_is_exported_can_be_saved_and_loaded(call, request):
    """And gives what was exported, in the classes that it has here."""
    tolerance = 0.1 if request.node.callspec.id == "sparsity" else 0.0
    module = nn.Module()
    module.head = FusedCosFaceLoss(9, 4, backend="cpu", gradient_tolerance=tolerance).eval()
    module.forward = lambda x, labels: call(module.head, x, labels)
    x, labels, file = torch.randn(5, 4), torch.arange(5), io.BytesIO()
    torch.export.save(torch.export.export(module, (x, labels)), file)
    file.seek(0)
    got, want = torch.export.load(file).module()(x, labels), module(x, labels)
    assert tree_structure(got) == tree_structure(want)
    torch.testing.assert_close(tree_leaves(got), tree_leaves(want))
