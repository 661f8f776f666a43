"""`python -m bench distributed`: a step of the sharded head on processes of this machine; a model of many GPUs."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from bench import machine, report
from bench.step import _dtype, _writable
from bench.worker import DTYPES
from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.distributed import destroy_process_group
from cosface_recipes.arguments import count, counts, positive

LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
GPUS, CLASSES = (8, 64, 256, 1024), (1_000_000, 10_000_000, 100_000_000)
PER_NODE = 8  # GPUs that are joined by the faster links
ITEMSIZE = 2  # of the bfloat16 features, weight and gradient of the prediction


@dataclass(frozen=True)
class Row:
    """The head's step on a number of processes that share this machine's cores."""

    ranks: int
    batch: int  # of all ranks together
    dim: int
    classes: int
    dtype: str
    threads: int  # of each rank
    median_s: float  # of the slowest rank
    min_s: float
    communication: float  # share of the time that a rank spends in collectives, waiting for others included
    bytes_formula: int  # that a rank sends in a step
    bytes_measured: float | None  # all that this machine sent to itself, per rank and step
    steps: int
    torch: str
    commit: str | None
    device: str


@dataclass(frozen=True)
class Prediction:
    """Not measured: arithmetic and bytes over the rates that were assumed, nothing overlapped."""

    gpus: int
    classes: int
    compute_s: float
    wire_s: float
    memory_gib: float  # weight, gradient and float32 momentum of a GPU's classes, and the gathered batch
    wire_mib: float  # that a GPU sends in a step


def bytes_per_step(ranks: int, batch: int, dim: int, itemsize: int) -> int:
    """What a rank sends in a step if every collective is a ring.

    (W - 1)/W N ( D b + 12    features, target and scale are gathered
                + 3 x 16      two reductions of (2, N) float32 forward, one backward
                + 4 D )       the embeddings' gradient is reduced in float32 and scattered
    """
    return (ranks - 1) * batch * (dim * itemsize + 12 + 48 + 4 * dim) // ranks


def predict(gpus: int, classes: int, args: argparse.Namespace) -> Prediction:
    """8 N C D / W operations, and the bytes of a ring, whose slowest link is that between machines if any."""
    batch = gpus * args.batch_per_gpu
    wire = bytes_per_step(gpus, batch, args.dim, ITEMSIZE)
    link = args.link if gpus <= PER_NODE else args.network
    rows = -(-classes // gpus)
    memory = rows * args.dim * (2 * ITEMSIZE + 4) + batch * args.dim * (ITEMSIZE + 4)
    return Prediction(
        gpus,
        classes,
        compute_s=8 * batch * rows * args.dim / (args.tflops * 1e12),
        wire_s=wire / (link * 1e9),
        memory_gib=memory / 2**30,
        wire_mib=wire / 2**20,
    )


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "distributed",
        help="the head sharded over processes, and a model of many GPUs",
        description="Times the sharded head on this machine, then predicts its cost on GPUs from assumed rates.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ranks", type=counts, default="1,2,4", help="numbers of processes, with commas")
    parser.add_argument("--batch", type=count, default=256, help="samples of all ranks together")
    parser.add_argument("--dim", type=count, default=512, help="size of an embedding")
    parser.add_argument("--classes", type=count, default=100_000)
    parser.add_argument("--dtype", type=_dtype, default="float32", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="of all ranks together")
    parser.add_argument("--steps", type=count, default=10, help="timed steps")
    parser.add_argument("--batch-per-gpu", type=count, default=128, help="assumed for the prediction")
    parser.add_argument("--tflops", type=positive, default=400.0, help="assumed, reached by a GPU")
    parser.add_argument("--link", type=positive, default=300.0, help="assumed GB/s of a GPU within a machine")
    parser.add_argument("--network", type=positive, default=40.0, help="assumed GB/s of a GPU between machines")
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write the measured rows to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    print(f"{machine.cpu_name()}, {args.threads} threads, torch {torch.__version__}, commit {machine.commit()}")
    rows = []
    for ranks in args.ranks:
        rows.append(_measure(ranks, args))
        print(f"{ranks} ranks: {report.duration(rows[-1].min_s)}", file=sys.stderr, flush=True)
    print(f"\nbatch {args.batch}, dim {args.dim}, classes {args.classes:,}, {args.dtype}; bytes that a rank sends")
    print(f"{'ranks':>5} {'median':>10} {'min':>10} {'communication':>13} {'formula':>12} {'measured':>12}")
    for row in rows:
        measured = "-" if row.bytes_measured is None else f"{row.bytes_measured:,.0f}"
        print(
            f"{row.ranks:>5} {report.duration(row.median_s):>10} {report.duration(row.min_s):>10} "
            f"{row.communication:>13.1%} {row.bytes_formula:>12,} {measured:>12}"
        )
    if args.json:
        report.write_json(args.json, rows)
    print(
        f"\nA prediction, not a measurement: {args.batch_per_gpu} samples of {args.dim} bfloat16 a GPU, "
        f"{args.tflops:g} TFLOP/s, {args.link:g} GB/s within {PER_NODE} GPUs, {args.network:g} GB/s beyond"
    )
    print(f"{'GPUs':>5} {'classes':>12} {'compute':>10} {'wire':>10} {'GiB a GPU':>10} {'MiB sent':>9}")
    for classes in CLASSES:
        for gpus in GPUS:
            guess = predict(gpus, classes, args)
            print(
                f"{gpus:>5} {classes:>12,} {report.duration(guess.compute_s):>10} "
                f"{report.duration(guess.wire_s):>10} {guess.memory_gib:>10.2f} {guess.wire_mib:>9.1f}"
            )
    return 0


def _measure(ranks: int, args: argparse.Namespace) -> Row:
    threads = max(1, args.threads // ranks)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (ranks, threads, folder, args), nprocs=ranks)
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    seconds = [max(step) for step in zip(*(each["seconds"] for each in found), strict=True)]
    sent = found[0]["sent"]
    return Row(
        ranks=ranks,
        batch=args.batch,
        dim=args.dim,
        classes=args.classes,
        dtype=args.dtype,
        threads=threads,
        median_s=statistics.median(seconds),
        min_s=min(seconds),
        communication=statistics.mean(each["communication"] for each in found),
        bytes_formula=bytes_per_step(ranks, args.batch, args.dim, DTYPES[args.dtype].itemsize),
        bytes_measured=None if sent is None else sent / args.steps / ranks,
        steps=args.steps,
        torch=torch.__version__,
        commit=machine.commit(),
        device=machine.cpu_name(),
    )


def _work(rank: int, ranks: int, threads: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    Path(folder, f"{rank}.json").write_text(json.dumps(_measured(rank, ranks, args)))
    dist.barrier()
    destroy_process_group()


def _measured(rank: int, ranks: int, args: argparse.Namespace) -> dict[str, object]:
    dtype = DTYPES[args.dtype]
    head = FusedCosFaceLoss(args.classes, args.dim, process_group=dist.group.WORLD, dtype=dtype)
    rng = torch.Generator().manual_seed(0)
    embeddings = torch.randn(args.batch, args.dim, generator=rng).to(dtype).tensor_split(ranks)[rank]
    labels = torch.randint(args.classes, (args.batch,), generator=rng).tensor_split(ranks)[rank]
    embeddings = embeddings.clone().requires_grad_()

    def step() -> float:
        embeddings.grad = head.weight.grad = None
        dist.barrier()
        start = time.perf_counter()
        head(embeddings, labels).backward()
        return time.perf_counter() - start

    for _ in range(2):
        step()
    before = _bytes_sent()
    seconds = [step() for _ in range(args.steps)]
    dist.barrier()
    after = _bytes_sent()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        profiled_seconds = sum(step() for _ in range(3))
    inside = sum(event.cpu_time_total for event in profiled.key_averages() if event.key.startswith("cosface: "))
    return {
        "seconds": seconds,
        "communication": inside / 1e6 / profiled_seconds,
        "sent": None if before is None or after is None else after - before,
    }


def _bytes_sent() -> int | None:
    """By this machine to itself, by all its programs: only on a quiet machine is it ours."""
    return int(LOOPBACK.read_text()) if LOOPBACK.exists() else None
