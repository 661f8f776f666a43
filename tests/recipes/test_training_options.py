"""What a training may be asked for beyond the plain recipe; each goes on from a checkpoint bit for bit."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.recipe import (
    FONTS,
    as_arguments,
    assert_same_training,
    everything,
    launch_several,
    losses,
    some_glyphs,
)
from torch import nn

import train
from cosface_kernels import checkpoint, family
from cosface_recipes import export, initial, training
from cosface_recipes.config import Config, load
from cosface_recipes.data import glyphs
from cosface_recipes.losses import LOSSES, make_head, own_settings
from cosface_recipes.models import make_model

ADAMW = {"optimizer": "adamw", "learning_rate": 0.01}
FIRST = "0.0.weight"  # of GlyphNet
OPTIONS = {
    "average": {"ema": 0.9, "clip": 0.5, "schedule": "cosine"},
    "sampled": {"sample_rate": 0.6, "backbone_learning_rate": 0.01, "nesterov": True},
    "adamw": {**ADAMW, "sample_rate": 0.6, "ema": 0.9, "clip": 0.5, "schedule": "cosine", "loss": "arcface"},
    "kappaface": {"loss": "kappaface", "loss_options": ("gamma=0.5",)},
    "curricularface": {"loss": "curricularface", "gradient_tolerance": 0.0, "loss_options": ("rate=0.1",)},
    "float8": {"head_dtype": "float8_e4m3fn", "head_state_dtype": "float8_e4m3fn"},
    "tolerance": {"gradient_tolerance": 1e-3, "schedule": "constant", "amp": "bf16"},
}


def stop_after(monkeypatch, step: int) -> None:
    """A SIGTERM in the middle of the next training."""
    learn = training.Training.learn

    def learn_and_terminate(self, *batch):
        if self.step == step - 1:
            monkeypatch.setattr(training.Training, "learn", learn)
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *batch)

    monkeypatch.setattr(training.Training, "learn", learn_and_terminate)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_goes_on_as_if_it_had_not_stopped(settings, tmp_path, monkeypatch, without_export, name):
    settings = dataclasses.replace(settings, steps=9, test=(), **OPTIONS[name])
    train.main(as_arguments(settings))
    assert len(losses(settings.output)) == 9
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"), resume=True)
    stop_after(monkeypatch, 6)  # in the middle of the second epoch
    train.main(as_arguments(stopped))
    assert len(losses(stopped.output)) == 6
    train.main(as_arguments(stopped))
    assert_same_training(settings.output, stopped.output)


# Losses


def test_the_losses_are_those_of_the_family():
    named = {name for name in vars(family) if name.startswith("Fused") and name.endswith("Loss")}
    assert {loss.__name__ for loss in LOSSES.values()} == named - {"FusedMarginLoss"}


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_its_own_defaults(settings, loss, without_export):
    scale = None if loss in ("adacos", "softmax", "a-softmax", "l-softmax") else 8.0
    settings = dataclasses.replace(settings, loss=loss, margin=(), scale=scale, test=(), steps=12)
    train.main(as_arguments(dataclasses.replace(settings, learning_rate=0.02)))
    curve = [value for _, value in losses(settings.output)]
    assert min(curve[-3:]) < curve[0]


def test_margins_and_settings_reach_the_loss():
    labels = torch.arange(20)
    head = make_head("combined", labels, 20, 8, margin=(1.0, 0.3, 0.1), options=("guard=false",))
    assert head.margin.guard is False
    assert head.margin.margins == (1.0, 0.3, 0.1)
    assert make_head("mv-softmax", labels, 20, 8, margin=(0.2,), scale=16.0, options=("t=0.3",)).margin.t == 0.3
    assert own_settings("kappaface") == ["temperature", "gamma"]
    with pytest.raises(
        ValueError, match=r"The loss cosface does not take its settings: margin must .* got \(1, 2\)"
    ):
        make_head("cosface", labels, 20, 8, margin=(1, 2))
    with pytest.raises(ValueError, match=r"The loss magface does not take its settings: .*0\.5"):
        make_head("magface", labels, 20, 8, margin=(0.5,))
    with pytest.raises(ValueError, match=r"The loss mv-softmax does not take its settings: .*'many'"):
        make_head("mv-softmax", labels, 20, 8, options=("t=many",))


def test_kappaface_sets_its_margins_after_each_epoch(settings, without_export):
    settings = dataclasses.replace(settings, loss="kappaface", margin=(), test=(), epochs=2)
    train.main(as_arguments(settings))
    state = everything(settings.output)
    assert len(state["head/margin.weights"].unique()) > 1
    assert not state["class_sums/sums"].any()


# Optimizers


def test_a_clipped_gradient_moves_the_backbone_by_the_norm_alone(settings, monkeypatch, without_export):
    norms = []
    clip = nn.utils.clip_grad_norm_

    def clip_and_note(parameters, most):
        parameters = list(parameters)
        clip(parameters, most)
        norms.append(float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_and_note)
    train.main(as_arguments(dataclasses.replace(settings, clip=1e-3, steps=3, test=())))
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


def test_a_backbone_without_a_learning_rate_stays(settings, without_export):
    settings = dataclasses.replace(settings, backbone_learning_rate=0.0, steps=3, test=())
    torch.manual_seed(settings.seed)
    before = make_model("glyphnet", channels=1, image_size=32, embedding_size=16).state_dict()
    train.main(as_arguments(settings))
    after = everything(settings.output)
    for name in (name for name in before if "weight" in name):
        assert torch.equal(after[f"network/{name}"], before[name]), name
    assert losses(settings.output)[-1][1] != losses(settings.output)[0][1]


def test_the_average_is_tested_and_exported(settings, monkeypatch):
    tested = []
    evaluate = training.evaluate
    monkeypatch.setattr(
        training, "evaluate", lambda network, *rest: tested.append(network) or evaluate(network, *rest)
    )
    settings = dataclasses.replace(settings, ema=0.8, epochs=1)
    train.main(as_arguments(settings))
    state = everything(settings.output)
    exported = load_file(Path(settings.output) / export.WEIGHTS)
    for name, tensor in exported.items():
        assert torch.equal(tensor, state[f"average/module.{name}"]), name
    assert not torch.equal(exported[FIRST], state[f"network/{FIRST}"])
    assert torch.equal(tested[0].state_dict()[FIRST], exported[FIRST])
    assert state["average/n_averaged"] == 4


# Lengths


def test_a_training_may_become_longer_and_not_shorter_than_it_is(settings, capsys, without_export):
    settings = dataclasses.replace(settings, epochs=2, test=(), warm_up=0.0, schedule="cosine")
    train.main(as_arguments(settings))
    capsys.readouterr()
    longer = dataclasses.replace(settings, epochs=4, resume=True)
    train.main(as_arguments(longer))
    said = capsys.readouterr().out
    assert "The training was of 8 steps and is of 16; the learning rate goes on where the schedule of 16" in said
    assert "steps 8 to 16" in said
    assert len(losses(settings.output)) == 16
    assert load(Path(settings.output) / training.SETTINGS).epochs == 4
    with pytest.raises(SystemExit, match=r"is of step 16, and this training would end after 12: raise --epochs"):
        train.main(as_arguments(dataclasses.replace(settings, epochs=3, resume=True)))


def test_a_longer_training_has_the_rate_of_the_longer_schedule(settings, monkeypatch, without_export):
    settings = dataclasses.replace(settings, steps=4, test=(), warm_up=0.0, schedule="cosine")
    train.main(as_arguments(settings))
    train.main(as_arguments(dataclasses.replace(settings, steps=12, resume=True)))
    whole = dataclasses.replace(settings, steps=12, output=settings.output + "-whole")
    train.main(as_arguments(whole))
    rates = [scalars(output, "train/learning_rate") for output in (settings.output, whole.output)]
    assert rates[0][4:] == rates[1][4:]
    assert rates[0][:4] != rates[1][:4]


def scalars(output: str, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{output}/tensorboard", size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(tag)]


def test_a_batch_of_more_images_than_there_are_is_made_smaller(settings, capsys, without_export):
    settings = dataclasses.replace(settings, batch_size=512, test=(), epochs=3)
    train.main(as_arguments(settings))
    said = capsys.readouterr().out
    assert "Warning: batch_size 512 is more than the 72 images in " in said
    assert "reduced to 72, so that an epoch is 1 step and the training 3" in said
    assert len(losses(settings.output)) == 3
    train.main(as_arguments(dataclasses.replace(settings, resume=True)))  # the same command goes on


def test_processes_share_a_smaller_batch_or_none():
    config = Config(train="FOLDER", batch_size=512)
    assert training.fit_batch(config, 1000, 2) == (config, "")
    assert training.fit_batch(config, 121, 8)[0].batch_size == 120
    with pytest.raises(ValueError, match=r"two images for each process, got 15 in FOLDER\."):
        training.fit_batch(config, 15, 8)
    with pytest.raises(ValueError, match=r"batch_size must divide by the 3 processes, got 512\."):
        training.fit_batch(config, 1000, 3)


# Trained weights


@pytest.fixture
def trained(settings, data) -> Config:
    settings = dataclasses.replace(settings, epochs=1, test=(), train=str(data / "folders"))
    train.main(as_arguments(settings))
    return settings


def begun(settings: Config) -> training.Training:
    """A training before its first step."""
    begun = training.Training(settings)
    begun.begin()
    return begun


def test_weights_come_back_the_head_where_the_identities_agree(trained, data, tmp_path, capsys):
    file = Path(trained.output) / export.WEIGHTS
    state = everything(trained.output)
    again = dataclasses.replace(trained, init=str(file), output=str(tmp_path / "again"), seed=1)
    training_ = begun(again)
    assert "of the same identities" in capsys.readouterr().out
    assert torch.equal(training_.head.weight, state["head/weight"])
    assert torch.equal(training_.network.state_dict()[FIRST], state[f"network/{FIRST}"])
    # another label set, as many classes: the head is new
    other = data / "others"
    for folder in sorted((data / "folders").iterdir()):
        (other / f"x{folder.name}").parent.mkdir(exist_ok=True)
        (other / f"x{folder.name}").symlink_to(folder)
    training_ = begun(dataclasses.replace(again, train=str(other), output=str(tmp_path / "other")))
    assert "The head is new" in capsys.readouterr().out
    assert not torch.equal(training_.head.weight, state["head/weight"])
    assert torch.equal(training_.network.state_dict()[FIRST], state[f"network/{FIRST}"])


def test_a_folder_of_a_training_begins_another_with_its_head(trained, tmp_path, capsys):
    state = everything(trained.output)
    training_ = begun(dataclasses.replace(trained, init=trained.output, output=str(tmp_path / "again"), seed=1))
    assert "of the same identities" in capsys.readouterr().out
    assert torch.equal(training_.head.weight, state["head/weight"])


@pytest.mark.parametrize("content", [None, "", '["00", '], ids=repr)
def test_a_head_of_identities_that_cannot_be_read_is_left(trained, tmp_path, capsys, content):
    names = Path(trained.output) / initial.IDENTITIES
    names.unlink()
    if content is not None:
        names.write_text(content)
    begun(dataclasses.replace(trained, init=trained.output, output=str(tmp_path / "again")))
    assert re.search(rf"The head is new: {names}, .* cannot be read: .*\.$", capsys.readouterr().out, re.MULTILINE)


def test_what_a_training_leaves_has_the_mode_of_open(settings):
    before = os.umask(0o027)
    try:
        train.main(as_arguments(dataclasses.replace(settings, epochs=1, test=())))
    finally:
        os.umask(before)
    files = [path for path in Path(settings.output).iterdir() if path.is_file()]
    assert {path.name for path in files} >= {export.WEIGHTS, export.ONNX, export.DESCRIPTION, initial.HEAD}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: "0o640" for path in files
    }


def test_a_state_dict_of_torch_save_is_a_backbone_too(trained, tmp_path, capsys):
    file = tmp_path / "backbone.pth"
    torch.save(load_file(Path(trained.output) / export.WEIGHTS), file)
    network = begun(dataclasses.replace(trained, init=str(file), output=str(tmp_path / "run2"))).network
    assert "The head is new: there is no head.safetensors beside backbone.pth." in capsys.readouterr().out
    assert torch.equal(network.state_dict()[FIRST], torch.load(file)[FIRST])


def test_weights_that_do_not_fit_are_refused_with_their_names_and_shapes(tmp_path, trained):
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    first, second, *_ = state
    wrong = {**{name: tensor for name, tensor in state.items() if name != first}, "more": torch.zeros(1)}
    wrong[second] = torch.zeros(3)
    file = tmp_path / "wrong.safetensors"
    save_file(wrong, file)
    with pytest.raises(
        ValueError,
        match=rf"{re.escape(first)} is missing, more is not in the model, {second} is \(3,\) and should",
    ):
        initial.load_backbone(network, file)
    with pytest.raises(SystemExit, match=r"does not fit the model: conv1\.weight is missing, .* more\.$"):
        train.main(
            as_arguments(
                dataclasses.replace(trained, model="iresnet18", init=str(file), output=str(tmp_path / "x"))
            )
        )


class Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/it-ran",)


def test_a_file_that_runs_code_or_is_none_is_refused(tmp_path):
    network = nn.Linear(2, 2)
    file = tmp_path / "backbone.pth"
    torch.save(Runs(), file)
    with pytest.raises(
        ValueError, match=r"backbone\.pth is no state_dict of torch\.save that loads without running"
    ):
        initial.load_backbone(network, file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no state_dict"):
        initial.load_backbone(network, file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match="must hold a state_dict of tensors"):
        initial.load_backbone(network, file)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no safetensors file"):
        initial.load_backbone(network, tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        initial.load_backbone(network, tmp_path / "absent.pth")


def test_finetuning_on_other_identities_begins_with_the_backbone(settings, tmp_path, capsys, without_export):
    """The flow of examples/README.md: train, then train on another label set from what was exported."""
    settings = dataclasses.replace(settings, test=(), epochs=12)
    train.main(as_arguments(settings))
    state = {name.removeprefix("network/"): tensor for name, tensor in everything(settings.output).items()}
    network = make_model("glyphnet", channels=1, image_size=32, embedding_size=16)
    save_file({name: state[name] for name in network.state_dict()}, tmp_path / export.WEIGHTS)
    images = some_glyphs("train", FONTS)
    keep = images.labels < 7
    images = dataclasses.replace(images, pixels=images.pixels[keep], labels=images.labels[keep])
    glyphs.write_records(images, tmp_path / "others")
    tuned = dataclasses.replace(
        settings,
        train=str(tmp_path / "others"),
        init=str(tmp_path / export.WEIGHTS),
        output=str(tmp_path / "tuned"),
        learning_rate=0.001,
        batch_size=14,
        epochs=8,
    )
    train.main(as_arguments(tuned))
    assert "The backbone is that of " in capsys.readouterr().out
    scratch = dataclasses.replace(tuned, init="", output=str(tmp_path / "scratch"))
    train.main(as_arguments(scratch))
    last = [sum(value for _, value in losses(run.output)[-4:]) for run in (tuned, scratch)]
    assert last[0] < 0.9 * last[1]


def test_two_processes_with_every_option_go_on_as_if_they_had_not_stopped(settings, tmp_path):
    settings = dataclasses.replace(settings, epochs=3, test=(), sample_rate=0.6, **ADAMW, ema=0.9, clip=0.5)
    launch_several(settings)
    assert json.loads((Path(settings.output) / initial.IDENTITIES).read_text()) == 12
    assert torch.equal(
        load_file(Path(settings.output) / initial.HEAD)["weight"], everything(settings.output)["head/weight"]
    )
    stopped = dataclasses.replace(settings, output=str(tmp_path / "stopped"), resume=True)
    shutil.copytree(settings.output, stopped.output)
    shutil.rmtree(checkpoint.latest(tmp_path / "stopped" / training.CHECKPOINTS))
    assert "steps 8 to 12" in launch_several(stopped)
    assert_same_training(settings.output, stopped.output)


def test_a_longer_training_that_died_before_its_first_checkpoint_has_the_rate_of_the_longer_one(
    settings, monkeypatch, without_export
):
    train.main(as_arguments(dataclasses.replace(settings, epochs=1, test=())))
    longer = dataclasses.replace(settings, epochs=4, test=(), resume=True)
    begun = training.Training(longer)
    begun.begin()  # the settings are those of the longer training, the checkpoint is not
    expected = [optimizer.param_groups[0]["lr"] for optimizer in begun.optimizers.values()]
    again = training.Training(longer)
    again.begin()
    assert [optimizer.param_groups[0]["lr"] for optimizer in again.optimizers.values()] == expected
    assert min(expected) > 0
