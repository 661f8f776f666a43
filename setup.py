"""Builds cosface_kernels._C with CMake and Ninja. The list of sources and flags is in CMakeLists.txt."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_tools()
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # kept, so that a second build is quick
        sanitize = os.environ.get("COSFACE_SANITIZE", "")  # CMake's option, as `make asan` sets it
        usual = f"cmake-{sys.implementation.cache_tag}-torch-{torch.__version__}"
        build = ROOT / "build" / ("asan" if sanitize else usual)
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                cmake(), "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
                f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
                f"-DTORCH_CXX_FLAGS=-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                f"-DCOSFACE_SANITIZE={sanitize}",
                *cuda_options(torch.version.cuda),
            ],
            check=True,
        )  # fmt: skip
        targets = ["_C", "cosface_cuda_host"] if os.environ.get("COSFACE_TESTS") == "1" else ["_C"]
        subprocess.run([cmake(), "--build", str(build), "--target", *targets], check=True)


def cuda_options(torch_cuda: str | None) -> list[str]:
    """CMake's options for the CUDA kernels: if torch is a CUDA build and nvcc is there, unless COSFACE_CUDA=0."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if os.environ.get("COSFACE_CUDA") == "0" or torch_cuda is None or nvcc is None:
        if torch_cuda and os.environ.get("COSFACE_CUDA") != "0":
            print(f"torch is built for CUDA {torch_cuda}, but nvcc is neither on PATH nor in CUDA_HOME: CPU only.")
        return ["-DCOSFACE_CUDA=OFF"]
    return ["-DCOSFACE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures()}"]


def architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", in CMake's words: "80-real;90"."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"
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
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        sys.exit(
            f"cosface_kernels needs a C++20 compiler to build, and found none of: {', '.join(compilers)}. "
            "Install g++ 11 or clang++ 14 or newer, or name one in the environment variable CXX."
        )
    for name, path in (("cmake", cmake()), ("ninja", shutil.which("ninja"))):
        if not path:
            sys.exit(f"cosface_kernels needs {name} to build: `pip install {name}`.")


def cmake() -> str:
    """That of PyPI's package if this Python has it, for the one on PATH may be too old; empty without either."""
    try:
        from cmake import CMAKE_BIN_DIR
    except ImportError:
        return shutil.which("cmake") or ""
    return str(Path(CMAKE_BIN_DIR) / "cmake")


setup(ext_modules=[Extension("cosface_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
