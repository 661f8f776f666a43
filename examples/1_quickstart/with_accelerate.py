"""FusedCosFaceLoss under Accelerate: seconds on a CPU.

    pip install accelerate
    python examples/1_quickstart/with_accelerate.py

Backbone and head are one module, which `prepare` wraps as a whole: with several processes it averages the head's
gradient too, and leaves a head with `process_group=` alone, of which each rank owns other classes.

Printed are the loss of the batch and, between samples of 200 classes that the training never sees, the share of
genuine pairs that are accepted where one in a thousand impostor pairs is (TAR at a FAR of 1e-3).
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cosface_kernels import FusedCosFaceLoss
from cosface_recipes.evaluation.verification import compare_all

CLASSES, UNSEEN, SIZE, BATCH, STEPS = 1000, 200, 32, 256, 200


def samples(labels: Tensor) -> Tensor:
    """(n, 64): what a class has in common, and twice as strong what it has not, mixed by a fixed rotation."""
    fixed = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES + UNSEEN, 16, generator=fixed)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=fixed)).Q
    common = centers[labels] + 0.3 * torch.randn(len(labels), 16)
    return torch.cat([common, 2 * torch.randn(len(labels), 48)], 1) @ rotation


class Recognition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, SIZE))
        self.head = FusedCosFaceLoss(CLASSES, SIZE, margin=0.2, scale=16.0)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.backbone(x), labels)


if __name__ == "__main__":
    torch.set_num_threads(1)  # products this small are no faster on more
    torch.manual_seed(0)
    seen, unseen = torch.randint(CLASSES, (STEPS * BATCH,)), torch.arange(CLASSES, CLASSES + UNSEEN).repeat(4)
    accelerator, model = Accelerator(cpu=True), Recognition()
    batches = DataLoader(TensorDataset(samples(seen), seen), BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    network, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for step, (x, labels) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = network(x, labels)
        accelerator.backward(loss)
        optimizer.step()
        if step % 50 == 0:
            with torch.no_grad():
                tar = compare_all(model.backbone(samples(unseen)), unseen).tar_at_far(1e-3)
            accelerator.print(f"step {step:3}   loss {loss:6.3f}   TAR at a FAR of 1e-3 {tar:6.1%}")
