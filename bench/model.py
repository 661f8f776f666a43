"""`python -m bench model`: what a step on a GPU should take, from what the compiler made of its kernels.

A model on paper, of backend `triton` in bfloat16: a kernel takes the longest of its products, its reads through L2
and its bytes of memory, in whole waves of blocks, and its epilogue comes on top where nothing else runs on the
multiprocessor meanwhile; in a specialised kernel another tile's products do. It ranks designs and finds what
bounds them; it is no measurement.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.kernels import MOST_SPILLED
from cosface_kernels.backends.triton.tiles import GEMM_KERNELS, LIBRARY_KERNELS, Tile, chunk_classes
from cosface_kernels.options import WORKSPACE_BYTES
from cosface_recipes.arguments import count, counts

REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor; registers are given out in eights
SHARED_OVERHEAD = 1024  # bytes a block
SUSTAINED = 0.81  # of the maker's dense rate that a library's large product is known to reach
LANES, EXPONENTIALS = 128, 16  # results a clock and multiprocessor
INSTRUCTIONS = {"class_statistics": 6, "logit_gradients": 14, "embedding_gradients": 0, "weight_gradients": 0}
LAUNCH = 20e-6  # seconds of the host: Python, the binder, the driver
BYTES = 2  # a bfloat16


@dataclass(frozen=True)
class Device:
    """The maker's figures, but for L2: about what micro-benchmarks find."""

    name: str
    arch: str
    processors: int
    tflops: float
    memory_tb: float  # a second
    l2_tb: float
    ghz: float
    shared: int  # bytes of a multiprocessor


DEVICES = (
    Device("A100", "sm_80", 108, 312, 2.0, 4.5, 1.41, 164 << 10),
    Device("H100", "sm_90", 132, 989, 3.35, 6.0, 1.75, 228 << 10),
    Device("H200", "sm_90", 132, 989, 4.8, 6.0, 1.75, 228 << 10),
    Device("B200", "sm_100", 148, 2250, 8.0, 10.0, 1.85, 228 << 10),
)


