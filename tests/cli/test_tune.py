"""`fastlora tune` in Triton's interpreter: what it keeps is used, and what loses is not kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlora import backends, tuning
from fastlora.backends import native, triton
from fastlora.backends.contract import Request
from fastlora.backends.machine import tuned
from fastlora.layer import Layer
from fastlora.quant import QuantState
from tests import emulated

OutOfResources = pytest.importorskip(
    "triton.runtime.errors", reason="Triton is what is tuned"
).OutOfResources
DEQUANTIZE = Request("dequantize_4bit", "cpu")

pytestmark = pytest.mark.skipif(
    triton.unsupported(Request("lora_linear_fwd", "cpu")) is not None,
    reason=str(triton.unsupported(Request("lora_linear_fwd", "cpu"))),
)

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))


def problem(op: str):  # type: ignore[no-untyped-def]
    from fastlora.backends.triton.tuner import Problem

    return Problem(op, (20, 48, 64, 4))


@pytest.mark.parametrize("slow", ["addmm", "ours"])
@pytest.mark.parametrize("op", ["lora_linear_fwd", "qlora_linear_bwd"])
def test_the_fastest_is_kept_and_no_loser(
    op: str, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are given, so that the choice is what is tested."""
    from fastlora.backends.triton.launch import Launcher, launcher, tile_of
    from fastlora.backends.triton.tiles import candidates
    from fastlora.cli.bench import measure
    from fastlora.cli.tune import gpu as tune

    def given(timed, budget, **how):  # type: ignore[no-untyped-def]
        for calls in timed.values():
            calls[0]()
        times = {name: 2.0 + index for index, name in enumerate(timed)}
        times[list(timed)[-2]] = 1.0  # the last tile
        times["addmm"] = 9.0 if slow == "addmm" else 0.5
        return {name: measure.Timing([value], 1) for name, value in times.items()}

    monkeypatch.setattr(measure, "interleave", given)
    # Two tiles are enough to have a choice.
    some = candidates("base_product", "interpreter", torch.bfloat16, 20, 4)[:2]
    monkeypatch.setattr("fastlora.backends.triton.tuner.candidates", lambda *args: some)
    outcome = tune.tune(problem(op), "cpu", 1, 0.0)
    gpu = launcher(torch.empty(1))
    choice = gpu.choice(op, torch.bfloat16, (20, 48, 64, 4))
    assert not outcome.wrong and not outcome.left_out
    assert ("native backend" in outcome.seconds) == (
        op.startswith("q") and native.unavailable_reason() is None
    )
    assert len(outcome.cells()) == 6
    if slow == "ours":
        assert outcome.kept is None and choice is None
        return
    assert choice is not None and tile_of(choice) == some[1]
    # The same class of tokens and of ranks finds it, and the op then runs with it.
    assert gpu.choice(op, torch.bfloat16, (30, 48, 64, 3)) == choice
    assert gpu.choice(op, torch.bfloat16, (33, 48, 64, 3)) is None
    sizes = (20, 48, 64, 4)
    assert kept_backend(op) == ("triton" if op.startswith("q") else None)
    taken = gpu.dense_tile if op.startswith("lora") else Launcher.four_bit_tiles.__get__(gpu)
    found = taken(op, torch.bfloat16, sizes)
    assert some[1] in (found if isinstance(found, tuple) else (found,))


def kept_backend(op: str) -> str | None:
    """The backend that the dispatcher prefers."""
    found = kept(op)
    return None if found is None else found.backend


