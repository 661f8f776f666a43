"""Backend `triton` beyond the suite of the op: its choices, its limits, and what it launches."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    BF16,
    F16,
    F32,
    check_backend,
    check_result,
    evaluate,
    evaluate_oracle,
    random_upstream,
    relative_error,
    run_python,
)

from bench import launches
from cosface_kernels import cosface_loss, ops
from cosface_kernels.backends import triton as backend_triton
from cosface_kernels.backends.chunks import CHUNK_STEP, LAUNCH_FLOPS, units
from cosface_kernels.backends.triton import backward_pass, choice, forward_pass, launch
from cosface_kernels.backends.triton import tiles as block_sizes
from cosface_kernels.backends.triton.cache import Saved, cache_size
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS, Key, candidates, plainest
from cosface_kernels.options import PLAIN, WORKSPACE_BYTES, Update


@pytest.mark.parametrize("dtypes", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("chunk", [1, 256, 300, 512, 10**9])
@pytest.mark.triton_only
def test_chunk_of_classes_changes_no_result(backend, dtypes, chunk, monkeypatch):
    """Chunks smaller than, equal to and larger than the problem; 1 and 300 are rounded up."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", str(chunk))
    check_backend(backend, backend.problem(40, 700, 40, dtypes))


H100 = {"processors": 132, "block_c": 128}


@given(
    N=st.integers(1, 10**5),
    D=st.integers(1, 5000),
    C=st.integers(1, 10**8),
    class_bytes=st.integers(1, 10**6),
    workspace_bytes=st.integers(0, 2**32),
    row_blocks=st.integers(1, 1000),
    block_c=st.sampled_from([16, 64, 128, 256]),
    processors=st.integers(1, 300),
)
def test_chunks_fit_the_workspace_and_are_few(N, D, C, class_bytes, workspace_bytes, **device):
    chunk = block_sizes.chunk_classes(N, D, C, class_bytes=class_bytes, workspace_bytes=workspace_bytes, **device)
    step, wave = CHUNK_STEP, math.lcm(256, device["block_c"] * device["processors"])
    assert chunk > 0
    assert chunk % step == 0
    assert chunk == step or chunk * class_bytes <= workspace_bytes
    assert chunk < C + wave  # a single one is no longer than it need be
    assert 2 * N * D * (chunk - wave) < LAUNCH_FLOPS
    if wave * class_bytes <= workspace_bytes:
        assert device["row_blocks"] * chunk // device["block_c"] % device["processors"] == 0


