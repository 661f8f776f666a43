"""Trains a million synthetic identities on one machine, and tests them on samples that were never trained on.

    python examples/3_train/million.py --steps 2000 --checkpoint million.pt    # the same command resumes

Identities and samples are those of cosface_recipes/synthetic.py. Rows of the head move inside backward, over the
batch's classes and a random share of the others.
"""

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.optim import FusedSGD
from cosface_recipes.arguments import count, whole
from cosface_recipes.memory import peak_resident_bytes
from cosface_recipes.outputs import check_output
from cosface_recipes.synthetic import MARGIN, SCALE, TEST_SEED, load_checkpoint, make_network, views

TEST_SAMPLES = 1024
MAY_CHANGE = ("steps", "every", "checkpoint", "cache_mib")  # on resume
DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


class Training:
    """Network, head, their optimizers and the number of steps done: what a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.network = make_network(args.dim)
        self.head = FusedCosFaceLoss(
            args.classes, args.dim, margin=MARGIN, scale=SCALE, dtype=getattr(torch, args.dtype),
            sample_rate=args.sample_rate, sample_seed=args.seed,
            cache_bytes=None if args.cache_mib is None else args.cache_mib << 20,
        )  # fmt: skip
        state_dtype = getattr(torch, args.state_dtype) if args.state_dtype else None
        self.rows = FusedSGD(
            self.head.parameters(), lr=args.lr, momentum=args.momentum, state_dtype=state_dtype, seed=args.seed
        )
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)
        self.steps = 0
        self.order = torch.empty(0, dtype=torch.int64)

    def labels(self) -> Tensor:
        """The next batch of a random order of all classes, which changes with every epoch."""
        epoch, batch = divmod(self.steps, -(-self.args.classes // self.args.batch))
        if batch == 0 or not len(self.order):
            generator = torch.Generator().manual_seed(self.args.seed + epoch)
            self.order = torch.randperm(self.args.classes, generator=generator)
        return self.order[batch * self.args.batch : (batch + 1) * self.args.batch]

    def step(self) -> float:
        labels = self.labels()
        loss = self.head(self.network(views(labels, self.args.seed + 1 + self.steps)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rows.step()
        self.steps += 1
        return loss.item()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of new samples, of random classes, whose own class is the nearest of all."""
        generator = torch.Generator().manual_seed(TEST_SEED)
        labels = torch.randint(self.args.classes, (TEST_SAMPLES,), generator=generator)
        self.head.eval()
        _, stats = self.head(self.network(views(labels, TEST_SEED)), labels, return_stats=True)
        self.head.train()
        return float(stats.accuracy)

    def settings(self) -> dict[str, object]:
        return {name: value for name, value in vars(self.args).items() if name not in MAY_CHANGE}

    def save(self, path: Path) -> None:
        """Replaces the file as a whole, so that an interruption leaves the last complete one."""
        names = ("network", "head", "rows", "optimizer")
        state = {"settings": self.settings(), **{name: getattr(self, name).state_dict() for name in names}}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save({"steps": self.steps, **state}, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        saved, now = load_checkpoint(path), self.settings()
        before, self.steps = saved.pop("settings"), saved.pop("steps")
        changed = [f"{name} was {was} and is {now[name]}" for name, was in before.items() if was != now[name]]
        if changed:
            raise ValueError(f"{path} is of another training: {', '.join(changed)}.")
        if self.steps > self.args.steps:
            raise ValueError(f"{path} is of step {self.steps}, and --steps is {self.args.steps} in all.")
        for name, state in saved.items():
            getattr(self, name).load_state_dict(state)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=count, default=1_000_000)
    parser.add_argument("--dim", type=count, default=256, help="size of an embedding")
    parser.add_argument("--batch", type=count, default=1024)
    parser.add_argument("--steps", type=count, default=2000, help="in all, those before a resume included")
    parser.add_argument("--sample-rate", type=float, default=0.01, help="share of the classes in a step")
    parser.add_argument("--lr", type=float, default=2.0, help="of the head")
    parser.add_argument("--momentum", type=float, default=0.0, help="of the head")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the head")
    parser.add_argument("--state-dtype", choices=DTYPES, help="of its momentum, if another")
    parser.add_argument(
        "--cache-mib", type=whole, help="memory for cosines of forward in backward, in place of the default"
    )
    parser.add_argument("--every", type=count, default=200, help="steps between tests, and between checkpoints")
    parser.add_argument(
        "--checkpoint", type=Path, help="file to write, at the end too, and to resume from if it is there"
    )
    parser.add_argument("--seed", type=whole, default=0)
    args = parser.parse_args(argv)
    try:
        if args.checkpoint:
            check_output(args.checkpoint)
        training = Training(args)
        if args.checkpoint and args.checkpoint.exists():
            training.load(args.checkpoint)
            print(f"Resumed after step {training.steps}.")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    start, first = time.perf_counter(), training.steps
    with tqdm(total=args.steps, initial=training.steps, unit="step") as progress:
        while training.steps < args.steps:
            loss = training.step()
            rate = (training.steps - first) / (time.perf_counter() - start)  # steps per second
            classes = rate * args.sample_rate * args.classes
            progress.set_postfix_str(
                f"loss {loss:.2f}, {classes:,.0f} classes/s, {peak_resident_bytes() / 2**30:.1f} GiB"
            )
            progress.update()
            if training.steps % args.every == 0:
                progress.write(f"step {training.steps}: accuracy {training.accuracy():.1%} on new samples")
            if args.checkpoint and (training.steps % args.every == 0 or training.steps == args.steps):
                training.save(args.checkpoint)
    accuracy = training.accuracy()
    print(f"accuracy {accuracy:.1%} on new samples; chance is {1 / args.classes:.1e}")
    return accuracy


if __name__ == "__main__":
    main()
