"""Bad input: a sentence that shows the value, before any work, and nothing is changed."""

import math
import re

import numpy as np
import pytest
import torch
from support import run_python
from torch.autograd import forward_ad

from cosface_kernels import (
    FusedArcFaceLoss,
    FusedCombinedMarginLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedKappaFaceLoss,
    FusedMagFaceLoss,
    cosface_loss,
    margin_softmax_loss,
)
from cosface_kernels.backends import BACKENDS, select
from cosface_kernels.functional import cosine_logits
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.sampling import ClassSampler

HEADS_WITH_ANGLES = (
    FusedArcFaceLoss,
    FusedCombinedMarginLoss,
    FusedCurricularFaceLoss,
    FusedKappaFaceLoss,
    FusedMagFaceLoss,
)


def _batch(device=None):
    """4 embeddings of size 3, 5 classes; gradients are there already and must survive."""
    x, w = torch.randn(4, 3, device=device), torch.randn(5, 3, device=device)
    for leaf in (x, w):
        leaf.requires_grad_()
        leaf.grad = torch.ones_like(leaf)
    return {"embeddings": x, "weight": w, "labels": torch.tensor([0, 1, 2, 4], device=device)}


def _refused(error, message, *, function=cosface_loss, device=None, **changes):
    """Calls with `changes` over a good batch; the message must match, and no input may change."""
    inputs = {**_batch(device), **changes}
    tensors = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    before = [(t.detach().clone(), t._version, None if t.grad is None else t.grad.clone()) for t in tensors]
    state = torch.get_rng_state()
    with pytest.raises(error, match=message) as raised:
        function(**inputs)
    text = str(raised.value)
    assert re.match(r"[A-Za-z']", text), f"not a sentence: {text!r}"
    assert text.rstrip().endswith("."), f"not a sentence: {text!r}"
    for tensor, (value, version, grad) in zip(tensors, before, strict=True):
        assert tensor._version == version
        now, then = (t.to(torch.complex128) for t in (tensor, value))  # of any dtype
        assert tensor.is_meta or torch.allclose(now, then, rtol=0, atol=0, equal_nan=True)
        assert (tensor.grad is None) if grad is None else torch.equal(tensor.grad, grad)
    assert torch.equal(torch.get_rng_state(), state)


def _with_label(value, row=2, dtype=torch.int64, device=None):
    labels = torch.tensor([0, 1, 2, 4], dtype=dtype, device=device)
    labels[row] = value
    return labels


