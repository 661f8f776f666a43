"""A training run that loses a rank: `torchrun ... tests/support/elastic.py FOLDER STEPS RANK STEP SIGNAL`.

The rank sends itself the signal in the middle of that step, the first time it is started.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCosFaceLoss, checkpoint
from cosface_kernels.distributed import destroy_process_group
from support import patience

SAVE_EVERY = 3
TIMEOUT = timedelta(seconds=patience(20))  # a rank that starts imports torch first, on a busy machine


def main(folder: Path, *loss: int) -> None:
    torch.set_num_threads(1)
    if init_method := os.environ.get("RENDEZVOUS"):
        place = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group("gloo", init_method, timeout=TIMEOUT, **place)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        train(folder, *loss)
    finally:
        destroy_process_group()


def train(folder: Path, steps: int, lost_rank: int, lost_step: int, lost_by: int) -> None:
    rank, first_start = dist.get_rank(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    torch.manual_seed(rank)
    # Otherwise its buckets, and with them the order of sums over three ranks or more, change after the first step.
    backbone = DistributedDataParallel(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)), find_unused_parameters=True
    )
    head = FusedCosFaceLoss(10, 6, scale=16.0, process_group=dist.group.WORLD)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=0.01)
    data = torch.Generator().manual_seed(rank)
    objects = {"backbone": backbone.module, "head": head, "optimizer": optimizer}
    generators = {"data": data, "torch": torch.default_generator}
    start = checkpoint.load(folder / "checkpoints", generators=generators, **objects) or 0
    for step in range(start, steps):
        images, labels = torch.randn(5, 4, generator=data), torch.randint(10, (5,), generator=data)
        optimizer.zero_grad()
        features = backbone(images)
        if (rank, step, first_start) == (lost_rank, lost_step, True):
            os.kill(os.getpid(), lost_by)
        loss = head(features, labels)
        loss.backward()
        optimizer.step()
        with (folder / f"losses-{rank}").open("a") as losses:
            losses.write(f"{step} {loss.item().hex()}\n")
        if (step + 1) % SAVE_EVERY == 0:
            checkpoint.save(folder / "checkpoints", step + 1, generators=generators, **objects)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
