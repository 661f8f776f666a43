"""A training from its settings to the exported model: data, backbone, fused head, checkpoints, evaluation.

The order of the images and their augmentation depend on the seed and the step alone, so a resumed training is the
uninterrupted one, on a CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.std import EMA

from cosface_kernels import checkpoint
from cosface_kernels.distributed import destroy_process_group
from cosface_kernels.margins import KappaFaceMargin
from cosface_kernels.optim import FusedAdamW, FusedSGD
from cosface_recipes.batches import Batches, Seeded, detach_worker, fit_batch, mix
from cosface_recipes.config import Config, difference, dump, load
from cosface_recipes.data.augmentation import make_transform
from cosface_recipes.data.image_datasets import open_dataset
from cosface_recipes.evaluation.held_out import Result, check, evaluate, table
from cosface_recipes.export import Description, export, weights_of
from cosface_recipes.first import first
from cosface_recipes.initial import load_backbone, load_head, save_head, whose_images
from cosface_recipes.losses import ClassSums, make_head
from cosface_recipes.models import make_model
from cosface_recipes.schedule import make_schedule, stretch

CHECKPOINTS, SETTINGS, DATA = "checkpoints", "settings.yaml", "data.txt"
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ValueError):
    """The loss became infinite or nan; the message names the batch."""


def make_optimizers(
    config: Config, backbone: nn.Module, head: nn.Module, scaler: torch.amp.GradScaler
) -> dict[str, torch.optim.Optimizer]:
    """The same rule twice; the head's moves its rows inside backward."""
    if config.optimizer == "sgd":
        of_backbone, of_head = torch.optim.SGD, FusedSGD
        options = {"momentum": config.momentum, "nesterov": config.nesterov}
    else:
        of_backbone, of_head, options = torch.optim.AdamW, FusedAdamW, {}
    options["weight_decay"] = config.weight_decay
    backbone_peak, head_peak = config.peaks
    return {
        "backbone_optimizer": of_backbone(
            [p for p in backbone.parameters() if p.requires_grad], lr=backbone_peak, **options
        ),
        "head_optimizer": of_head(
            head.parameters(),
            lr=head_peak,
            state_dtype=getattr(torch, config.head_state_dtype) if config.head_state_dtype else None,
            grad_scaler=scaler if scaler.is_enabled() else None,
            seed=config.seed,
            **options,
        ),
    }


