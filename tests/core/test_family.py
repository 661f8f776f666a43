"""Heads of the family: state, bad batches, precision, signatures, domains."""

import inspect
import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from support.formulas import (
    CLASS_COUNTS,
    DIM,
    LOSSES,
    NAMES,
    NUM_CLASSES,
    SIGMOIDS,
    as_leaves,
    formula_problem,
    make_head,
)

import cosface_kernels
from cosface_kernels import (
    FusedAdaCosLoss,
    FusedAdaFaceLoss,
    FusedArcFaceLoss,
    FusedASoftmaxLoss,
    FusedCombinedMarginLoss,
    FusedCosFaceLoss,
    FusedCurricularFaceLoss,
    FusedGBCosFaceLoss,
    FusedKappaFaceLoss,
    FusedLSoftmaxLoss,
    FusedMagFaceLoss,
    FusedMarginLoss,
    FusedMVSoftmaxLoss,
    FusedNormalizedSoftmaxLoss,
    FusedSoftmaxLoss,
    FusedSphereFaceLoss,
    FusedX2SoftmaxLoss,
    margins,
)

STATEFUL = (
    "a_softmax",
    "adaface",
    "kappaface",
    "gb_cosface",
    "adacos",
    "curricularface",
    "elastic_cos",
    "elastic_arc_plus",
)
# of which a batch changes nothing
TABLES = ("kappaface", "class_margin", "class_margin_arc", "adam_softmax", *SIGMOIDS[:-1])


@pytest.mark.parametrize("name", STATEFUL)
def test_a_compiled_head_has_its_gradients(name):
    """Also where its backward would compute again, from state that forward has changed since."""
    torch._dynamo.reset()
    x, w, labels = formula_problem("random")
    head, other = make_head(name, w), make_head(name, w)
    compiled = torch.compile(other, backend="aot_eager")
    for _ in range(2):
        (leaf,), (other_leaf,) = as_leaves(x), as_leaves(x)
        torch.manual_seed(0)
        loss = head(leaf, labels)
        torch.manual_seed(0)
        other_loss = compiled(other_leaf, labels)
        torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
        got = torch.autograd.grad(other_loss, (other_leaf, other.weight))
        want = torch.autograd.grad(loss, (leaf, head.weight))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", range(4))
def test_statistics_of_too_few_samples_are_nan(count):
    values = torch.randn(5)
    mean, std = margins.mean_and_std(values, torch.arange(5) < count)
    torch.testing.assert_close(mean, values[:count].double().mean(), equal_nan=True)
    want = values[:count].double().std() if count > 1 else torch.tensor(math.nan).double()
    torch.testing.assert_close(std, want, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_samples_count_for_nothing(name):
    """Neither in the loss nor in a statistic, whatever they hold."""
    x, w, labels = formula_problem("random")
    alone, together = make_head(name, w), make_head(name, w)
    want = alone(*as_leaves(x), labels)
    rubbish = torch.full((2, DIM), math.nan, dtype=x.dtype)
    (padded,) = as_leaves(torch.cat([rubbish[:1], x, rubbish[1:], 50 * x[:1]]))
    ignored = torch.tensor([-100])
    got = together(padded, torch.cat([ignored, labels, ignored, ignored]))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    got.backward()
    want.backward()
    torch.testing.assert_close(together.weight.grad, alone.weight.grad, rtol=1e-9, atol=1e-12)
    assert not padded.grad[[0, -2, -1]].any()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[key], value, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["all ignored", "no samples", "one sample", "two classes"])
