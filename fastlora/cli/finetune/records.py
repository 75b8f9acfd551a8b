"""What a run stores: its settings, its log and its checkpoints. A kill damages none of them."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CliError

LOG_FILE = "log.jsonl"
LOCK_FILE = ".lock"
RUN_FILE = "run.json"
# The final loss is the mean of this many steps: the loss of a single batch says little.
LAST_STEPS = 10


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint with the highest step, as `checkpoints` finds them."""
    return next(iter(checkpoints(out)), None)


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints, the newest first. Removes those that a kill cut off.

    The Trainer writes trainer_state.json last: a checkpoint is complete if that has its end.
    """
    complete = []
    for folder in out.glob("checkpoint-*/"):
        if not is_checkpoint(folder):
            continue  # somebody else's
        state = folder / "trainer_state.json"
        if state.is_file() and state.read_bytes().rstrip().endswith(b"}"):
            complete.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return sorted(complete, key=step_of, reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a name that the Trainer gives."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def check_files(checkpoint: Path) -> None:
    """Checks that the Trainer's files are there, and the sums that torch's have.

    Raises:
        ValueError: a file is missing, is cut off, or has changed.
    """
    state = checkpoint / "trainer_state.json"
    try:
        fields = json.loads(state.read_text())
        if not all(isinstance(fields[name], int) for name in ("global_step", "max_steps")):
            raise ValueError("its steps are no numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{state.name} can't be read ({error!r})") from error
    for name in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):
        if not list(checkpoint.glob(name)):
            raise ValueError(f"it has no {name}")
    for path in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
        try:
            with zipfile.ZipFile(path) as archive:
                part = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, OSError) as error:
            raise ValueError(f"{path.name}: {error}") from error
        if part is not None:
            raise ValueError(f"{path.name}: {part} does not have its checksum")


def is_last(checkpoint: Path, steps: int | None) -> bool:
    """True if the checkpoint was saved at the end of a run of `steps`, or of its own length."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= (steps or state["max_steps"]))


class Locked(CliError):
    """Another process writes to the folder."""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps `out` to this process until the block ends.

    Raises:
        Locked: another process has it.
    """
    from filelock import FileLock, Timeout

    path = out / LOCK_FILE
    try:
        lock = FileLock(path).acquire(blocking=False)
    except Timeout:
        raise Locked(f"--out: another run is writing to {out}") from None
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def step_of(checkpoint: Path) -> int:
    """The step after which the checkpoint was saved."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write(temporary path)`, then renames: readers see the old file or the new, whole."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


def read_run(out: Path) -> dict[str, Any] | None:
    """The content of `run.json` in `out`: what was run and its results. None if there is none.

    Raises:
        CliError: it can't be read.
    """
    path = out / RUN_FILE
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CliError(
            f"--out: {path} can't be read ({error}), so that the run can't be resumed; "
            "--overwrite starts it anew"
        ) from None


def update_run(out: Path, **fields: Any) -> None:
    """Adds or replaces fields of `run.json` in `out`."""
    content = json.dumps({**(read_run(out) or {}), **fields}, indent=2) + "\n"
    write_atomically(out / RUN_FILE, lambda partial: partial.write_text(content))


class Log:
    """`log.jsonl` in `out`: one line a step. A resumed run drops the steps after its checkpoint."""

    def __init__(self, out: Path, keep_to_step: int) -> None:
        self.path = out / LOG_FILE
        kept = [e for e in read_log(self.path) if e["step"] <= keep_to_step]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_atomically(self.path, lambda partial: partial.write_text(lines))

    def write(self, entry: dict[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """All lines."""
        return read_log(self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, without a last line that a kill cut off."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def summarise(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of a log, without the first step after each start."""
    timed = [e for e in entries if not e["first"]] or entries
    return {
        "steps": entries[-1]["step"],
        "seconds_per_step": statistics.median(e["seconds"] for e in timed),
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in timed),
        "peak_memory_mb": max(e["peak_memory_mb"] for e in entries),
        "training_memory_mb": max(e["peak_memory_mb"] - e["start_memory_mb"] for e in entries),
        "loss": statistics.fmean(e["loss"] for e in entries[-LAST_STEPS:]),
    }