def kept(op: str) -> tuned.Kept | None:
    """What the dispatcher asks on a GPU, in the words of the interpreter's cache.

    Args:
        op: as the cache names it.
    """
    linear_op = op.removeprefix("q")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "device_key", lambda index: launcher_on_cpu().key)
        with FakeTensorMode():
            x = torch.empty(30, 64, dtype=torch.bfloat16, device="cuda")
            A, B = torch.empty(3, 64, device="cuda"), torch.empty(48, 3, device="cuda")
            weight, state = torch.empty(48, 64, dtype=torch.bfloat16, device="cuda"), None
            if op != linear_op:
                shape, dtype = weight.shape, weight.dtype
                absmax, code = torch.empty(48, device="cuda"), torch.empty(16, device="cuda")
                weight = torch.empty(48 * 32, dtype=torch.uint8, device="cuda")
                state = QuantState(absmax, shape, code, dtype, 64, "nf4")
            layer = Layer(weight, A, B, 1.0, quant_state=state)
            eager = tuned.kept(linear_op, x, layer)
            # The product's dtype counts, not x's.
            wide = layer._replace(compute_dtype=torch.bfloat16)
            assert tuned.kept(linear_op, x.float(), layer) is None
            assert tuned.kept(linear_op, x.float(), wide) == eager
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert tuned.kept(linear_op, x, layer) == eager
            other = torch.empty(33, 64, dtype=torch.bfloat16, device="cuda")
            assert tuned.kept(linear_op, other, layer) is None
    return eager


def launcher_on_cpu():  # type: ignore[no-untyped-def]
    from fastlora.backends.triton.launch import launcher

    return launcher(torch.empty(1))


@needs_native
def test_the_native_backend_competes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it wins it is preferred, and the best tile is there for who asks for Triton."""
    from fastlora.backends.triton import tuner
    from fastlora.backends.triton.launch import tile_of
    from fastlora.backends.triton.tiles import candidates
    from fastlora.cli.bench import measure
    from fastlora.cli.tune import gpu as tune

    given = {"native backend": 1.0, "addmm": 3.0}

    def interleave(timed, budget, **how):  # type: ignore[no-untyped-def]
        return {
            name: measure.Timing([given.get(name, 2.0 + index / 10)], 1)
            for index, name in enumerate(timed)
        }

    monkeypatch.setattr(measure, "interleave", interleave)
    some = candidates("base_product_4bit", "interpreter", torch.bfloat16, 20, 4)[:1]
    monkeypatch.setattr(tuner, "candidates", lambda *args: some)
    op = "qlora_linear_fwd"
    assert tune.tune(problem(op), "cpu", 1, 0.0).kept == "native backend"
    assert kept_backend(op) == "native"
    choice = launcher_on_cpu().choice(op, torch.bfloat16, (20, 48, 64, 4))
    assert tile_of(choice) is None  # the vendor's product is timed first, so it is the faster one
    given["native backend"] = 2.5
    assert tune.tune(problem(op), "cpu", 1, 0.0).kept == "vendor's product"
    assert kept_backend(op) == "triton"
    # What has won before is forgotten once it loses.
    given["addmm"] = 0.5
    assert tune.tune(problem(op), "cpu", 1, 0.0).kept is None
    assert kept_backend(op) is None
    assert launcher_on_cpu().choice(op, torch.bfloat16, (20, 48, 64, 4)) is None


@pytest.mark.parametrize("fastest", ["decode", "gemm", "vendor"])
def test_kernels_of_the_native_backend_compete(
    fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is called by its name, the kernels emulated; the faster of them is kept."""
    from fastlora.backends.triton import tuner
    from fastlora.cli.bench import measure
    from fastlora.cli.tune import gpu as tune

    named = {kernel: f"native backend, {kernel}" for kernel in ("decode", "gemm")}
    given = {"addmm": 3.0, named["decode"]: 2.0, named["gemm"]: 2.5, "vendor's product": 2.7}
    given[named.get(fastest, "vendor's product")] = 1.0

    def interleave(timed, budget, **how):  # type: ignore[no-untyped-def]
        for calls in timed.values():
            calls[0]()
        return {name: measure.Timing([given[name]], 1) for name in timed}

    monkeypatch.setattr(measure, "interleave", interleave)
    monkeypatch.setattr(tuner, "candidates", lambda *args: [])
    sizes = (20, 64, 64, torch.bfloat16)
    kernels = native.cuda.kernels("lora_linear_fwd", *sizes)
    choices = [{**tuner.NATIVE, "kernel": kernel} for kernel in kernels]
    monkeypatch.setattr(tuner.Trial, "_native_choices", lambda trial: choices)
    emulated.load()
    op = "qlora_linear_fwd"
    with emulated.as_backend():
        emulated.called.clear()
        outcome = tune.tune(problem(op), "cpu", 1, 0.0)
        # Each is checked, then timed.
        assert emulated.called == ["qlora_decode", "qlora_gemm_fwd"] * 2
    assert outcome.kept == named.get(fastest, "vendor's product") and not outcome.wrong
    assert kept_backend(op) == ("triton" if fastest == "vendor" else "native")
    found = kept(op)
    assert found is not None
    assert found.kernel == ("gemm" if fastest == "gemm" else "decode")


