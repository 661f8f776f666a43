"""The training recipe in miniature: settings, models, schedule, checkpoints, training, export, verification."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import patience
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import glyphs_to_records
import identify_faces
import train
import verify_faces
from cosface_kernels import checkpoint
from cosface_recipes import config, export, recognition, training
from cosface_recipes.data import glyphs
from cosface_recipes.data.augmentation import RandomAffine, make_transform
from cosface_recipes.data.glyphs import load_glyphs
from cosface_recipes.data.image_datasets import decode, open_dataset
from cosface_recipes.data.images import Images
from cosface_recipes.data.pairs import write_bin
from cosface_recipes.evaluation import held_out
from cosface_recipes.evaluation.protocols import cross_validate
from cosface_recipes.models import DEPTHS, make_model
from cosface_recipes.schedule import PRESETS, learning_rate_factor

TRAIN = Path(train.__file__)
HANGUL = glyphs_to_records.HANGUL

# Settings


def test_options_count_after_the_file_and_the_file_after_the_defaults(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("epochs: 3\nlearning_rate: 1e-2\nmilestones: [0.5, 0.8]\nflip: false\nmodel: iresnet18\n")
    settings = config.parse(["--config", str(file), "--epochs", "7", "--test", "a", "b", "--resume"])
    assert (settings.epochs, settings.learning_rate, settings.milestones) == (7.0, 0.01, (0.5, 0.8))
    assert (settings.flip, settings.resume, settings.test) == (False, True, ("a", "b"))
    assert (settings.model, settings.batch_size) == ("iresnet18", config.Config.batch_size)


@pytest.mark.parametrize("file", sorted((TRAIN.parent / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configurations_are_valid(file):
    assert config.parse(["--config", str(file)]).train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"There is no setting 'epoch'; did you mean epochs\?"),
        ("epochs: many", r"epochs must be a number, got 'many'\."),
        ("batch_size: 2.5", r"batch_size must be a whole number, got 2\.5\."),
        ("flip: sometimes", r"flip must be true or false, got 'sometimes'\."),
        ("model:", r"model must be text, got None\."),
        ("- 3", r"must be lines of `name: value`, got \[3\]\."),
        ("{", r"is not YAML"),
        ("milestones: [0.8, 0.5]", r"milestones must rise between 0 and 1, got \[0\.8, 0\.5\]\."),
        ("schedule: step", r"schedule step needs milestones"),
        ("schedule: cosine", r"schedule must be one of polynomial, step, .* got 'cosine'\."),
        ("warm_up: 1", r"warm_up must be at least 0 and below 1, got 1\.0\."),
        ("far: 0", r"far must be above 0 and below 1, got 0\.0\."),
        ("{nesterov: true, momentum: 0}", r"nesterov needs a momentum above 0"),
        ("batch_size: 1", r"batch_size must be at least 2, got 1\."),
        ("scale: .inf", r"scale must be positive and finite, got inf\."),
        ("margin: .nan", r"margin must be finite, got nan\."),
        ("weight_decay: -1", r"weight_decay must be at least 0 and finite, got -1\.0\."),
    ],
)
def test_a_bad_setting_is_refused_with_its_value(tmp_path, text, message):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.parse(["--config", str(file)])


# Schedule


def test_the_learning_rate_rises_to_its_peak_and_falls_as_the_power_says():
    rates = [learning_rate_factor(step, 100, "polynomial", warm_up=0.1, power=2.0) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([(1 - i / 90) ** 2 for i in range(91)])


def test_the_papers_schedules_fall_where_the_paper_says():
    paper = {
        "cosface-small": (30_000, (16_000, 24_000, 28_000)),
        "cosface-large": (240_000, (80_000, 140_000, 200_000)),
    }
    assert paper.keys() == PRESETS.keys()
    for name, (steps, milestones) in paper.items():
        for passed, step in enumerate(milestones):
            assert learning_rate_factor(step - 1, steps, name) == pytest.approx(0.1**passed)
            assert learning_rate_factor(step, steps, name) == pytest.approx(0.1 ** (passed + 1))


def test_a_step_schedule_takes_its_own_milestones():
    rates = [learning_rate_factor(step, 10, "step", milestones=(0.2, 0.75)) for step in (0, 1, 2, 7, 8, 9)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


# Models


@pytest.mark.parametrize(
    ("name", "blocks", "millions"),
    [("iresnet18", 8, 24.03), ("iresnet34", 16, 34.14), ("iresnet50", 24, 43.59), ("iresnet100", 49, 65.16)],
)
def test_the_iresnets_have_the_known_sizes(name, blocks, millions):
    with torch.device("meta"):
        model = make_model(name)
    assert sum(DEPTHS[name]) == blocks
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    names = set(model.state_dict())
    assert {"conv1.weight", "prelu.weight", "layer3.1.bn3.bias", "layer4.0.downsample.1.running_var"} <= names
    assert {"fc.bias", "features.running_mean"} <= names
    assert not model.features.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "channels", "size"), [("iresnet18", 3, 112), ("iresnet18", 1, 50), ("glyphnet", 1, 32)]
)
def test_the_last_layers_are_float32_under_autocast(name, channels, size, dtype):
    model = make_model(name, channels=channels, image_size=size, embedding_size=24)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    with torch.no_grad():
        linear.weight *= 1e6  # float16 ends at 65504
    norm.eval()
    with torch.autocast("cpu", dtype):
        embeddings = model(torch.rand(3, channels, size, size) * 2 - 1)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (3, 24)
    assert embeddings.isfinite().all()
    assert embeddings.abs().max() > 65504


def test_a_model_of_timm_gets_an_embedding_layer(monkeypatch):
    asked = {}

    def create_model(name: str, **options: object) -> nn.Module:
        asked.update(options, name=name)
        body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        body.num_features = 10
        return body

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    model = make_model("timm:resnet18", channels=3, embedding_size=5)
    assert asked == {"name": "resnet18", "num_classes": 0, "in_chans": 3}
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(torch.randn(4, 3, 8, 8))
    assert (embeddings.shape, embeddings.dtype) == ((4, 5), torch.float32)


def test_missing_models_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"model must be one of iresnet18, .* got 'resnet1000'\."):
        make_model("resnet1000")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"The model timm:resnet18 needs timm: pip install timm"):
        make_model("timm:resnet18")


# Augmentation


def test_an_affine_map_is_that_of_affine_grid():
    x, y = np.meshgrid(np.linspace(0, np.pi, 48), np.linspace(0, np.pi, 32))
    smooth = (255 * np.sin(x) * np.sin(y) ** 2).astype(np.uint8)  # black at the border, as glyphs are
    torch.manual_seed(5)
    warped = np.asarray(RandomAffine(0.1)(Image.fromarray(smooth)), np.float32)
    torch.manual_seed(5)
    noise = torch.randn(6).mul(0.1).clamp(-0.2, 0.2).reshape(1, 2, 3)
    grid = torch.nn.functional.affine_grid(torch.eye(2, 3) + noise, [1, 1, 32, 48], align_corners=False)
    image = torch.from_numpy(smooth).float()[None, None]
    expected = torch.nn.functional.grid_sample(image, grid, align_corners=False)[0, 0].numpy()
    assert np.abs(warped - smooth).max() > 20
    assert np.abs(warped - expected).max() <= 6  # half a pixel of border, which one blends with black


@pytest.mark.parametrize("name", ["face", "face-strong", "glyph", "none"])
def test_augmentations_give_normalised_images_of_the_size(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    tensor = make_transform(name, 16)(image)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert -1 <= tensor.min() < -0.5
    assert 0.5 < tensor.max() <= 1


# Order of the samples


def test_each_epoch_is_an_order_of_its_own_and_the_processes_share_each_batch():
    whole = list(training.Batches(23, 4, seed=0, start=0, stop=15))
    epochs = [[index for batch in whole[i : i + 5] for index, _ in batch] for i in (0, 5, 10)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) <= set(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({seed for batch in whole for _, seed in batch}) == 60
    assert list(training.Batches(23, 4, seed=0, start=7, stop=15)) == whole[7:]
    assert list(training.Batches(23, 4, seed=1, start=0, stop=15)) != whole
    halves = [list(training.Batches(23, 4, 0, 0, 15, rank, world=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])
        assert [len(part) for part in parts] == [2, 2]


# Training

CHARACTERS, FONTS = 12, 6


def some_glyphs(split: str, fonts: int) -> Images:
    images = load_glyphs(split, HANGUL)
    total = len(images.identities)
    rows = torch.arange(len(images)).reshape(-1, total)[:fonts, :CHARACTERS].flatten()
    return Images(images.pixels[rows], images.labels[rows], images.identities[:CHARACTERS])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The same 72 images of 12 syllables as records and as folders, and test images of 12 others."""
    folder = tmp_path_factory.mktemp("glyphs")
    images = some_glyphs("train", FONTS)
    glyphs.write_records(images, folder / "train")
    glyphs.write_records(some_glyphs("test", 4), folder / "test")
    for i, label in enumerate(images.labels.tolist()):
        path = folder / "folders" / f"{label:02}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(glyphs.png(images.pixels[i, 0].numpy()))
    return folder


