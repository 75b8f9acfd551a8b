"""`fastlora tune` on a CPU: what is faster is kept and used, and what is not leaves no trace."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastlora import tuning
from fastlora.backends import native
from fastlora.backends.machine import cpu

if native.build_info() is None:
    pytest.skip(str(native.unavailable_reason()), allow_module_level=True)

from fastlora import _C
from fastlora.cli import main
from fastlora.cli.bench.case import Case, Layer
from fastlora.cli.tune import cpu as tune_cpu
from fastlora.cli.tune import gpu as tune

CASE = Case(Layer(48, 64, 4, "bf16", "nf4", True, 0.05, "fp32"), 5, "step")
OTHER = replace(CASE, M=6)
ISA = _C.build_info()["cpu_isa"]
ARGUMENTS = ["tune", "--device", "cpu", "--shape", "48,64", "--tokens", "5", "--rank", "4"]
ARGUMENTS += ["--quant", "nf4", "--rounds", "1", "--sample-ms", "0.1"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    # Triton's interpreter, which the tests switch on, would be tuned instead.
    monkeypatch.setattr(tune, "_device", lambda wanted: "native")
    return tmp_path


def comparing(best: dict[str, int], gain: float = 1.1, worst: float = 1.0):  # type: ignore[no-untyped-def]
    """Measures by a rule: sizes are faster the nearer they are to `best`."""

    def distance(sizes: tune_cpu.Sizes) -> int:
        return sum(abs(sizes[name].bit_length() - best[name].bit_length()) for name in best)

    def compare(timer, sizes, candidates):  # type: ignore[no-untyped-def]
        return {
            name: tune_cpu.Comparison(
                {CASE: gain ** (distance(sizes) - distance(tried)), OTHER: worst}
            )
            for name, tried in candidates.items()
        }

    return compare


@pytest.mark.parametrize(("best", "found"), [(8, 8), (512, 512), (32, 32)])
def test_a_size_is_halved_or_doubled_as_long_as_that_is_faster(best: int, found: int) -> None:
    compare = comparing({"rows": best})
    sizes = {"rows": 32, "other": 3}
    climbed = tune_cpu.climb("rows", sizes, lambda *a: compare(None, *a), lambda sizes: True)
    assert climbed == {"rows": found, "other": 3}
    assert sizes == {"rows": 32, "other": 3}


def test_sizes_that_the_kernels_refuse_are_not_tried() -> None:
    compare = comparing({"rows": 1024})
    climbed = tune_cpu.climb(
        "rows", {"rows": 32}, lambda *a: compare(None, *a), lambda sizes: sizes["rows"] <= 128
    )
    assert climbed == {"rows": 128}


def test_zero_is_not_measured_against_itself() -> None:
    def compare(sizes, candidates):  # type: ignore[no-untyped-def]
        raise AssertionError(candidates)

    assert tune_cpu.climb("rows", {"rows": 0}, compare, lambda _: True) == {"rows": 0}


def test_what_loses_on_one_case_is_not_taken() -> None:
    compare = comparing({"rows": 64}, gain=2.0, worst=0.9)
    climbed = tune_cpu.climb("rows", {"rows": 32}, lambda *a: compare(None, *a), lambda _: True)
    assert climbed == {"rows": 32}


def test_the_fastest_is_kept_and_used_by_the_next_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _C.tile_sizes()
    monkeypatch.setattr(tune_cpu._Timer, "compare", comparing({"decode_rows": 64}))
    assert main(ARGUMENTS) == 0
    assert "decode_rows: 32 -> 64" in capsys.readouterr().out
    assert _C.tile_sizes() == before
    assert tuning.lookup(cpu.device(ISA), "tile_sizes", "all") == {**before, "decode_rows": 64}
    code = "from fastlora.backends import native; from fastlora import _C; print(_C.tile_sizes())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'decode_rows': 64" in out.stdout


def test_nothing_is_stored_when_nothing_is_faster(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_cpu._Timer, "compare", comparing({}, worst=0.95))
    assert main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert "nothing was stored" in out
    # What was measured is shown all the same.
    assert re.search(r"decode_rows +32 +64 +0\.975 +0\.95", out)
    assert not list(cache.iterdir())


def test_what_was_found_before_ctrl_c_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_rule, names = comparing({"decode_rows": 64}), list(_C.tile_sizes())

    def compare(timer, sizes, candidates):  # type: ignore[no-untyped-def]
        if "tuned" not in candidates and sizes.get("decode_rows") == 64:
            changed = next(n for n in names if any(c[n] != sizes[n] for c in candidates.values()))
            if changed != "decode_rows":
                raise KeyboardInterrupt
        return by_rule(timer, sizes, candidates)

    monkeypatch.setattr(tune_cpu._Timer, "compare", compare)
    assert main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert "Stopped; what was found so far" in out and "decode_rows: 32 -> 64" in out
    assert "N=48 K=64 R=4 bf16 on nf4 nested dropout 0.05" in out
    assert tuning.lookup(cpu.device(ISA), "tile_sizes", "all") is not None


def test_a_cache_that_cannot_be_written_is_found_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("FASTLORA_CACHE", str(cache / "file" / "folder"))
    monkeypatch.setattr(tune_cpu._Timer, "compare", None)  # measuring would fail
    assert main(ARGUMENTS) == 2
    assert "$FASTLORA_CACHE: can't write to" in capsys.readouterr().err


def test_a_wrong_result_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_cpu._Timer, "compare", comparing({"decode_rows": 64}))
    monkeypatch.setattr(tune_cpu._Timer, "fault", lambda timer, sizes: "y is wrong")
    assert main(ARGUMENTS) == 1
    assert "y is wrong" in capsys.readouterr().out
    assert not list(cache.iterdir())


def test_it_measures_with_the_sizes_that_it_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real timer: every sample runs under its own sizes."""
    used: list[int] = []

    def use(**sizes: int) -> None:
        used.append(sizes["decode_rows"])
        _C.set_tile_sizes(**sizes)

    before = _C.tile_sizes()
    timer = tune_cpu._Timer([CASE], tune_cpu.Budget(2, 1e-4), use)
    try:
        found = timer.compare(before, {"more": {**before, "decode_rows": 64}})
        assert set(used) == {before["decode_rows"], 64} and found["more"].ratios[CASE] > 0
        assert timer.fault(before) is None
    finally:
        _C.set_tile_sizes(**before)


@pytest.mark.parametrize(
    "option", ["--rounds 0", "--sample-ms 0", "--sample-ms x", "--dropout 2", "--tokens x"]
)
def test_bad_numbers_are_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", *option.split()])
    error = capsys.readouterr().err
    assert option.split()[0] in error and option.split()[1] in error and "_" not in error


def test_a_spoilt_file_is_left_alone(cache: Path) -> None:
    before = _C.tile_sizes()
    for value, message in ((-1, "must be"), (10**23, "too big"), (True, "must be an int")):
        path = cpu.keep(ISA, {"decode_rows": value})
        with pytest.warns(UserWarning, match=message):
            cpu.use_tuned(_C)
        assert _C.tile_sizes() == before
    content = json.loads(path.read_text())
    content["choices"]["tile_sizes | all"] = {"no_such_size": 1}
    path.write_text(json.dumps(content))
    tuning._choices_of.cache_clear()
    with pytest.warns(UserWarning, match="no_such_size"):
        cpu.use_tuned(_C)