@pytest.mark.parametrize(("N", "chunks"), [(256, 10), (1024, 17), (4096, 60)])
def test_a_million_classes_of_an_h100_take_few_chunks_of_whole_waves(N, chunks):
    class_bytes, row_blocks = 2 * N + 4 * N // 128 + 4 * 512, N // 128
    chunk = block_sizes.chunk_classes(
        N, 512, 10**6, class_bytes=class_bytes, workspace_bytes=WORKSPACE_BYTES, row_blocks=row_blocks, **H100
    )
    assert -(-(10**6) // chunk) == chunks
    assert row_blocks * chunk // 128 % 132 == 0


@pytest.mark.triton_only
@pytest.mark.parametrize("dtypes", [F32, BF16, F16], ids=str)
def test_workspace_sets_the_chunks_and_changes_no_result(backend, dtypes, monkeypatch):
    """A workspace for no more than 256 classes, and one for all."""
    launched = []

    def count(name, launch, arguments):
        launched.append(name)
        launch()

    problem = backend.problem(40, 700, 40, dtypes)
    upstream = random_upstream(problem, "loss")
    monkeypatch.setattr(backward_pass, "INTERPRETED_WORKSPACE", 2**30)
    for workspace_bytes, chunks in ((0, 3), (2**30, 1)):
        launched.clear()
        with launches.through(count):
            got = evaluate(partial(backend.lmcl, workspace_bytes=workspace_bytes), problem, upstream)
        check_result(got, backend.seen(problem), upstream, backend.operand(problem.dtypes))
        assert launched.count("logit_gradients") == chunks * launched.count("finish_embedding_gradients") > 0


@pytest.mark.triton_only
def test_an_empty_batch_moves_as_many_classes_at_once(backend):
    """256 at least, as of any batch, however small the workspace."""
    w = torch.ones(600, 8, device=backend.device)
    problem = backend.problem(0, 600, 8)
    rows = torch.zeros(0, device=backend.device)
    _, top, log_sum, *_, cache, _ = ops.lmcl(problem.x, w, problem.targets, rows, 0.3, backend.name)
    update, launched = Update("sgd", 1, 0, 1.0, math.inf, 0.5, 1.0), []

    def count(name, launch, arguments):
        launched.append(name)
        launch()

    with launches.through(count):
        ops.lmcl_backward_update_(
            problem.x, w, problem.targets, rows, top, log_sum, rows, rows, cache, [], None, *update.flat(), True,
            backend.name, workspace_bytes=1,
        )  # fmt: skip
    assert launched == ["sgd_rows"] * 3
    assert bool((w == 0.5).all())


class NoLaunches:
    """In the kernels' place: the grids of what is launched, and nothing run."""

    def __init__(self):
        self.grids = []

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


@pytest.mark.triton_only
def test_candidates_of_a_step_are_tried_on_as_many_classes(backend):
    """On any GPU: whatever chunk a block would have, it does the work of the others, into results of one shape."""
    assert backend_triton.unavailable() is None  # it imports triton

    @given(
        gpu=st.sampled_from([("sm_80", 58), ("sm_80", 108), ("sm_90", 132), ("sm_100", 148), ("gfx942", 304)]),
        dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        N=st.sampled_from([1, 32, 128, 200, 1024]),
        D=st.sampled_from([64, 128, 512, 515]),
        C=st.sampled_from([300, 93_431, 360_232, 10**6]),
        workspace_bytes=st.sampled_from([WORKSPACE_BYTES, 1 << 25, 1 << 20, 1]),
        moved=st.booleans(),
    )
    def tried(gpu, dtype, N, D, C, workspace_bytes, moved):
        key = Key(gpu[0], D, dtype, dtype, dtype, 1 << (N - 1).bit_length(), library=dtype == torch.bfloat16)
        tiles = set()

        def choose(kernel, key, prepare):
            tiles.update(each := (*candidates(kernel, key), plainest(kernel, key)))
            assert len({tuple(got.shape for got in prepare(tile).results()) for tile in each}) == 1
            return each[0]

        x, w = (torch.empty(rows, D, dtype=dtype, device="meta") for rows in (N, C))
        per_row = [torch.empty(N, device="meta") for _ in range(5)]
        options = replace(PLAIN, workspace_bytes=workspace_bytes)
        cache = torch.empty(cache_size(x, w, options), dtype=torch.uint8, device="meta")
        given = x, w, torch.empty(N, dtype=torch.int64, device="meta"), *per_row, cache
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "kernels", NoLaunches())
            patch.setattr(launch, "key", lambda *of: key)
            patch.setattr(launch, "processors", lambda x: gpu[1])
            patch.setattr(backward_pass, "INTERPRETED_WORKSPACE", 2**62)
            patch.setattr(choice, "choose", choose)
            move = (lambda first, dw: None) if moved else None
            backend_triton._tuned_backward(given, options, True, True, move)
        assert len(tiles) > 3

    tried()


def _off_16_bytes(rows):
    return torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape)


@pytest.mark.triton_only
@pytest.mark.parametrize(
    "layout", [lambda x: x.T.contiguous().T, lambda x: x[:, :1].expand(x.shape), _off_16_bytes]
)
def test_kernels_read_aligned_contiguous_rows_whatever_the_layout(backend, layout):
    """They are compiled for these alone: of others each number is a load of its own."""
    problem, read = backend.problem(20, 300, 24), []
    problem = replace(
        problem, x=layout(problem.x), targets=_off_16_bytes(problem.targets), scale=_off_16_bytes(problem.scale)
    )

    def note(name, launch, arguments):
        read.extend(each for each in arguments if isinstance(each, torch.Tensor))
        launch()

    with launches.through(note):
        evaluate(backend.lmcl, problem, random_upstream(problem, "loss"))
    assert len(read) > 50
    assert all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in read)


@pytest.mark.triton_only
@pytest.mark.parametrize("dtypes", [F32, BF16, F16], ids=str)
def test_a_weight_off_16_bytes_has_blocks_of_its_own(backend, dtypes):
    """It is too large for a copy, and the code that reads it is other code than that of a weight that is not."""
    problem = backend.problem(20, 300, 32, dtypes)
    off = replace(problem, w=_off_16_bytes(problem.w))
    check_backend(backend, off)
    keys = [launch.key(each.x, each.w, PLAIN) for each in (problem, off)]
    assert keys[0].variant == keys[1].variant - {"unaligned"} != keys[1].variant
    for kernel in GEMM_KERNELS:
        aligned, unaligned = (block_sizes.table(kernel, replace(key, architecture="sm_90")) for key in keys)
        assert unaligned == block_sizes.RAGGED[kernel] != aligned


