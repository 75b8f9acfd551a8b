"""PEFT's own tests as a judge: none may pass on PEFT's layers and not on fastlora's.

    make peft-suite
    make peft-suite PEFT_SUITE_ARGS="tests/test_custom_models.py -k dora"
    python -m tests.peft_suite --small      a minute's choice; 75 where PyPI can't be reached

Fetches the sources of the installed PEFT release from PyPI, since its wheel has no tests, and what
they import beside our own requirements. Runs them once as they are and once after
`fastlora.patch_peft()`, offline: tests that need a model of the hub fail in both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "peft-suite"
# Those that need neither the hub nor several processes.
DEFAULT = ["tests/test_custom_models.py", "-k", "(lora or Lora) and not Fsdp"]
SMALL = ["tests/test_custom_models.py", "-k"]
SMALL += ["(lora or Lora) and (forward or params_are_updated or merge or disable or training)"]
_UNREACHABLE = 75
# What the selected modules import, as far as requirements/dev.txt does not bring it.
PACKAGES = ["diffusers", "importlib_metadata", "parameterized", "pillow", "requests", "scipy"]
PACKAGES += ["certifi", "charset_normalizer", "idna", "urllib3", "zipp", "attrs"]


@dataclass(frozen=True)
class Run:
    """How each test ended, by its id, and how many calls of layers ran on fastlora."""

    outcomes: dict[str, str]
    calls: int


def sources() -> Path:
    """The folder of PEFT's sources, downloaded once."""
    release = version("peft")
    folder = FOLDER / f"peft-{release}"
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        _pip("download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation")
        with tarfile.open(FOLDER / f"peft-{release}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    # The modules import each other as a package, whose __init__.py the archive lacks.
    (folder / "tests" / "__init__.py").touch()
    return folder


def packages() -> Path:
    """The folder with `PACKAGES`, installed once, beside the environment and not into it."""
    folder = FOLDER / "site"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), *PACKAGES], check=True)
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "-q", "-d", str(FOLDER)]
    subprocess.run([*command, f"peft=={version('peft')}"], check=True)


def run(arguments: list[str], fastlora: bool) -> Run:
    """PEFT's tests, with fastlora's layers or with PEFT's own."""
    path = FOLDER / f"outcomes-{'fastlora' if fastlora else 'peft'}.json"
    path.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "FASTLORA_QUIET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(packages())]),
        "PEFT_SUITE_OUTCOMES": str(path),
        "PEFT_SUITE_FASTLORA": "1" if fastlora else "0",
    }
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite_plugin", "-p", "no:cacheprovider"]
    command += ["-q", "--tb=line", "-W", "ignore", "-o", "addopts=", *arguments]
    with (path.with_suffix(".log")).open("w") as log:
        subprocess.run(command, cwd=sources(), env=environment, stdout=log, stderr=log, check=False)
    if not path.is_file():
        raise RuntimeError(f"pytest ended early; see {path.with_suffix('.log')}")
    found = json.loads(path.read_text())
    return Run(found["outcomes"], found["calls"])


def worse(stock: Run, fast: Run) -> list[str]:
    """The tests that pass on PEFT's layers and not on fastlora's."""
    passed = (name for name, outcome in stock.outcomes.items() if outcome == "passed")
    return [name for name in passed if fast.outcomes.get(name) != "passed"]


def main(arguments: list[str]) -> int:
    """Runs both, prints the comparison; 1 when a test got worse or nothing was compared."""
    arguments = SMALL if arguments == ["--small"] else arguments or DEFAULT
    try:
        sources(), packages()
    except subprocess.CalledProcessError as error:
        print(f"PEFT's sources, or what its tests import, can't be had: {error}")
        return _UNREACHABLE
    stock, fast = run(arguments, fastlora=False), run(arguments, fastlora=True)
    for name, one in (("PEFT's layers", stock), ("fastlora's layers", fast)):
        counts = Counter(one.outcomes.values())
        print(f"{name:18}", ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    print(f"calls on fastlora  {fast.calls}")
    lost = worse(stock, fast)
    for name in lost:
        print(f"passes without fastlora, not with it: {name}")
    if not fast.calls:
        print("no call ran on fastlora: nothing was compared")
    return int(bool(lost) or not fast.calls)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
