"""examples/3_train/million.py at a tiny size: it learns, and a run that resumes is the run that never stopped."""

import re

import pytest
import torch

import million
from cosface_recipes import synthetic

TINY = ["--classes", "400", "--dim", "32", "--batch", "50", "--sample-rate", "0.5", "--lr", "1", "--every", "20"]


def test_identities_are_standard_normal_and_their_own():
    z = synthetic.latents(torch.arange(20_000))
    assert abs(float(z.mean())) < 4 / z.numel() ** 0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / z.numel()) ** 0.5
    assert torch.equal(synthetic.latents(torch.tensor([7, 19_999])), z[[7, 19_999]])
    correlation = (z[:-1] * z[1:]).mean()
    assert abs(float(correlation)) < 4 / z.numel() ** 0.5
    assert bool(synthetic.latents(torch.tensor([2**40])).isfinite().all())


def test_samples_of_an_identity_differ_and_repeat_for_a_seed():
    labels = torch.tensor([3, 3, 5])
    x = synthetic.views(labels, seed=1)
    assert x.shape == (3, synthetic.VIEW)
    assert torch.equal(x, synthetic.views(labels, seed=1))
    assert float((x[0] - x[1]).norm()) < float((x[0] - x[2]).norm())
    assert not torch.equal(x[0], synthetic.views(labels, seed=2)[0])


def test_learns_far_above_chance_and_says_how_it_goes(capsys):
    accuracy = million.main([*TINY, "--steps", "80"])
    assert accuracy > 0.5
    out = capsys.readouterr()
    assert "chance is 2.5e-03" in out.out
    assert re.search(r"loss [\d.]+, [\d,]+ classes/s, [\d.]+ GiB", out.err)
    assert out.err.count("accuracy") + out.out.count("accuracy") == 5


@pytest.mark.parametrize("dtype", [["float32"], ["bfloat16"], ["float8_e4m3fn", "--state-dtype", "float8_e4m3fn"]])
def test_resumes_where_it_stopped(dtype, tmp_path, capsys):
    options = [*TINY, "--dtype", *dtype, "--momentum", "0.9", "--lr", "0.2"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    million.main([*options, "--steps", "40", "--checkpoint", str(whole)])
    million.main([*options, "--steps", "20", "--checkpoint", str(half)])
    million.main([*options, "--steps", "40", "--checkpoint", str(half)])
    assert "Resumed after step 20." in capsys.readouterr().out
    a, b = torch.load(whole), torch.load(half)
    assert a["steps"] == b["steps"] == 40
    for name in ("network", "head"):
        for key, value in a[name].items():
            assert torch.equal(value.float(), b[name][key].float()), key
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--lr", "0.5"], r"lr was 1\.0 and is 0\.5"),
        (["--momentum", "0.9"], r"momentum was 0\.0 and is 0\.9"),
        (["--batch", "25", "--seed", "3"], r"batch was 50 and is 25, seed was 0 and is 3"),
    ],
    ids=lambda each: each[0].strip("-") if isinstance(each, list) else "",
)
def test_a_resume_refuses_other_settings(option, sentence, tmp_path, capsys):
    """Which it would not follow, or not go on with the same batches."""
    file = tmp_path / "million.pt"
    million.main([*TINY, "--steps", "20", "--checkpoint", str(file)])
    with pytest.raises(SystemExit):
        million.main([*TINY, "--steps", "40", "--checkpoint", str(file), *option])
    assert re.search(rf"million\.pt is of another training: {sentence}\.$", capsys.readouterr().err)


@pytest.mark.parametrize("every", [2, 200])
def test_what_is_saved_is_what_was_tested_last(every, tmp_path):
    checkpoint = tmp_path / "runs" / "million.pt"
    options = ["--classes", "40", "--dim", "8", "--batch", "10", "--every", str(every)]
    accuracy = million.main([*options, "--steps", "5", "--checkpoint", str(checkpoint)])
    assert torch.load(checkpoint)["steps"] == 5
    assert million.main([*options, "--steps", "5", "--checkpoint", str(checkpoint)]) == accuracy
    with pytest.raises(SystemExit):
        million.main([*options, "--steps", "4", "--checkpoint", str(checkpoint)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        *(
            ((option, value), f"argument {option}: {value!r} is not a positive whole number.")
            for option in ("--classes", "--dim", "--batch", "--steps", "--every")
            for value in ("0", "-1")
        ),
        (("--cache-mib", "-1"), "argument --cache-mib: '-1' is not a whole number from 0 on."),
        (("--seed", str(2**64)), f"argument --seed: '{2**64}' is above 2^63 - 1."),
        (("--sample-rate", "nan"), "sample_rate must be in (0, 1], got nan."),
        (("--lr", "nan"), "lr must not be negative, got nan."),
        (("--momentum", "-1"), "momentum must not be negative, got -1.0."),
        (("--checkpoint", "."), ". is a folder, not the name of a file to write."),
        (("--checkpoint", "file/million.pt"), "file is no folder."),
        (("--checkpoint", "file"), "file is no checkpoint of million.py."),
        (("--checkpoint", "other.pt"), "other.pt is no checkpoint of million.py."),
    ],
)
def test_what_it_cannot_do_is_said_before_the_first_step(options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    torch.save({"weight": torch.ones(3, 2)}, tmp_path / "other.pt")
    monkeypatch.setattr(million.Training, "step", lambda self: pytest.fail("a step was taken"))
    with pytest.raises(SystemExit):
        million.main(["--classes", "40", "--dim", "8", *options])
    assert sentence in capsys.readouterr().err