@pytest.mark.triton_only
def test_parts_of_dx_lie_beyond_32_bits(backend):
    """N D numbers apart, of which none but the first rows' are touched, nor memory but theirs."""
    N, D, splits, rows = 2**26, 64, 2, 8
    parts = torch.empty(N * D + rows * D, dtype=torch.int8, device=backend.device)
    parts[: rows * D], parts[N * D :] = 3, 4
    none, one = (torch.full((rows,), number, device=backend.device) for number in (0.0, 1.0))
    x = torch.zeros(rows, D, device=backend.device)
    dx, dscale = torch.empty_like(x), torch.empty_like(one)
    launch.kernels.finish_embedding_gradients[1, 1](
        parts, none, none, none, x, one, one, one, none, none, one, dx, dscale, N, splits, 1, D=D,
        NEED_DX=True, RESHAPE=False, MOMENTS=False, SIGMOID=False, BLOCK_N=rows, BLOCK_SPLITS=2, BLOCK_D=D,
    )  # fmt: skip
    assert bool((dx == dx[0, 0]).all())
    assert float(dx[0, 0]) * launch.kernels.common.G_LIFT.value == 3 + 4


@pytest.mark.triton_only
@pytest.mark.parametrize("dtypes", [F32, BF16, F16], ids=str)
def test_large_embeddings_of_an_odd_size(backend, dtypes):
    check_backend(backend, backend.problem(5, 70, 4099, dtypes))


@pytest.mark.triton_only
@pytest.mark.parametrize("value", ["0", "-5", "many"])
def test_chunk_override_must_be_a_number(backend, value, monkeypatch):
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", value)
    problem = backend.problem(4, 20, 8)
    with pytest.raises(ValueError, match=rf"COSFACE_TRITON_CHUNK must be .* got '{value}'\."):
        evaluate(backend.lmcl, problem, random_upstream(problem, "loss"))


@pytest.mark.triton_only
@pytest.mark.parametrize("exponent", [-20, -14, 0, 10])
def test_float16_g_neither_underflows_nor_overflows(backend, exponent):
    """G is as small as the mean over a large batch makes it; short rows make normal gradients of it."""
    problem = backend.problem(12, 400, 32, F16)
    problem.x.mul_(2.0 ** min(0, exponent // 2)), problem.w.mul_(2.0 ** min(0, exponent // 2))
    upstream = random_upstream(problem, "loss")
    upstream.loss.mul_(2.0**exponent)
    got, want = evaluate(backend.lmcl, problem, upstream), evaluate_oracle(problem, upstream)
    assert relative_error(got.dx, want.dx) < backend.rounding(F16) + 2**-11
    assert relative_error(got.dw, want.dw) < backend.rounding(F16) + 2**-11


@pytest.mark.triton_only
def test_unit_of_a_row_is_a_power_of_two_that_bounds_it(backend):
    g = torch.tensor([1e-30, 3e-9, 0.7, 1.0, 1e20], device=backend.device)
    scale = torch.full_like(g, 64.0)
    bound, unit = scale * g, units(scale, g, -scale * g)
    assert bool(((bound <= unit) & (unit <= 2 * bound)).all())
    assert torch.equal(torch.frexp(unit).mantissa, torch.full_like(unit, 0.5))
    odd = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, 1e-45], device=backend.device)
    assert bool(units(scale, odd, odd).isfinite().all())
    assert bool((1 / units(scale, odd, odd) * 4096).isfinite().all())


@pytest.mark.triton_only
def test_weight_that_is_not_contiguous_is_refused(backend):
    problem = backend.problem(4, 20, 8)
    w = problem.w.T.contiguous().T
    with pytest.raises(RuntimeError, match=r"contiguous weight, got strides \(1, 20\) for shape \(20, 8\)\."):
        cosface_loss(problem.x, w, problem.targets, backend="triton")


@pytest.mark.triton_only
def test_float64_is_refused_with_the_backend_that_takes_it(backend):
    problem = backend.problem(4, 20, 8)
    with pytest.raises(RuntimeError, match="leaves float64 to backend 'reference'"):
        cosface_loss(problem.x.double(), problem.w, problem.targets, backend="triton")


