"""The frame of the command line: help, exit status, one-line errors."""

from __future__ import annotations

import pytest

import fastlora
from fastlora.cli import info, main
from fastlora.cli.errors import CliError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastlora {fastlora.__version__}\n"


@pytest.mark.parametrize(
    "command", ["info", "verify", "bench", "spectrum", "finetune", "merge", "demo"]
)
def test_help_fits_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "'fly'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (CliError("--out: full"), 2, "fastlora info: error: --out: full"),
        (KeyboardInterrupt(), 130, "fastlora info: interrupted"),
        (
            RuntimeError("first\nsecond"),
            1,
            "fastlora info: RuntimeError: first (--debug shows where)",
        ),
        (RuntimeError(), 1, "fastlora info: RuntimeError: no message (--debug shows where)"),
    ],
)
def test_an_error_is_one_line(
    raised: BaseException,
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def collect() -> None:
        raise raised

    monkeypatch.setattr(info, "collect", collect)
    assert main(["info"]) == status
    assert capsys.readouterr().err == line + "\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def collect() -> None:
        raise RuntimeError("deep")

    monkeypatch.setattr(info, "collect", collect)
    with pytest.raises(RuntimeError, match="deep"):
        main(["info", "--debug"])
