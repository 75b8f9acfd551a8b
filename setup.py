"""Builds fastlora: the Python files as they are, the library fastlora._C by CMake.

Sources and flags stand in CMakeLists.txt. Reads from the environment FASTLORA_NATIVE (auto, 0, 1),
CMAKE_ARGS (more arguments for CMake) and MAX_JOBS (how many compilers may run at once).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str | None:
    """Path of a program, or None. Looks beside Python first: `.venv/bin/pip` has no PATH to it."""
    return shutil.which(
        name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    )


def missing_for_native() -> list[str]:
    """What a native build needs and this environment lacks."""
    compilers = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    lacking = [] if any(shutil.which(name) for name in compilers) else ["a C++ compiler"]
    lacking += [tool for tool in ("cmake", "ninja") if find_tool(tool) is None]
    return lacking + [
        name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None
    ]


def wants_native() -> bool:
    """FASTLORA_NATIVE: 1 = must build, 0 = pure Python, auto = build where that is possible."""
    mode = os.environ.get("FASTLORA_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FASTLORA_NATIVE must be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return False
    lacking = missing_for_native()
    if lacking and mode == "1":
        sys.exit(f"FASTLORA_NATIVE=1 can't build for lack of {', '.join(lacking)}")
    if lacking:
        print(f"fastlora: no native kernels are built, for lack of {', '.join(lacking)}")
    return not lacking


class CMakeBuild(build_ext):
    """Runs CMake once; it knows the sources, and writes the library to the folder it is given."""

    def run(self) -> None:
        # An editable install shares build/ with `cmake -B build`: later edits need only
        # `cmake --build build`.
        tree = ROOT / "build" if self.inplace else Path(self.build_temp).resolve()
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fastlora"
        cmake, ninja = str(find_tool("cmake")), str(find_tool("ninja"))
        # --fresh: an isolated build leaves the paths of a deleted environment in the cache.
        configure = [cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(tree)]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [
            f"-DFASTLORA_OUTPUT_DIR={package}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(tree), *jobs], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"fastlora: {error}. FASTLORA_NATIVE=0 installs the package without native kernels."
            )


setup(
    ext_modules=[Extension("fastlora._C", sources=[])] if wants_native() else [],
    cmdclass={"build_ext": CMakeBuild},
)
