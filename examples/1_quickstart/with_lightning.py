"""FusedCosFaceLoss in a LightningModule, with torch's optimizer or this package's: seconds on a CPU.

    pip install pytorch-lightning
    python examples/1_quickstart/with_lightning.py

The head is a part of the module, and what it returns is the loss. With several processes Lightning averages the
head's gradient too, and leaves a head with `process_group=` alone, of which each rank owns other classes.

Printed are the loss of the batch and, between samples of 200 classes that the training never sees, the share of
genuine pairs that are accepted where one in a thousand impostor pairs is (TAR at a FAR of 1e-3).
"""

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cosface_kernels import FusedCosFaceLoss
from cosface_recipes.evaluation.verification import compare_all

CLASSES, UNSEEN, SIZE, BATCH, STEPS = 1000, 200, 32, 256, 200


def samples(labels: Tensor) -> TensorDataset:
    """(n, 64): what a class has in common, and twice as strong what it has not, mixed by a fixed rotation."""
    fixed = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES + UNSEEN, 16, generator=fixed)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=fixed)).Q
    common = centers[labels] + 0.3 * torch.randn(len(labels), 16)
    return TensorDataset(torch.cat([common, 2 * torch.randn(len(labels), 48)], 1) @ rotation, labels)


class Recognition(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, SIZE))
        self.head = FusedCosFaceLoss(CLASSES, SIZE, margin=0.2, scale=16.0)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.loss = self.head(self.backbone(batch[0]), batch[1])
        return self.loss

    def validation_step(self, batch: list[Tensor]) -> None:
        loss, tar = self.loss.item(), compare_all(self.backbone(batch[0]), batch[1]).tar_at_far(1e-3)
        print(f"step {self.global_step:3}   loss {loss:6.3f}   TAR at a FAR of 1e-3 {tar:6.1%}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)  # products this small are no faster on more
    lightning.seed_everything(0)
    seen, unseen = torch.randint(CLASSES, (STEPS * BATCH,)), torch.arange(CLASSES, CLASSES + UNSEEN).repeat(4)
    off = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, val_check_interval=50, num_sanity_val_steps=0, **off
    )
    trainer.fit(Recognition(), DataLoader(samples(seen), BATCH), DataLoader(samples(unseen), len(unseen)))