def test_small_batches_leave_no_nan_behind(name, case):
    x, w, labels = formula_problem("random")
    head = make_head(name, w, reduction="sum") if case != "two classes" else None
    if case == "all ignored":
        labels = torch.full_like(labels, -100)
    elif case == "no samples":
        x, labels = x[:0], labels[:0]
    elif case == "one sample":
        x, labels = x[4:5], labels[4:5]
    elif name == "kappaface":
        head = FusedKappaFaceLoss(2, DIM, class_counts=[3, 4], dtype=w.dtype, reduction="sum")
    else:
        scale = {"scale": 5.0} if name == "adacos" else {}
        head = LOSSES[name][0](2, DIM, dtype=w.dtype, reduction="sum", **scale)
    (x,) = as_leaves(x)
    loss = head(x, labels % head.num_classes if case == "two classes" else labels)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()
    head(*as_leaves(formula_problem("random")[0]), formula_problem("random")[2] % head.num_classes).backward()
    finite = [bool(t.isfinite().all()) for t in head.state_dict().values()]
    assert all(finite)
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_vectors_and_exact_centres(name):
    """x = 0, w_j = 0, cos = 1 and cos = -1 exactly: finite losses and gradients."""
    x, w, labels = formula_problem("random")
    w[3], w[4] = 0, torch.eye(DIM, dtype=w.dtype)[0]
    x[0], x[1], x[2] = 0, 20 * w[4], -20 * w[4]
    labels[:3], labels[3] = 4, 3
    for dtype in (torch.float64, torch.float32):
        head = make_head(name, w.to(dtype), reduction="none")
        (leaf,) = as_leaves(x.to(dtype))
        loss = head(leaf, labels)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert leaf.grad.isfinite().all()
        assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_close_to_float64(name):
    """Gradients of confident samples, where the angle is hardest to know from its cosine."""
    x, w, labels = formula_problem("confident")
    results = []
    for dtype in (torch.float64, torch.float32):
        head = make_head(name, w.to(dtype), reduction="none")
        (leaf,) = as_leaves(x.to(dtype))
        loss = head(leaf, labels)
        results.append((loss, *torch.autograd.grad(loss.sum(), (leaf, head.weight))))
    for want, got in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_state_travels_in_the_state_dict(name):
    x, w, labels = formula_problem("random")
    head = make_head(name, w)
    before = {key: value.clone() for key, value in head.state_dict().items() if key != "weight"}
    assert bool(before) == (name in STATEFUL or name in TABLES)
    head(x, labels)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    twin = make_head(name, torch.zeros_like(w))
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    x, _, labels = formula_problem("random", seed=1)
    for _ in range(3):
        assert torch.equal(twin(x, labels), head(x, labels))
    changed = [key for key in before if not torch.equal(before[key].nan_to_num(), head.state_dict()[key])]
    assert bool(changed) == (name in STATEFUL and name not in TABLES)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_on_the_device_of_the_head(name):
    make = LOSSES[name][0] if name != "kappaface" else partial(FusedKappaFaceLoss, class_counts=CLASS_COUNTS)
    assert all(value.is_meta for value in make(NUM_CLASSES, DIM, device="meta").state_dict().values())


@pytest.mark.parametrize("name", STATEFUL)
def test_state_changes_in_training_alone(name):
    x, w, labels = formula_problem("random")
    head = make_head(name, w)
    head(x, labels)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    head.eval()
    assert torch.equal(head(2 * x, labels.roll(1)), head(2 * x, labels.roll(1)))
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", STATEFUL)
def test_state_keeps_its_precision_and_can_start_anew(name):
    x, w, labels = formula_problem("random")
    head = make_head(name, w)
    first = {key: value.clone() for key, value in head.state_dict().items() if key != "weight"}
    head(x, labels)
    state = {key: value.clone() for key, value in head.state_dict().items() if key != "weight"}
    head.to(torch.float64)
    for key, value in state.items():
        assert torch.equal(head.state_dict()[key], value)
    head.to(torch.bfloat16)
    for key, value in state.items():
        torch.testing.assert_close(head.state_dict()[key], value, rtol=1e-2, atol=0)  # rounded once, and no more
    head.reset_parameters()
    if name == "kappaface":
        assert torch.equal(head.margin.weights, torch.full_like(head.margin.weights, 0.5))
    else:
        for key, value in first.items():
            torch.testing.assert_close(head.state_dict()[key], value, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name):
    torch.compiler.reset()
    x, w, labels = formula_problem("random")
    head, twin = (make_head(name, w) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, labels), head(x, labels), rtol=1e-12, atol=0)
    for key, value in head.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    head = make_head(name, torch.ones(NUM_CLASSES, DIM))
    parameters = inspect.signature(type(head)).parameters
    assert list(parameters)[:4] == ["num_classes", "embedding_size", "margin", "scale"]
    assert type(head).__name__ in cosface_kernels.__all__
    assert "Source:" in type(head).__doc__ or type(head) is FusedMarginLoss


def test_adaface_averages_over_batches():
    x, w, labels = formula_problem("random")
    head = make_head("adaface", w, rate=0.25)
    mean, std = 20.0, 100.0
    for factor in (1.0, 0.3, 2.0):
        head(factor * x, labels)
        norms = (factor * x).norm(dim=1).clip(1e-3, 100)
        mean, std = 0.75 * mean + 0.25 * norms.mean().item(), 0.75 * std + 0.25 * norms.std().item()
        assert head.margin.mean.item() == pytest.approx(mean)
        assert head.margin.std.item() == pytest.approx(std)


