"""The build: what it says when a tool is missing, and what the installed package carries."""

import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution, Extension

import cosface_kernels

ROOT = Path(__file__).parents[2]


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
    assert "needs ninja to build: `pip install ninja`." in result.stderr


def test_cmake_of_this_python_precedes_the_one_on_path(setup_script, monkeypatch, tmp_path) -> None:
    on_path = tmp_path / "cmake"
    on_path.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "cmake", SimpleNamespace(CMAKE_BIN_DIR="/of/this/python"))
    assert setup_script["cmake"]() == "/of/this/python/cmake"
    monkeypatch.setitem(sys.modules, "cmake", None)
    assert setup_script["cmake"]() == str(on_path)
    on_path.unlink()
    assert not setup_script["cmake"]()


def test_version_is_the_installed_one() -> None:
    try:
        installed = importlib.metadata.version("cosface_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is built in place, not installed")
    assert installed == cosface_kernels.__version__


def test_package_is_typed() -> None:
    assert (Path(cosface_kernels.__file__).parent / "py.typed").exists()


def test_no_source_includes_torch() -> None:
    """So that one module serves every torch, and none is needed to build it."""
    sources = list((ROOT / "csrc").rglob("*.*"))
    assert {"bindings.cpp", "kernels.cpp", "forward.cu"} <= {path.name for path in sources}
    assert not [path for path in sources for word in ("<torch", "<ATen", "<c10") if word in path.read_text()]


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The names that setup.py defines."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_each_build_says_where_its_ninja_is(setup_script, monkeypatch, tmp_path) -> None:
    """pip deletes the environment of an isolated build, and CMake remembers the ninja that it had there."""
    ninja = tmp_path / "ninja"
    ninja.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setitem(setup_script["build_folder"].__globals__, "ROOT", tmp_path)
    extension = Extension("cosface_kernels._C", sources=[])
    build_ext = setup_script["CMakeBuild"](Distribution({"ext_modules": [extension]}))
    build_ext.ensure_finalized()
    build_ext.build_extension(extension)
    assert f"-DCMAKE_MAKE_PROGRAM={ninja}" in commands[0]


@pytest.mark.parametrize(
    ("wanted", "architectures"),
    [
        (None, "75-real;80-real;90-real;100"),
        ("8.6", "86-real"),
        ("9.0a 12.0+PTX", "90a-real;120"),
        ("8.0,8.9", "80-real;89-real"),
    ],
)
def test_cuda_architectures(setup_script, monkeypatch, wanted, architectures) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted or "")
    assert setup_script["architectures"]() == architectures


def test_unknown_cuda_architecture_is_refused(setup_script, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match=r"got 'Hopper' in '8\.0;Hopper'"):
        setup_script["architectures"]()


@pytest.mark.parametrize("torch", ["2.14.1", "2.11.0+cu130", "", "2.13.0+cpu"])
def test_cuda_is_built_if_nvcc_is_there_and_torch_may_have_it(setup_script, monkeypatch, tmp_path, torch) -> None:
    options, off = setup_script["cuda_options"], ["-DCOSFACE_CUDA=OFF"]
    monkeypatch.setitem(options.__globals__, "torch_version", lambda: torch)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("COSFACE_CUDA", raising=False)
    assert (options() == off) == (torch == "2.13.0+cpu")
    monkeypatch.setenv("COSFACE_CUDA", "1")
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in options()
    monkeypatch.setenv("COSFACE_CUDA", "0")
    assert options() == off
    monkeypatch.delenv("COSFACE_CUDA")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert (options() == off) == (torch == "2.13.0+cpu")
    nvcc.unlink()
    assert options() == off


@pytest.mark.parametrize(
    ("wanted", "message"), [("1", "nvcc is neither in CUDA_HOME's bin nor on PATH"), ("off", "0 or 1, got 'off'")]
)
def test_cuda_that_cannot_be_had_is_refused(setup_script, monkeypatch, tmp_path, wanted, message) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COSFACE_CUDA", wanted)
    with pytest.raises(SystemExit, match=message):
        setup_script["cuda_options"]()


def test_a_build_folder_is_of_one_compiler_and_place(setup_script, monkeypatch, tmp_path) -> None:
    """What CMake has found in its first run it keeps, whatever the environment says later."""
    folder = setup_script["build_folder"]
    monkeypatch.setitem(folder.__globals__, "ROOT", tmp_path)
    for name in setup_script["CACHED"]:
        monkeypatch.delenv(name, raising=False)
    object_file = folder("cmake") / "kernels.o"
    object_file.touch()
    assert folder("cmake") == object_file.parent
    assert object_file.exists()
    monkeypatch.setenv("CXX", "clang++")
    assert not list(folder("cmake").glob("*.o"))
    object_file.touch()
    shutil.copytree(tmp_path / "build", tmp_path / "moved" / "build")
    monkeypatch.setitem(folder.__globals__, "ROOT", tmp_path / "moved")
    assert not list(folder("cmake").glob("*.o"))


@pytest.mark.parametrize("compiler", ["  ", "c++ -m64", "'/a folder/c++' -m64"])
def test_a_compiler_is_named_as_a_shell_would(setup_script, monkeypatch, compiler) -> None:
    check, found = setup_script["check_tools"], []
    monkeypatch.setattr("shutil.which", lambda name: found.append(name) or name)
    monkeypatch.setenv("CXX", compiler)
    check()
    assert found[0] in ("c++", "/a folder/c++")
