"""`python -m bench train-step --state`: its states and its rows. No timings."""

import json

import pytest
import torch

import head_state
import million
from bench.__main__ import main
from cosface_recipes import synthetic

TINY = [
    "--batch",
    "8",
    "--dim",
    "16",
    "--classes",
    "3000",
    "--threads",
    "1",
    "--rounds",
    "2",
    "--tolerance",
    "1e-2,1e-4",
]


def test_every_state_gives_a_row_a_tolerance(tmp_path, capsys):
    trained = tmp_path / "trained.pt"
    tensors = {"embeddings": torch.randn(5, 24), "weight": torch.randn(300, 24), "labels": torch.arange(5)}
    torch.save({**tensors, "scale": 20.0, "margin": 0.1}, trained)
    states, out = ["random", "spread:0.3", str(trained)], tmp_path / "rows.json"
    assert main(["train-step", "--state", ",".join(states), "--json", str(out), *TINY]) == 0
    rows = json.loads(out.read_text())
    assert [(row["state"], row["tolerance"]) for row in rows] == [(s, t) for s in states for t in (0, 1e-2, 1e-4)]
    for row in rows:
        assert row["dropped_mean"] <= row["dropped_max"] <= row["tolerance"]
        assert (row["dx_error"] == 0) == (row["exact"] == 1) == (row["path"] == "exact")
        assert row["dx_error"] < max(1e-6, 10 * row["tolerance"])
        assert row["median_s"] >= row["min_s"] > 0
    peaked = rows[4]
    assert 0 < peaked["kept"] < 0.5
    assert peaked["path"] == "sparse"
    assert [rows[6][name] for name in ("batch", "classes", "dim", "scale", "margin")] == [5, 300, 24, 20.0, 0.1]
    assert "x 1.00" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", million.DTYPES)
def test_loads_what_the_recipes_write(dtype, tmp_path):
    """A checkpoint of million.py, through head_state.py."""
    checkpoint, state, out = (tmp_path / name for name in ("million.pt", "state.pt", "rows.json"))
    options = "--classes 400 --dim 32 --batch 50 --steps 20 --every 20 --sample-rate 0.5 --checkpoint"
    million.main(["--dtype", dtype, *options.split(), str(checkpoint)])
    head_state.main([str(checkpoint), str(state), "--batch", "9"])
    assert main(["train-step", "--state", str(state), "--json", str(out), *TINY]) == 0
    row = json.loads(out.read_text())[0]
    assert [row[name] for name in ("batch", "classes", "dim", "scale")] == [9, 400, 32, synthetic.SCALE]


@pytest.mark.parametrize(
    ("source", "file", "sentence"),
    [
        ("absent.pt", "state.pt", "No such file or directory: 'absent.pt'"),
        ("text", "state.pt", "text is no checkpoint of million.py."),
        ("other.pt", "state.pt", "other.pt is no checkpoint of million.py."),
        ("empty", "state.pt", "No such file or directory: 'empty/settings"),
        ("other.pt", "empty", "empty is a folder, not the name of a file to write."),
    ],
)
def test_of_what_is_no_checkpoint_no_state_is_written(source, file, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").mkdir()
    torch.save({"weight": torch.ones(3, 2)}, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=sentence):
        head_state.main([source, file])
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("state", ["flat", "spread:", "spread:2", "missing.pt", "random:1"])
def test_refuses_a_state(state, capsys):
    with pytest.raises(SystemExit):
        main(["train-step", "--state", state])
    assert "is not random, spread:S" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"text", b"", [1], {"weight": torch.ones(3, 2)}], ids=["text", "empty", "list", "weight"]
)
def test_refuses_a_file_of_something_else(content, tmp_path, capsys):
    file = tmp_path / "state.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(SystemExit):
        main(["train-step", "--state", f"random,{file}"])
    assert f"{file} is no file of examples/studies/head_state.py." in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--device", "cuda"), ("--dtype", "fp32,fp8"), ("--dtype", "fp16")])
def test_refuses_what_it_does_not_measure(options, capsys):
    assert main(["train-step", "--state", "random", *TINY, *options]) == 2
    assert "--state measures on the CPU, a weight in float32, float64, bfloat16; got" in capsys.readouterr().err


def test_refuses_a_cache_of_less_than_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["train-step", "--state", "random", "--cache-mib", "-1"])
    assert "'-1' is not a whole number from 0 on." in capsys.readouterr().err


def test_refuses_a_tolerance(capsys):
    with pytest.raises(SystemExit):
        main(["train-step", "--tolerance", "1"])
    assert "is not a tolerance in [0, 1)" in capsys.readouterr().err
