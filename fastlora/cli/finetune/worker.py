"""`python -m fastlora.cli.worker`: one run in a process of its own, led by `compare` through pipes.

Comes in on stdin: the job, as one line of JSON, then a line for each gate that it may pass. Goes
out on stdout: one JSON object a line, {"event": ..., ...}. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, TextIO

from ..errors import CliError
from .job import Job, Stopped
from .training import train


class _Pipe:
    """An `Observer` at the other end of the pipes."""

    def __init__(self, commands: TextIO, events: TextIO) -> None:
        self._commands = commands
        self._events = events

    def emit(self, event: str, **fields: Any) -> None:
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()

    def gate(self, name: str, step: int) -> None:
        self.emit("gate", name=name, step=step)
        if not self._commands.readline():
            # The leading process has died: nobody waits for a result, and the run is resumable.
            os._exit(1)


def main() -> int:
    """Runs the job on stdin; ends with a "result", "stopped" or "error" event."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    pipe = _Pipe(sys.stdin, events)
    try:
        result = train(Job(**request["job"]), pipe, resume=request["resume"])
        pipe.emit("result", result=result)
    except Stopped as stopped:
        pipe.emit("stopped", step=stopped.step, steps=stopped.steps)
    except KeyboardInterrupt:
        pipe.emit("error", kind="interrupted", text="interrupted")
    except CliError as error:
        pipe.emit("error", kind="argument", text=str(error))
    except Exception as error:
        traceback.print_exc()
        pipe.emit("error", kind="failure", text=f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
