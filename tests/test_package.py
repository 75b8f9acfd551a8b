"""The build, the wheel, and the choice of an instruction set, on this and on older processors."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fastlora.backends import native

from .building import build_lock
from .csrc.isa_check import escapes

ROOT = Path(__file__).resolve().parents[1]
EVERY_OP = ROOT / "tests" / "every_op.py"
BUILD = native.build_info()
ISAS = BUILD["cpu_isas"].split() if BUILD else []

needs_native = pytest.mark.skipif(
    native.build_info() is None, reason=native.unavailable_reason() or ""
)


def run(
    command: list[str | Path], cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command; the caller looks at its exit status."""
    # One thread: for such small sizes, threads that wait for each other on a busy machine are all
    # the time that there is.
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def output(done: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a command that must have succeeded."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- instruction sets ------------------------------------------------------------------------


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_op_on_a_lower_isa(isa: str) -> None:
    build = native.build_info()
    assert build is not None
    compiled = build["cpu_isas"].split()
    if isa not in compiled[: compiled.index(build["cpu_isa"]) + 1]:
        pytest.skip(f"this library chose {build['cpu_isa']}: {isa} is beyond this CPU")
    assert output(run([sys.executable, EVERY_OP], FASTLORA_CPU_ISA=isa)).split() == [isa]


@needs_native
def test_unknown_isa_is_named() -> None:
    done = run([sys.executable, "-c", "import fastlora.backends"], FASTLORA_CPU_ISA="avx3")
    assert done.returncode != 0
    assert re.search("FASTLORA_CPU_ISA must be one of scalar.*got avx3", done.stderr)


@needs_native
def test_isa_beyond_this_cpu_is_refused() -> None:
    build = native.build_info()
    assert build is not None
    beyond = build["cpu_isas"].split()[-1]
    if build["cpu_isa"] == beyond:
        pytest.skip(f"this CPU runs {beyond}, and there is none beyond it")
    done = run([sys.executable, "-c", "import fastlora.backends"], FASTLORA_CPU_ISA=beyond)
    assert done.returncode != 0
    assert f"no higher than this CPU's {build['cpu_isa']}, got {beyond}" in done.stderr


# SandyBridge is of 2011 and has no AVX2 (on an emulated one before it, NumPy 2.4 doesn't import);
# Haswell, of 2013, brought AVX2. The emulator raises SIGILL for what the real processor lacks, and
# it knows no AVX-512 at all.
@needs_native
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates older x86-64 processors")
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no qemu-x86_64 (apt: qemu-user)")
@pytest.mark.parametrize(("cpu", "isa"), [("SandyBridge", "scalar"), ("Haswell", "avx2")])
def test_every_op_on_an_older_processor(cpu: str, isa: str) -> None:
    done = run(["qemu-x86_64", "-cpu", cpu, sys.executable, EVERY_OP], FASTLORA_CPU_ISA="")
    assert output(done).split() == [isa]


def test_isa_check_sees_what_escapes() -> None:
    symbols = """
0000000000000000 T fastlora::avx2::lora_linear_fwd(fastlora::LoraLinearFwd const&)
0000000000000000 W float fastlora::avx2::sum<8>(float const*)
0000000000000000 W std::vector<fastlora::avx2::Row>::push_back(fastlora::avx2::Row&&)
0000000000000000 V DW.ref.__gxx_personality_v0
0000000000000000 t fastlora::(anonymous namespace)::local()
0000000000000000 W float std::max<float>(float, float)
0000000000000000 u fastlora::round_up(long)::memo
0000000000000000 W fastlora::avx512::load(float const*)
0000000000000000 t _GLOBAL__sub_I_table.cpp
"""
    assert escapes(symbols, "avx2") == [
        "float std::max<float>(float, float)",
        "fastlora::round_up(long)::memo",
        "fastlora::avx512::load(float const*)",
        "_GLOBAL__sub_I_table.cpp",
    ]


@needs_native
@pytest.mark.slow
def test_no_isa_escapes_from_its_objects() -> None:
    if not (ROOT / "build" / "CMakeCache.txt").exists():
        pytest.skip("build/ holds no objects: fastlora was not compiled here by `make build`")
    cmake = shutil.which("cmake", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert cmake is not None
    with build_lock():
        done = run([cmake, "--build", "build", "-t", "isa-check"])
    assert "0 symbols that escape" in output(done)


# ---- the library as a file -------------------------------------------------------------------


def library() -> Path:
    from fastlora import _C

    assert _C.__file__ is not None
    return Path(_C.__file__)


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
def test_library_asks_torch_for_the_stable_abi_alone() -> None:
    """Otherwise it would be bound to the torch that it was compiled with."""
    listed = output(run(["nm", "-D", "--undefined-only", library()])).split("\n")
    names = {line.split()[-1] for line in listed if line.strip()}
    assert {name for name in names if name.startswith("torch_")}
    # C++ names of torch hold its namespaces: 2at, 3c10, 5torch.
    unstable = [name for name in names if re.match(r"_Z.*\d(at|c10|torch|aten)", name)]
    assert not unstable


@needs_native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf (binutils)")
def test_library_holds_no_path_of_its_builder() -> None:
    header = output(run(["readelf", "-d", library()]))
    assert "NEEDED" in header
    assert not re.search("RPATH|RUNPATH", header)
    content = library().read_bytes()
    assert b"csrc/bindings/" in content  # torch's check macros name the file, from here on down
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        assert f"{folder}/".encode() not in content


# ---- setup.py --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what setup.py needs, with neither build/ nor a compiled library."""
    copy = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("_C.*.so", "__pycache__")
    for name in ("fastlora", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    return copy


def build_wheel(project: Path, **environment: str) -> zipfile.ZipFile:
    folder = project / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w"]
    output(run([*pip, folder, "."], project, **environment))
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
def test_pure_wheel(project: Path, tmp_path: Path) -> None:
    """FASTLORA_NATIVE=0: no compiled file, one wheel for all machines, and it works."""
    wheel = build_wheel(project, FASTLORA_NATIVE="0")
    assert Path(str(wheel.filename)).name.endswith("-py3-none-any.whl")
    names = wheel.namelist()
    packed = {name for name in names if name.startswith("fastlora/")}
    mine = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fastlora").rglob("*")
        if path.suffix in (".py", ".pyi", ".typed", ".json", ".txt")
    }
    assert packed == mine
    assert all(re.match(r"fastlora(-[\d.]+\.dist-info)?/", name) for name in names)
    assert any(name.endswith("/LICENSE") for name in names)

    wheel.extractall(tmp_path)
    # -S: an editable install's finder, which would serve this checkout's library, is not loaded.
    python: list[str | Path] = [sys.executable, "-S"]
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    done = run([*python, EVERY_OP, "reference"], tmp_path, PYTHONPATH=path)
    assert output(done) == "no native library\n"
    code = "import fastlora; from fastlora.backends import native as n; print(fastlora.__file__)"
    code += "; print(n.unavailable_reason())"
    file, reason = output(run([*python, "-c", code], tmp_path, PYTHONPATH=path)).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert "FASTLORA_NATIVE=1 pip install" in reason


STUB = """
cmake_minimum_required(VERSION 3.24)
project(stub LANGUAGES NONE)
add_custom_target(
  library ALL
  COMMAND ${CMAKE_COMMAND} -E make_directory ${FASTLORA_OUTPUT_DIR}
  COMMAND ${CMAKE_COMMAND} -E echo ${SAID} > ${FASTLORA_OUTPUT_DIR}/_C.${SAID}.so)
"""


@pytest.mark.slow
@pytest.mark.skipif(native.build_info() is None, reason="no compiler or no CMake here")
def test_native_wheel_holds_what_cmake_builds(project: Path) -> None:
    """Real CMake, but a stub in place of the kernels: `make test` has compiled those already."""
    cmakelists = project / "CMakeLists.txt"
    real = cmakelists.read_text()
    cmakelists.write_text(STUB)
    try:
        wheel = build_wheel(project, FASTLORA_NATIVE="1", CMAKE_ARGS="-DSAID=hello", MAX_JOBS="1")
    finally:
        cmakelists.write_text(real)
    tag = sysconfig.get_platform().replace("-", "_")
    assert Path(str(wheel.filename)).name.endswith(f"{tag}.whl")
    assert wheel.read("fastlora/_C.hello.so") == b"hello\n"


@pytest.mark.slow
def test_source_distribution_can_be_built_from(project: Path) -> None:
    output(run([sys.executable, "setup.py", "-q", "sdist"], project, FASTLORA_NATIVE="0"))
    (archive,) = (project / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, project / "unpacked")
    (unpacked,) = (project / "unpacked").iterdir()
    for path in [*(ROOT / "csrc").rglob("*.*"), ROOT / "CMakeLists.txt", ROOT / "setup.py"]:
        assert (unpacked / path.relative_to(ROOT)).exists()


def test_native_mode_is_checked(project: Path) -> None:
    setup: list[str | Path] = [sys.executable, "setup.py", "--version"]
    wrong = run(setup, project, FASTLORA_NATIVE="yes")
    assert wrong.returncode != 0
    assert "FASTLORA_NATIVE must be auto, 0 or 1, got 'yes'" in wrong.stderr

    nowhere = {"CXX": "no-such-compiler"}
    must = run(setup, project, FASTLORA_NATIVE="1", **nowhere)
    assert must.returncode != 0
    assert "for lack of a C++ compiler" in must.stderr

    auto = output(run(setup, project, FASTLORA_NATIVE="auto", **nowhere)).splitlines()
    assert "no native kernels are built, for lack of a C++ compiler" in auto[0]
    assert re.fullmatch(r"\d+\.\d+\.\d+", auto[-1])
