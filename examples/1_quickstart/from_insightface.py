"""From insightface's PartialFC_V2 to a head of this package, its classes sharded over the ranks: seconds on CPUs.

    python examples/1_quickstart/from_insightface.py                                    # a group of one process
    torchrun --nproc-per-node 2 examples/1_quickstart/from_insightface.py               # each owns 500 classes

The loop is that of recognition/arcface_torch/train_v2.py; in it `margin_loss` and `module_partial_fc` change,
and with fp16 `amp`, which becomes a `cosface_kernels.distributed.GradScaler`.

Printed are the loss of the batch and, between samples of 200 classes that the training never sees, the share of
genuine pairs that are accepted where one in a thousand impostor pairs is (TAR at a FAR of 1e-3).
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cosface_kernels import FusedCombinedMarginLoss, distributed
from cosface_recipes.evaluation.verification import compare_all

CLASSES, UNSEEN, SIZE, BATCH, STEPS = 1000, 200, 32, 256, 200


def samples(labels: Tensor) -> Tensor:
    """(n, 64): what a class has in common, and twice as strong what it has not, mixed by a fixed rotation."""
    fixed = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES + UNSEEN, 16, generator=fixed)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=fixed)).Q
    common = centers[labels] + 0.3 * torch.randn(len(labels), 16)
    return torch.cat([common, 2 * torch.randn(len(labels), 48)], 1) @ rotation


def main() -> None:
    torch.set_num_threads(1)  # products this small are no faster on more
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)  # before it group.WORLD is None, and the head not sharded
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)  # samples of its own; DistributedDataParallel sends rank 0's backbone to all
    backbone = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, SIZE)))
    module_partial_fc = FusedCombinedMarginLoss(
        CLASSES, SIZE, (1, 0, 0.2), 16, straight_through=True, sample_rate=0.5, process_group=dist.group.WORLD
    )
    opt = torch.optim.AdamW([{"params": m.parameters()} for m in (backbone, module_partial_fc)], lr=3e-3)
    unseen = torch.arange(CLASSES, CLASSES + UNSEEN).repeat(4)
    for step in range(STEPS + 1):
        labels = torch.randint(CLASSES, (BATCH // ranks,))
        loss = module_partial_fc(backbone(samples(labels)), labels)  # the same on every rank: of the whole batch
        if step % 50 == 0 and rank == 0:
            tar = compare_all(backbone.module(samples(unseen)).detach(), unseen).tar_at_far(1e-3)
            print(f"step {step:3}   loss {loss.item():6.3f}   TAR at a FAR of 1e-3 {tar:6.1%}", flush=True)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 5)
        opt.step()


if __name__ == "__main__":
    main()
    distributed.destroy_process_group()  # with its threads, now that no variable holds it