class Training:
    """A training from its configuration to the exported model.

    Attributes:
        step: optimizer steps done.
        stopping: set by SIGTERM; the training ends after the step in hand, and saves.
        head_seconds: of the last step, forward and backward of the loss. A GPU is not waited for, so that there
            they hold the wait for the backbone and lack most of backward: they are shown on a CPU alone.
    """

    def __init__(self, config: Config):
        self.output = Path(config.output)
        self.device = device_of(config)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if not config.train:
            raise ValueError("train must name the training data: --train FOLDER or --train FILE.rec.")
        transform = make_transform(config.augmentation, config.image_size)
        self.data = open_dataset(config.train, transform, on_corrupt=config.on_corrupt, color=config.color)
        first(lambda: check(config, self.data), self.device)  # before hours of training
        config, warning = fit_batch(config, len(self.data), self.world)
        if warning:
            self.say(warning)
        self.config = config
        self.steps_per_epoch = len(self.data) // config.batch_size
        self.steps = config.length(len(self.data))

        torch.manual_seed(config.seed)
        self.network = make_model(
            config.model,
            channels=config.channels,
            image_size=config.image_size,
            embedding_size=config.embedding_size,
        ).to(self.device)
        self.head = make_head(
            config.loss,
            self.data.labels,
            self.data.num_classes,
            config.embedding_size,
            margin=config.margin,
            scale=config.scale,
            options=config.loss_options,
            sample_rate=config.sample_rate,
            sample_seed=config.seed,
            gradient_tolerance=config.gradient_tolerance,
            dtype=getattr(torch, config.head_dtype),
            device=self.device,
        )
        self.backbone: nn.Module = self.network
        if dist.is_initialized():
            # Else it rearranges its sums over the ranks after the first step of each start: the last bits of a sum
            # of three or more are then those of no uninterrupted training.
            keeps_order = self.world > 2 and self.device.type == "cpu"
            self.backbone = DistributedDataParallel(self.network, find_unused_parameters=keeps_order)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.optimizers = make_optimizers(config, self.network, self.head, self.scaler)
        shape = {"warm_up": config.warm_up, "power": config.power, "milestones": config.milestones}
        self.schedules = {
            name.replace("optimizer", "schedule"): make_schedule(optimizer, self.steps, config.schedule, **shape)
            for name, optimizer in self.optimizers.items()
        }
        self.average = self.class_sums = None
        if config.ema:
            self.average = AveragedModel(
                self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True
            )
        if isinstance(self.head.margin, KappaFaceMargin):
            self.class_sums = ClassSums(self.data.num_classes, config.embedding_size, self.device)
        self.step = 0
        self.head_seconds = 0.0
        self.stopping = False

    @property
    def state(self) -> dict[str, checkpoint.Stateful]:
        state = {
            "network": self.network,
            "average": self.average,
            "head": self.head,
            "class_sums": self.class_sums,
            "scaler": self.scaler,
            **self.optimizers,
            **self.schedules,
        }
        return {name: item for name, item in state.items() if item is not None}

    @property
    def result(self) -> nn.Module:
        """The backbone that is tested and exported."""
        return self.network if self.average is None else self.average.module

    def begin(self) -> None:
        """From the first step, with trained weights if there are any, or from the newest checkpoint.

        The step is kept where the training has become longer, and the learning rate is that of the longer one.
        """
        folder, file = self.output / CHECKPOINTS, self.output / SETTINGS
        if checkpoint.latest(folder) is not None:
            if not self.config.resume:
                raise ValueError(f"{folder} exists: --resume goes on from it, another --output starts anew.")
            try:
                old = load(file)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"The settings of the training in {folder} cannot be read: {error} --resume goes on when they "
                    f"are in {file} again, as --config takes them."
                ) from error
            now, kept = whose_images(self.data), self.output / DATA  # none of a training from before it was kept
            if kept.is_file() and (before := kept.read_text(errors="replace").strip()) != now:
                raise ValueError(
                    f"{folder} is of a training on {before}, and {self.config.train} has {now}: the head's rows "
                    "would be of others. Bring those images back, or begin anew with another --output."
                )
            if changed := difference(old, self.config):
                raise ValueError(f"{folder} is of another training: {changed}.")
            try:
                self.step = checkpoint.load(folder, **self.state)
            except RuntimeError as error:
                raise ValueError(
                    f"The newest checkpoint cannot be loaded: {str(error).removesuffix('.')}. If it is damaged, "
                    "remove it, and --resume goes on from the one before."
                ) from error
            if self.steps < self.step:
                raise ValueError(
                    f"{folder} is of step {self.step}, and this training would end after {self.steps}: raise "
                    "--epochs or --steps."
                )
            for schedule in self.schedules.values():  # always: the checkpoint may be older than the settings
                stretch(schedule)
            if (before := old.length(len(self.data))) != self.steps:
                self.say(
                    f"The training was of {before:,} steps and is of {self.steps:,}; the learning rate goes on "
                    f"where the schedule of {self.steps:,} has it at step {self.step:,}."
                )
        elif self.config.init:
            init = weights_of(Path(self.config.init))
            load_backbone(self.network, init)
            self.say(f"The backbone is that of {init}. {load_head(self.head, init, self.data)}")
        first(self.keep_settings, self.device)

    def keep_settings(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        for name, text in ((SETTINGS, dump(self.config)), (DATA, f"{whose_images(self.data)}\n")):
            written = self.output / f"{name}.new"  # the file is whole at any time
            written.write_text(text, encoding="utf-8")
            written.replace(self.output / name)

    def run(self) -> list[Result] | None:
        """Train, evaluate, export. None if a SIGTERM came first."""
        self.begin()
        self.say(
            f"{len(self.data):,} images of {self.data.num_classes:,} identities, "
            f"steps {self.step:,} to {self.steps:,}, {self.steps_per_epoch:,} an epoch, on {self.device}"
        )
        with sigterm(self), self.writer() as self.log:
            try:
                finished = self.learn_all()
                self.data.skipped |= self.any_process(self.data.skipped)
            finally:
                if corrupt := self.data.corrupt:
                    self.say(f"{len(corrupt)} images could not be read and were skipped: {shorten(corrupt)}")
            if not finished:
                self.say(f"SIGTERM: saved step {self.step:,} in {self.output}; --resume goes on from there.")
                return None
            results = self.evaluate()
        self.export(results)
        return results

    def learn_all(self) -> bool:
        """All steps that are left; False if SIGTERM ends them early."""
        config = self.config
        checkpoint_every = config.checkpoint_every or self.steps_per_epoch
        if self.is_evaluation_due():  # which a training that ended between checkpoint and evaluation lacks
            self.evaluate()
        with tqdm(
            total=self.steps * config.batch_size,
            initial=self.step * config.batch_size,
            unit=" images",
            unit_scale=True,
            disable=self.rank > 0,
            mininterval=0.5,
        ) as bar:
            waits, heads, wholes = EMA(), EMA(), EMA()  # tqdm's moving averages, as of its rate
            ready = time.perf_counter()
            for images, labels, indices in self.loader():
                waited = time.perf_counter() - ready
                value, accuracy, stop = self.learn(images, labels, indices)
                whole = wholes(time.perf_counter() - ready)
                shown = {"loss": f"{value:.3f}", "data": f"{waits(waited) / whole:.0%}"}
                if self.device.type == "cpu":
                    shown["head"] = f"{heads(self.head_seconds) / whole:.0%}"
                bar.update(config.batch_size)
                bar.set_postfix(shown, refresh=False)
                if self.step % config.log_every == 0:
                    self.scalars({"train/loss": value, "train/accuracy": accuracy})
                    self.scalars({"train/samples_per_second": bar.format_dict["rate"] or 0.0})
                    self.scalars({"train/learning_rate": self.optimizers["head_optimizer"].param_groups[0]["lr"]})
                if stop or self.step % checkpoint_every == 0 or self.step == self.steps:
                    self.save()
                if stop:
                    return False
                if self.is_evaluation_due():
                    bar.clear()
                    self.evaluate()
                ready = time.perf_counter()
        return True

    def is_evaluation_due(self) -> bool:
        every = self.config.evaluate_every * self.steps_per_epoch
        return 0 < self.step < self.steps and every > 0 and self.step % every == 0

    def learn(self, images: Tensor, labels: Tensor, indices: Tensor) -> tuple[float, float, bool]:
        """One step: loss and accuracy of the batch of all processes, and whether one of them was told to stop."""
        config = self.config
        images = images.to(self.device, non_blocking=True)  # (n, channels, size, size)
        labels = labels.to(self.device, non_blocking=True)  # (n,)
        torch.manual_seed(mix(config.seed, self.step, self.rank)[0])  # dropout's, say
        precision = AUTOCAST[config.amp]
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            embeddings = self.backbone(images)  # (n, embedding_size) float32
        # The head's graph is cut off at the embeddings, so that its backward can be timed on its own.
        features = embeddings.detach().requires_grad_()
        start = time.perf_counter()
        loss, stats = self.head(features, labels, return_stats=True)
        value = loss.item()
        if not math.isfinite(value):
            raise self.non_finite(value, indices)
        self.scaler.scale(loss).backward()
        self.head_seconds = time.perf_counter() - start
        embeddings.backward(features.grad)
        if config.clip:
            self.scaler.unscale_(self.optimizers["backbone_optimizer"])
            nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        with warnings.catch_warnings():  # of an optimizer whose first step a GradScaler leaves out
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for schedule in self.schedules.values():
                schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        if self.class_sums is not None:
            self.class_sums.add(features, labels)
            if (self.step + 1) % self.steps_per_epoch == 0:
                self.class_sums.end_epoch(self.head)
        self.step += 1
        return value, float(stats.accuracy), bool(self.any_process(torch.tensor(self.stopping)))

    def any_process(self, flags: Tensor) -> Tensor:
        """Which flags are set on any process. All of them must leave the loop after the same step, for one."""
        if self.world > 1:
            flags = flags.to(self.device, torch.uint8)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags.bool().cpu()

    def non_finite(self, value: float, indices: Tensor) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"The loss became {value} at step {self.step} of {self.steps}, on the images "
            f"{', '.join(str(self.data.keys[i]) for i in indices.tolist())}. If these are sound, a learning rate "
            f"below {max(self.config.peaks):g} or a longer warm-up may help."
        )

    def loader(self) -> DataLoader:
        config = self.config
        batches = Batches(
            len(self.data), config.batch_size, config.seed, self.step, self.steps, self.rank, self.world
        )
        return DataLoader(
            Seeded(self.data),
            batch_sampler=batches,
            num_workers=config.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=detach_worker,
        )

    def save(self) -> None:
        checkpoint.save(self.output / CHECKPOINTS, self.step, **self.state)

    def evaluate(self) -> list[Result]:
        if not self.config.test:
            return []
        results = first(lambda: evaluate(self.result, self.config, self.device), self.device) or []
        for result in results:
            self.scalars({f"test/{result.name}/{name}": rate for name, rate in result.rates.items()})
        if results:
            tqdm.write(f"step {self.step:,}\n{table(results)}", file=sys.stdout)
        return results

    def export(self, results: Sequence[Result]) -> None:
        save_head(self.head, self.output, self.data)
        config = self.config
        tested = results[0] if results else None
        description = Description(
            config.model,
            config.color,
            config.image_size,
            config.embedding_size,
            config.flip,
            tested and tested.threshold,
            tested.chosen if tested else "no test data",
        )
        difference = first(lambda: export(self.result, description, self.output), self.device)
        if difference is not None:  # on the first process
            self.say(
                f"Exported to {self.output}: model.safetensors reproduces the embeddings, model.onnx with a "
                f"relative difference of {difference:.0e}."
            )

    @contextlib.contextmanager
    def writer(self) -> Iterator[SummaryWriter | None]:
        if self.rank:
            yield None
            return
        with SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step + 1) as writer:
            yield writer

    def scalars(self, values: dict[str, float]) -> None:
        if self.log is not None:
            for name, value in values.items():
                self.log.add_scalar(name, value, self.step)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def shorten(keys: Sequence[str], most: int = 20) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


@contextlib.contextmanager
def sigterm(training: Training) -> Iterator[None]:
    """While this lasts, SIGTERM asks the training to save and end."""

    def stop(*_: object) -> None:
        training.stopping = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def device_of(config: Config) -> torch.device:
    """Of this process: torchrun numbers those of a machine.

    Raises:
        ValueError: PyTorch has no such device, or none is here.
    """
    try:
        device = torch.device(config.torch_device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be one of PyTorch's, such as cpu or cuda, got {config.device!r}."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"PyTorch sees {torch.cuda.device_count()} GPUs, and device is {config.device!r}.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"PyTorch sees {torch.cuda.device_count()} GPUs here, too few for process {device.index} of "
                "torchrun, which starts one for each with --nproc-per-node gpu."
            )
        torch.cuda.set_device(device)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # a build without such devices, or meta
        reason = str(error).partition(". ")[0]
        raise ValueError(f"PyTorch cannot compute on device {config.device!r} here: {reason}.") from error
    return device


@contextlib.contextmanager
def process_group(config: Config) -> Iterator[None]:
    """Joins the processes of torchrun; without it, there is one process and no group."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    device = device_of(config)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        destroy_process_group()
