"""`fastlora info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlora.backends import native
from fastlora.backends.machine import cpu
from fastlora.backends.native import cuda, library
from fastlora.cli import main


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_what_an_issue_needs(capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(capsys)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert "reference" in facts["fastlora"]["backends on cpu"]
    assert set(facts["packages"]) >= {"triton", "transformers", "peft", "bitsandbytes"}
    assert facts["machine"]["cpus for this process"] >= 1


def test_text_is_bullets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Copy and paste the text below into your issue."
    assert all(line.startswith(("- ", "  - ")) for line in lines[2:])


def test_a_missing_library_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(library, "_build", None)
    monkeypatch.setattr(library, "_reason", "not built; `make build` builds it.")
    facts = report(capsys)["fastlora"]
    assert facts["native library"] == "not built; `make build` builds it."
    assert facts["backends on cpu"] == ["reference"]


@pytest.mark.parametrize("reason", ["this torch is built without CUDA.", None])
def test_the_library_for_cuda(
    reason: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_reason", reason)
    assert report(capsys)["fastlora"]["library for cuda"] == (reason or "loaded")


def test_tuned_sizes_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if native.build_info() is None:
        pytest.skip(str(native.unavailable_reason()))
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    facts = report(capsys)["fastlora"]
    assert facts["tile sizes"] == "defaults"
    cpu.keep(str(facts["instruction set chosen"]), {"decode_rows": 64})
    assert report(capsys)["fastlora"]["tile sizes"] == "tuned"


def test_settings_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_QUIET", "1")
    assert "FASTLORA_QUIET=1" in report(capsys)["fastlora"]["environment"]
