"""The code in README.md and docs/ runs as it is written, and their links lead somewhere."""

import ast
import re
from pathlib import Path

import pytest
from support import run_python

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What code around a diff has; one process is a process group, as torchrun starts it.
GIVEN = (
    "import os, types; os.chdir({folder!r}); "
    "cfg = types.SimpleNamespace("
    "num_classes=1000, embedding_size=128, margin_list=(1.0, 0.0, 0.4), sample_rate=1.0, "
    "interclass_filtering_threshold=0)"
)
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def code_of(page: Path) -> str:
    """The python blocks of a page and its diffs as they are afterwards, each line where it stands in the page."""
    lines, language = [], None
    for line in page.read_text().splitlines():
        fence = re.match(r"```(\w*)$", line)
        if fence:
            language = fence.group(1) or None
            lines.append("")
        elif language == "python":
            lines.append(line)
        else:
            lines.append(line[2:] if language == "diff" and line[:1] != "-" else "")
    return "\n".join(lines[1:])  # the first, a title, makes room for what is given


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page).strip()], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path):
    code = f"{GIVEN.format(folder=str(tmp_path))}\n{code_of(page)}"
    done = run_python(code, timeout=300, PYTHONPATH=str(ROOT), **ONE_PROCESS)
    assert done.returncode == 0, f"{page.name}, by its lines:\n{done.stderr}"
    if page.name == "README.md":
        assert len(page.read_text().splitlines()) <= 150
        losses = [float(loss) for loss in re.findall(r"loss +([\d.]+)", done.stdout)]
        assert len(losses) == 5
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def literal(node: ast.AST) -> str:
    """A message as docs/troubleshooting.md writes it, with … for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    return literal(node.left) + literal(node.right) if isinstance(node, ast.BinOp) else "…"


def test_the_messages_of_troubleshooting_are_those_of_the_package():
    """The code in the first column; that of "Frequent questions" and of other packages is not in a table's."""
    sources = [*(ROOT / "cosface_kernels").rglob("*.py"), ROOT / "setup.py"]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source.read_text()))]
    messages = {literal(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    written = [span for row in rows for span in re.findall("`(.+?)`", row)]
    assert len(written) > 100
    patterns = {span: ".*".join(map(re.escape, span.rstrip(".").split("…"))) for span in written}
    missing = [
        span for span, pattern in patterns.items() if not any(re.search(pattern, text) for text in messages)
    ]
    assert missing == []