@dataclass(frozen=True)
class Kernel:
    """A row of `bench kernels`, and the problem it is for."""

    row: dict
    device: Device
    N: int
    C: int
    D: int
    chunk: int  # classes of a launch

    @property
    def resident(self) -> int:
        """Blocks on a multiprocessor at a time."""
        threads, row = 32 * self.row["config"]["warps"], self.row
        by_registers = REGISTERS // (threads * -(-row["registers"] // 8) * 8)
        by_shared = self.device.shared // (row["shared_bytes"] + SHARED_OVERHEAD)
        return max(min(by_registers, by_shared, THREADS // threads, BLOCKS), 1)

    @property
    def blocks(self) -> int:
        """Of a launch."""
        n, c, d = (self.row["config"][side] for side in "ncd")
        rows, classes, columns = -(-self.N // n), -(-self.chunk // c), -(-self.D // d)
        name = self.row["kernel"]
        if name == "class_statistics":
            splits = max(2 * self.device.processors // rows, 1)
            return rows * min(splits, classes)
        if name == "logit_gradients":
            return rows * classes
        if name == "embedding_gradients":
            return rows * columns * min(max(2 * self.device.processors // (rows * columns), 1), classes)
        return columns * classes

    @property
    def waves(self) -> float:
        return self.blocks / (self.resident * self.device.processors)

    def parts(self) -> dict[str, float]:
        """Seconds of a whole step's launches that each bound asks for, and that the epilogue adds."""
        device, config, name = self.device, self.row["config"], self.row["kernel"]
        products = 2 * self.N * self.C * self.D
        idle = math.ceil(self.waves) / self.waves
        # An operand is read once for each block of the other's rows; of G both products read blocks as well.
        n, c, d = config["n"], config["c"], config["d"]
        reads = {
            "class_statistics": 1 / n + 1 / c,
            "logit_gradients": 1 / n + 1 / c,
            "embedding_gradients": 1 / n + 1 / d,
            "weight_gradients": 1 / c + 1 / d,
        }[name]
        of_g, weight = self.N * self.C * BYTES, self.C * self.D * BYTES
        memory = (
            weight + (0 if name == "class_statistics" else of_g) + (weight if name == "weight_gradients" else 0)
        )
        elements = self.N * self.C / device.processors / (device.ghz * 1e9)  # a multiprocessor's, in clocks
        exponentials = 1 / EXPONENTIALS if INSTRUCTIONS[name] else 0
        epilogue = elements * (exponentials + INSTRUCTIONS[name] / LANES)
        return {
            "products": idle * products / (SUSTAINED * device.tflops * 1e12),
            "L2": self.N * self.C * self.D * BYTES * reads / (device.l2_tb * 1e12),
            "memory": memory / (device.memory_tb * 1e12),
            "epilogue": epilogue / (1 if self.resident == 1 else self.resident),
        }

    def seconds(self) -> float:
        parts = self.parts()
        return max(parts["products"], parts["L2"], parts["memory"]) + parts["epilogue"]

    @property
    def tile(self) -> str:
        return str(Tile(**self.row["config"]))

    def describe(self) -> str:
        return f"{self.tile}; {self.resident} blocks a multiprocessor, {self.waves:.2f} waves a launch"


class Specialized(Kernel):
    """A program a multiprocessor, which reads its x once and hides each epilogue under the next products."""

    @property
    def blocks(self) -> int:
        rows = -(-self.N // self.row["config"]["n"])
        return rows * min(max(self.device.processors // rows, 1), -(-self.chunk // self.row["config"]["c"]))

    def parts(self) -> dict[str, float]:
        of_w = self.N * self.C * self.D * BYTES / self.row["config"]["n"]
        return super().parts() | {"L2": of_w / (self.device.l2_tb * 1e12)}

    def seconds(self) -> float:
        return max(self.parts().values())


class Library(Kernel):
    """torch's product in a kernel's place, at the rate of a large one; dw is projected in a pass of its own."""

    def parts(self) -> dict[str, float]:
        device, weight = self.device, self.C * self.D * BYTES
        products = 2 * self.N * self.C * self.D / (SUSTAINED * device.tflops * 1e12)
        memory = (self.N * self.C * BYTES + weight) / (device.memory_tb * 1e12)
        # Sums are written and read in float32, w read, dw written.
        projection = 6 * weight / (device.memory_tb * 1e12) if self.row["kernel"] == "weight_gradients" else 0.0
        return {"products": products, "L2": 0.0, "memory": memory, "epilogue": projection}

    def describe(self) -> str:
        return "the library"


def step(rows: list[dict], device: Device, N: int, C: int, D: int) -> tuple[list[Kernel], int]:
    """The fastest of each kernel's rows, by the model, and the launches of a step."""
    found: list[Kernel] = []
    chunk = C
    for name in GEMM_KERNELS:
        kernels = [
            _kernel(row, device, N, C, D, chunk) for row in _plain(rows, device, N, D) if row["kernel"] == name
        ]
        if name in LIBRARY_KERNELS:
            kernels.append(Library({"kernel": name}, device, N, C, D, chunk))
        found.append(min(kernels, key=Kernel.seconds))
        chunk = found[-1].chunk
    return found, 5 + 3 * -(-C // chunk)


def _kernel(row: dict, device: Device, N: int, C: int, D: int, chunk: int = 0) -> Kernel:
    """In chunks of so many classes; 0: what logit_gradients would ask for with its blocks. Forward has none."""
    config = row["config"]
    if row["kernel"] == "class_statistics":
        chunk = C
    elif row["kernel"] == "logit_gradients" or not chunk:
        row_blocks = -(-N // config["n"])
        chunk = chunk_classes(
            N, D, C, class_bytes=BYTES * N + 4 * row_blocks, workspace_bytes=WORKSPACE_BYTES,
            row_blocks=row_blocks, block_c=config["c"], processors=device.processors,
        )  # fmt: skip
    kind = Specialized if config.get("specialized") else Kernel
    return kind(row, device, N, C, D, chunk)


def _plain(rows: list[dict], device: Device, N: int, D: int) -> Iterator[dict]:
    """Those in bfloat16 without options that may run, but for the plainest tile; with at most N samples."""
    for row in rows:
        plain = (row["arch"], row["dim"], row["variant"], row["dtype"]) == (device.arch, D, "plain", "bf16 x bf16")
        product = row["kernel"] in GEMM_KERNELS and row["config"]["stages"] > 1
        if plain and product and row["spill_bytes"] <= MOST_SPILLED and _fits(row, N):
            yield row


def _fits(row: dict, N: int) -> bool:
    return row["config"]["n"] <= N


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "model",
        help="predicted time of a step on GPUs",
        description="Predicts a step of backend triton in bfloat16 from the JSON of `bench kernels`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("kernels", type=Path, metavar="FILE", help="JSON of `bench kernels`")
    parser.add_argument("--batch", type=counts, default="256,1024,4096", help="samples, separated by commas")
    parser.add_argument("--dim", type=count, default=512, help="size of an embedding, one that FILE has")
    parser.add_argument("--classes", type=count, default=1_000_000)
    parser.add_argument("--kernels-too", action="store_true", help="what bounds each kernel, and every other tile")
    parser.add_argument("--specialized", action="store_true", help="with the kernels that are tried on demand")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    rows = [
        row
        for row in json.loads(args.kernels.read_text())
        if args.specialized or not row["config"].get("specialized")
    ]
    print("| GPU | N | ms | TFLOP/s at 8NCD | of the 8192^3 rate | host, ms | bound by |")
    print("|---|---|---|---|---|---|---|")
    for device in _compiled_for(rows):
        for N in args.batch:
            print(*_lines(rows, device, N, args.classes, args.dim, args.kernels_too), sep="\n")
    if args.kernels_too:
        print(*_tiles(rows, args.batch, args.classes, args.dim), sep="\n")
    return 0


def _compiled_for(rows: list[dict]) -> list[Device]:
    return [device for device in DEVICES if any(row["arch"] == device.arch for row in rows)]


def _lines(rows: list[dict], device: Device, N: int, C: int, D: int, kernels_too: bool) -> Iterator[str]:
    kernels, launches = step(rows, device, N, C, D)
    # Beside them row_norms reads w; what works on (N,) and (N, D) is small.
    seconds = sum(kernel.seconds() for kernel in kernels) + C * D * BYTES / (device.memory_tb * 1e12)
    tflops = 8 * N * C * D / seconds / 1e12
    longest = max(kernels, key=Kernel.seconds)
    bounds = {bound: sum(kernel.parts()[bound] for kernel in kernels) for bound in longest.parts()}
    share, host = tflops / (SUSTAINED * device.tflops), 1e3 * LAUNCH * launches
    yield (
        f"| {device.name} | {N} | {1e3 * seconds:.1f} | {tflops:.0f} | {share:.0%} | {host:.1f} | "
        f"{max(bounds, key=bounds.__getitem__)} |"
    )
    if kernels_too:
        for kernel in kernels:
            parts = ", ".join(f"{bound} {1e3 * part:.2f}" for bound, part in kernel.parts().items())
            yield f"{kernel.row['kernel']}: {1e3 * kernel.seconds():.2f} ms, {kernel.describe()}; {parts}"


def _tiles(rows: list[dict], batches: list[int], C: int, D: int) -> Iterator[str]:
    """A row for each plain tile in bfloat16: what it takes, and its waves and time for each batch."""
    each = [f"N = {N}: waves, ms" for N in batches]
    columns = ("GPU", "kernel", "tile", "registers", "shared", "slots", "pending", "blocks", *each)
    yield "\n" + f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for device in _compiled_for(rows):
        for row in _plain(rows, device, max(batches), D):
            kernels = [_kernel(row, device, N, C, D) for N in batches]
            times = [f"{k.waves:.2f}, {1e3 * k.seconds():.2f}" if _fits(row, k.N) else "" for k in kernels]
            known = [row[what] for what in ("registers", "shared_bytes", "slots", "pending")]
            cells = [device.name, row["kernel"], kernels[0].tile, *known, kernels[0].resident, *times]
            yield f"| {' | '.join(map(str, cells))} |"
