"""Where things are: every package is installed, no command imports another."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted((ROOT / "examples").glob("*/*.py"))
SHARED = {"trials"}  # of the studies alone, and no command


def imported(path: Path) -> set[str]:
    """The first part of each module's name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_command_imports_no_other(path):
    assert not imported(path) & {command.stem for command in COMMANDS} - SHARED


def test_the_package_knows_no_command_and_no_benchmark():
    names = {command.stem for command in COMMANDS} | {"bench", "tests"}
    assert not [path for path in (ROOT / "cosface_recipes").rglob("*.py") if imported(path) & names]


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = ast.literal_eval(text.split("\n[tool.setuptools]\npackages = ")[1].split("\n[")[0])
    found = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in ("cosface_kernels", "cosface_recipes")
        for path in (ROOT / name).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)


def test_no_name_is_that_of_the_standard_library():
    assert not {path.stem for path in COMMANDS} & set(sys.stdlib_module_names)


def test_no_name_is_that_of_an_installed_package():
    assert not {path.stem for path in COMMANDS} & set(packages_distributions())