PRECISIONS = """
import torch
from cosface_kernels.backends.triton.launch import precision
matmul = torch.backends.cuda.matmul
print(precision(torch.float32))
torch.set_float32_matmul_precision("high")
print(precision(torch.float32))
matmul.allow_tf32 = False
print(precision(torch.float32))
matmul.fp32_precision = "tf32"  # from here on torch refuses to read allow_tf32
print(precision(torch.float32))
matmul.fp32_precision = "ieee"
print(precision(torch.float32))
"""


def test_precision_of_float32_products_follows_each_of_torchs_settings():
    done = run_python(PRECISIONS, TRITON_INTERPRET="0")
    assert done.stdout.split() == ["tf32x3", "tf32", "tf32x3", "tf32", "tf32x3"], done.stdout + done.stderr


def test_cpu_import_does_not_pay_for_triton():
    done = run_python("import sys, cosface_kernels; print('triton' in sys.modules)", TRITON_INTERPRET="0")
    assert done.stdout.strip() == "False", done.stdout + done.stderr


# -- launches ----------------------------------------------------------------------------------------------------

SPECIALISED = {"first_class", "chunk"}
SIZES = """
import torch, triton
from bench.kernels import INTEGERS, StandIn
from cosface_kernels.backends.triton import kernels
from cosface_kernels.backends.triton.kernels import sparse as sparse_kernels
triton.runtime.driver.set_active(StandIn("sm_80"))
for kernel in (*vars(kernels).values(), *vars(sparse_kernels).values()):
    for parameter in getattr(kernel, "params", ()):
        if parameter.name in INTEGERS and not kernel.fn.__name__.startswith("_"):
            assert parameter.do_not_specialize, (kernel.fn.__name__, parameter.name)
def compiled(C):
    bf16 = torch.bfloat16
    return kernels.row_norms.warmup(
        bf16, torch.int64, torch.float32, C, grid=(1,), D=64, BLOCK_C=32, BLOCK_D=64,
        OPERAND=triton.language.bfloat16, CHOSEN=False,
    )
print(compiled(1000) is compiled(1024) is compiled(1))
"""


def test_other_numbers_of_samples_and_classes_need_no_other_code():
    done = run_python(SIZES, TRITON_INTERPRET="0", PYTHONPATH=".")
    assert done.stdout == "True\n", done.stdout + done.stderr


@pytest.mark.triton_only
def test_a_first_step_compiles_eight_kernels(backend):
    names = set()

    def record(name, launch, arguments):
        names.add(name)
        launch()

    x, w = (torch.ones(rows, 3, device=backend.device, requires_grad=True) for rows in (2, 300))
    with launches.through(record):
        cosface_loss(x, w, torch.tensor([0, 1], device=backend.device), backend=backend.name).backward()
    assert len(names) == 8, names


@pytest.mark.triton_only
@pytest.mark.parametrize(
    ("num_samples", "num_classes", "dim"),
    [(1, 2**31 - 1, 1), (2**21, 100, 8), (3, 1000, 2**20), (2**14, 2**24, 1)],
)
def test_no_grid_passes_what_a_gpu_takes(backend, num_samples, num_classes, dim, monkeypatch):
    """2^31 - 1 blocks along the first axis, 65,535 along the others.

    The largest G here takes 1 TiB; one with more than 2^31 blocks would take at least 4 TiB.
    """
    launches = NoLaunches()
    assert backend_triton.unavailable() is None  # it imports triton
    monkeypatch.setattr(launch, "kernels", launches)
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", str(2**24))
    x, w = torch.empty(num_samples, dim, device="meta"), torch.empty(num_classes, dim, device="meta")
    rows = [torch.empty(num_samples, device="meta") for _ in range(6)]
    tile = block_sizes.INTERPRETED_TILE
    saved = Saved(w[:, 0], rows[0], x.new_empty(num_samples, 0, dtype=torch.int16))
    forward_pass.forward(x, w, saved, rows[0], rows[1], 0.0, PLAIN, tile)
    tiles = dict.fromkeys(GEMM_KERNELS[1:], tile)
    backward_pass.backward(x, w, saved, rows, PLAIN, True, True, tiles)
    assert len(launches.grids) >= 7
    for first, *others in launches.grids:
        assert first < 2**31
        assert all(size <= 65_535 for size in others), launches.grids
