"""`python -m bench.tables FILE`: the figures of `bench gpu` as tables that fit on a screen or two."""

import argparse
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report as step_report
from cosface_recipes.tables import aligned

LIMIT = 9_500  # characters of a report: some consoles keep the last 12,000
FAILURES = 30  # tests that are named
NOTE = 60


def line(row: dict[str, Any]) -> str:
    """A row as it is printed when it is found."""
    return "  ".join([row["step"], *(f"{key} {cell(key, value)}" for key, value in row.items() if key != "step")])


def cell(key: str, value: Any) -> str:
    if value is None:
        return step_report.MISSING
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return "/".join(cell(key, part) for part in value)
    if isinstance(value, float):
        return f"{1e3 * value:.3f} ms" if key.endswith("_s") and key != "tb_per_s" else f"{value:.3g}"
    return str(value)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of one step's rows, in columns."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("step", "note")))
    cells = ([*(cell(key, row.get(key)) for key in keys), str(row.get("note", ""))[:NOTE]] for row in rows)
    return aligned([[*keys, ""], *cells], left=range(len(keys) + 1)).split("\n")


def report(file: Path, junit: Path | None = None, peers: Path | None = None) -> str:
    """All figures of a phase, the tests' results and the peers' rows."""
    rows, torn = _rows(file)
    lines = [f"{file} has lines that are torn and left out: {torn}."] if torn else []
    for step in dict.fromkeys(row["step"] for row in rows):
        found = [row for row in rows if row["step"] == step]
        if step == "versions":
            lines.append(line(found[0]))
            continue
        if step == "race":
            lines += ["", f"race: {sum(row.get('right', False) for row in found)} of {len(found)} tiles are right"]
            found = [row for row in found if not row.get("right")]
            if not found:
                continue
        lines += ["", f"{step}:", *table(found)]
    if peers:
        lines += ["", *_peers(peers)]
    if junit:
        lines += ["", *_tests(junit)]
    return shortened("\n".join(lines), file)


def _rows(file: Path) -> tuple[list[dict[str, Any]], int]:
    """And how many lines are of a process that ended within them."""
    rows, torn = [], 0
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            torn += 1
    return rows, torn


def shortened(text: str, file: Path) -> str:
    """The text without its middle, if it is too long."""
    if len(text) <= LIMIT:
        return text
    half = LIMIT // 2 - 100
    return f"{text[:half]}\n... {len(text) - 2 * half} characters are left out; {file} has all ...\n{text[-half:]}"


def _peers(file: Path) -> list[str]:
    if not file.exists():
        return [f"peers: there is no {file}."]
    rows = [step_report.Row(**{**row, "note": (row["note"] or "")[:NOTE]}) for row in json.loads(file.read_text())]
    problems: dict[tuple[Any, ...], list[step_report.Row]] = {}
    for row in rows:
        problems.setdefault((row.batch, row.dim, row.classes, row.dtype, row.device), []).append(row)
    lines = []
    for (batch, dim, classes, dtype, device), found in problems.items():
        lines += [f"peers, batch {batch}, dim {dim}, {classes:,} classes, {dtype}, {device}:"]
        lines += step_report.table(found).splitlines()
    return lines


def _tests(junit: Path) -> list[str]:
    if not junit.exists():
        return [f"tests: there is no {junit}."]
    try:
        found = ET.parse(junit)
    except ET.ParseError as error:
        return [f"tests: {junit} cannot be read: {error}."]
    cases = [case for case in found.iter("testcase") if case.get("name")]  # others were not finished
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    lines = [f"tests: {len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped"]
    for case in bad[:FAILURES]:
        reason = next(child for child in case if child.tag in ("failure", "error"))
        said = (reason.get("message") or "").strip().splitlines()
        lines.append(f"  {case.get('classname')}::{case.get('name')}"[:90] + f"  {said[0][:90] if said else ''}")
    if len(bad) > FAILURES:
        lines.append(f"  and {len(bad) - FAILURES} more")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The figures of `bench gpu` as tables.")
    parser.add_argument("file", type=Path, help="JSON lines")
    parser.add_argument("--junit", type=Path, help="the tests' results")
    parser.add_argument("--peers", type=Path, help="rows of `bench step`")
    arguments = parser.parse_args()
    print(report(arguments.file, arguments.junit, arguments.peers))
