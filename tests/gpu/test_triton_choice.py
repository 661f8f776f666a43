"""Which block a kernel gets: the fastest of those whose results agree, and a product of the library's as well."""

import dataclasses
import logging
import math
import weakref
from functools import partial

import pytest
import torch
from support import BF16, F16, F32, check_result, evaluate, random_upstream
from support.gluon_host import TorchKernels

from bench import launches
from bench.kernels import ARCHITECTURES
from cosface_kernels import ops
from cosface_kernels.backends.triton import choice, launch
from cosface_kernels.backends.triton.choice import Trial, choose
from cosface_kernels.backends.triton.tiles import (
    GEMM_KERNELS,
    LIBRARY,
    LIBRARY_KERNELS,
    Key,
    Tile,
    candidates,
    plainest,
)
from cosface_kernels.options import Update

KERNEL = "class_statistics"
CAPABILITIES = {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (10, 3): "sm_100", (12, 0): "sm_80"}
KEY = Key("sm_90", 512, torch.bfloat16, torch.bfloat16, torch.bfloat16, 256)
RIGHT = torch.arange(12.0).view(3, 4), torch.tensor([1.0, 2.0, torch.nan])


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is known yet; what would be timed runs, and gives its milliseconds."""
    for known in ("_chosen", "_latest", "_complaints", "_milliseconds"):
        monkeypatch.setattr(choice, known, {})
    monkeypatch.setattr(choice, "_milliseconds_of", lambda launch: launch())
    monkeypatch.delenv("COSFACE_TRITON_TUNE", raising=False)


class Device:
    """Later candidates are faster; `results` by tile are what it computes, one after the other."""

    def __init__(self, key=KEY, **results):
        self.tiles, self.results, self.tried = candidates(KERNEL, key), results, []

    def prepare(self, tile):
        if tile in self.tiles:
            self.tried.append(tile)
        given = self.results.get(f"_{self.tiles.index(tile)}" if tile in self.tiles else "plain", [RIGHT])
        result = given.pop(0) if len(given) > 1 else given[0]
        if isinstance(result, Exception):
            raise result
        return Trial(lambda: -self.tiles.index(tile) if tile in self.tiles else 0, lambda: result)


def test_the_fastest_is_chosen_once_for_a_key(fresh):
    device = Device()
    for _ in range(3):
        assert choose(KERNEL, KEY, device.prepare) == device.tiles[-1]
    assert len(device.tried) == 3 * len(device.tiles) > 3  # two runs against the plainest, and one for the time
    other = dataclasses.replace(KEY, dim=128)
    choose(KERNEL, other, device.prepare)
    assert len(device.tried) == 6 * len(device.tiles)


WRONG = RIGHT[0] * torch.tensor([[1.0], [1.1], [1.0]]), RIGHT[1]
NAN = RIGHT[0], torch.tensor([1.0, torch.nan, torch.nan])


@pytest.mark.parametrize(
    ("results", "complaint"),
    [
        ([WRONG], "off by 0.1"),
        ([NAN], "off by nan"),
        ([RIGHT, NAN], "different bits"),
        ([RuntimeError("too much shared memory")], "RuntimeError: too much shared memory"),
        ([TypeError("no such product")], "TypeError: no such product"),
        ([(RIGHT[0][:2], RIGHT[1])], "shapes [2, 4], [3], those of the plainest block [3, 4], [3]."),
        ([RIGHT[:1]], "shapes [3, 4], those of the plainest block [3, 4], [3]."),
    ],
)
def test_what_is_wrong_here_is_left_out_and_named_once(fresh, caplog, results, complaint):
    last = len(candidates(KERNEL, KEY)) - 1
    device = Device(**{f"_{last}": results})
    with caplog.at_level(logging.WARNING):
        assert choose(KERNEL, KEY, device.prepare) == device.tiles[last - 1]
        larger = dataclasses.replace(KEY, bucket=4096)
        assert choose(KERNEL, larger, device.prepare) != device.tiles[last], "a larger batch trusts it no more"
    assert [record.message for record in caplog.records if complaint in record.message] == caplog.messages
    assert len(caplog.messages) == 1
    assert sum(complaint in line for line in choice.report()) == 2


def test_if_nothing_is_right_the_plainest_is_taken(fresh):
    tiles = candidates(KERNEL, KEY)
    device = Device(**{f"_{i}": [WRONG] for i in range(len(tiles))})
    assert choose(KERNEL, KEY, device.prepare) == plainest(KERNEL, KEY)
    assert plainest(KERNEL, KEY).stages == 1


def test_rounding_is_no_error(fresh):
    rounded = [(RIGHT[0] * (1 + 2**-8), RIGHT[1] * (1 - 2**-8))]
    device = Device(_0=rounded, _1=rounded)
    choose(KERNEL, KEY, device.prepare)
    assert set(choice._complaints.values()) == {None}


def test_the_last_batch_of_an_epoch_tries_nothing(fresh):
    device, ragged = Device(), dataclasses.replace(KEY, bucket=64)
    chosen = choose(KERNEL, KEY, device.prepare)
    for _ in range(3):
        tried = len(device.tried)
        assert choose(KERNEL, ragged, device.prepare) == chosen
        assert choose(KERNEL, KEY, device.prepare) == chosen
        assert len(device.tried) == tried
    choose(KERNEL, ragged, device.prepare)
    choose(KERNEL, ragged, device.prepare)
    assert len(device.tried) > tried, "two in a row are no accident"


def test_larger_batches_than_before_are_timed(fresh):
    device = Device()
    choose(KERNEL, KEY, device.prepare)
    tried = len(device.tried)
    choose(KERNEL, dataclasses.replace(KEY, bucket=1024), device.prepare)
    assert len(device.tried) == tried + len(device.tiles), "right is right at any batch, fast is not"


def test_the_default_is_taken_unseen_if_tuning_is_forbidden(fresh, monkeypatch):
    monkeypatch.setenv("COSFACE_TRITON_TUNE", "0")
    assert choose(KERNEL, KEY, lambda tile: pytest.fail("tried")) == candidates(KERNEL, KEY)[0]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_are_the_first_that_is_right(fresh, monkeypatch, deterministic):
    monkeypatch.setattr(choice, "_milliseconds_of", lambda launch: pytest.fail("timed"))
    device = Device(_0=[WRONG])
    assert choose(KERNEL, KEY, device.prepare) == device.tiles[1]


@pytest.mark.parametrize("timed", [False, True], ids=["deterministic before", "timed before"])
@pytest.mark.parametrize("before", [(), (256,), (64,), (4096, 64, 256)], ids=str)
def test_deterministic_algorithms_depend_on_no_batch_before(fresh, deterministic, before, timed):
    torch.use_deterministic_algorithms(not timed)
    for bucket in before:
        choose(KERNEL, dataclasses.replace(KEY, bucket=bucket), Device().prepare)
    torch.use_deterministic_algorithms(True)
    for bucket in (256, 64):
        key = dataclasses.replace(KEY, bucket=bucket)
        assert choose(KERNEL, key, Device(key).prepare) == candidates(KERNEL, key)[0]


FULL = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")]
LAST = len(candidates(KERNEL, KEY)) - 1


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("where", ["_0", f"_{LAST}", "plain", "times"])
def test_memory_that_was_full_says_nothing_of_a_block(fresh, monkeypatch, caplog, where, error):
    def times(launch):
        raise error

    with monkeypatch.context() as full:
        if where == "times":
            full.setattr(choice, "_milliseconds_of", times)
        tile = choose(KERNEL, KEY, Device(**({} if where == "times" else {where: [error]})).prepare)
    known = where in (f"_{LAST}", "times")
    assert tile == (candidates(KERNEL, KEY)[0] if known else plainest(KERNEL, KEY))
    assert "Memory is too full" in caplog.text
    device = Device()
    assert choose(KERNEL, KEY, device.prepare) == device.tiles[-1], "the next batch tries them"
    assert set(choice._complaints.values()) == {None}


@pytest.mark.parametrize("number", [0.0, torch.nan, torch.inf])
def test_nothing_is_learnt_where_every_block_would_agree(fresh, number):
    """Of a batch without a gradient, say, a kernel that is wrong by a factor is right."""
    device = Device(plain=[tuple(torch.full_like(each, number) for each in RIGHT)])
    device.results |= {f"_{i}": device.results["plain"] for i in range(LAST + 1)}
    assert choose(KERNEL, KEY, device.prepare) == plainest(KERNEL, KEY)
    device = Device(**{f"_{LAST}": [WRONG]})
    assert choose(KERNEL, KEY, device.prepare) == device.tiles[LAST - 1]


def test_a_trial_holds_the_results_of_two_runs(fresh):
    """Each may be as large as the workspace of a step."""
    alive, most, device = weakref.WeakSet(), [], Device()

    def prepare(tile):
        trial = device.prepare(tile)

        def results():
            fresh_results = [each.clone() for each in RIGHT]
            alive.add(fresh_results[0])
            most.append(len(alive))
            return fresh_results

        return Trial(trial.launch, results)

    choose(KERNEL, KEY, prepare)
    assert max(most) == 2


@pytest.mark.parametrize("shape", [(9,), (9, 4)], ids=str)
def test_rows_are_compared_some_at_a_time(monkeypatch, shape):
    want = torch.randn(shape)
    got = want + 0.01 * torch.randn(shape)
    got[3], want[3] = torch.nan, torch.nan
    error = choice._worst_row(got, want)
    monkeypatch.setattr(choice, "ROWS_AT_ONCE", 2)
    assert 0 < choice._worst_row(got, want) == error


def test_nothing_is_tried_while_a_graph_is_captured(fresh, monkeypatch):
    monkeypatch.setattr(choice, "is_capturing", lambda: True)
    assert choose(KERNEL, KEY, lambda tile: pytest.fail("tried")) == plainest(KERNEL, KEY)
    monkeypatch.setattr(choice, "is_capturing", lambda: False)
    device = Device()
    chosen = choose(KERNEL, KEY, device.prepare)
    monkeypatch.setattr(choice, "is_capturing", lambda: True)
    assert choose(KERNEL, KEY, lambda tile: pytest.fail("tried")) == chosen


@pytest.mark.parametrize("kernel", GEMM_KERNELS)
@pytest.mark.parametrize("bucket", [1, 16, 32, 64, 128, 4096])
def test_small_batches_get_small_blocks(kernel, bucket):
    for operand in (torch.bfloat16, torch.float32):
        key = dataclasses.replace(KEY, bucket=bucket, operand=operand)
        tiles = candidates(kernel, key)
        assert tiles
        assert min(t.n for t in tiles) <= 32
        assert all(t.n <= max(bucket, 32) for t in tiles)
        assert all(256 % t.c == 0 for t in tiles), "a chunk is a whole number of tiles"


# -- specialised -------------------------------------------------------------------------------------------------

DESCRIBED = dataclasses.replace(KEY, described=True)
SPECIALIZED_KERNELS = ("class_statistics", "logit_gradients")


@pytest.mark.parametrize("kernel", SPECIALIZED_KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_specialised_kernel_is_a_last_candidate(kernel, dtype):
    tiles = candidates(kernel, dataclasses.replace(DESCRIBED, x=dtype, w=dtype, operand=dtype))
    assert [tile.specialized for tile in tiles] == [False] * (len(tiles) - 1) + [True]
    assert "specialised warps" in str(tiles[-1])


@pytest.mark.parametrize("kernel", GEMM_KERNELS)
@pytest.mark.parametrize(
    "without",
    [
        {"described": False}, {"variant": frozenset({"raw"})}, {"dim": 64}, {"dim": 520}, {"dim": 1024},
        {"bucket": 64}, {"operand": torch.float32}, {"architecture": "sm_80"}, {"architecture": "sm_100"},
        {"architecture": "interpreter"},
    ],
    ids=str,
)  # fmt: skip
def test_none_is_specialised_where_it_could_not_run(kernel, without):
    assert not any(tile.specialized for tile in candidates(kernel, dataclasses.replace(DESCRIBED, **without)))


def test_rows_are_described_as_tensor_descriptors_can():
    rows = torch.zeros(40, 128, dtype=torch.bfloat16)
    assert launch.can_describe(rows, rows[:, :64], rows[::2])
    for other in (rows.T, rows[:, 4:], rows[:1].expand(40, 128), torch.zeros(40, 12, dtype=torch.bfloat16)):
        assert not launch.can_describe(rows, other)


@pytest.mark.triton_only
@pytest.mark.parametrize("dtypes", [BF16, F16], ids=str)
@pytest.mark.parametrize("sizes", [(100, 300, 128), (65, 1, 64), (3, 530, 64)], ids=str)
def test_specialised_kernels(backend, dtypes, sizes, monkeypatch):
    """Launched as on a GPU, and run by a host; several chunks, of which the last is ragged."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    kernels = TorchKernels()
    monkeypatch.setattr(launch, "hopper", lambda: kernels)
    tile = Tile(64, 32, 64, 12, 3, specialized=True)

    def choose(kernel, key, prepare):
        return tile if kernel in SPECIALIZED_KERNELS else candidates(kernel, key)[0]

    monkeypatch.setattr(choice, "choose", choose)
    problem = backend.problem(*sizes, dtypes)
    for outputs in (("loss",), ("loss", "lse", "target_cos")):
        upstream = random_upstream(problem, *outputs)
        got = evaluate(backend.lmcl, problem, upstream)
        check_result(got, backend.seen(problem), upstream, backend.operand(dtypes))


