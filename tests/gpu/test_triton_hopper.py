"""The warp-specialised kernels for Hopper: their source, on a host that draws the order of everything."""

import numpy as np
import pytest
from support.gluon_host import BFLOAT16, Descriptor, HazardError, Kernels, Pointer, array

N, C, D = 80, 300, 192
BLOCKS = {"D": D, "BLOCK_N": 64, "BLOCK_C": 32}
ROW_BLOCKS, TILES = 2, 10
SCALE = 16.0
SEEDS = 3  # orders of events


def float32(*shape):
    return Pointer(np.full(shape, np.nan, np.float32), np.float32)


@pytest.fixture(scope="module")
def problem():
    """Rows of x and w as bfloat16 holds them, with all that forward and backward are given."""
    rng = np.random.default_rng(1)

    def rows(count):
        values = array(rng.normal(size=(count, D)) + 1, np.float32).to(BFLOAT16)
        return np.asarray(values), np.asarray(values, np.float64)

    (x, x64), (w, w64) = rows(N), rows(C)
    norms = [np.linalg.norm(values, axis=1) for values in (x64, w64)]
    cos = x64 @ w64.T / norms[0][:, None] / norms[1]
    targets = rng.integers(0, C, N)
    targets[3] = -1
    g_lse, g_cos = rng.normal(size=(2, N))
    g_lse[5] = g_cos[5] = 0
    return {"x": x, "w": w, "cos": cos, "x_norm": norms[0], "w_norm": norms[1], "targets": targets, "g_lse": g_lse,
            "g_cos": g_cos}  # fmt: skip


def given(problem, *names):
    return [
        Pointer(problem[name], np.int64)
        if name == "targets"
        else Pointer(problem[name].astype(np.float32), np.float32)
        for name in names
    ]


def descriptors(problem):
    return [Descriptor(problem[name], (rows, 64)) for name, rows in (("x", 64), ("w", 32))]


