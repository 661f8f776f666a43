"""`python -m bench update` at a tiny size: every dtype moves; no timings."""

import json

import pytest

from bench import update
from bench.__main__ import main


def test_command_writes_a_row_for_each_rule_and_dtype(tmp_path, capsys, restore_threads):
    out = tmp_path / "rows.json"
    sizes = ["--classes", "50", "--dim", "24", "--threads", "1", "--rounds", "1"]
    assert main(["update", *sizes, "--json", str(out)]) == 0
    copied, *rows = json.loads(out.read_text())
    assert copied["bytes"] == 2 * 50 * 24 * 4
    assert [(row["rule"], row["dtype"]) for row in rows] == [(r, d) for r in update.RULES for d in update.CASES]
    numbers = 50 * 24
    of_sgd = {row["dtype"]: row["bytes"] for row in rows if row["rule"] == "sgd"}
    assert of_sgd["float32"] == 5 * 4 * numbers
    assert of_sgd["float8"] == (4 + 4) * numbers + 4 * 50
    text = capsys.readouterr().out
    assert "of a copy" in text
    assert "float8, state in bfloat16" in text


@pytest.mark.parametrize(
    ("command", "options", "sentence"),
    [
        *(
            ("update", (f"--{name}", "0"), "'0' is not a positive")
            for name in ("classes", "dim", "rounds", "threads")
        ),
        ("update", ("--json", "absent/rows.json"), "'absent/rows.json' cannot be written"),
        *(("model", ("kernels.json", f"--{name}", "0"), "'0' is not") for name in ("batch", "dim", "classes")),
        *(("kernels", (f"--{name}", "0"), "'0' is not a positive") for name in ("dim", "jobs")),
    ],
)
def test_options_are_refused_before_anything_is_measured(command, options, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, *options])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
