"""Starts workers, one for each allocator, and collects their rows."""

from __future__ import annotations

import dataclasses
import os
import sys
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import process as pipe
from ..errors import CliError
from ..process import Emit
from .case import Case
from .model import ModelRequest
from .rows import Row, case_row
from .worker import Request

ALLOCATORS = ("glibc", "tcmalloc")
_TCMALLOC = "libtcmalloc_minimal.so.4"
_FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"),
    *("/usr/local/lib", str(Path(sys.prefix) / "lib")),
)
_OTHERS = ("tcmalloc", "jemalloc", "mimalloc")


@dataclass
class Results:
    """What the workers sent: rows, and who was refused in which row and why."""

    rows: list[Row] = field(default_factory=list)
    refused: list[tuple[Row, str]] = field(default_factory=list)
    wrong: list[tuple[Row, str]] = field(default_factory=list)


def tcmalloc() -> str | None:
    """Where tcmalloc lies, or None."""
    for folder in _FOLDERS:
        if (Path(folder) / _TCMALLOC).is_file():
            return str(Path(folder) / _TCMALLOC)
    # A name alone is enough for the dynamic linker.
    return find_library("tcmalloc_minimal")


def environment(allocator: str) -> dict[str, str]:
    """The environment of a process under `allocator`.

    Raises:
        CliError: tcmalloc is not found.
    """
    env = os.environ.copy()
    words = env.pop("LD_PRELOAD", "").replace(":", " ").split()
    preload = [word for word in words if not any(name in word for name in _OTHERS)]
    if allocator == "tcmalloc":
        path = tcmalloc()
        if path is None:
            raise CliError(
                f"--allocators: {_TCMALLOC} is not found; Debian and Ubuntu have it in the package "
                "libtcmalloc-minimal4"
            )
        preload.insert(0, path)
    if preload:
        env["LD_PRELOAD"] = ":".join(preload)
    return env


def measure(request: Request | ModelRequest, emit: Emit, into: Results) -> None:
    """Runs `request` in a worker; its rows go to `into` as they come.

    Args:
        request: layers or a model to time, under which allocator.
        emit: told of every event, with its fields.
        into: the results of this and of earlier workers.

    Raises:
        RuntimeError: the worker failed; rows that it had sent by then are kept.
    """

    def take(event: str, fields: dict[str, Any]) -> None:
        if event == "row":
            into.rows.append(fields["row"])
        elif event == "refused":
            kind = into.wrong if fields["wrong"] else into.refused
            kind.append((fields["row"], fields["reason"]))
        emit(event, fields)

    module = "worker" if isinstance(request, Request) else "model"
    pipe.lead(f"{__package__}.{module}", request.as_dict(), environment(request.allocator), take)


def add_memory(case: Case, request: Request, rows: list[Row], emit: Emit) -> None:
    """Measures the memory of `case` with every provider that has a row, in processes of their own.

    Args:
        case: in "step" or "inference" mode.
        request: the one that the rows come from.
        rows: get `peak_mb` and `saved_bytes`.
        emit: told of every process that starts.

    Raises:
        RuntimeError: a process failed.
    """
    for row in rows:
        if row != {**row, **case_row(case, row["provider"], row["adapter_dtype"])}:
            continue
        emit("case", {"text": f"memory of {row['provider']}: {case}"})
        task = {"case": case.as_dict(), "provider": row["provider"], "threads": request.threads}
        memory = _measured("memory", task, request.allocator)
        row |= {name: f"{value:.4g}" for name, value in memory.items()}


def add_model_memory(request: ModelRequest, rows: list[Row], emit: Emit) -> None:
    """Measures the memory of a model's calls, each in a process of its own.

    Args:
        request: the one that the rows come from.
        rows: get `peak_mb`.
        emit: told of every process that starts.

    Raises:
        RuntimeError: a process failed.
    """
    for row in rows:
        emit("case", {"text": f"memory of {row['provider']}: {row['mode']}"})
        task = dataclasses.replace(request, memory_of=(row["mode"], row["provider"]))
        memory = _measured("model", task.as_dict(), request.allocator)
        row["peak_mb"] = f"{memory['peak_mb']:.4g}"


def _measured(module: str, task: dict[str, Any], allocator: str) -> dict[str, float]:
    """The fields of the one event that `module` sends."""
    figures: dict[str, float] = {}

    def take(event: str, fields: dict[str, Any]) -> None:
        figures.update(fields)

    pipe.lead(f"{__package__}.{module}", task, environment(allocator), take)
    return figures