def test_gb_cosface_boundary_is_averaged_after_its_use():
    x, w, labels = formula_problem("confident")
    head = make_head("gb_cosface", w)
    boundary = None
    for seed in range(3):
        x, _, labels = formula_problem("confident", seed=seed)
        cos = F.normalize(x) @ F.normalize(w).T
        is_target = F.one_hot(labels, NUM_CLASSES).bool()
        negative = (32 * cos.masked_fill(is_target, -math.inf)).logsumexp(1) / 32
        middle = ((cos[is_target] + negative) / 2).mean().item()
        boundary = min(max(middle if boundary is None else boundary, 0.5), 0.7)
        boundary = 0.99 * boundary + 0.01 * middle
        head(x, labels)
        assert head.margin.boundary.item() == pytest.approx(boundary)
    head.margin.boundary.fill_(0.75)  # beyond its bounds, where a batch without a sample leaves it
    head(x, torch.full_like(labels, head.ignore_index))
    assert head.margin.boundary.item() == 0.75


def test_annealing_counts_batches():
    x, w, labels = formula_problem("random")
    head = make_head("a_softmax", w)
    for step in range(1, 4):
        head(x, labels)
        assert head.margin.annealing.item() == pytest.approx(1000 / (1 + 0.12 * step))
    head.margin.step.fill_(1e9)
    assert head.margin.annealing.item() == 5


def test_repr_shows_the_margin():
    assert "ArcFaceMargin(margin=0.4" in repr(FusedArcFaceLoss(50, 16, 0.4))
    assert "AdaFaceMargin(margin=0.4, h=0.333" in repr(FusedAdaFaceLoss(50, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FusedArcFaceLoss(9, 4, 28.6), r"margin must be in \[0, pi\) radians, got 28.6"),
        (lambda: FusedArcFaceLoss(9, 4, -0.1), r"margin must be in \[0, pi\) radians, got -0.1"),
        (lambda: FusedSphereFaceLoss(9, 4, 0.9), r"margin must be in \[1, inf\), got 0.9"),
        (lambda: FusedSphereFaceLoss(9, 4, math.nan), r"margin must be in \[1, inf\), got nan"),
        (lambda: FusedASoftmaxLoss(9, 4, gamma=-1), r"gamma must be in \[0, inf\), got -1"),
        (lambda: FusedCombinedMarginLoss(9, 4, 0.5), r"margins must be three numbers .*, got 0.5"),
        (lambda: FusedCombinedMarginLoss(9, 4, (0.5, 0, 0)), r"m1 must be in \[1, inf\), got 0.5"),
        (lambda: FusedAdaFaceLoss(9, 4, "0.4"), r"margin must be in \[0, pi\), got '0.4'"),
        (lambda: FusedAdaFaceLoss(9, 4, rate=2), r"rate must be in \[0, 1\], got 2"),
        (lambda: FusedMagFaceLoss(9, 4, 0.4), r"margins must be 2 numbers, got 0.4"),
        (lambda: FusedX2SoftmaxLoss(9, 4, 0.4), r"margin must be 3 numbers, got 0.4"),
        (lambda: FusedGBCosFaceLoss(9, 4, bounds=(0.7, None)), r"bounds must be 2 numbers, got \(0.7, None\)"),
        (lambda: FusedKappaFaceLoss(9, 4, class_counts="abc"), r"class_counts must be a vector .*, got 'abc'"),
        (lambda: FusedMagFaceLoss(9, 4, (0.8, 0.4)), r"largest margin must be in \[smallest, pi\), got 0.4"),
        (lambda: FusedMagFaceLoss(9, 4, norms=(0, 9)), r"smallest norm must be in \(0, inf\), got 0"),
        (lambda: FusedKappaFaceLoss(9, 4), r"KappaFace needs class_counts, .* 9 classes, got None"),
        (lambda: FusedKappaFaceLoss(9, 4, class_counts=[1, 2]), r"class_counts must hold 9 counts, got 2"),
        (lambda: FusedKappaFaceLoss(2, 4, class_counts=[1, 0]), r"positive counts, got \[1, 0\]"),
        (lambda: FusedX2SoftmaxLoss(9, 4, (0.9, 0, 1)), r"a must be in \(-inf, 0\), got 0.9"),
        (lambda: FusedGBCosFaceLoss(9, 4, alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: FusedGBCosFaceLoss(9, 4, bounds=(0.7, 0.5)), r"low <= high, got \(0.7, 0.5\)"),
        (lambda: FusedSoftmaxLoss(9, 4, 0.1), r"margin must be 0, .*, got 0.1"),
        (lambda: FusedLSoftmaxLoss(9, 4, 0), r"margin must be in \[1, inf\), got 0"),
        (lambda: FusedCurricularFaceLoss(9, 4, 4.0), r"margin must be in \[0, pi\) radians, got 4.0"),
        (lambda: FusedMVSoftmaxLoss(9, 4, t=-0.1), r"t must be in \[0, inf\), got -0.1"),
        (lambda: FusedMVSoftmaxLoss(9, 4, 3.5, arc=True), r"margin must be in \[0, pi\) radians, got 3.5"),
        (lambda: FusedCombinedMarginLoss(9, 4, filter_above=40), r"filter_above must be in \[0, 1\], got 40"),
        (lambda: margins.AdaCosMargin(0.0, 1.0, bounds=(2, 1)), r"largest scale must be in .*, got 1"),
        (lambda: FusedAdaCosLoss(2, 4), r"num_classes - 2, .*, must be a positive integer, got 0"),
        (lambda: FusedCosFaceLoss(9, 4, margins.CosFaceMargin()), "margin must be a finite number, got CosFace"),
    ],
)
def test_out_of_domain_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_adaface_refuses_normalised_embeddings():
    x, w, labels = formula_problem("random")
    head = make_head("adaface", w)
    with pytest.raises(ValueError, match=r"before they are normalised, got norms in \[1, 1\]"):
        head(F.normalize(x), labels)
    head(x, labels)


