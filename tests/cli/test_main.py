"""The frame of the command line: help, exit status, one-line errors."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

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


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["finetune", "--help"]], ids=str)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    """It takes a tenth of a second without, and three seconds with it."""
    program = (
        "import sys; from fastlora.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: print({'torch', 'numpy', 'peft', 'transformers'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("set()\n")


def test_without_peers() -> None:
    """`import *` leaves out what needs peft, and a command names what is missing."""
    program = (
        "import sys; sys.modules['peft'] = None\n"
        "from fastlora import *\n"
        "assert 'accelerate' not in globals(); LoraLinear\n"
        "from fastlora.cli import main\n"
        "folder = sys.argv[1]\n"
        "sys.exit(main(['merge', '--model', folder, '--adapter', folder, '--out', 'nowhere']))"
    )
    command = [sys.executable, "-c", program]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").touch()
        ran = subprocess.run([*command, folder], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "fastlora merge: error: missing: peft; " in ran.stderr and ran.stderr.count("\n") == 1


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


@pytest.mark.parametrize("command", ["merge", "finetune"])
def test_a_place_that_can_not_be_written_is_said_first(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is looked for. /proc is writable for nobody, root included."""
    given = {"merge": ["--adapter", str(tmp_path)], "finetune": ["--data", __file__]}[command]
    (tmp_path / "config.json").touch()
    arguments = [command, "--model", str(tmp_path), "--out", "/proc/fastlora/out", *given]
    assert main(arguments) == 2
    assert "--out: can't write to /proc" in capsys.readouterr().err
