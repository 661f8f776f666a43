"""`python -m bench tolerance`: its states, its rows, its figure. No timings."""

import json

import pytest
import torch

from bench.__main__ import main

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
    saved = {"embeddings": torch.randn(8, 16), "weight": torch.randn(300, 16), "labels": torch.arange(8)}
    torch.save(saved, tmp_path / "trained.pt")
    states = ["random", "spread:0.3", f"trained:{tmp_path / 'trained.pt'}"]
    out, figure = tmp_path / "rows.json", tmp_path / "kept.png"
    assert (
        main(["tolerance", "--state", ",".join(states), "--json", str(out), "--figure", str(figure), *TINY]) == 0
    )
    rows = json.loads(out.read_text())
    assert [(row["state"], row["tolerance"]) for row in rows] == [(s, t) for s in states for t in (0, 1e-2, 1e-4)]
    for row in rows:
        assert row["dropped_mean"] <= row["dropped_max"] <= row["tolerance"]
        assert (row["dx_error"] == 0) == (row["exact"] == 1)
        assert row["dx_error"] < max(1e-6, 10 * row["tolerance"])
    peaked = rows[4]
    assert 0 < peaked["kept"] < 0.5
    assert figure.stat().st_size > 0
    assert "x 1.00" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["flat", "spread:", "spread:2", "trained:", "random:1"])
def test_refuses_a_state(state, capsys):
    with pytest.raises(SystemExit):
        main(["tolerance", "--state", state])
    assert "is not random, spread:S" in capsys.readouterr().err


def test_refuses_a_tolerance(capsys):
    with pytest.raises(SystemExit):
        main(["tolerance", "--tolerance", "1"])
    assert "is not a tolerance in [0, 1)" in capsys.readouterr().err