@pytest.mark.parametrize("value", [5, 6, 10**12, -1, -99, -101, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("row", [0, 3])
def test_label_out_of_range(backend, value, row):
    message = rf"labels must be in \[0, 5\) or equal to ignore_index -100, got {value} at row {row}\."
    labels = _with_label(value, row, device=backend.device)
    options = {"validate_labels": True, "backend": backend.name}
    _refused(ValueError, message, device=backend.device, labels=labels, **options)


@pytest.mark.parametrize("value", [5, 2**31 + 1, 2**32 + 1, -1, -2, 2**63 - 1])
@pytest.mark.parametrize("general", [False, True], ids=["cosface", "any_margin"])
def test_label_that_is_not_validated_makes_its_own_loss_nan(backend, value, general):
    """No wait for the device, nothing read out of bounds, and no other sample is touched."""
    batch = {k: t.detach() for k, t in _batch(backend.device).items()}
    margin = (lambda cos: cos - 0.35) if general else 0.35

    def run(labels, keep):
        x, w = (batch[k].clone().requires_grad_() for k in ("embeddings", "weight"))
        loss = margin_softmax_loss(
            x, w, labels, margin=margin, reduction="none", validate_labels=False, backend=backend.name
        )
        loss[keep].sum().backward()
        return loss.detach(), x.grad, w.grad

    keep = [0, 1, 3]
    labels = _with_label(value, device=backend.device)
    ignored = run(_with_label(-100, device=backend.device), keep)
    loss, dx, dw = run(labels, keep)
    assert loss[2].isnan()
    assert torch.equal(loss[keep], ignored[0][keep])
    assert torch.equal(dx, ignored[1])
    assert torch.equal(dw, ignored[2])
    inputs = {**batch, "labels": labels}
    assert cosface_loss(**inputs, validate_labels=False, backend=backend.name).isnan()
    with pytest.raises(ValueError, match=rf"got {value} at row 2"):
        cosface_loss(**inputs, validate_labels=True, backend=backend.name)


def test_first_of_many_wrong_labels_is_named():
    _refused(ValueError, "got 7 at row 1", labels=torch.tensor([0, 7, 9, -3]))


def test_ignore_index_is_shown_and_only_it_is_accepted():
    _refused(ValueError, r"ignore_index -1, got -100 at row 2", labels=_with_label(-100), ignore_index=-1)
    assert cosface_loss(**{**_batch(), "labels": _with_label(-1)}, ignore_index=-1).isfinite()


def test_narrow_labels_are_checked_too():
    _refused(ValueError, "got -128 at row 2", labels=_with_label(-128, dtype=torch.int8))
    _refused(ValueError, "got 200 at row 2", labels=_with_label(200, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.complex64], ids=str)
def test_labels_not_integer(dtype):
    _refused(TypeError, f"labels .*integer.*{dtype}", labels=torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("name", ["embeddings", "weight"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e5m2], ids=str)
def test_not_floating(name, dtype):
    bad = torch.ones(4 if name == "embeddings" else 5, 3).to(dtype)
    _refused(TypeError, f"{name} .*{dtype}", **{name: bad})


@pytest.mark.parametrize(
    ("name", "layout"),
    [("embeddings", "sparse"), ("weight", "sparse_csr"), ("weight", "mkldnn"), ("labels", "sparse")],
)
def test_not_dense(name, layout):
    batch = _batch()
    batch[name] = getattr(batch[name].detach(), f"to_{layout}")()
    with pytest.raises(TypeError, match=f"^{name} must be dense, .*{layout}"):
        cosface_loss(**batch)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", ["embeddings", "labels"])
def test_nested(name):
    batch = _batch()
    batch[name] = torch.nested.nested_tensor([*batch[name].detach()])
    with pytest.raises(TypeError, match=f"^{name} must be dense, got a nested tensor of 4, which torch.stack"):
        cosface_loss(**batch)


def test_embedding_size_mismatch_shows_both():
    _refused(ValueError, r"embeddings have size 128 but .* embedding_size 3\b", embeddings=torch.randn(4, 128))


@pytest.mark.parametrize("num_labels", [0, 3, 5])
def test_number_of_labels(num_labels):
    _refused(ValueError, rf"4 and {num_labels}\b", labels=torch.zeros(num_labels, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embeddings", (3,)),
        ("embeddings", (1, 4, 3)),
        ("weight", (15,)),
        ("weight", (5, 1, 3)),
        ("labels", ()),
        ("labels", (4, 1)),
    ],
)
def test_wrong_rank(name, shape):
    dtype = torch.int64 if name == "labels" else torch.float32
    _refused(
        ValueError,
        f"{name} must have shape .*{re.escape(str(shape))}",
        **{name: torch.zeros(shape, dtype=dtype)},
    )


@pytest.mark.parametrize("name", ["embeddings", "weight", "labels"])
def test_different_devices(name):
    batch = _batch()
    _refused(ValueError, r"one device.*(cpu.*meta|meta.*cpu)", **{name: batch[name].detach().to("meta")})


def test_no_classes_or_no_columns():
    _refused(ValueError, r"num_classes .*positive.* 0\b", weight=torch.zeros(0, 3))
    _refused(
        ValueError, r"embedding_size .*positive.* 0\b", weight=torch.zeros(5, 0), embeddings=torch.zeros(4, 0)
    )


@pytest.mark.parametrize("value", [0, 0.0, -1.0, -64, math.nan, math.inf, -math.inf])
def test_scale(value):
    _refused(ValueError, rf"scale must be positive and finite, got {re.escape(str(value))}", scale=value)
    tensor = torch.tensor(float(value))
    _refused(ValueError, rf"scale must be positive and finite, got {re.escape(str(float(value)))}", scale=tensor)


@pytest.mark.parametrize("value", [-1.0, math.inf])
def test_scale_of_one_sample(value):
    _refused(ValueError, f"scale must be .*{value}", scale=torch.tensor([64.0, 64.0, value, 1.0]))


@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (4, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("name", ["scale", "sample_weight"])
def test_one_value_per_sample(name, shape):
    _refused(ValueError, rf"{name} .*\(4,\).*{re.escape(str(shape))}", **{name: torch.ones(shape)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_margin(value):
    _refused(ValueError, f"margin must be .*finite.*{value}", margin=value)
    _refused(ValueError, f"margin must be .*finite.*{value}", margin=value, function=margin_softmax_loss)


@pytest.mark.parametrize(
    "margin", [lambda c: c[:2], lambda c: c.sum(), lambda c: c[:, None]], ids=["2", "0d", "column"]
)
def test_margin_that_changes_the_shape(margin):
    _refused(ValueError, r"margin.*\(4,\)", margin=margin, function=margin_softmax_loss)


@pytest.mark.parametrize("value", ["avg", "batchmean", "", "MEAN"])
def test_reduction(value):
    _refused(ValueError, f"reduction must be one of none, sum, mean, got '{value}'", reduction=value)


@pytest.mark.parametrize("value", ["cuda_tensor_cores", "CPU", "fastest"])
def test_unknown_backend(value):
    names = ".*".join(BACKENDS)
    _refused(ValueError, f"backend must be .*{names}.*got '{value}'", backend=value)


def test_labels_are_checked_before_the_backend_runs(monkeypatch):
    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "forward", lambda *_: pytest.fail("work was done on a bad batch"))
    _refused(ValueError, "got 5 at row 2", labels=_with_label(5))
    _refused(ValueError, "scale", scale=-1)
    _refused(ValueError, "reduction", reduction="avg")


def test_named_backend_says_why_it_cannot_run():
    x, w, labels = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1])
    code = """
import sys
sys.modules["cosface_kernels._C"] = None  # as if it were not built
import torch, cosface_kernels
x, w, labels = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1])
assert cosface_kernels.cosface_loss(x, w, labels).isfinite()
try:
    cosface_kernels.cosface_loss(x, w, labels, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert re.search(r"backend 'cpu' cannot run.*cosface_kernels\._C", done.stdout), done.stdout
    assert "reference" in done.stderr, "nothing falls through silently"
    assert cosface_loss(x, w, labels, backend="cpu").isfinite()


def test_backend_that_does_not_take_the_device_says_why():
    x, w = torch.empty(2, 3, device="meta"), torch.empty(5, 3, device="meta")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: .*meta"):
        select("cpu", x, w)
    with pytest.warns(UserWarning, match=r"reference runs.*meta"):
        assert select(None, x, w) is BACKENDS["reference"]


@pytest.mark.parametrize("value", [0, -5, 2.0, None])
@pytest.mark.parametrize("name", ["num_classes", "embedding_size"])
def test_module_sizes(name, value):
    sizes = {"num_classes": 5, "embedding_size": 3, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value}"):
        FusedCosFaceLoss(**sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": math.nan}, "scale must be positive and finite, got nan"),
        ({"margin": math.inf}, "margin must be a finite number, got inf"),
        ({"reduction": "avg"}, "reduction must be one of none, sum, mean, got 'avg'"),
        ({"backend": "gpu"}, "backend must be .*cpu.*reference.*got 'gpu'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_module_options(options, message):
    with pytest.raises(ValueError, match=message):
        FusedCosFaceLoss(5, 3, **options)


def test_module_input():
    head = FusedCosFaceLoss(5, 3)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="embeddings have size 4 but the weight expects embedding_size 3"):
        head(torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="got 5 at row 1"):
        head(torch.randn(2, 3), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"embeddings .*4.*3"):
        head.get_logits(torch.randn(2, 4))
    assert torch.equal(head.weight, before)
    assert head.weight.grad is None


def test_ops_check_their_labels():
    with pytest.raises(
        ValueError, match=r"labels must be in \[0, 5\) or equal to ignore_index -100, got 5 at row 0\."
    ):
        torch.ops.cosface.targets(torch.tensor([5]), 5, -100)
    targets = torch.ops.cosface.targets(torch.tensor([4, -100, 0], dtype=torch.int32), 5, -100)
    assert targets.tolist() == [4, -1, 0]
    assert targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cache_bytes", -5),
        ("cache_bytes", 1e6),
        ("cache_bytes", 10**30),
        ("workspace_bytes", -5),
        ("workspace_bytes", 1e6),
        ("ignore_index", None),
        ("ignore_index", 1.5),
        ("ignore_index", 2**70),
    ],
)
def test_an_option_that_is_no_integer(option, value):
    message = rf"{option} must be an integer.*, got {value}\."
    if option == "ignore_index":
        _refused(ValueError, message, ignore_index=value)
    _refused(ValueError, message, function=margin_softmax_loss, margin=0.1, **{option: value})
    with pytest.raises(ValueError, match=message):
        FusedCosFaceLoss(5, 3, **{option: value})


def test_logits_take_one_scale():
    x, w, scales = torch.randn(4, 4), torch.randn(5, 4), torch.tensor([1.0, 2.0])
    each = torch.func.vmap(lambda s: cosine_logits(x, w, scale=s))(scales)  # (2, 4, 5)
    torch.testing.assert_close(each, scales[:, None, None] * cosine_logits(x, w))
    for value in (0, -1.0, math.nan):
        for scale in (value, torch.tensor(float(value))):
            with pytest.raises(ValueError, match=f"scale must be positive and finite, got {value}"):
                cosine_logits(x, w, scale=scale)
    with pytest.raises(ValueError, match=r"scale must be a number or a 0-d tensor, got shape \(4,\)\."):
        cosine_logits(torch.randn(4, 4), torch.randn(5, 4), scale=torch.ones(4))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("of", ["embeddings", "scale"])
def test_forward_mode_is_refused(backend, of, requires_grad):
    """A tangent would not pass through the op, and count as 0."""
    inputs = {**_batch(backend.device), "scale": torch.tensor(9.0, device=backend.device)}
    inputs = {
        k: v.detach().requires_grad_(requires_grad) if v.is_floating_point() else v for k, v in inputs.items()
    }

    def loss(value):
        return cosface_loss(**{**inputs, of: value}, backend=backend.name)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (inputs[of],), (torch.ones_like(inputs[of]),))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"), forward_ad.dual_level():
        loss(forward_ad.make_dual(inputs[of], torch.ones_like(inputs[of])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validate_labels": "no"}, "validate_labels must be True, False or None, got 'no'"),
        ({"dtype": torch.int64}, r"dtype must be float64, .*, got torch\.int64"),
        ({"sample_rate": 0.5, "sample_seed": None}, "sample_seed must be an integer, got None"),
        ({"sample_rate": 0.5, "sample_seed": 1.5}, r"sample_seed must be an integer, got 1\.5"),
    ],
)
def test_options_of_a_head(options, message):
    with pytest.raises(ValueError, match=message):
        FusedCosFaceLoss(5, 3, **options)


@pytest.mark.parametrize("num_classes", [60.5, -3, "a"])
def test_a_sampler_of_no_number_of_classes(num_classes):
    with pytest.raises(ValueError, match=f"num_classes must be an integer of at least 0, got {num_classes!r}"):
        ClassSampler(num_classes, 0.5)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian, torch.func.vmap, torch.func.vjp]
)
def test_transforms_of_functions_are_refused(transform, owned):
    head = FusedCosFaceLoss(5, 3)
    optimizer = FusedSGD(head.parameters(), lr=0.1) if owned else None
    before, x = head.weight.detach().clone(), torch.randn(4, 3)

    def loss(x):
        return head(x, torch.arange(4))

    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms|no forward-mode"):
        transform(loss, x) if transform is torch.func.vjp else transform(loss)(x)
    assert torch.equal(head.weight, before)
    if optimizer:
        optimizer.step()


@pytest.mark.parametrize("value", ["abc", "1e3", "0", "-4", ""])
def test_a_tile_that_is_no_number_of_classes(value, monkeypatch):
    monkeypatch.setenv("COSFACE_CPU_TILE", value)
    message = rf"COSFACE_CPU_TILE must be a positive number of classes, got '{value}'\."
    _refused(ValueError, message, backend="cpu")


def test_a_tile_of_more_classes_than_there_are(monkeypatch):
    torch.manual_seed(0)
    want = cosface_loss(**_batch(), backend="cpu")
    monkeypatch.setenv("COSFACE_CPU_TILE", str(10**9))
    torch.manual_seed(0)
    assert torch.equal(cosface_loss(**_batch(), backend="cpu"), want)


def test_an_unknown_instruction_set_never_falls_to_the_reference():
    code = """
import torch
from cosface_kernels import cosface_loss
from cosface_kernels.info import describe
print(describe())
cosface_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))
"""
    done = run_python(code, COSFACE_CPU_ISA="AVX2")
    assert "COSFACE_CPU_ISA must be one that this processor runs" in done.stderr
    assert done.returncode != 0
    assert "backend cpu: unavailable: COSFACE_CPU_ISA must be one" in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("embeddings", [[1.0] * 3] * 4, r"list \[\[1.0, 1.0, 1.0\], .*\]"),
        ("embeddings", np.ones((4, 3)), r"ndarray array\("),
        ("weight", np.ones((5, 3)), r"ndarray array\("),
        ("labels", [0, 1, 2, 4], r"list \[0, 1, 2, 4\]"),
        ("labels", np.arange(4), r"ndarray array\(\[0, 1, 2, 3\]\)"),
        ("sample_weight", (1.0, 1.0, 1.0, 1.0), r"tuple \(1.0, 1.0, 1.0, 1.0\)"),
    ],
)
def test_no_tensor(name, value, seen):
    """Of another library, or none: told at the door."""
    message = f"{name} must be a torch.Tensor, got {seen}.*; torch.as_tensor makes one of it"
    _refused(TypeError, message, **{name: value})
    if name in ("embeddings", "labels"):
        batch = {"embeddings": torch.ones(4, 3), "labels": torch.arange(4), name: value}
        for head in (
            FusedCosFaceLoss(5, 3),
            FusedCosFaceLoss(5, 3, sample_rate=0.9),
            FusedCurricularFaceLoss(5, 3),
        ):
            with pytest.raises(TypeError, match=message):
                head(**batch)
    if name == "embeddings":
        with pytest.raises(TypeError, match=message):
            FusedCosFaceLoss(5, 3).get_logits(value)


@pytest.mark.parametrize("module", HEADS_WITH_ANGLES, ids=lambda module: module.__name__)
def test_an_angle_in_degrees(module):
    """What pytorch-metric-learning calls 28.6 is 0.4992 here."""
    options = {"class_counts": [1] * 5} if module is FusedKappaFaceLoss else {}
    margin = {FusedCombinedMarginLoss: (1, 28.6, 0), FusedMagFaceLoss: (28.6, 45)}.get(module, 28.6)
    with pytest.raises(ValueError, match=r"in \[0, pi\) radians, got 28.6; if these are degrees, give 0.4992\."):
        module(5, 3, margin, **options)
    with pytest.raises(ValueError, match=r"in \[0, pi\) radians, got -0.1\."):
        FusedArcFaceLoss(5, 3, -0.1)


def test_a_head_in_place_of_its_parameters():
    head = FusedCosFaceLoss(5, 3)
    for optimizer in (FusedSGD, FusedAdamW):
        with pytest.raises(
            TypeError, match=f"{optimizer.__name__} takes parameters, got the module FusedCosFaceLoss"
        ):
            optimizer(head, lr=0.1)


def test_labels_that_int64_does_not_hold_are_refused(backend):
    """2^64 - 100 is ignore_index, once it is an int64."""
    x, w = torch.randn(2, 3, device=backend.device), torch.randn(5, 3, device=backend.device)
    labels = torch.tensor([1, 2**64 - 100], dtype=torch.uint64, device=backend.device)
    for margin in (0.3, lambda cos: cos - 0.3):
        with pytest.raises(TypeError, match=r"an integer dtype that int64 holds, got torch\.uint64\."):
            margin_softmax_loss(x, w, labels, margin=margin, backend=backend.name)
