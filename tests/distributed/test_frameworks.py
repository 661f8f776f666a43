"""One optimizer for backbone and head under Lightning and Accelerate, which know nothing of this package."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cosface_kernels import FusedCosFaceLoss
from cosface_kernels.optim import FusedAdamW, FusedSGD

C, D, STEPS = 50, 12, 4
RULES = [
    pytest.param(FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, id="sgd"),
    pytest.param(FusedAdamW, torch.optim.AdamW, {"lr": 0.01, "eps": 0.1}, id="adamw"),
]
rules = pytest.mark.parametrize(("fused", "torchs", "options"), RULES)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, D), nn.LayerNorm(D))
        self.head = FusedCosFaceLoss(C, D, backend="cpu")

    def forward(self, x, labels):
        return self.head(self.backbone(x), labels)


def loader():
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(8 * STEPS, 6, generator=generator), torch.randint(C, (8 * STEPS,), generator=generator)
    return DataLoader(TensorDataset(x, labels), batch_size=8)


def check(models):
    for mine, want in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
        assert mine.grad is None or bool(mine.grad.isfinite().all())


def with_lightning(kind, options, clip=None, **fields) -> Model:
    lightning = pytest.importorskip("pytorch_lightning")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def training_step(self, batch):
            return self.model(*batch)

        def configure_optimizers(self):
            optimizer = kind(self.parameters(), **options, **fields)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    task = Task()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=clip,
        )  # fmt: skip
        trainer.fit(task, loader())
    return task.model


def with_accelerate(kind, options, clip=None, **fields) -> Model:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = Model()
    optimizer = kind(model.parameters(), **options, **fields)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    prepared, optimizer, batches, scheduler = accelerator.prepare(model, optimizer, loader(), scheduler)
    for _ in range(2):
        for x, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(prepared(x, labels))
            if clip:
                accelerator.clip_grad_norm_(prepared.parameters(), clip)
            optimizer.step()
        scheduler.step()
    return model


FRAMEWORKS = pytest.mark.parametrize("train", [with_lightning, with_accelerate], ids=["lightning", "accelerate"])


@FRAMEWORKS
@rules
def test_trains_as_with_torch(fused, torchs, options, train):
    check([train(fused, options), train(torchs, options)])


@FRAMEWORKS
def test_clipping_by_the_global_norm(train):
    """With accumulate=True as torch; without, the sentence says so before the next step."""
    fused, torchs, options = RULES[0].values
    check([train(fused, options, clip=0.5, accumulate=True), train(torchs, options, clip=0.5)])
    with pytest.raises(RuntimeError, match=r"set gradient_factor .* accumulate=True"):
        train(fused, options, clip=0.5)
