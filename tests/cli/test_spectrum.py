"""`fastlora spectrum`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fastlora
from fastlora.cli import main


def test_table_and_regex(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum", "--model", str(tiny_model), "--share", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "7 of 14 linear layers chosen" in out
    regex = out.strip().splitlines()[-1]
    ranking = fastlora.spectrum(tiny_model, 0.5)
    matched = [row.name for row in ranking.rows if re.fullmatch(regex, row.name)]
    assert matched == ranking.target_modules


def test_json(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spectrum", "--model", str(tiny_model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fastlora.spectrum(tiny_model).as_dict()


def test_what_does_not_fit(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["spectrum", "--model", str(tmp_path)]) == 2
    assert "--model: expected a folder with config.json" in capsys.readouterr().err
    assert main(["spectrum", "--model", str(tiny_model), "--share", "2"]) == 2
    assert "--share: share must be above 0" in capsys.readouterr().err
