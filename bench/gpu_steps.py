"""The steps of `bench gpu`: each adds rows of figures to a Bench."""

import functools
import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench import launches, machine, race
from bench.head import MARGIN, SCALE, Head, draw
from bench.probe import DTYPES, Bench
from cosface_kernels import LossStats, cosface_loss
from cosface_kernels.backends import select
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS, Tile
from cosface_kernels.optim import FusedSGD

LEARNING_RATE = 1e-6  # so small that all repeats see the same state
# The needs (dx, dw) of the lmcl_backward in which a kernel is timed; class_statistics is lmcl's.
NEEDS = {
    "logit_gradients": (False, False),
    "embedding_gradients": (True, False),
    "weight_gradients": (False, True),
}


def versions(bench: Bench) -> None:
    try:
        import triton as triton_package

        found = triton_package.__version__
    except ImportError:
        found = None
    import numpy

    bench.add(
        "versions", **bench.device.facts(), python=platform.python_version(), torch=torch.__version__,
        cuda=torch.version.cuda, triton=found, numpy=numpy.__version__, cpus=os.cpu_count(),
        commit=machine.commit(),
    )  # fmt: skip


def ceilings(bench: Bench) -> None:
    """What the device can do at best: moving bytes, multiplying matrices."""
    device, n = bench.device.name, bench.sizes.square
    nbytes = bench.sizes.copy_bytes
    source, target = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = bench.seconds(functools.partial(target.copy_, source))
    bench.add("ceilings", what="copy", median_s=seconds, tb_per_s=2 * nbytes / seconds / 1e12)
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "ieee"),
        ("float16", torch.float16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        seconds = bench.seconds(functools.partial(torch.mm, a, b, out=out))
        bench.add("ceilings", what=f"{n}^3 {name}", median_s=seconds, tflops=2 * n**3 / seconds / 1e12)
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def races(bench: Bench) -> None:
    """Bits and values of every tile; --dtype tf32 is float32 with allow_tf32."""
    tf32 = bench.dtype == "tf32"
    dtype = torch.float32 if tf32 else DTYPES[bench.dtype]
    _examine(bench, "race", dtype, tf32)


def _examine(bench: Bench, step: str, dtype: torch.dtype, tf32: bool = False, **options: Any) -> None:
    sizes, repeats = bench.sizes.race, bench.sizes.race_repeats
    os.environ["COSFACE_TRITON_CHUNK"] = str(sizes[1])  # one launch, whose whole G can be compared
    for what, examine in race.examinations(sizes, dtype, tf32, bench.device, repeats, **options):
        right = False
        with bench.tried(step, **what):
            figures = examine()
            bench.add(step, **what, **figures)
            right = figures["right"]
        bench.wrong |= not right


def _kernel(bench: Bench, step: str, head: Head, kernel: str, tile: Tile, **what: Any) -> None:
    """The time of one kernel, of all its launches in a step, with this tile."""
    what |= {"kernel": kernel, "tile": launches.name(tile), "batch": len(head.x), "dtype": _name(head.x.dtype)}
    with bench.tried(step, **what), launches.pinned(kernel, tile):
        run = functools.partial(head.backward(), *NEEDS[kernel]) if kernel in NEEDS else head.forward
        seconds, count = bench.in_kernels(run, kernel)[kernel]
        bench.add(step, **what, median_s=seconds, launches=count, tflops=head.flops / seconds / 1e12)


def kernels(bench: Bench) -> None:
    """Every tile of the table at every batch in bfloat16; the first tile in float32 and float16."""
    for batch in sorted(bench.sizes.batches, key=lambda batch: batch != bench.sizes.batch):
        head = bench.draw(batch)
        for kernel in GEMM_KERNELS:
            for tile in launches.tiles(kernel, head.x.dtype):
                _kernel(bench, "kernels", head, kernel, tile)
    for dtype in ("float32", "float16"):
        head = bench.draw(bench.sizes.batch, dtype=dtype)
        for kernel in GEMM_KERNELS:
            _kernel(bench, "kernels", head, kernel, launches.tiles(kernel, head.x.dtype)[0])


def specialized(bench: Bench) -> None:
    """Bits, values and times of the kernels that are off by default, where there are any."""
    tiles = functools.partial(launches.specialized, dim=bench.sizes.dim)
    for dtype in (torch.bfloat16, torch.float16):
        _examine(bench, "specialized race", dtype, tiles=tiles)
    del os.environ["COSFACE_TRITON_CHUNK"]
    for batch in bench.sizes.batches:
        head = bench.draw(batch)
        for kernel in GEMM_KERNELS:
            for tile in tiles(kernel, head.x.dtype):
                _kernel(bench, "specialized", head, kernel, tile)


def library(bench: Bench) -> None:
    """torch.mm at the kernels' shapes, which is what they could reach."""
    for batch in bench.sizes.batches:
        _library(bench, "library", bench.draw(batch), bench.sizes.chunk)


def _library(bench: Bench, step: str, head: Head, chunk: int) -> None:
    """The products with the library, chunk by chunk of classes, into memory that is there."""
    rows = head.w.split(chunk)
    largest = len(rows[0])
    z, dx, dw = head.x.new_empty(len(head.x), largest), torch.zeros_like(head.x), torch.empty_like(rows[0])
    g = torch.randn_like(z)  # zeros would be multiplied faster
    products = {
        "z = x w^T": lambda w: torch.mm(head.x, w.T, out=z) if len(w) == largest else head.x @ w.T,
        "dx += g w": lambda w: dx.addmm_(g[:, : len(w)], w),
        "dw = g^T x": lambda w: torch.mm(g[:, : len(w)].T, head.x, out=dw[: len(w)]),
    }
    for name, product in products.items():
        what = {"product": name, "batch": len(head.x), "chunk": chunk}
        with bench.tried(step, **what):
            seconds = bench.seconds(lambda product=product: [product(w) for w in rows])
            bench.add(step, **what, median_s=seconds, tflops=head.flops / seconds / 1e12)


def steps(bench: Bench) -> None:
    """Whole steps: as called, on the device alone, under a graph, the host alone, and their memory."""
    for batch, backend in itertools.product(bench.sizes.batches, _backends(bench)):
        head, what = bench.draw(batch, backend=backend), {"backend": backend, "batch": batch}
        with bench.tried("steps", **what):
            run = head.step()
            wall, host = bench.wall(run)
            figures = {"wall_s": wall, "host_s": host, "device_s": bench.seconds(run)}
            gradients = head.x.nbytes + head.w.nbytes
            figures["extra_mib"] = (bench.device.peak(run) - gradients) / 2**20
            figures["tflops"] = 4 * head.flops / figures["device_s"] / 1e12
            bench.add("steps", **what, **figures)
        with bench.tried("graph", **what):
            bench.add("graph", **what, graph_s=bench.seconds(bench.device.captured(head.step())))
    with bench.tried("shares"):
        _shares(bench, "shares", bench.draw(bench.sizes.batch).step(), batch=bench.sizes.batch)


def _shares(bench: Bench, step: str, run: Callable[[], Any], **what: Any) -> None:
    """Where a step's time goes, by kernel."""
    for kernel, (seconds, count) in bench.in_kernels(run).items():
        bench.add(step, kernel=kernel, **what, median_s=seconds, launches=count)


def _backends(bench: Bench) -> list[str]:
    """Those of GPUs that run here; a row for one that does not."""
    found = []
    for name in ("triton", "cuda"):
        head = draw(1, 1, 1, torch.bfloat16, bench.device, name)
        try:
            select(name, head.x, head.w)
        except RuntimeError as error:
            bench.add("backend", backend=name, note=str(error))
        else:
            found.append(name)
    return found


def update(bench: Bench) -> None:
    """A step whose rows FusedSGD moves inside backward."""
    for backend in _backends(bench):
        head, what = (
            bench.draw(bench.sizes.batch, backend=backend),
            {"backend": backend, "batch": bench.sizes.batch},
        )
        with bench.tried("update", **what):
            run = _training_step(head)
            wall, host = bench.wall(run)
            figures = {"wall_s": wall, "host_s": host, "device_s": bench.seconds(run)}
            bench.add("update", **what, **figures, extra_mib=bench.device.peak(run) / 2**20)
            if backend == "triton":
                _shares(bench, "update shares", run, batch=bench.sizes.batch)


def _training_step(head: Head, **options: Any) -> Callable[[], LossStats]:
    """Loss, dx, and rows that FusedSGD moves inside backward."""
    x, w = head.x.requires_grad_(), torch.nn.Parameter(head.w)
    optimizer = FusedSGD([w], lr=LEARNING_RATE, momentum=0.9)

    def run() -> LossStats:
        x.grad = None
        loss, stats = cosface_loss(
            x, w, head.labels, scale=SCALE, margin=MARGIN, backend=head.backend, return_stats=True, **options
        )
        loss.backward()
        optimizer.step()
        return stats

    return run


def tolerance(bench: Bench) -> None:
    """Such a step with a gradient_tolerance, of cosines that spread as in a new head and as in a trained one."""
    for width, eps in itertools.product((bench.sizes.dim, bench.sizes.dim // 8), (0.0, 1e-2)):
        head = bench.draw(bench.sizes.batch)
        for rows in (head.x, head.w):
            rows[:, width:] = 0  # cosines of random rows have a standard deviation of 1 / sqrt(width)
        what = {"spread": width**-0.5, "tolerance": eps, "batch": bench.sizes.batch}
        with bench.tried("tolerance", **what):
            run = _training_step(head, gradient_tolerance=eps)
            kept = sparsity.kept.mean().item() if (sparsity := run().sparsity) else 1.0
            bench.add("tolerance", **what, kept=kept, device_s=bench.seconds(run))


def sweep(bench: Bench) -> None:
    """What the table and the chunk rule do not hold: is there more to be had?"""
    head = bench.draw(bench.sizes.batch)
    for factor in bench.sizes.factors:
        chunk = factor * bench.sizes.chunk
        os.environ["COSFACE_TRITON_CHUNK"] = str(chunk)
        with bench.tried("chunks", chunk=chunk):
            run = head.step()
            found = bench.in_kernels(run)
            shares = {kernel.replace("gradients", "s"): found[kernel][0] for kernel in GEMM_KERNELS[1:]}
            bench.add("chunks", chunk=chunk, wall_s=bench.wall(run)[0], device_s=bench.seconds(run), **shares)
        _library(bench, "library by chunk", head, chunk)
    del os.environ["COSFACE_TRITON_CHUNK"]
    for kernel in GEMM_KERNELS:
        default = launches.tiles(kernel, head.x.dtype)[0]
        for tile in variations(default)[: bench.sizes.variations]:
            _kernel(bench, "tiles", head, kernel, tile)


def variations(tile: Tile) -> list[Tile]:
    """The tile; others of its stages and warps; and the two largest that a block's registers can hold."""
    more = [replace(tile, stages=stages) for stages in (2, 3, 4)]
    more += [replace(tile, warps=4), replace(tile, n=128, c=256, warps=8), replace(tile, n=256, c=128, warps=8)]
    return list(dict.fromkeys([tile, *more]))


def once(bench: Bench, small: bool) -> None:
    """Two steps, for a profiler or a sanitizer, which sees the first launch of each large kernel in the second."""
    N, C, D = bench.sizes.small if small else (bench.sizes.batch, bench.sizes.classes, bench.sizes.dim)
    run = draw(N, C, D, torch.bfloat16, bench.device, bench.backend).step()
    results = run()
    seen: set[str] = set()

    def record(name: str, launch: Callable[[], None], arguments: tuple[Any, ...]) -> None:
        if name in seen or name not in GEMM_KERNELS:
            return launch()
        seen.add(name)
        with bench.device.profiled():
            launch()

    with launches.through(record):
        again = run()
    bench.device.synchronize()
    if not all(torch.equal(a, b) for a, b in zip(results, again, strict=True)):
        bench.wrong = True
        print("The second step gave other bits than the first.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