def statistics(problem, kernels, slots, splits=2):
    top, sum_exp = float32(2 * splits, N), float32(2 * splits, N)
    scale = Pointer(np.full(N, SCALE, np.float32), np.float32)
    kernels.class_statistics[ROW_BLOCKS, splits](
        *descriptors(problem), *given(problem, "w_norm", "x_norm", "targets"), scale, top, sum_exp, N, C,
        -(-TILES // splits), SLOTS=slots, **BLOCKS,
    )  # fmt: skip
    return top.memory.reshape(-1, N), sum_exp.memory.reshape(-1, N)


def negatives(problem):
    return np.where(np.arange(C) == problem["targets"][:, None], -np.inf, problem["cos"])


@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("splits", [1, 4, 10])
def test_statistics_are_those_of_float64_in_any_order_of_events(problem, slots, splits):
    """Of one tile to all of them for each pair of groups, and so of groups without a tile."""
    cos = negatives(problem)
    results = []
    for seed in range(SEEDS):
        top, sum_exp = statistics(problem, Kernels(seed), slots, splits)
        results.append((top, sum_exp))
        largest = top.max(0)
        np.testing.assert_allclose(largest, cos.max(1), rtol=1e-6)
        total = (sum_exp * np.exp(SCALE * (top - largest))).sum(0)
        np.testing.assert_allclose(total, np.exp(SCALE * (cos - cos.max(1, keepdims=True))).sum(1), rtol=1e-4)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_one_slot_is_a_deadlock(problem):
    """It is given back only when the next product has been issued."""
    with pytest.raises(HazardError, match="the partitions wait for each other"):
        statistics(problem, Kernels(), slots=1)


def gradients(problem, kernels, slots, first=32, chunk=288, splits=2, dtype=BFLOAT16):
    cos = negatives(problem)
    top = cos.max(1)
    log_sum = np.log(np.exp(SCALE * (cos - top[:, None])).sum(1))
    given_rows = problem | {"scale": np.full(N, SCALE), "top": top, "log_sum": log_sum, "unit": np.full(N, 4.0)}
    g = Descriptor(np.full((N, chunk), np.nan, np.float32), (64, 8), dtype)
    negative_dot = Pointer(np.ones((chunk // 32, N), np.float32), np.float32)
    class_dot = float32(ROW_BLOCKS, chunk)
    per_row = ("w_norm", "targets", "scale", "top", "log_sum", "g_lse", "g_cos", "x_norm", "unit")
    kernels.logit_gradients[ROW_BLOCKS, splits](
        *descriptors(problem), *given(given_rows, *per_row), g, negative_dot, class_dot, N, C, first, chunk,
        -(-(chunk // 32) // splits), SLOTS=slots, **BLOCKS,
    )  # fmt: skip
    return g.matrix, negative_dot.memory.reshape(-1, N), class_dot.memory.reshape(-1, chunk)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("splits", [1, 2, 9])
def test_gradients_are_those_of_float64_in_any_order_of_events(problem, slots, splits, dtype):
    """Of a chunk that begins with the second tile and passes the last class."""
    first, chunk = 32, 288
    classes = slice(first, C)
    cos, below = problem["cos"], negatives(problem)
    g_lse, g_cos = problem["g_lse"][:, None], problem["g_cos"][:, None]
    p = np.exp(SCALE * below)
    p /= p.sum(1, keepdims=True)
    gradient = np.where(below == -np.inf, g_cos, SCALE * g_lse * p)
    results = [gradients(problem, Kernels(seed), slots, first, chunk, splits, dtype) for seed in range(SEEDS)]
    g, negative_dot, class_dot = results[0]
    assert np.isfinite(g).all()
    count = C - first
    want = (gradient if dtype == np.float16 else gradient / problem["w_norm"]) * (4096 / 4)
    smallest = 1e-7 if dtype == np.float16 else 0  # half a step of its subnormal numbers
    np.testing.assert_allclose(g[:, :count], want[:, classes], rtol=2**-8 + 1e-4, atol=smallest)
    of_negatives = (g_lse * p * cos)[:, classes].sum(1)
    np.testing.assert_allclose((negative_dot - 1).sum(0), of_negatives, atol=1e-5 * np.abs(of_negatives).max())
    of_classes = (gradient * cos).sum(0)[classes]
    np.testing.assert_allclose(class_dot.sum(0)[:count], of_classes, atol=1e-5 * np.abs(of_classes).max())
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


MUTANTS = {
    "no wait for a tile": ("        mbarrier.wait(full.index(slot), load // SLOTS & 1)\n", ""),
    "no wait for an empty slot": (
        "        mbarrier.wait(empty.index(slot), (load // SLOTS & 1) ^ 1)",
        "        pass",
    ),
    "no wait for x": ("    mbarrier.wait(memory[2], 0)  # ready\n", ""),
    "no turns": ("    mbarrier.wait(turns.index(GROUP), (tile // GROUPS + 1 + GROUP) & 1)", "    pass"),
    "the wrong phase of a tile": (
        "full.index(slot), load // SLOTS & 1",
        "full.index(slot), load // SLOTS & 1 ^ 1",
    ),
    "the wrong phase of a slot": ("(load // SLOTS & 1) ^ 1", "(load // SLOTS & 1)"),
    "the wrong turn": ("(tile // GROUPS + 1 + GROUP) & 1", "(tile // GROUPS + GROUP) & 1"),
    "a product that still reads": ("num_outstanding=1", "num_outstanding=2"),
    "a slot given back too early": ("(load + SLOTS - 1) % SLOTS", "load % SLOTS"),
    "a slot kept": ("    mbarrier.arrive(empty.index(last % SLOTS), count=1)\n", ""),
    "too few bytes": ("STEPS * x.block_type.nbytes", "x.block_type.nbytes"),
    "another tile's columns": ("load % STEPS * STEP]", "load // STEPS * STEP]"),
}
OF_GRADIENTS = {
    "a part stored over the one before": ("            tma.store_wait(0)  # until the part before is read\n", ""),
    "a part that the copy need not see": ("            fence_async_shared()\n", ""),
    "no wait for the last part": ("    tma.store_wait(0)\n\n", ""),
    "another part's columns": ("row_block * BLOCK_N, column]", "row_block * BLOCK_N, column + WIDTH]"),
    "the parts in another order": (
        "dot, second, third = second, third, fourth",
        "dot, second, third = third, second, fourth",
    ),
}


@pytest.mark.parametrize(
    ("mutant", "kernel"), [*((m, statistics) for m in MUTANTS), *((m, gradients) for m in OF_GRADIENTS)]
)
def test_a_mistake_is_found(problem, mutant, kernel):
    old, new = (MUTANTS | OF_GRADIENTS)[mutant]

    def change(source):
        assert old in source
        return source.replace(old, new)

    right = kernel(problem, Kernels(), 2)

    def try_orders():
        for seed in range(20):
            for got, want in zip(kernel(problem, Kernels(seed, change), 2), right, strict=True):
                np.testing.assert_array_equal(got, want)

    with pytest.raises(AssertionError):  # a HazardError, or other numbers
        try_orders()