def test_a_preferred_backend_is_asked_first() -> None:
    assert backends.choose(DEQUANTIZE, prefer="reference").name == "reference"
    # Triton is not in the CPU's order, and who names a backend gets that one.
    assert backends.choose(DEQUANTIZE, prefer="triton").name != "triton"
    assert backends.choose(DEQUANTIZE, "triton", prefer="reference").name == "triton"


def test_a_wrong_candidate_is_neither_timed_nor_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.backends.triton import tuner
    from fastlora.cli.tune import gpu as tune

    trial = tuner.Trial(problem("lora_linear_fwd"), torch.device("cpu"))
    choices = {tune._name(choice): choice for choice in trial.choices()[:3]}
    ready, left_out, wrong = tune._checked(trial, choices)
    assert ready == list(choices) and not left_out and not wrong
    run = tuner.Trial.call
    spoilt = list(choices.values())[1]

    def call(self, choice):  # type: ignore[no-untyped-def]
        if choice == spoilt:
            return lambda: (run(self, choice)()[0] * 1.05,)
        if choice["way"] == "vendor":
            raise OutOfResources(300_000, 232_448, "shared memory")
        return run(self, choice)

    monkeypatch.setattr(tuner.Trial, "call", call)
    ready, left_out, wrong = tune._checked(trial, choices)
    assert ready == list(choices)[2:]
    assert "shared memory" in left_out[0] and "y is wrong" in wrong[0]


@pytest.mark.parametrize(
    ("error", "left_out"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), True),
        (RuntimeError("PassManager::run failed"), True),
        (RuntimeError("expected scalar type Half"), False),
        (TypeError("call() takes 1 positional argument"), False),
    ],
)
def test_only_what_is_too_large_is_left_out(
    error: Exception,
    left_out: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error of our own code ends the command, and so does a problem that no candidate runs."""
    from fastlora.backends.triton import tuner
    from fastlora.cli import main

    def call(self, choice):  # type: ignore[no-untyped-def]
        raise error

    monkeypatch.setattr(tuner.Trial, "call", call)
    sizes = ["--shape", "48,64", "--tokens", "5", "--rank", "2", "--quant", "none"]
    assert main(["tune", *sizes, "--rounds", "1", "--sample-ms", "0.1"]) == 1
    captured = capsys.readouterr()
    assert ("no candidate runs here" in captured.out) == left_out
    assert (str(error).splitlines()[0] in captured.err) != left_out


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from fastlora.cli import main

    sizes = ["--shape", "48,64", "--tokens", "5", "--rank", "2", "--quant", "none"]
    assert main(["tune", *sizes, "--rounds", "1", "--sample-ms", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "addmm" in out and "M=5" in out


def test_layers_of_a_model(tmp_path: Path) -> None:
    from fastlora.cli.errors import CliError
    from fastlora.cli.tune.gpu import _shapes_of

    folder = Path(__file__).parents[2] / "benchmarks" / "models" / "llama-1b"
    assert set(_shapes_of(str(folder))) == {(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)}
    with pytest.raises(CliError, match=r"config\.json"):
        _shapes_of(str(tmp_path))


def test_nothing_is_tuned_without_the_command() -> None:
    """Running an op neither measures nor stores."""
    from fastlora import ops

    x, A, B = torch.randn(20, 64), torch.randn(4, 64), torch.randn(48, 4)
    ops.lora_linear_fwd(x, Layer(torch.randn(48, 64), A, B, 1.0), backend="triton")
    assert not list(tuning.cache_file("any").parent.iterdir())
