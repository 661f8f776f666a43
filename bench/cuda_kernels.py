"""`python -m bench cuda-kernels`: compiles the CUDA kernels with nvcc, without a GPU, and reads the report."""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.step import _writable

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "cuda-kernels",
        help="ahead-of-time report of the CUDA kernels",
        description="Compiles the CUDA kernels for each architecture; fails on a warning and on a spill.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="architectures, separated by commas")
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write the rows to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc is neither on PATH nor in CUDA_HOME.", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cases = itertools.product(SOURCES, args.arch.split(","))
        done = list(pool.map(lambda case: compile_for(nvcc, *case), cases))
    failed = [process for process in done if process.returncode]
    for process in failed:
        print(process.stdout, file=sys.stderr)
    rows = [row for process in done for row in read_report(process.stdout)]
    spilling = [row for row in rows if row["spill_bytes"]]
    for arch, kernel in sorted({(row["arch"], row["kernel"]) for row in rows}):
        print(summary(arch, kernel, [row for row in rows if (row["arch"], row["kernel"]) == (arch, kernel)]))
    for row in spilling:
        print(f"{row['name']} spills {row['spill_bytes']} bytes a thread on {row['arch']}.", file=sys.stderr)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} compiled, {len(spilling)} spill.")
    return 1 if failed or spilling or not rows else 0


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def compile_for(nvcc: str, source: Path, arch: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-std=c++20", "-O3", "-arch", arch, "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings",
            "-I", str(ROOT / "csrc"), "-o", str(Path(folder) / "kernels.cubin"), str(source),
        ]  # fmt: skip
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def read_report(text: str) -> Iterator[dict]:
    """One row for each kernel that ptxas names."""
    for entry in ENTRY.finditer(text):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        yield {
            "kernel": re.search(r"\d([a-z_]+)_kernel", entry["name"])[1],
            "name": entry["name"],
            "arch": entry["arch"],
            "registers": int(entry["registers"]),
            "spill_bytes": max(int(entry[field]) for field in ("stack", "stores", "loads")),
            "shared_bytes": int(shared[1]) if shared else 0,
        }


def summary(arch: str, kernel: str, rows: list[dict]) -> str:
    registers = [row["registers"] for row in rows]
    return (
        f"{arch:7} {kernel:22} {len(rows):3} variants  registers {min(registers):3} to {max(registers):3}  "
        f"spills {max(row['spill_bytes'] for row in rows):4}  shared {max(row['shared_bytes'] for row in rows):5}"
    )