def test_kappaface_refuses_sums_of_other_classes():
    head = FusedKappaFaceLoss(3, 4, class_counts=[5, 6, 7])
    with pytest.raises(ValueError, match=r"class_sums must have shape \(3, D\), got shape \(4, 3\)"):
        head.margin.update(torch.ones(4, 3))


def test_adaface_takes_one_sample_whose_norm_is_one():
    """By chance; and its statistics need two."""
    x, w, labels = formula_problem("random")
    assert make_head("adaface", w)(F.normalize(x[:1]) * 1.005, labels[:1]).isfinite()


def test_kappaface_of_classes_that_are_single_points():
    """Every r is 1 and every kappa infinite: no class is more concentrated than another."""
    margin = margins.KappaFaceMargin([3, 3, 3], gamma=1.0)
    margin.update(3 * torch.eye(3))
    assert margin.weights.tolist() == [0.5, 0.5, 0.5]


def test_kappaface_of_a_single_point_whose_sum_is_rounded_up():
    """An r that is above 1 makes kappa negative, which would be the least concentrated class."""
    weights = []
    for longest in (3, 3 + 2**-22):
        margin = margins.KappaFaceMargin([3, 20, 10])
        margin.update(torch.tensor([[longest, 0], [0, 12], [5, 0]]))
        weights.append(margin.weights)
    assert torch.equal(*weights)


@pytest.mark.parametrize("num_classes", [3, 4, 60])
@pytest.mark.parametrize("opposite", [False, True])
def test_the_scale_of_adacos_stays_within_bounds(num_classes, opposite):
    """In two dimensions a few classes drive it up without end, and negatives that are all opposite below 0."""
    head = FusedAdaCosLoss(num_classes, 2)
    labels = torch.arange(num_classes)
    fixed = math.sqrt(2) * math.log(num_classes - 1)
    for _ in range(50):
        x = head.weight.detach()
        if opposite:
            x = torch.tensor([[1.0, 0.0]]).expand(num_classes, 2)
            head.weight.data.copy_(-x)
        assert head(x, labels).isfinite()
        assert fixed / 4 * 0.999 <= head.scale <= 4 * fixed * 1.001


@pytest.mark.parametrize("margin", [(1.0, 0.5, 0.0), (1.3, 0.4, 0.1), (3.0, 1.0, 0.0)], ids=str)
def test_the_combined_margin_falls_up_to_pi(margin):
    """Without its guard it rises again beyond m1 theta + m2 = pi, as in insightface."""
    cos = torch.linspace(1, -1, 2001, dtype=torch.float64)
    psi = margins.CombinedMargin(margin)(cos)
    assert bool((psi.diff() < 0).all())
    for bare in (
        margins.CombinedMargin(margin, guard=False),
        margins.CombinedMargin(margin, straight_through=True),
    ):
        assert bool((bare(cos).diff() > 0).any())
        falling = margin[0] * cos.acos() + margin[1] <= math.pi
        torch.testing.assert_close(bare(cos)[falling], psi[falling])


def test_no_filter_above_0():
    """insightface's 0, its default, means off."""
    x, w, labels = formula_problem("random")
    heads = [FusedCombinedMarginLoss(*w.shape, filter_above=above, dtype=w.dtype) for above in (None, 0, 0.0)]
    for head in heads:
        head.weight.data.copy_(w)
    assert len({head(x, labels).item() for head in heads}) == 1


def test_the_normalised_softmax_takes_no_third_position():
    """It is a temperature in pytorch-metric-learning and would be a margin here."""
    with pytest.raises(TypeError, match="positional"):
        FusedNormalizedSoftmaxLoss(9, 4, 0.05)
