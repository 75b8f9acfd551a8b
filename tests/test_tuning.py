"""The cache of measured choices: what is stored is found, by its own device alone, whole or not."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from fastlora import tuning

DEVICE = tuning.device_key("GPU", "driver 1", "triton 3.9.0")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_stored_is_found() -> None:
    assert tuning.lookup(DEVICE, "op", "M16") is None
    tuning.store(DEVICE, "op", "M16", {"way": "fused", "BM": 64})
    tuning.store(DEVICE, "op", "M32", {"way": "vendor"})
    tuning.store(DEVICE, "op", "M32", {"way": "fused", "BM": 128})
    assert tuning.lookup(DEVICE, "op", "M16") == {"way": "fused", "BM": 64}
    assert tuning.lookup(DEVICE, "op", "M32") == {"way": "fused", "BM": 128}
    assert tuning.lookup(DEVICE, "other", "M16") is None
    for _ in range(2):
        tuning.store(DEVICE, "op", "M32", None)
        assert tuning.lookup(DEVICE, "op", "M32") is None
        assert tuning.lookup(DEVICE, "op", "M16") == {"way": "fused", "BM": 64}


def test_another_driver_or_version_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store(DEVICE, "op", "M16", {"BM": 64})
    assert tuning.lookup(tuning.device_key("GPU", "driver 2", "triton 3.9.0"), "op", "M16") is None
    monkeypatch.setattr(tuning, "__version__", "99")
    newer = tuning.device_key("GPU", "driver 1", "triton 3.9.0")
    assert newer != DEVICE and tuning.lookup(newer, "op", "M16") is None


def test_a_broken_file_is_an_empty_one() -> None:
    path = tuning.store(DEVICE, "op", "M16", {"BM": 64})
    path.write_text(path.read_text()[:-20])
    tuning._choices_of.cache_clear()
    assert tuning.lookup(DEVICE, "op", "M16") is None
    tuning.store(DEVICE, "op", "M16", {"BM": 32})
    assert tuning.lookup(DEVICE, "op", "M16") == {"BM": 32}


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        '{"device": DEVICE}',
        '{"device": DEVICE, "choices": []}',
        '{"device": DEVICE, "choices": {"op | M16": 7}}',
    ],
)
def test_a_file_of_another_form_is_an_empty_one(content: str) -> None:
    path = tuning.store(DEVICE, "op", "M16", {"BM": 64})
    path.write_text(content.replace("DEVICE", json.dumps(DEVICE)))
    tuning._choices_of.cache_clear()
    assert tuning.lookup(DEVICE, "op", "M16") is None


def test_there_need_be_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    tuning.store(DEVICE, "op", "M16", {"BM": 64})
    assert tuning.lookup(DEVICE, "op", "M16") == {"BM": 64}
    monkeypatch.delenv("FASTLORA_CACHE")
    assert tuning.lookup(DEVICE, "op", "M16") is None


def test_other_users_may_read_the_file() -> None:
    mode = tuning.store(DEVICE, "op", "M16", {"BM": 64}).stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


def _store(number: int) -> None:
    tuning.store(DEVICE, "op", f"M{number}", {"BM": number})


def test_processes_do_not_lose_each_others_choices(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_store, range(24))
    choices = json.loads(tuning.cache_file(DEVICE).read_text())["choices"]
    assert choices == {f"op | M{i}": {"BM": i} for i in range(24)}
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize(("size", "of"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_size_class(size: int, of: int) -> None:
    assert tuning.size_class(size) == of
