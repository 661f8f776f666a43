"""Class sampling: which classes take part, how often, and what happens to the others."""

import functools
import math

import pytest
import torch
from support import Backend, evaluate, random_upstream, relative_error

import cosface_kernels
from cosface_kernels import (
    FusedCosFaceLoss,
    FusedLSoftmaxLoss,
    FusedMarginLoss,
    cosface_loss,
    margin_softmax_loss,
)
from cosface_kernels.distributed import clip_grad_norm_
from cosface_kernels.margins import LSoftmaxMargin
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_kernels.sampling import ClassSampler

C, D = 400, 16
CPU = Backend("cpu")


def _of_every_kind() -> list:
    """All heads but L-Softmax, which reads the class centres."""
    options = {"FusedMarginLoss": {"margin": 0.35}, "FusedKappaFaceLoss": {"class_counts": [1] * C}}
    names = [name for name in cosface_kernels.__all__ if name.startswith("Fused") and name != "FusedLSoftmaxLoss"]
    make = functools.partial
    return [
        pytest.param(make(getattr(cosface_kernels, name), C, D, sample_rate=0.1, **options.get(name, {})), id=name)
        for name in names
    ]


every_head = pytest.mark.parametrize("make", _of_every_kind())


def make_head(rate: float, backend: Backend = CPU) -> FusedMarginLoss:
    torch.manual_seed(0)
    return backend.head(C, D, scale=16.0, sample_rate=rate)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("samples", [0, 1, 60])
def test_all_positives_and_distinct_negatives(rate, samples):
    sampler = ClassSampler(C, rate)
    for _ in range(5):
        targets = torch.randint(C, (samples,))
        targets[1::7] = -1
        targets[2::7] = -2
        classes, positions = sampler(targets)
        assert len(classes) == max(math.ceil(rate * C), targets[targets >= 0].unique().numel())
        assert bool((classes.diff() > 0).all())
        assert 0 <= int(classes.min()) <= int(classes.max()) < C
        real = targets >= 0
        assert torch.equal(classes[positions[real]], targets[real])
        assert torch.equal(positions[~real], targets[~real])


@pytest.mark.parametrize("rate", [0.05, 0.5])  # both ways to draw
def test_every_negative_is_as_likely_and_sums_are_unbiased(rate):
    """Counts within 5 standard deviations, and sum_j e^{z_j} / q within 4 standard errors of the full sum."""
    draws, targets = 3000, torch.tensor([0, 7, 7, 399])
    sampler = ClassSampler(C, rate, seed=1)
    z = torch.randn(C, dtype=torch.float64).exp()
    negative = torch.ones(C, dtype=torch.bool)
    negative[targets] = False
    counts, sums = torch.zeros(C, dtype=torch.float64), []
    q = (math.ceil(rate * C) - 3) / (C - 3)
    for _ in range(draws):
        classes, _ = sampler(targets)
        counts[classes] += 1
        sums.append(float(z[classes][negative[classes]].sum()) / q)
    assert bool((counts[~negative] == draws).all())
    deviation = math.sqrt(draws * q * (1 - q))
    assert float((counts[negative] - draws * q).abs().max()) < 5 * deviation
    estimates = torch.tensor(sums)
    error = float(estimates.mean()) - float(z[negative].sum())
    assert abs(error) < 4 * float(estimates.std()) / math.sqrt(draws)


@pytest.mark.option("classes")
def test_equals_the_full_loss_at_rate_1(backend):
    problem = backend.problem(9, 300, 24)
    sampler = ClassSampler(300, 1.0, device=backend.device)
    classes, positions = sampler(problem.targets)
    assert torch.equal(classes, torch.arange(300, device=backend.device))
    assert torch.equal(positions, problem.targets)
    upstream = random_upstream(problem, "loss")

    sampled = functools.partial(backend.lmcl, classes=classes)
    got, want = evaluate(sampled, problem, upstream), evaluate(backend.lmcl, problem, upstream)
    assert relative_error(got.loss, want.loss) < 1e-6
    assert relative_error(got.dx, want.dx) < 1e-6
    assert relative_error(got.dw.to_dense(), want.dw) < 1e-6
    assert make_head(1.0).sampler is None


@every_head
def test_every_pass_over_a_batch_has_its_draw(make):
    head, drawn = make(), []
    head.sampler.register_forward_hook(lambda *call: drawn.append(call[2][0]))
    for batch in range(3):
        drawn.clear()
        head(5 * torch.randn(8, D), torch.randint(C, (8,)))
        assert int(head.sampler.draws) == batch + 1
        for classes in drawn:
            assert torch.equal(classes, drawn[0])


