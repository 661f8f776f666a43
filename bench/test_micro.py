"""Small sizes, the fused loss beside what most people write: `pytest bench/test_micro.py`."""

from collections.abc import Callable

import pytest
import torch

from bench.implementations import build
from bench.worker import Case, Check, make_problem


@pytest.mark.parametrize("impl", ["fused", "eager"])
@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("classes", [1_000, 10_000])
def test_step(benchmark: Callable, impl: str, batch: int, classes: int) -> None:
    case = Case(impl, batch, 512, classes, "float32", 0.35, 64.0, seed=0, threads=torch.get_num_threads())
    accuracy = Check(case).turn()
    assert accuracy.error <= accuracy.allowed(case.dtype, case.scale)
    step = build(impl, make_problem(case))

    def forward_and_backward() -> None:
        step.clear_gradients()
        step.loss().backward()

    benchmark.group = f"batch {batch}, classes {classes:,}"
    benchmark(forward_and_backward)