@pytest.fixture
def settings(data, tmp_path, restore_threads) -> config.Config:
    """20 steps, 4 an epoch."""
    return config.Config(
        train=str(data / "train"),
        test=(str(data / "test"),),
        output=str(tmp_path / "run"),
        image_size=32,
        color="gray",
        augmentation="glyph",
        flip=False,
        model="glyphnet",
        embedding_size=16,
        scale=8.0,
        margin=0.1,
        epochs=5,
        batch_size=18,
        learning_rate=0.1,
        warm_up=0.1,
        far=0.05,
        workers=0,
        threads=1,
        log_every=1,
    )


@pytest.fixture
def without_export(monkeypatch):
    """Tracing for ONNX takes longer than these trainings."""
    monkeypatch.setattr(training, "export", lambda network, description, folder: 0.0)


def test_the_glyphs_of_the_repository_become_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glyphs_to_records, "load_glyphs", lambda split, _: some_glyphs(split, fonts=3))
    glyphs_to_records.main([str(tmp_path)])
    assert f"{tmp_path / 'test'}: 36 images of 12 identities" in capsys.readouterr().out
    images, records = some_glyphs("train", fonts=3), open_dataset(tmp_path / "train", color="gray")
    assert records.labels.tolist() == images.labels.sort(stable=True).values.tolist()
    for i, row in enumerate(images.labels.argsort(stable=True).tolist()):
        assert np.array_equal(np.asarray(records[i][0]), images.pixels[row, 0].numpy())


