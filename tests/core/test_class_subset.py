"""A subset of the classes: the loss over their rows, with no gradient for the others."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import BF16, F32, F64, evaluate, evaluate_oracle, random_upstream

pytestmark = pytest.mark.option("classes")


@pytest.mark.parametrize("dtypes", [F32, F64, BF16], ids=str)
def test_some_classes_are_the_loss_over_their_rows(backend, dtypes):
    """Against the whole op on a copy of these rows; the others' gradient is absent, not zero."""
    problem = backend.problem(9, 1000, 24, dtypes)
    classes = torch.randperm(1000, device=backend.device)[:300].sort().values
    problem = replace(problem, targets=torch.randint(-1, 300, (9,), device=backend.device))
    upstream = random_upstream(problem, "loss", "lse", "target_cos")

    got = evaluate(partial(backend.lmcl, classes=classes), problem, upstream)
    rows = replace(problem, w=problem.w[classes])
    want = evaluate(backend.lmcl, rows, upstream)
    assert torch.equal(got.dw._indices()[0], classes)
    for name in want._fields:
        mine = got.dw._values() if name == "dw" else getattr(got, name)
        torch.testing.assert_close(mine, getattr(want, name), rtol=1e-5, atol=1e-6)
    if dtypes == F64:
        oracle = evaluate_oracle(rows, upstream)
        torch.testing.assert_close(got.dw._values(), oracle.dw, rtol=1e-10, atol=1e-12)


def test_opcheck_some_classes(backend):
    problem = replace(backend.problem(4, 30, 8), targets=torch.tensor([0, 2, -1, 1], device=backend.device))
    arguments = (problem.x, problem.w, problem.targets, problem.scale)
    classes = torch.tensor([3, 7, 29], device=backend.device)
    torch.library.opcheck(torch.ops.cosface.lmcl, (*arguments, 0.35, backend.name, classes))
