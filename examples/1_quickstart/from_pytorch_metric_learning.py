"""From pytorch-metric-learning's CosFaceLoss to FusedCosFaceLoss in the middle of a training: seconds on a CPU.

    pip install pytorch-metric-learning
    python examples/1_quickstart/from_pytorch_metric_learning.py

In a training of your own the constructor changes, and nothing else; what is trained moves over by state_dict.

Printed are the loss of the batch and, between samples of 200 classes that the training never sees, the share of
genuine pairs that are accepted where one in a thousand impostor pairs is (TAR at a FAR of 1e-3).
"""

import torch
from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor, nn

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


def train(network: nn.Module, criterion: nn.Module) -> None:
    optimizer = torch.optim.AdamW([*network.parameters(), *criterion.parameters()], lr=3e-3)
    unseen = torch.arange(CLASSES, CLASSES + UNSEEN).repeat(4)
    for step in range(STEPS + 1):
        labels = torch.randint(CLASSES, (BATCH,))
        loss = criterion(network(samples(labels)), labels)
        if step % 100 == 0:
            with torch.no_grad():
                tar = compare_all(network(samples(unseen)), unseen).tar_at_far(1e-3)
            print(f"step {step:3}   loss {loss.item():6.3f}   TAR at a FAR of 1e-3 {tar:6.1%}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)  # products this small are no faster on more
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, SIZE))
    trained = CosFaceLoss(num_classes=CLASSES, embedding_size=SIZE, margin=0.2, scale=16)
    print("CosFaceLoss")
    train(network, trained)
    criterion = FusedCosFaceLoss(num_classes=CLASSES, embedding_size=SIZE, margin=0.2, scale=16)
    criterion.load_state_dict(trained.state_dict())
    print("FusedCosFaceLoss, which goes on with its weight")
    train(network, criterion)