def as_arguments(settings: config.Config) -> list[str]:
    arguments = []
    for name, value in vars(settings).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-"))
        elif value != config.FIELDS[name].default:
            arguments += [option, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return arguments


def losses(output: str) -> list[tuple[int, float]]:
    """(step, loss) as TensorBoard shows them."""
    events = EventAccumulator(f"{output}/tensorboard", size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def everything(output: str) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint: weights, statistics, momentum."""
    path = checkpoint.latest(Path(output) / training.CHECKPOINTS)
    names = {name for file in path.glob("*.safetensors") for name in load_file(file)} - {checkpoint.STRUCTURE}
    return {name: checkpoint.load_tensor(path, name) for name in names}


def assert_same_training(a: str, b: str) -> None:
    ours, theirs = everything(a), everything(b)
    assert ours.keys() == theirs.keys()
    assert {"head/weight", "network/8.running_var", "head_optimizer/state/0/momentum_buffer"} <= ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert losses(a) == losses(b)


def test_training_learns_and_leaves_a_model_that_decides(settings, data, capsys):
    train.main(as_arguments(settings))
    curve = losses(settings.output)
    assert [step for step, _ in curve] == list(range(1, 21))
    assert curve[-1][1] < 0.9 * curve[0][1]
    printed = capsys.readouterr()
    assert "loss=" in printed.err
    assert "samples/s" in printed.err
    assert "72 images of 12 identities, steps 0 to 20, 4 an epoch, on cpu" in printed.out
    assert len(re.findall(r"^test +48 +\d", printed.out, re.MULTILINE)) == 5  # an evaluation per epoch
    assert "model.safetensors reproduces the embeddings" in printed.out

    # verify_faces.py and identify_faces.py, on images of the test set
    records = open_dataset(data / "test", color="gray")
    gallery = Path(settings.output) / "gallery"
    paths = {}
    for i, label in enumerate(records.labels.tolist()):
        path = gallery / f"syllable{label:02}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        records[i][0].save(path)
        paths.setdefault(label, []).append(path)
    cosines = {}
    for model in ("", "model.onnx", "model.safetensors"):
        for a, b in (
            (paths[0][0], paths[0][0]),
            (paths[0][0], paths[1][0]),
            (gallery / "syllable00", gallery / "syllable01"),
        ):
            verify_faces.main([str(Path(settings.output) / model), str(a), str(b)])
            first, second = capsys.readouterr().out.splitlines()
            cosine = float(first.removeprefix("cosine "))
            cosines.setdefault((a, b), set()).add(cosine)
            threshold = float(
                re.search(r"threshold (\S+) \(FAR 0\.05 of 1,056 impostor pairs of test\)", second)[1]
            )
            assert second.startswith("same identity" if cosine > threshold else "different identities")
    assert cosines[paths[0][0], paths[0][0]] == {1.0}
    for values in cosines.values():
        assert max(values) - min(values) <= 2e-4  # printed with four digits
    probe = paths[3][2]
    identify_faces.main([settings.output, str(gallery), str(probe), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(probe)
    assert len(lines) == 4
    embedder = recognition.Recognizer(Path(settings.output))
    expected = {
        name: float(embedder.identity(gallery / name) @ embedder.identity(probe)) for name in os.listdir(gallery)
    }
    best = max(expected, key=expected.get)
    assert lines[1].split()[-2:] == [f"{expected[best]:.4f}", best]


def test_records_and_folders_and_worker_processes_train_alike(settings, data, tmp_path, without_export):
    train.main(as_arguments(settings))
    other = dataclasses.replace(
        settings, train=str(data / "folders"), workers=2, output=str(tmp_path / "other"), evaluate_every=0
    )
    train.main(as_arguments(other))
    assert_same_training(settings.output, other.output)


@pytest.mark.parametrize("amp", ["no", "fp16"])
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(
    settings, tmp_path, monkeypatch, capsys, without_export, amp
):
    settings = dataclasses.replace(settings, amp=amp, steps=6, batch_size=4)  # fp16 is slow on a CPU
    train.main(as_arguments(settings))
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"), resume=True)
    learn = training.Training.learn

    def learn_and_terminate(self, *batch):
        if self.step == 1:  # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *batch)

    monkeypatch.setattr(training.Training, "learn", learn_and_terminate)
    train.main(as_arguments(stopped))
    assert "SIGTERM: saved step 2 in " in capsys.readouterr().out
    monkeypatch.setattr(training.Training, "learn", learn)
    train.main(as_arguments(stopped))
    assert_same_training(settings.output, stopped.output)


def launch(settings: config.Config, *launcher: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(TRAIN), *as_arguments(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def test_sigterm_saves_and_exits_with_0(settings):
    settings = dataclasses.replace(settings, steps=100_000, checkpoint_every=3, evaluate_every=0, workers=1)
    process = launch(settings)
    folder = Path(settings.output) / training.CHECKPOINTS
    end = time.monotonic() + patience(120)
    while checkpoint.latest(folder) is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, the loader's workers with it
    out, err = process.communicate(timeout=patience(120))
    assert process.returncode == 0, err
    step = int(re.search(r"SIGTERM: saved step (\S+) in ", out)[1].replace(",", ""))
    assert checkpoint.latest(folder).name.startswith(f"step-{step:012}-")
    assert not (Path(settings.output) / export.ONNX).exists()


def launch_two(settings: config.Config) -> str:
    process = launch(settings, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out, err = process.communicate(timeout=patience(240))
    assert process.returncode == 0, err
    return out


def test_two_processes_train_as_one_program(settings, tmp_path):
    """And go on from a checkpoint as if they had not stopped, bit for bit."""
    settings = dataclasses.replace(settings, epochs=3)
    out = launch_two(settings)
    assert out.count("72 images of 12 identities") == 1
    assert [step for step, _ in losses(settings.output)] == list(range(1, 13))
    assert losses(settings.output)[-1][1] < losses(settings.output)[0][1]
    assert export.load(Path(settings.output))[1].threshold is not None
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"), resume=True)
    shutil.copytree(settings.output, stopped.output)
    shutil.rmtree(checkpoint.latest(tmp_path / "stopped" / training.CHECKPOINTS))
    assert "steps 8 to 12" in launch_two(stopped)
    assert_same_training(settings.output, stopped.output)


def test_a_loss_that_is_not_finite_stops_with_the_keys_of_its_batch(settings):
    settings = dataclasses.replace(settings, learning_rate=1e30, warm_up=0)
    with pytest.raises(SystemExit, match=r"The loss became (nan|inf) at step \d+ of 20") as stop:
        train.main(as_arguments(settings))
    keys = re.findall(r"train\.rec:\d+", str(stop.value))
    assert len(set(keys)) == 18
    assert "below 1e+30" in str(stop.value)


def test_an_error_ends_the_workers_too(settings):
    process = launch(dataclasses.replace(settings, learning_rate=1e30, warm_up=0, workers=2))
    _, err = process.communicate(timeout=patience(120))
    assert process.returncode == 1
    assert "The loss became" in err


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_another_training(settings, without_export):
    settings = dataclasses.replace(settings, epochs=1, test=())
    train.main(as_arguments(settings))
    with pytest.raises(SystemExit, match=r"checkpoints exists: --resume goes on from it"):
        train.main(as_arguments(settings))
    changed = dataclasses.replace(settings, resume=True, margin=0.2, workers=1)
    with pytest.raises(SystemExit, match=r"of another training: margin was 0\.1 and is 0\.2\.$"):
        train.main(as_arguments(changed))


def test_a_model_without_test_data_has_no_threshold(settings, data, capsys):
    settings = dataclasses.replace(settings, epochs=1, test=())
    train.main(as_arguments(settings))
    images = sorted((data / "folders").glob("*/*.png"))[:2]
    capsys.readouterr()
    verify_faces.main([settings.output, *map(str, images)])
    assert "no decision: the model was exported without a threshold" in capsys.readouterr().out
    verify_faces.main([settings.output, *map(str, images), "--threshold", "-1"])
    assert "same identity: threshold -1.0000 (as given)" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_skipped_and_counted_or_stops_the_training(
    settings, tmp_path, capsys, without_export, workers
):
    images = some_glyphs("train", FONTS)
    images.pixels[0] = 0
    folder = tmp_path / "broken"
    glyphs.write_records(images, folder)
    records = bytearray((folder / "train.rec").read_bytes())
    blank = records.index(glyphs.png(images.pixels[0, 0].numpy()))
    records[blank : blank + 20] = bytes(20)
    (folder / "train.rec").write_bytes(records)
    settings = dataclasses.replace(settings, train=str(folder), epochs=1.5, test=(), workers=workers)
    train.main(as_arguments(dataclasses.replace(settings, on_corrupt="skip")))
    assert "1 images could not be read and were skipped: train.rec:1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"The sample train\.rec:1 cannot be read"):
        train.main(as_arguments(dataclasses.replace(settings, output=str(tmp_path / "stops"))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ""}, "train must name the training data"),
        ({"train": "/no/such"}, "/no/such"),
        ({"batch_size": 73}, r"batch_size must be at most the 72 images, got 73\."),
        ({"model": "vgg"}, "model must be one of"),
    ],
    ids=str,
)
def test_a_training_that_cannot_start_says_why(settings, change, message):
    with pytest.raises(SystemExit, match=message):
        train.main(as_arguments(dataclasses.replace(settings, **change)))


def test_half_precision_trains(settings, without_export):
    train.main(as_arguments(dataclasses.replace(settings, amp="bf16", epochs=3)))
    curve = losses(settings.output)
    assert curve[-1][1] < curve[0][1]


# Evaluation


def test_the_threshold_lets_the_asked_share_of_impostors_pass(settings):
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    (result,) = held_out.evaluate(network, settings, torch.device("cpu"))
    assert network.training
    data = open_dataset(settings.test[0], make_transform("none", 32), color="gray")
    with torch.no_grad():
        unit = nn.functional.normalize(network.eval()(torch.stack([image for image, _ in data])))
    labels = data.labels
    impostor = (unit @ unit.T)[(labels[:, None] < labels)]
    assert ((impostor > result.threshold).sum() / len(impostor)).item() == pytest.approx(
        0.05, abs=1 / len(impostor)
    )
    assert f"{len(impostor):,} impostor pairs" in result.chosen


def test_many_images_are_counted_as_few_are_compared(settings, monkeypatch):
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    (few,) = held_out.evaluate(network, settings, torch.device("cpu"))
    monkeypatch.setattr(held_out, "EXACT_IMAGES", 10)
    (many,) = held_out.evaluate(network, settings, torch.device("cpu"))
    assert few.rates.pop("rank-1") > 0
    assert many.rates == pytest.approx(few.rates, abs=1 / 72, nan_ok=True)  # one genuine pair may fall in the bin
    assert many.threshold == pytest.approx(few.threshold, abs=1e-6)
    assert many.chosen == few.chosen


def test_pairs_of_a_bin_file_are_verified_in_folds(settings, tmp_path):
    images = open_dataset(settings.test[0])
    rows = [(i % 24, (i % 24) + (1 if i % 2 else 24)) for i in range(0, 40)]  # records lie four to an identity
    same = [bool(images.labels[a] == images.labels[b]) for a, b in rows]
    encoded = [images.read(i)[0] for pair in rows for i in pair]
    write_bin(tmp_path / "some.bin", encoded, same)
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    settings = dataclasses.replace(settings, test=(settings.test[0], str(tmp_path / "some.bin")), flip=True)
    everything, pairs = held_out.evaluate(network, settings, torch.device("cpu"))
    assert pairs.images == 80
    assert pairs.chosen == "best accuracy on 40 pairs of some.bin"
    x = torch.stack([make_transform("none", 32)(decode(image, "gray")) for image in encoded])
    with torch.no_grad():
        unit = nn.functional.normalize(network.eval()(x) + network(x.flip(-1)))
    cosines = (unit[0::2] * unit[1::2]).sum(1)
    distances = (2 - 2 * cosines).double().numpy()
    assert pairs.rates["accuracy"] == cross_validate(distances, np.array(same)).accuracy
    lines = held_out.table([everything, pairs]).splitlines()
    assert [line.split()[0] for line in lines] == ["test", "test", "some"]
    assert len({len(line) for line in lines}) == 1


# Export


def description(**changes: object) -> export.Description:
    fields = {"model": "glyphnet", "color": "gray", "image_size": 32, "embedding_size": 8, "flip": False}
    return export.Description(**{**fields, "threshold": 0.5, "chosen_on": "some data", **changes})


def test_an_iresnet_comes_back_from_both_files(tmp_path):
    model = make_model("iresnet18", channels=3, image_size=32, embedding_size=8)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))  # statistics of the norms
    about = description(model="iresnet18", color="rgb")
    assert export.export(model, about, tmp_path) < 1e-5
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model.eval()(images)
    for file in (export.ONNX, export.WEIGHTS):
        embed, read = export.load(tmp_path / file)
        assert read == about
        assert (embed(images) - expected).norm() < 1e-5 * expected.norm()


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch):
    model = make_model("glyphnet", channels=1, image_size=32, embedding_size=8)
    monkeypatch.setattr(export, "load_onnx", lambda file: lambda images: model(images).detach() * 1.001)
    with pytest.raises(
        RuntimeError, match=r"model\.onnx does not reproduce the embeddings: they differ by 1\.0e-03"
    ):
        export.export(model, description(), tmp_path)


def test_files_that_are_no_exported_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        export.load(tmp_path)
    (tmp_path / export.DESCRIPTION).write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"model\.json does not describe an exported model"):
        export.load(tmp_path)
    model = make_model("glyphnet", channels=1, image_size=32, embedding_size=8)
    export.export(model, description(), tmp_path)
    (tmp_path / "model.bin").write_bytes(b"something")
    with pytest.raises(ValueError, match=r"is a folder, a \.safetensors or an \.onnx file, got .*model\.bin"):
        export.load(tmp_path / "model.bin")
    (tmp_path / export.WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold the weights of glyphnet"):
        export.load(tmp_path)