# -- in the kernels' place ---------------------------------------------------------------------------------------


def lmcl_with(backend, kernels, problem, upstream, **options):
    """The op, where the library takes these kernels' products."""

    def choose(kernel, key, prepare):
        return LIBRARY if kernel in kernels else candidates(kernel, key)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "choose", choose)
        return evaluate(partial(backend.lmcl, **options), problem, upstream)


@pytest.mark.triton_only
@pytest.mark.parametrize("kernels", [LIBRARY_KERNELS[:1], LIBRARY_KERNELS[1:], LIBRARY_KERNELS], ids=str)
@pytest.mark.parametrize("sizes", [(20, 300, 40), (5, 1, 16), (3, 257, 130)], ids=str)
def test_products_of_the_library(backend, kernels, sizes, monkeypatch):
    """Several chunks, of which the last is ragged; rows of any length, with other upstream gradients."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    problem = backend.problem(*sizes, BF16)
    for row, length in enumerate((1e-3, 0.0, 1e4)):
        problem.w[row % len(problem.w)] *= length
    for outputs in (("loss",), ("loss", "lse", "target_cos")):
        upstream = random_upstream(problem, *outputs)
        got = lmcl_with(backend, kernels, problem, upstream)
        check_result(got, backend.seen(problem), upstream, backend.operand(BF16))


@pytest.mark.triton_only
def test_products_of_the_library_of_a_weight_as_it_is(backend):
    problem = backend.problem(24, 300, 32, BF16)
    upstream = random_upstream(problem, "loss")
    got = lmcl_with(backend, LIBRARY_KERNELS, problem, upstream, normalize_weight=False)
    want = lmcl_with(backend, (), problem, upstream, normalize_weight=False)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-6)


@pytest.mark.triton_only
@pytest.mark.parametrize(
    ("dtypes", "c", "classes"), [(BF16, 64, 256), (F32, 64, 256), (BF16, 64, 768), (BF16, 256, 768)]
)
def test_a_step_tries_each_candidate_and_computes_the_same(backend, dtypes, c, classes, fresh, monkeypatch):
    """The real trials, on a sample that ends within a chunk; the slowest is taken for the fastest.

    Of 768 classes, the workspace gives some candidates one chunk, and the library or wide blocks two.
    """
    if classes == 256:
        monkeypatch.setenv("COSFACE_TRITON_CHUNK", "256")
    problem = backend.problem(17, 1000, 24, dtypes)
    monkeypatch.setattr(launch, "TRIAL_FLOPS", 2 * classes * problem.x.numel())
    upstream, launched = random_upstream(problem, "loss"), []

    def milliseconds(launch):
        launch()
        launched.append(launch)
        return -len(launched)

    monkeypatch.setattr(choice, "_milliseconds_of", milliseconds)

    def several(kernel, key):
        library = (LIBRARY,) if dtypes == BF16 and kernel in LIBRARY_KERNELS else ()
        return plainest(kernel, key), Tile(16, c, 32, 4, 1), *library

    monkeypatch.setattr(choice, "candidates", several)
    got = evaluate(backend.lmcl, problem, upstream)
    check_result(got, backend.seen(problem), upstream, backend.operand(dtypes))
    assert set(choice._complaints.values()) == {None}
    assert len(launched) == (10 if dtypes == BF16 else 8)
    for (kernel, key), tile in choice._chosen.items():
        assert tile == several(kernel, key)[-1]
    assert all("(chosen)" in line or "ms" in line for line in choice.report())


def _with_two_tiles(backend, monkeypatch):
    """A problem of which each kernel has two tiles to try, on the first 256 classes."""
    problem = backend.problem(20, 300, 24, F32)
    monkeypatch.setattr(launch, "TRIAL_FLOPS", 2 * 256 * problem.x.numel())
    monkeypatch.setattr(choice, "_milliseconds_of", lambda launch: launch() or 1.0)
    tiles = Tile(32, 64, 32, 4, 1), Tile(16, 64, 32, 4, 1)
    monkeypatch.setattr(choice, "candidates", lambda kernel, key: tiles)
    return problem


@pytest.mark.triton_only
def test_a_step_with_moments_has_trials_of_its_own(backend, fresh, monkeypatch):
    problem = _with_two_tiles(backend, monkeypatch)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    for moments in (False, True):
        results = ops.lmcl(x, w, problem.targets, problem.scale, 0.3, backend.name, moments=moments)
        (results[6][:2] if moments else results[0]).sum().backward()
    assert set(choice._complaints.values()) == {None}
    assert {(kernel, "moments" in key.variant) for kernel, key in choice._chosen} == {
        (kernel, moments) for kernel in GEMM_KERNELS for moments in (False, True)
    }


@pytest.mark.triton_only
def test_a_sigmoid_has_trials_of_its_own(backend, fresh, monkeypatch):
    problem = _with_two_tiles(backend, monkeypatch)
    ones = torch.ones_like(problem.scale)
    inputs = problem.x, problem.w, problem.targets, problem.scale, ones, ones, ones
    ops.sigmoid(*inputs, True, True, backend.name, sigmoid="angle")
    assert set(choice._complaints.values()) == {None}
    assert {(kernel, key.variant) for kernel, key in choice._chosen} == {
        (kernel, frozenset({"sigmoid", "angle"})) for kernel in GEMM_KERNELS[1:]
    }


@pytest.mark.triton_only
def test_every_kernel_of_a_step_was_tried_as_it_is_compiled(backend, fresh, monkeypatch):
    """Steps with other options one after another, on several chunks: what one tries does not stand for more."""
    monkeypatch.setenv("COSFACE_TRITON_CHUNK", "512")
    _with_two_tiles(backend, monkeypatch)
    tiles = Tile(32, 256, 32, 4, 1), Tile(16, 256, 32, 4, 1)
    monkeypatch.setattr(choice, "candidates", lambda kernel, key: tiles)
    monkeypatch.setattr(choice, "_milliseconds_of", lambda launch: 1.0)
    problem, device = backend.problem(5, 600, 8), backend.device
    x, w, targets, scale = problem.x, problem.w, problem.targets.clamp_max(200), problem.scale
    monkeypatch.setattr(launch, "TRIAL_FLOPS", 2 * 512 * x.numel())
    reshaped = {"thresholds": torch.full_like(scale, 0.1)}
    every = [
        {}, {"cache_bytes": 2 * 5 * 256}, {"gradient_tolerance": 1e-3}, {"normalize_weight": False},
        {"classes": torch.arange(0, 600, 2, device=device)},
        reshaped | {"negatives": torch.tensor([0.0, 1.1, 0.1], device=device)},
        reshaped | {"negatives": torch.tensor([0.0, 1.1, 0.1, 1.0, 0.0, 1.1], device=device)},
    ]  # fmt: skip
    tried, taken, trying = set(), set(), []

    def choose(*arguments):
        trying.append(True)
        tile = choice_of(*arguments)
        trying.pop()
        return tile

    def note(name, launch, arguments):
        launch()
        flags = tuple(sorted((flag, on) for flag, on in launch.keywords.items() if isinstance(on, bool)))
        dtypes = tuple(each.dtype for each in arguments if isinstance(each, torch.Tensor))
        if name in GEMM_KERNELS:
            (tried if trying else taken).add((name, flags, dtypes))

    choice_of = choice.choose
    monkeypatch.setattr(choice, "choose", choose)
    with launches.through(note):
        for options in every:
            _, top, log_sum, *_, cache, _ = ops.lmcl(x, w, targets, scale, 0.3, backend.name, **options)
            given = x, w, targets, scale, top, log_sum, torch.ones_like(scale), torch.ones_like(scale), cache
            ops.lmcl_backward(*given, True, True, backend.name, **options)
        update = Update("sgd", 1, 0, 1.0, math.inf, 0.1, 0.0)
        half = w.bfloat16()
        _, top, log_sum, *_, cache, _ = ops.lmcl(x, half, targets, scale, 0.3, backend.name)
        given = x, half, targets, scale, top, log_sum, torch.ones_like(scale), torch.ones_like(scale), cache
        ops.lmcl_backward(*given, True, True, backend.name)
        ops.lmcl_backward_update_(*given, [], None, *update.flat(), True, backend.name)
    assert len(taken) > 20
    assert taken <= tried, taken - tried
    assert set(choice._complaints.values()) == {None}


@pytest.mark.triton_only
def test_launches_with_the_library_are_counted_by_kernel(backend):
    """It needs one more pass over dw, and none over G."""
    problem, names = backend.problem(24, 300, 32, BF16), []

    def count(name, launch, arguments):
        names.append(name)
        launch()

    with launches.through(count):
        lmcl_with(backend, LIBRARY_KERNELS, problem, random_upstream(problem, "loss"))
    assert "project_weight_gradients" in names
    assert not set(names) & set(LIBRARY_KERNELS)


@pytest.mark.parametrize(("capability", "architecture"), CAPABILITIES.items())
def test_a_gpu_takes_the_blocks_of_an_architecture_that_is_compiled_for(monkeypatch, capability, architecture):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.architecture.__wrapped__(torch.device("cuda")) == architecture
    assert architecture in ARCHITECTURES
