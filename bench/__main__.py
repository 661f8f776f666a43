"""The command line: one file a sub-command, which offers `add_parser(commands)` and sets `run`."""

import argparse
import sys
from collections.abc import Sequence

from bench import cuda_kernels, distributed, gpu, kernels, model, sizes, step, topk, train_step, update


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time and memory, measured fairly.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (step, sizes, train_step, update, topk, distributed, kernels, model, cuda_kernels, gpu):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
