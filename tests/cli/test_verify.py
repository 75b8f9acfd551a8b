"""`fastlora verify`: it passes here, and it sees a wrong kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fastlora import backends, reference
from fastlora.backends.contract import Backend
from fastlora.backends.native import library
from fastlora.cli import main, verify
from fastlora.cli.verify import check
from fastlora.layer import Grads


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_QUICK_SIZES", ((17, 67, 65, 16),))


@pytest.fixture
def backend_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a backend "odd": the reference with some functions replaced."""

    def make(**replaced: object) -> None:
        odd = Backend()
        for name, function in replaced.items():
            monkeypatch.setattr(odd, name, function, raising=True)
        monkeypatch.setitem(backends.BACKENDS, "odd", odd)

    return make


@pytest.mark.slow
def test_every_backend_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--quick"]) == 0, capsys.readouterr().out


@pytest.mark.usefixtures("one_size")
def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["verify", "--quick", "--backend", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "reference on cpu"
    rows = {tuple(line.split()[:2]) for line in lines}
    for base in ("dense", "nf4", "fp4"):
        op = "lora_linear_bwd" if base == "dense" else "qlora_linear_bwd"
        assert (op, base) in rows
    assert lines[-1] == "Every result is within its bound."


def wrong_gradient(index: int) -> object:
    def backward(*args: object, **kwargs: object) -> Grads:
        grads = list(reference.lora_linear_bwd(*args, **kwargs))  # type: ignore[arg-type]
        grads[index] = grads[index] * 1.02
        return Grads(*grads)

    return backward


@pytest.mark.usefixtures("one_size")
@pytest.mark.parametrize(("index", "name"), [(0, "dx"), (1, "dA"), (2, "dB"), (3, "dbias")])
def test_a_wrong_gradient_is_named(
    index: int,
    name: str,
    backend_with: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check, "BASES", check.BASES[:1])
    backend_with(lora_linear_bwd=wrong_gradient(index))
    assert main(["verify", "--quick", "--backend", "odd"]) == 1
    output = capsys.readouterr().out
    assert f"failed  lora_linear_bwd dense {name}: float32/float32, M=17" in output
    assert "lora_linear_fwd dense y" not in output


@pytest.mark.usefixtures("one_size")
def test_one_wrong_bit_fails(
    backend_with: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def quantize(*args: object) -> tuple[object, object]:
        packed, state = reference.quantize_4bit(*args)  # type: ignore[arg-type]
        packed[3] ^= 1
        return packed, state

    monkeypatch.setattr(check, "BASES", check.BASES[:2])
    backend_with(quantize_4bit=quantize)
    assert main(["verify", "--quick", "--backend", "odd"]) == 1
    output = capsys.readouterr().out
    assert "differs" in output
    assert "failed  quantize_4bit nf4: float32, N=67 K=65" in output


def test_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", "abacus"]) == 2
    assert "--backend: expected one of" in capsys.readouterr().err


def test_a_backend_asked_for_must_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_reason", "the library is away.")
    assert main(["verify", "--backend", "native"]) == 1
    assert "native on cpu: not checked. the library is away." in capsys.readouterr().out


def test_isa_needs_the_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_build", None)
    monkeypatch.setattr(library, "_reason", "the library is away.")
    assert main(["verify", "--isa", "avx2"]) == 2
    assert "--isa: the library is away." in capsys.readouterr().err


def test_isa_runs_again_with_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str], check: bool) -> SimpleNamespace:
        seen.append((env["FASTLORA_CPU_ISA"], command[-3:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv("FASTLORA_CPU_ISA", raising=False)
    build = {"cpu_isas": "scalar avx2 avx512", "cpu_isa": "avx2"}
    monkeypatch.setattr(library, "_build", build)
    monkeypatch.setattr(verify.subprocess, "run", run)
    assert main(["verify", "--isa", "all", "--quick"]) == 0
    arguments = ["--backend", "native", "--quick"]
    assert seen == [("scalar", arguments), ("avx2", arguments)]
