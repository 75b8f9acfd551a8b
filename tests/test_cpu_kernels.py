"""The CPU kernels of every instruction set, run without torch: here, on emulated older processors
and, compiled by a cross compiler, on emulated AArch64."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastlora.backends import native

from .building import build_lock
from .kernel_calls import Call, make_calls, read_results

ROOT = Path(__file__).resolve().parents[1]
CROSS_COMPILER = "aarch64-linux-gnu-g++"


@dataclass(frozen=True)
class Machine:
    """A processor, real or emulated, and the instruction set that is to be chosen on it."""

    isa: str
    emulator: tuple[str, ...] = ()
    asked: str = ""  # FASTLORA_CPU_ISA; empty: the best that there is
    aarch64: bool = False  # needs the cross-compiled runner
    emulated_amx: bool = False

    def __str__(self) -> str:
        emulator = ("emulated",) if self.emulated_amx else self.emulator
        return " ".join((self.isa, *emulator))


BUILT = native.build_info()
NATIVE_ISAS = BUILT["cpu_isas"].split() if BUILT else []
# Nehalem has no AVX, Haswell has AVX2; Cortex-A72 has NEON alone, and "max" has bf16 as well.
MACHINES = (
    *(Machine(isa, asked=isa) for isa in NATIVE_ISAS),
    Machine("amx", asked="avx512_bf16", emulated_amx=True),
    Machine("scalar", ("qemu-x86_64", "-cpu", "Nehalem")),
    Machine("avx2", ("qemu-x86_64", "-cpu", "Haswell")),
    Machine("scalar", ("qemu-aarch64", "-cpu", "cortex-a72"), "scalar", aarch64=True),
    Machine("neon", ("qemu-aarch64", "-cpu", "cortex-a72"), aarch64=True),
    Machine("neon_bf16", ("qemu-aarch64", "-cpu", "max"), aarch64=True),
)


def tool(name: str) -> str | None:
    return shutil.which(name, path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")


def run(command: list[str | Path], **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder: Path) -> Path:
    with build_lock():
        run([str(tool("cmake")), "--build", folder, "--target", "kernel-runner"])
    return folder / "kernel-runner"


@pytest.fixture(scope="module")
def native_runner() -> Path:
    if BUILT is None:
        pytest.skip(str(native.unavailable_reason()))
    if not (ROOT / "build" / "CMakeCache.txt").exists():
        pytest.skip("build/ holds no objects: fastlora was not compiled here by `make build`")
    return build(ROOT / "build")


@pytest.fixture(scope="module")
def aarch64_runner() -> Path:
    if tool(CROSS_COMPILER) is None:
        pytest.skip(f"no {CROSS_COMPILER} (apt: g++-aarch64-linux-gnu)")
    if tool("cmake") is None or tool("ninja") is None:
        pytest.skip("no CMake or no Ninja here")
    folder = ROOT / "build" / "aarch64"
    options = {
        "FASTLORA_EXTENSION": "OFF",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": CROSS_COMPILER,
        "CMAKE_COMPILE_WARNING_AS_ERROR": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    with build_lock():
        run([str(tool("cmake")), "-G", "Ninja", "-S", ROOT, "-B", folder, *defined])
    return build(folder)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Call]]:
    made = make_calls()
    path = tmp_path_factory.mktemp("kernels") / "calls"
    path.write_bytes(b"".join(call.record.data for call in made))
    return path, made


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_every_kernel(
    machine: Machine,
    calls: tuple[Path, list[Call]],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    if machine.emulator and tool(machine.emulator[0]) is None:
        pytest.skip(f"no {machine.emulator[0]} (apt: qemu-user)")
    if not machine.aarch64 and machine.emulator and platform.machine() != "x86_64":
        pytest.skip("emulates older processors of this kind, and this is no x86-64")
    if not machine.emulator and machine.asked not in usable_isas():
        pytest.skip(f"this CPU runs {usable_isas()[-1:]}: {machine.asked} is beyond it")
    runner = request.getfixturevalue("aarch64_runner" if machine.aarch64 else "native_runner")
    path, made = calls
    results = tmp_path / "results"
    command = [*machine.emulator, runner, path, results]
    command += ["emulated-amx"] if machine.emulated_amx else []
    assert run(command, FASTLORA_CPU_ISA=machine.asked).split() == [machine.isa]
    wrong = []
    for call, outputs in read_results(results, made):
        try:
            call.check(outputs)
        except AssertionError as error:
            wrong.append(f"{call.name}: {error}")
    assert not wrong, "\n".join(wrong)


def usable_isas() -> list[str]:
    return NATIVE_ISAS[: NATIVE_ISAS.index(BUILT["cpu_isa"]) + 1] if BUILT else []


@pytest.mark.slow
def test_bf16_is_not_run_where_it_is_not(aarch64_runner: Path) -> None:
    """What tells the levels apart is read from the kernel's HWCAP, not from the compiler."""
    if tool("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64 (apt: qemu-user)")
    done = subprocess.run(
        ["qemu-aarch64", "-cpu", "cortex-a72", aarch64_runner, os.devnull, os.devnull],
        env={**os.environ, "FASTLORA_CPU_ISA": "neon_bf16"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "no higher than this CPU's neon, got neon_bf16" in done.stderr
