"""What several commands do with the terminal."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn


def wide_console() -> Console:
    """The terminal. A file gets lines as long as a table needs, not 80 characters."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    return console


@contextmanager
def layer_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for work that goes layer by layer, shown on terminals only.

    Yields a function to call with the number of layers done, and of all.
    """
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def quiet_libraries() -> None:
    """Silences the notes and warnings of the libraries; errors still come through."""
    # bitsandbytes warns about kernels that it can't fetch as soon as it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    # torch and the peers warn about their own future, once in a run.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft|torch|transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
