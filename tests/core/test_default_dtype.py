"""torch.set_default_dtype: numbers that are given, that learn or that count are no coarser for it."""

import pytest
import torch
from support.formulas import LOSSES, formula_problem, make_head

from cosface_kernels import FusedCosFaceLoss, FusedKappaFaceLoss, FusedMarginLoss
from cosface_kernels.margins import ClassMargin, ldam_margins
from cosface_kernels.optim import FusedAdamW, FusedSGD


def narrowly(call):
    """Its result under a default of bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return call()
    finally:
        torch.set_default_dtype(before)


def _trained(make):
    """The losses and all that was learned, of a head in float32."""
    x, w, labels = (t.float() if t.is_floating_point() else t for t in formula_problem("random"))
    head = make(w)
    optimizer = FusedAdamW(head.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(head(x, labels))
        losses[-1].backward()
        optimizer.step()
    return [torch.stack(losses).detach(), *(value.detach() for value in head.state_dict().values())]


@pytest.mark.parametrize("name", LOSSES)
def test_a_head_in_float32_is_the_same_under_any_default(name):
    want = _trained(lambda w: make_head(name, w))
    got = narrowly(lambda: _trained(lambda w: make_head(name, w)))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda c, d, **options: FusedCosFaceLoss(c, d, class_weight=[0.1 + 0.01 * i for i in range(c)], **options),
        lambda c, d, **options: FusedMarginLoss(c, d, ClassMargin([0.3 + 1e-4 * i for i in range(c)]), **options),
        lambda c, d, **options: FusedMarginLoss(c, d, ClassMargin([*range(c)]), **options),
        lambda c, d, **options: FusedCosFaceLoss(c, d, ldam_margins([257.0 + i for i in range(c)]), **options),
        lambda c, d, **options: FusedKappaFaceLoss(c, d, class_counts=[257.0 + i for i in range(c)], **options),
    ],
    ids=["class_weight", "margins", "integers", "ldam_margins", "class_counts"],
)
def test_numbers_that_are_given_are_not_rounded_to_the_default(make):
    want = _trained(lambda w: _with_rows(make(*w.shape, dtype=w.dtype), w))
    got = narrowly(lambda: _trained(lambda w: _with_rows(make(*w.shape, dtype=w.dtype), w)))
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def _with_rows(head, w):
    with torch.no_grad():
        head.weight.copy_(w)
    return head


@pytest.mark.parametrize("fused", [FusedSGD, FusedAdamW])
def test_steps_are_counted_beyond_the_integers_of_the_default(fused):
    def steps():
        head, layer = FusedCosFaceLoss(60, 16, dtype=torch.float32), torch.nn.Linear(16, 16, dtype=torch.float32)
        optimizer = fused([*layer.parameters(), *head.parameters()], lr=0.01, weight_decay=0.1)
        for count in (1, 2**8, 2**8 + 1):
            head(layer(torch.randn(8, 16, dtype=torch.float32)), torch.randint(60, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert float(optimizer.state[head.weight]["step"]) == count
            if count == 1:
                saved = optimizer.state_dict()
                for state in saved["state"].values():
                    state["step"] = torch.tensor(2.0**8 - 1, dtype=torch.float32)
                optimizer.load_state_dict(saved)
        return optimizer.state

    assert {state["step"].dtype for state in narrowly(steps).values() if "step" in state} == {torch.float32}
