"""`python -m bench update` at a tiny size: every dtype moves; no timings."""

import json

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
