"""What torch's tracers record of a loss: torch.jit.trace, torch.export, and torch.compile with tangents."""

from typing import NamedTuple

import pytest
import torch
from support.formulas import NAMES, formula_problem, make_head
from torch.autograd import forward_ad
from torch.export import Dim, export

from cosface_kernels import FusedCosFaceLoss, cosface_loss, margin_softmax_loss, nearest_classes
from cosface_kernels.margins import UniFaceMargin
from cosface_kernels.optim import FusedSGD

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Batch(NamedTuple):
    x: torch.Tensor
    w: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    cache: torch.Tensor


def _batch() -> Batch:
    cache = torch.empty(0, dtype=torch.uint8)
    return Batch(torch.randn(4, 3), torch.randn(7, 3), torch.arange(4), torch.full((4,), 8.0), cache)


CALLS = {
    "loss": lambda x, b: cosface_loss(x, b.w, b.labels),
    "margin": lambda x, b: margin_softmax_loss(x, b.w, b.labels, margin=lambda cos: cos - 0.1),
    "sigmoid margin": lambda x, b: margin_softmax_loss(x, b.w, b.labels, margin=UniFaceMargin(0.4, bias=0.0)),
    "nearest": lambda x, b: nearest_classes(x, b.w, 2).cosines,
    "lmcl": lambda x, b: torch.ops.cosface.lmcl(x, b.w, b.labels, b.rows, 0.3, None)[0],
    "lmcl_backward": lambda x, b: torch.ops.cosface.lmcl_backward(
        x, b.w, b.labels, b.rows, b.rows, b.rows, b.rows, b.rows, b.cache, True, True, None
    )[0],
    "sigmoid": lambda x, b: torch.ops.cosface.sigmoid(
        x, b.w, b.labels, b.rows, b.rows, b.rows, b.rows, True, True, None, sigmoid="cross_entropy"
    )[1],
}  # fmt: skip


def _tangent(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize(
    "ask",
    [
        lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),))[1],
        lambda call, x: torch.func.jacfwd(call)(x),
        _tangent,
    ],
    ids=["jvp", "jacfwd", "dual"],
)
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused_in_compiled_code(name, ask):
    """The op in the graph sees no tangent, which would count as 0."""
    batch = _batch()
    compiled = torch.compile(lambda x: ask(lambda x: CALLS[name](x, batch), x), backend="aot_eager")
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        compiled(batch.x)


def test_compiled_code_is_refused_a_tangent():
    batch = _batch()
    for warm in (False, True):
        compiled = torch.compile(lambda x: cosface_loss(x, batch.w, batch.labels), backend="aot_eager")
        if warm:
            compiled(batch.x)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            _tangent(compiled, batch.x)
        torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_head_is_the_head(name):
    x, w, labels = formula_problem("random")
    head = make_head(name, w).eval()
    with torch.no_grad():
        traced = torch.jit.trace(head, (x, labels))
        other = 3 * x.flip(0)[:7], labels.flip(0)[2:]
        torch.testing.assert_close(traced(*other), head(*other), rtol=1e-12, atol=0)


class Finds(torch.nn.Module):
    """A head whose forward is its other two functions."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        cosines, classes = self.head.topk(x, 3)
        return cosines, classes, self.head.get_logits(x)


@pytest.mark.parametrize("options", [{}, {"subcenters": 2}, {"dtype": torch.float8_e4m3fn}])
def test_traced_functions_of_a_head_are_its_own(options):
    """And not memory that nothing has written to, which the tracer sees of a function that it does not."""
    finds, x = Finds(FusedCosFaceLoss(40, 16, **options).eval()), torch.randn(6, 16)
    traced = torch.jit.trace(finds, (x,))
    torch.testing.assert_close(traced(2 * x[:4]), finds(2 * x[:4]))


def test_a_traced_loss_moves_the_rows():
    x, labels = torch.randn(2, 6, 16), torch.arange(6)
    runs = []
    for trace in (True, False):
        torch.manual_seed(0)
        head = FusedCosFaceLoss(40, 16)
        optimizer = FusedSGD(head.parameters(), lr=0.1)
        call = torch.jit.trace(head, (x[0], labels), check_trace=False) if trace else head
        for batch in x:
            call(batch, labels).backward()
            optimizer.step()
        runs.append(head.weight)
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_head_takes_batches_of_any_size(name):
    x, w, labels = formula_problem("random")
    head, twin = (make_head(name, w) for _ in range(2))
    size = {0: Dim("n", min=2, max=64)}
    exported = export(twin, (x, labels), dynamic_shapes={"embeddings": size, "labels": size}).module()
    for batch in ((x, labels), (3 * x[:7], labels[:7])):
        torch.testing.assert_close(exported(*batch), head(*batch), rtol=1e-12, atol=0)
    for key, value in exported.state_dict().items():
        torch.testing.assert_close(value, head.state_dict()[key], rtol=1e-12, atol=0)