@every_head
def test_rows_that_no_batch_drew_stay_with_every_head(make):
    """Also where decay and momentum would move what has no gradient."""
    head, drawn = make(), []
    head.sampler.register_forward_hook(lambda *call: drawn.append(call[2][0]))
    torch.nn.init.normal_(head.weight)
    optimizer, before = FusedSGD(head.parameters(), 0.1, 0.9, weight_decay=0.1), head.weight.detach().clone()
    for _ in range(3):
        head(5 * torch.randn(8, D), torch.randint(C, (8,))).backward()
        optimizer.step()
        moved = (head.weight != before).any(1).view(C, -1).any(1)  # of a class, if one of its centres has
        assert torch.equal(moved.nonzero()[:, 0], torch.cat(drawn).unique())


def test_a_margin_that_reads_the_class_centres_is_refused():
    """Its gradient of them is dense, and so would be the sum with one of sampled classes."""

    class Reads(LSoftmaxMargin):
        pass

    refusal = "reads the class centres, and so .*: sample_rate must be 1, got 0.1"
    with pytest.raises(ValueError, match=f"LSoftmaxMargin {refusal}"):
        FusedLSoftmaxLoss(C, D, sample_rate=0.1)
    with pytest.raises(ValueError, match=f"Reads {refusal}"):
        margin_softmax_loss(
            torch.randn(8, D), torch.randn(C, D), torch.arange(8), margin=Reads(), sampler=ClassSampler(C, 0.1)
        )
    assert FusedLSoftmaxLoss(C, D, sample_rate=1).sampler is None


@pytest.mark.option("updates", "classes")
@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
def test_rows_and_state_of_other_classes_stay(backend, fused):
    head = make_head(0.1, backend)
    optimizer = fused(
        head.parameters(), lr=0.1, weight_decay=0.1, **({"momentum": 0.9} if fused is FusedSGD else {})
    )
    seen = torch.zeros(C, dtype=torch.bool, device=backend.device)
    for _ in range(4):
        x = torch.randn(8, D, device=backend.device)
        labels = torch.randint(C, (8,), device=backend.device)
        sampler = ClassSampler(C, 0.1, device=backend.device)
        sampler.load_state_dict(head.sampler.state_dict())
        classes, positions = sampler(labels)
        weight = head.weight.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state[head.weight].items() if v.dim()}
        loss = head(x, labels)
        expected = cosface_loss(x, weight[classes], positions, scale=16.0, backend=backend.name)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        optimizer.step()
        others = torch.ones(C, dtype=torch.bool, device=backend.device)
        others[classes] = False
        seen |= ~others
        assert torch.equal(head.weight[others], weight[others])
        assert not bool((head.weight[classes] == weight[classes]).all(1).any())
        for name, before in state.items():
            assert torch.equal(optimizer.state[head.weight][name][others], before[others])
    assert not bool(optimizer.state[head.weight][optimizer.state_names[0]][~seen].any())


@pytest.mark.option("classes")
def test_sparse_gradient_trains_with_torch(backend):
    head = make_head(0.2, backend)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    x, labels = torch.randn(8, D, device=backend.device), torch.randint(C, (8,), device=backend.device)
    before = head.weight.detach().clone()
    head(x, labels).backward()
    assert head.weight.grad.is_sparse
    assert head.weight.grad._nnz() == 80
    optimizer.step()
    moved = (head.weight != before).any(1).nonzero()[:, 0]
    assert torch.equal(moved, head.weight.grad._indices()[0])


def test_draws_differ_between_steps_and_resume():
    first, second = ClassSampler(C, 0.1, seed=3), ClassSampler(C, 0.1, seed=3)
    targets = torch.tensor([5])
    drawn = [first(targets)[0] for _ in range(4)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], ClassSampler(C, 0.1, seed=4)(targets)[0])
    for _ in range(2):
        second(targets)
    resumed = ClassSampler(C, 0.1, seed=3)
    resumed.load_state_dict(second.state_dict())
    assert torch.equal(resumed(targets)[0], drawn[2])


def test_draws_of_a_seed_are_not_those_of_another_one_step_later():
    targets, samplers = torch.tensor([3]), [ClassSampler(C, 0.1, seed) for seed in range(4)]
    draws = [[tuple(sampler(targets)[0].tolist()) for _ in range(4)] for sampler in samplers]
    assert len({each for of_seed in draws for each in of_seed}) == 16


def test_evaluation_takes_all_classes():
    head = make_head(0.1).eval()
    x, labels = torch.randn(8, D), torch.randint(C, (8,))
    assert torch.equal(head(x, labels), cosface_loss(x, head.weight, labels, scale=16.0, backend="cpu"))
    assert int(head.sampler.draws) == 0


