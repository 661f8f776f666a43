"""The build: what it says when a tool is missing, and what the installed package carries."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import cosface_kernels

ROOT = Path(__file__).parents[1]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_missing_compiler_is_named_in_a_sentence(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="no-such-compiler -O2")
    assert result.returncode != 0
    assert "needs a C++20 compiler to build, and found none of: no-such-compiler." in result.stderr


def test_missing_build_tool_is_named_in_a_sentence(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.touch(mode=0o755)
    result = build(tmp_path, CXX=str(compiler), PATH=str(tmp_path))
    assert result.returncode != 0
    assert "needs cmake to build" in result.stderr


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("cosface_kernels") == cosface_kernels.__version__


def test_package_is_typed() -> None:
    assert (Path(cosface_kernels.__file__).parent / "py.typed").exists()


def test_kernels_do_not_include_torch() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.name != "bindings.cpp"]
    assert any(path.name == "kernels.cpp" for path in sources)
    assert not [path for path in sources for word in ("<torch", "<ATen", "<c10") if word in path.read_text()]
