"""Builds cosface_kernels._C with CMake and Ninja. The list of sources and flags is in CMakeLists.txt."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NO_CUDA = ["-DCOSFACE_CUDA=OFF"]
CACHED = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS")  # which CMake reads in its first run alone


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_tools()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitize = os.environ.get("COSFACE_SANITIZE", "")  # CMake's option, as `make asan` sets it
        cuda = cuda_options()
        usual = f"cmake-{sys.implementation.cache_tag}" + ("" if cuda == NO_CUDA else "-cuda")
        build = build_folder("asan" if sanitize else usual)
        subprocess.run(
            [
                cmake(), "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
                # Given anew, for where the last build had it, pip may have deleted it.
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DCOSFACE_SANITIZE={sanitize}",
                *cuda,
            ],
            check=True,
        )  # fmt: skip
        targets = ["_C", "cosface_cuda_host"] if os.environ.get("COSFACE_TESTS") == "1" else ["_C"]
        subprocess.run([cmake(), "--build", str(build), "--target", *targets], check=True)


def build_folder(name: str) -> Path:
    """Kept, so that a second build is quick, but emptied where CMake's cache is of another place or compiler."""
    folder = ROOT / "build" / name
    settings = "\n".join([str(ROOT), *(f"{key}={os.environ.get(key, '')}" for key in CACHED)])
    of_this_cache = folder / "settings"
    if of_this_cache.exists() and of_this_cache.read_text("utf-8") != settings:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    of_this_cache.write_text(settings, "utf-8")
    return folder


def cuda_options() -> list[str]:
    """CMake's, for CUDA kernels: where nvcc is, unless torch is there as +cpu, or as COSFACE_CUDA says."""
    wanted = os.environ.get("COSFACE_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"COSFACE_CUDA must be 0 or 1, got {wanted!r}.")
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        sys.exit("COSFACE_CUDA=1 asks for CUDA kernels, and nvcc is neither in CUDA_HOME's bin nor on PATH.")
    if nvcc is None or wanted == "0" or (not wanted and torch_version().endswith("+cpu")):
        return NO_CUDA
    return ["-DCOSFACE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures()}"]


def torch_version() -> str:
    """Of the environment of the build, which need not have one."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", in CMake's words: "80-real;90"."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or "7.5;8.0;9.0;10.0+PTX"
    names = []
    for architecture in wanted.replace(" ", ";").replace(",", ";").split(";"):
        number = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
        if number is None:
            sys.exit(
                "TORCH_CUDA_ARCH_LIST must hold compute capabilities such as 8.0, 9.0a or 10.0+PTX, "
                f"got {architecture!r} in {wanted!r}."
            )
        names.append(number[1] + number[2] + ("" if number[3] else "-real"))
    return ";".join(names)


def check_tools() -> None:
    """Says in a sentence what a build lacks, before CMake says it in fifty."""
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        sys.exit(
            f"cosface_kernels needs a C++20 compiler to build, and found none of: {', '.join(compilers)}. "
            "Install g++ 11 or clang++ 14 or newer, or name one in the environment variable CXX."
        )
    for name, found in (
        ("cmake", cmake()),
        ("ninja", shutil.which("ninja")),
        ("pybind11", importlib.util.find_spec("pybind11")),
    ):
        if not found:
            sys.exit(f"cosface_kernels needs {name} to build: `pip install {name}`.")


def cmake() -> str:
    """That of PyPI's package if this Python has it, for the one on PATH may be too old; empty without either."""
    try:
        from cmake import CMAKE_BIN_DIR
    except ImportError:
        return shutil.which("cmake") or ""
    return str(Path(CMAKE_BIN_DIR) / "cmake")


setup(ext_modules=[Extension("cosface_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
