"""From nn.Linear and cross_entropy to FusedCosFaceLoss: 1,000 classes, seconds on a CPU.

    python examples/1_quickstart/linear_to_cosface.py

In a training of your own, two lines change; embeddings go in as they are, without a normalization:

    head = nn.Linear(32, 1000)                  ->  head = FusedCosFaceLoss(1000, 32, margin=0.2, scale=16.0)
    loss = F.cross_entropy(head(x), labels)     ->  loss = head(x, labels)

Printed are the loss of the batch and, between samples of 200 classes that the training never sees, the share of
genuine pairs that are accepted where one in a thousand impostor pairs is (TAR at a FAR of 1e-3).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosface_kernels import FusedCosFaceLoss
from cosface_recipes.evaluation.verification import compare_all

CLASSES, UNSEEN, SIZE, BATCH, STEPS = 1000, 200, 32, 256, 400


class LinearHead(nn.Linear):
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(embeddings), labels)


def samples(labels: Tensor) -> Tensor:
    """(n, 64): what a class has in common, and twice as strong what it has not, mixed by a fixed rotation."""
    fixed = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES + UNSEEN, 16, generator=fixed)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=fixed)).Q
    common = centers[labels] + 0.3 * torch.randn(len(labels), 16)
    return torch.cat([common, 2 * torch.randn(len(labels), 48)], 1) @ rotation


def train(head: nn.Module) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, SIZE))
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=3e-3)
    unseen = torch.arange(CLASSES, CLASSES + UNSEEN).repeat(4)
    for step in range(STEPS + 1):
        labels = torch.randint(CLASSES, (BATCH,))
        loss = head(network(samples(labels)), labels)
        if step % 100 == 0:
            with torch.no_grad():
                tar = compare_all(network(samples(unseen)), unseen).tar_at_far(1e-3)
            print(f"step {step:3}   loss {loss.item():6.3f}   TAR at a FAR of 1e-3 {tar:6.1%}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)  # products this small are no faster on more
    for head in (LinearHead(SIZE, CLASSES), FusedCosFaceLoss(CLASSES, SIZE, margin=0.2, scale=16.0)):
        print(type(head).__name__)
        train(head)
