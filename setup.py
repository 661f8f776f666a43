"""Builds cosface_kernels._C with CMake and Ninja. The list of sources and flags is in CMakeLists.txt."""

import os
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
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept, so that a second build is quick
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
                f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
                f"-DTORCH_CXX_FLAGS=-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)


def check_tools() -> None:
    """Says in a sentence what a build lacks, before CMake says it in fifty."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        sys.exit(
            f"cosface_kernels needs a C++20 compiler to build, and found none of: {', '.join(compilers)}. "
            "Install g++ 11 or clang++ 14 or newer, or name one in the environment variable CXX."
        )
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            sys.exit(f"cosface_kernels needs {tool} to build: `pip install {tool}`.")


setup(ext_modules=[Extension("cosface_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
