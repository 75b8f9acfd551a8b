"""Work in other processes: both ends of the pipes between a leading process and its workers.

A process chooses its allocator when it starts, and its peak memory counts everything that it does.
Work that must not share these runs in a worker.

The request goes in on stdin, as one line of JSON, then a line "go" for each gate that the worker
may pass. Events come out on stdout, one JSON object a line: {"event": name, ...}. The last is
"result" or "error". What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any, Protocol, TextIO

from .errors import CliError

# The name of the module whose `work` is to be done follows.
_START = "import sys; from fastlora.cli.process import serve; sys.exit(serve(sys.argv[1]))"
COMMAND = (sys.executable, "-c", _START)

# An event's name and its fields.
Event = tuple[str, dict[str, Any]]


class Emit(Protocol):
    """Takes an event."""

    def __call__(self, event: str, **fields: Any) -> None: ...


class Died(RuntimeError):
    """A worker ended without a result and without an error."""


# ---- the worker's end ------------------------------------------------------------------------


class Leader:
    """The leading process, as a worker sees it."""

    def __init__(self, commands: TextIO, events: TextIO) -> None:
        self._commands = commands
        self._events = events

    def emit(self, event: str, **fields: Any) -> None:
        """Sends an event."""
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()

    def gate(self, name: str, step: int) -> None:
        """Announces a gate, and returns when the leading process opens it."""
        self.emit("gate", name=name, step=step)
        if not self._commands.readline():
            # The leading process has died, and nobody waits for a result.
            os._exit(1)


def serve(module: str) -> int:
    """Does the request on stdin with the function `work(request, leader)` of a module.

    Its return value is sent as "result". Returns the exit status.
    """
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    leader = Leader(sys.stdin, events)
    request = json.loads(sys.stdin.readline())
    try:
        result = import_module(module).work(request, leader)
    except KeyboardInterrupt:
        leader.emit("error", kind="interrupted", text="interrupted")
    except CliError as error:
        leader.emit("error", kind="argument", text=str(error))
    except Exception as error:
        traceback.print_exc()
        leader.emit("error", kind="failure", text=f"{type(error).__name__}: {error}")
    else:
        leader.emit("result", result=result)
        return 0
    return 1


# ---- the leading end -------------------------------------------------------------------------


class Worker:
    """A process that does one request. As a context manager, it is killed on exit if it still runs.

    Args:
        name: for error messages.
        module: has the function `work`; see `serve`.
        request: anything that JSON can hold.
        log: where its stderr goes.
        environment: of the process; None for the environment of this one.
    """

    def __init__(
        self,
        name: str,
        module: str,
        request: Any,
        log: IO[str],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log = log
        self._process = subprocess.Popen(
            [*COMMAND, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            # Ctrl-C then reaches the leading process alone.
            start_new_session=True,
        )
        self._send(json.dumps(request))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def go(self) -> None:
        """Opens the gate at which the worker waits."""
        self._send("go")

    def interrupt(self) -> None:
        """Sends Ctrl-C."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def events(self) -> Iterator[Event]:
        """The events as they come; the last is "result".

        Raises:
            CliError, KeyboardInterrupt: as in the worker. RuntimeError: the worker failed.
        """
        assert self._process.stdout is not None
        event = ""
        for line in self._process.stdout:
            fields = json.loads(line)
            event = fields.pop("event")
            if event == "error":
                raise self._error(**fields)
            yield event, fields
        if event != "result":
            status = self._process.wait()
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise Died(f"the {self.name} process {how}{self._where() or self._last_line()}")

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # It has died, and the end of its stdout says so.
            return

    def _error(self, kind: str, text: str) -> BaseException:
        match kind:
            case "argument":
                return CliError(text)
            case "interrupted":
                return KeyboardInterrupt()
        return RuntimeError(f"the {self.name} process failed: {text}{self._where()}")

    def _where(self) -> str:
        """The path of the log; "" if that is a temporary file."""
        return f" (see {self._log.name})" if isinstance(self._log.name, str) else ""

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def run(
    name: str, module: str, request: Any, emit: Emit, environment: Mapping[str, str] | None = None
) -> Any:
    """Does a request in one worker and returns its result; `emit` gets all other events.

    Raises:
        CliError, KeyboardInterrupt, RuntimeError: as in `Worker.events`.
    """
    result = None
    with (
        tempfile.TemporaryFile("w+") as log,
        Worker(name, module, request, log, environment) as worker,
    ):
        for event, fields in worker.events():
            if event == "result":
                result = fields["result"]
            else:
                emit(event, **fields)
    return result


def merged(workers: Sequence[Worker]) -> Iterator[tuple[int, Event]]:
    """The events of several workers as they come, each with the index of its worker.

    Raises:
        CliError, KeyboardInterrupt, RuntimeError: as in `Worker.events`, of the first that fails.
    """
    arrived: queue.Queue[tuple[int, Event | BaseException | None]] = queue.Queue()

    def read(index: int) -> None:
        try:
            for event in workers[index].events():
                arrived.put((index, event))
            arrived.put((index, None))
        except BaseException as error:
            arrived.put((index, error))

    for index in range(len(workers)):
        threading.Thread(target=read, args=(index,), daemon=True).start()
    running = len(workers)
    while running:
        index, event = arrived.get()
        if event is None:
            running -= 1
        elif isinstance(event, BaseException):
            raise event
        else:
            yield index, event


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
