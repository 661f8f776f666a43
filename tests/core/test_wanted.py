"""Which gradients are wanted changes no bit of any, whatever options are asked for: backend `cpu`.

`make module-asan` runs this too, where what is written for a gradient that is not wanted is found.
"""

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from support import MIXED_DTYPES, SAME_DTYPES, make_problem, random_upstream
from torch import Tensor

from cosface_kernels import ops
from cosface_kernels.backends import cpu
from cosface_kernels.options import Options

WANTED = [(True, False), (False, True), (False, False)]


@st.composite
def options_of(draw: st.DrawFn, samples: int, classes: int, compute: torch.dtype) -> dict[str, object]:
    options = {
        "gradient_tolerance": draw(st.sampled_from([0.0, 1e-3, 0.1, 0.5])),
        "cache_bytes": draw(st.sampled_from([None, 0, 3000, 10**6])),
        "exact_cache": draw(st.booleans()),
        "normalize_weight": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options |= {
            "thresholds": torch.linspace(-0.5, 0.5, samples, dtype=compute, device="cpu"),
            "negatives": torch.tensor([1.0, 0.1, -0.06], dtype=compute, device="cpu"),
        }
    if draw(st.booleans()):
        options["classes"] = torch.arange(0, classes, 2, device="cpu")
    return options


def gradients(problem, given: list[Tensor], options: dict[str, object], dx: bool, dw: bool) -> tuple[Tensor, ...]:
    tensors = (problem.x, problem.w, problem.targets, problem.scale)
    _, top, log_sum, *_, cache, _ = ops.lmcl(*tensors, problem.margin, "cpu", **options)
    return ops.lmcl_backward(*tensors, top, log_sum, *given, cache, dx, dw, "cpu", **options)


@given(data=st.data())
def test_what_is_wanted_changes_no_bit(data):
    samples, classes = data.draw(st.integers(0, 70)), data.draw(st.sampled_from([2, 100, 300, 2500]))
    dtypes = data.draw(st.sampled_from([*SAME_DTYPES, *MIXED_DTYPES]))
    regime = data.draw(st.sampled_from(["random", "confident", "wrong"]))
    problem = make_problem(samples, classes, data.draw(st.integers(1, 70)), dtypes, regime=regime, device="cpu")
    options = data.draw(options_of(samples, classes, dtypes.compute))
    note(f"{samples} x {classes}, {dtypes}, {regime}, {options}")
    if "classes" in options:
        problem.targets.div_(2, rounding_mode="floor")
    if Options(**options).refusal(cpu.OPTIONS):
        return
    upstream = random_upstream(problem, "lse", "target_cos")
    given = [upstream.lse, upstream.target_cos]
    whole = gradients(problem, given, options, True, True)
    for dx, dw in WANTED:
        some = gradients(problem, given, options, dx, dw)
        for got, want, wanted in zip(some, whole, (dx, dw, True), strict=True):
            assert torch.equal(got, want) if wanted else not got.numel()
