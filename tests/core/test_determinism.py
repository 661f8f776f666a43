"""Bitwise the same on every run; the same to rounding for other threads, tile sizes and instruction sets."""

import pathlib

import pytest
import torch
from support import (
    BF16,
    F32,
    SAME_DTYPES,
    Backend,
    Result,
    Upstream,
    assert_as_good_as_plain,
    check_result,
    evaluate,
    evaluate_oracle,
    make_problem,
    natural_norms,
    plain_forward,
    random_upstream,
    run_python,
)

from cosface_kernels.backends import cpu


def test_bitwise_repeatable(backend, dtypes):
    problem = backend.problem(33, 301 if backend.interpreted else 3001, 72, dtypes)
    upstream = random_upstream(problem, "loss", "lse", "target_cos")
    first = evaluate(backend.lmcl, problem, upstream)
    for _ in range(2 if backend.interpreted else 4):
        torch.empty(12345, device=backend.device).random_()  # moves later allocations to other addresses
        again = evaluate(backend.lmcl, problem, upstream)
        for name in first._fields:
            assert torch.equal(getattr(again, name), getattr(first, name)), name


def _assert_same_to_rounding(results, problem, upstream):
    """Every result is as good as plain PyTorch, so that any two differ by rounding alone."""
    want, plain = evaluate_oracle(problem, upstream), evaluate(plain_forward, problem, upstream)
    natural, scale = natural_norms(problem, upstream), float(problem.scale.max())
    for which, got in results.items():
        for name in got._fields:
            parts = (getattr(r, name) for r in (got, want, plain, natural))
            assert_as_good_as_plain(f"{name} with {which}", *parts, scale=scale, compute=problem.dtypes.compute)


@pytest.mark.heavy
def test_number_of_threads(backend, dtypes, restore_threads):
    problem = backend.problem(19, 2600, 40, dtypes)
    upstream = random_upstream(problem, "loss", "lse")
    results = {}
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results[f"{threads} threads"] = evaluate(backend.lmcl, problem, upstream)
        again = evaluate(backend.lmcl, problem, upstream)
        assert torch.equal(again.dx, results[f"{threads} threads"].dx)
    _assert_same_to_rounding(results, problem, upstream)


def test_more_threads_than_classes(backend, restore_threads):
    problem = backend.problem(3, 2, 8, F32)
    upstream = random_upstream(problem, "loss")
    torch.set_num_threads(8)
    _assert_same_to_rounding({"8 threads": evaluate(backend.lmcl, problem, upstream)}, problem, upstream)


@pytest.mark.parametrize("dtypes", [F32, BF16], ids=str)
@pytest.mark.parametrize("num_classes", [1, 513, 2600])
def test_tile_size(dtypes, num_classes, monkeypatch):
    """Classes per tile change the order of sums and nothing else."""
    problem = make_problem(19, num_classes, 40, dtypes)
    upstream = random_upstream(problem, "loss", "lse")
    results = {}
    for tile in (1, 7, 64, 511, 512, 513, 4096):
        monkeypatch.setenv("COSFACE_CPU_TILE", str(tile))
        results[f"tiles of {tile}"] = evaluate(Backend("cpu").lmcl, problem, upstream)
    if num_classes > 1000:
        assert not torch.equal(results["tiles of 1"].lse, results["tiles of 4096"].lse), "the variable is not read"
    _assert_same_to_rounding(results, problem, upstream)


# What csrc/cpu/dispatch.cpp asks of the processor, in the words of /proc/cpuinfo.
FLAGS = {
    "amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
    "avx2": {"avx2", "fma"},
    "baseline": set(),
    "emulated_amx": {"avx2", "fma"},
    "emulated_avx512_bf16": {"avx2", "fma"},
}
MULTIPLY_BFLOAT16 = {"amx", "avx512_bf16", "emulated_amx", "emulated_avx512_bf16"}

EVALUATE = """
import sys, torch
from support import Backend, evaluate
from cosface_kernels import _C
cases = torch.load(sys.argv[1], weights_only=False)
results = [tuple(evaluate(Backend("cpu").lmcl, problem, upstream)) for problem, upstream in cases]
torch.save((_C.instruction_set(), results), sys.argv[2])
"""


def _processor_flags() -> set[str]:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


@pytest.mark.parametrize("isa", FLAGS)
def test_instruction_set(isa, tmp_path):
    """Sizes that are no multiple of any register, in every dtype, on the kernels of each instruction set."""
    missing = FLAGS[isa] - _processor_flags()
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    problems = [make_problem(19, 531, dim, dtypes) for dim in (3, 67) for dtypes in SAME_DTYPES]
    problems += [make_problem(5, num_classes, 16) for num_classes in (1, 2, 15, 17, 33)]
    problems += [make_problem(8, 300, 40, regime=regime) for regime in ("confident", "wrong")]
    problems[0].x[3] = problems[1].w[8] = 0
    cases = [(problem, random_upstream(problem, "loss", "lse", "target_cos")) for problem in problems]
    torch.save(cases, tmp_path / "cases")
    done = run_python(EVALUATE, str(tmp_path / "cases"), str(tmp_path / "results"), COSFACE_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    used, results = torch.load(tmp_path / "results", weights_only=False)
    assert used == isa
    for (problem, upstream), result in zip(cases, results, strict=True):
        half = isa in MULTIPLY_BFLOAT16 and problem.dtypes == BF16
        check_result(Result(*result), problem, upstream, operand=torch.bfloat16 if half else None)


def test_unknown_instruction_set_is_refused(tmp_path):
    torch.save([(make_problem(2, 3, 4), Upstream(loss=torch.ones(2)))], tmp_path / "cases")
    done = run_python(EVALUATE, str(tmp_path / "cases"), str(tmp_path / "results"), COSFACE_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "COSFACE_CPU_ISA" in done.stderr
    assert "baseline" in done.stderr
    assert "'sse9'" in done.stderr


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_backend_uses_the_threads_of_torch(threads: int, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    assert cpu.describe().endswith(f"{threads} threads")
