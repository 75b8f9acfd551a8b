"""Both ends of the pipes between the leading process and one that measures.

The allocator is chosen when a process starts, and peak memory belongs to a process, hence processes
of their own. A request goes in on stdin, as one line of JSON; events come out on stdout, a JSON
object a line, {"event": name, ...}. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Called with an event's name and its fields.
Emit = Callable[[str, dict[str, Any]], None]


def serve(work: Callable[[dict[str, Any], Emit], None]) -> int:
    """The measuring end: does the request on stdin; returns the exit status.

    Args:
        work: takes the request and what to call with every event.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(event: str, fields: dict[str, Any]) -> None:
        out.write(json.dumps({"event": event, **fields}) + "\n")
        out.flush()

    try:
        work(json.loads(sys.stdin.readline()), emit)
    except Exception as error:
        traceback.print_exc()
        emit("error", {"text": f"{type(error).__name__}: {error}"})
        return 1
    return 0


@contextmanager
def on_stop_signal(handle: Callable[[], None]) -> Iterator[None]:
    """Calls `handle` on Ctrl-C and on SIGTERM."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: handle()) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def lead(
    module: str, request: Mapping[str, Any], environment: Mapping[str, str], emit: Emit
) -> None:
    """The leading end: runs `module` in a process and passes on its events as they come.

    Args:
        module: ends in `sys.exit(serve(...))`.
        request: what it is to do, in what JSON can hold.
        environment: of the process.
        emit: told of every event but "error".

    Raises:
        RuntimeError: the process failed.
    """
    failure = ""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.close()
            except BrokenPipeError:
                # It died before it read anything; its status and its stderr say more.
                pass
            for line in process.stdout:
                fields = json.loads(line)
                event = fields.pop("event")
                if event == "error":
                    failure = fields["text"]
                else:
                    emit(event, fields)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status:
            log.seek(0)
            lines = log.read().strip().splitlines() or [f"it ended with status {status}"]
            raise RuntimeError(f"the measuring process failed: {failure or lines[-1]}")