OPTIMIZERS = [
    ("SGD", {"lr": 0.1}, None),
    ("SGD", {"lr": 0.1, "maximize": True, "foreach": True}, None),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, None),
    ("SGD", {"lr": 0.1, "weight_decay": 5e-4}, r"SGD with weight_decay=0\.0005 takes none"),
    ("SGD", {"lr": 0.1, "fused": True}, "SGD with fused=True takes none"),
    ("SparseAdam", {}, None),
    ("SparseAdam", {}, "SparseAdam takes no dense one beside it"),
    ("Adagrad", {}, None),
    ("Adagrad", {"weight_decay": 0.1}, r"Adagrad with weight_decay=0\.1 takes none"),
    *(
        (name, {}, f"{name} takes none")
        for name in ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adadelta", "Rprop", "ASGD")
    ),
    ("LBFGS", {}, "LBFGS takes none"),
    ("Adafactor", {}, "Adafactor takes none"),
]


@pytest.mark.parametrize("closure", [False, True], ids=["backward", "closure"])
@pytest.mark.parametrize(("name", "options", "refusal"), OPTIMIZERS)
def test_what_torch_does_with_rows_that_are_not_drawn(name, options, refusal, closure):
    """The table of docs/optimizers.md, and that a refusal leaves every parameter as it was."""
    other, head = torch.nn.Parameter(torch.ones(3)), make_head(0.1)
    alone = [head.weight] if name == "SparseAdam" else [other, head.weight]
    beside = [{"params": [head.weight]}, {"params": [other]}]  # of which the first would have moved
    optimizer = getattr(torch.optim, name)(beside if refusal and name == "SparseAdam" else alone, **options)

    def gradients():
        optimizer.zero_grad()
        loss = head(torch.randn(8, D), torch.randint(C, (8,))) + other.sum()
        loss.backward()
        return loss

    def step():
        return optimizer.step(gradients) if closure else optimizer.step()

    strays = False
    for _ in range(3):
        if not closure:
            gradients()
        before, others_before = head.weight.detach().clone(), other.detach().clone()
        if refusal:
            with pytest.raises(RuntimeError, match=f"sampled classes is sparse, and {refusal}: take FusedSGD or"):
                step()
            assert torch.equal(head.weight, before)
            assert torch.equal(other, others_before)
            return
        step()
        moved = (head.weight != before).any(1)
        drawn = torch.zeros(C, dtype=torch.bool)
        drawn[head.weight.grad.coalesce().indices()[0]] = True
        assert bool(moved[drawn].all())
        strays |= bool(moved[~drawn].any())
    assert strays == ("momentum" in options)


def test_a_sparse_gradient_is_clipped():
    """To the norm of the dense one, beside another parameter; rows that are in it twice are summed first."""
    head, other = make_head(0.2), torch.nn.Parameter(torch.ones(3))
    for _ in range(2):
        (head(torch.randn(8, D), torch.randint(C, (8,))) + 5 * other.sum()).backward()
    assert not head.weight.grad.is_coalesced()
    whole = torch.cat([head.weight.grad.to_dense().flatten(), other.grad])
    torch.testing.assert_close(clip_grad_norm_([other, head.weight], 0.5), whole.norm())
    clipped = torch.cat([head.weight.grad.to_dense().flatten(), other.grad])
    torch.testing.assert_close(clipped, whole * (0.5 / whole.norm()))


def test_a_sampler_without_memory_begins_at_the_first_draw():
    head = FusedCosFaceLoss(C, D, sample_rate=0.1, device="meta").to_empty(device="cpu")
    head.sampler.draws.fill_(94586482045886)  # what memory holds
    head.reset_parameters()
    assert int(head.sampler.draws) == 0


@pytest.mark.parametrize(("saved", "loaded", "draws"), [(0.1, 1.0, None), (1.0, 0.1, 1), (0.1, 0.2, 3)])
def test_heads_load_each_other_strictly(saved, loaded, draws):
    """Those that sample and those that do not, alone and in a model."""
    saved, loaded = (torch.nn.ModuleDict({"head": make_head(rate)}) for rate in (saved, loaded))
    x, labels = torch.randn(8, D), torch.randint(C, (8,))
    for model, count in ((saved, 3), (loaded, 1)):
        for _ in range(count):
            model["head"](x, labels)
    for source, target in ((saved, loaded), (saved["head"], loaded["head"])):
        torch.nn.init.normal_(saved["head"].weight)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(loaded["head"].weight, saved["head"].weight)
        assert draws is None or int(loaded["head"].sampler.draws) == draws


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.1, math.nan, "half"])
def test_refuses_a_rate(rate):
    with pytest.raises(ValueError, match=rf"sample_rate must be in \(0, 1\], got {rate!r}"):
        make_head(rate)


def test_accumulation_of_sampled_classes_is_refused():
    head = make_head(0.1)
    optimizer = FusedSGD(head.parameters(), lr=0.1, accumulate=True)
    head(torch.randn(8, D), torch.randint(C, (8,))).backward()
    with pytest.raises(RuntimeError, match="got one of sampled classes"):
        optimizer.step()
