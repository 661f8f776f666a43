"""The settings of a training and the schedule of its learning rate."""

import dataclasses
import math
import re

import pytest
import torch
from support.recipe import TRAIN, said

from cosface_recipes import config
from cosface_recipes.schedule import PRESETS, learning_rate_factor, make_schedule, stretch


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
        ("epochs: many", r"--epochs: could not convert string to float: 'many'"),
        ("batch_size: 2.5", r"--batch-size: invalid literal for int\(\) with base 10: '2\.5'"),
        ("batch_size: true", r"--batch-size: .* 'true'"),
        ("batch_size: 16.0", r"--batch-size: .* '16\.0'"),
        ("milestones: [0.8, 0.5]", r"milestones must rise between 0 and 1, got \[0\.8, 0\.5\]\."),
        ("schedule: step", r"schedule step needs milestones"),
        ("schedule: linear", r"invalid choice 'linear' .*--schedule.* Expected one of \('polynomial', 'cosine',"),
        ("loss: arface", r"invalid choice 'arface' .*--loss"),
        ("loss_options: [0.3]", r"loss_options must be written NAME=VALUE, got '0\.3'\."),
        ("loss_options: {t: 0.3}", r"The loss cosface has no setting 't' beside margin and scale; it has none\."),
        ("{loss: mv-softmax, loss_options: {h: 1}}", r"has no setting 'h' .*; it has t, arc\."),
        ("sample_rate: 0", r"sample_rate must be above 0 and at most 1, got 0\.0\."),
        ("gradient_tolerance: 1", r"gradient_tolerance must be at least 0 and below 1, got 1\.0\."),
        ("ema: 1", r"ema must be at least 0 and below 1, got 1\.0\."),
        ("clip: .inf", r"clip must be at least 0 and finite, got inf\."),
        ("optimizer: adam", r"invalid choice 'adam'"),
        ("backbone_learning_rate: -1", r"backbone_learning_rate must be at least 0 and finite, got -1\.0\."),
        ("warm_up: 1", r"warm_up must be at least 0 and below 1, got 1\.0\."),
        ("far: 0", r"far must be above 0 and below 1, got 0\.0\."),
        ("{nesterov: true, momentum: 0}", r"nesterov needs a momentum above 0"),
        ("batch_size: 1", r"batch_size must be at least 2, got 1\."),
        ("scale: .inf", r"scale must be positive and finite, got inf\."),
        ("margin: .nan", r"margin must be finite, got nan\."),
        ("seed: 9223372036854775808", r"seed must be below 2\^63, got 9223372036854775808\."),
        ("weight_decay: -1", r"weight_decay must be at least 0 and finite, got -1\.0\."),
    ],
)
def test_a_bad_setting_is_refused_with_its_value(tmp_path, capsys, text, message):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        config.parse(["--config", str(file)])
    printed = said(capsys)
    assert re.search(message, printed)
    assert f"The configuration {file} was read as --" in printed


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(config.Config)])
def test_no_is_false_where_a_setting_is_true_or_false_and_a_word_elsewhere(tmp_path, capsys, name):
    file = tmp_path / "some.yaml"
    file.write_text(f"{name}: no")
    boolean = isinstance(getattr(config.Config, name), bool)
    option = f"--no-{name}" if boolean else f"--{name.replace('_', '-')}=no"
    results = []
    for arguments in ([option], ["--config", str(file)]):
        try:
            results.append(config.parse(arguments))
        except SystemExit:
            results.append(said(capsys).partition(" The configuration ")[0])
    assert results[0] == results[1]


def test_an_unknown_option_is_refused_with_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--epoch", "3"])
    assert re.search(r"Unrecognized options: --epoch, 3 .*Perhaps you meant: --epochs", said(capsys))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"There is no setting 'epoch', which .*some\.yaml has; did you mean epochs\?"),
        ("3: 3", r"There is no setting 3, which .*some\.yaml has\."),
        ("flip: sometimes", r"flip must be true or false, got 'sometimes' in .*some\.yaml\."),
        ("flip: 1", r"flip must be true or false, got 1 in .*some\.yaml\."),
        ("test: [a, --resume]", r"test cannot have '--resume', which .*some\.yaml has: it would be an option\."),
        ("test: [a, -h]", r"test cannot have '-h', which .*some\.yaml has"),
        ("train: {a: b}", r"train cannot be \{'a': 'b'\}, which .*some\.yaml has\."),
        ("- 3", r"must be lines of `name: value`, got \[3\]\."),
        ("{", r"is not YAML"),
    ],
)
def test_a_file_that_is_none_of_settings_is_refused(tmp_path, text, message):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.parse(["--config", str(file)])


def test_settings_come_back_from_the_file_that_a_training_keeps(tmp_path):
    options = ["--loss", "mv-softmax", "--loss-options", "t=0.3", "arc=true", "--margin", "0.4", "--no-flip"]
    settings = config.parse([*options, "--batch_size", "7", "--test", "a", "b b", "--weight-decay", "1e-7"])
    assert settings.batch_size == 7
    assert (settings.margin, settings.scale) == ((0.4,), None)
    file = tmp_path / "settings.yaml"
    file.write_text(config.dump(settings))
    assert config.load(file) == settings
    file.write_text("{loss: mv-softmax, loss_options: {t: 0.3, arc: true}, learning_rate: }")
    assert config.load(file).loss_options == settings.loss_options
    assert config.load(file).peaks == (0.1, 0.1)


def test_help_names_every_setting_and_what_it_does(capsys):
    with pytest.raises(SystemExit):
        config.parse(["--help"], "What it does.")
    text = said(capsys)
    assert "What it does." in text
    for name in vars(config.Config()):
        assert f"--{name.replace('_', '-')}" in text
    assert "images per step, over all processes" in text
    assert not re.search(r"(STR|INT|FLOAT|\]\]|\}|--no-\S+) \(default", text)  # each says what it is


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


def test_a_cosine_falls_to_nothing_and_a_constant_stays():
    rates = [learning_rate_factor(step, 100, "cosine", warm_up=0.1) for step in (10, 40, 55, 100)]
    assert rates == pytest.approx([1, 0.75, 0.5, 0])
    assert {learning_rate_factor(step, 100, "constant") for step in range(100)} == {1.0}


def test_a_training_that_becomes_longer_has_the_rate_of_the_longer_one():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = make_schedule(optimizer, 10, "cosine")
    for _ in range(6):
        optimizer.step()
        schedule.step()
    state = schedule.state_dict()
    longer = make_schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2), 20, "cosine")
    longer.optimizer.load_state_dict(optimizer.state_dict())
    longer.load_state_dict(state)
    stretch(longer)
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 + 0.1 * math.cos(math.pi * 6 / 20))
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_lr() == pytest.approx([0.1 + 0.1 * math.cos(math.pi * 7 / 20)])


def test_a_step_schedule_takes_its_own_milestones():
    rates = [learning_rate_factor(step, 10, "step", milestones=(0.2, 0.75)) for step in (0, 1, 2, 7, 8, 9)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
