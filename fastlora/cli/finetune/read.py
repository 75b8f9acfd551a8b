"""Reads a data file: text, or records. What it is, its content decides, not its name."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CliError

FORMS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'
# A table has the columns of one of these; it may have others, too.
_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"text"})
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_GZIP, _PARQUET, _ARROW = b"\x1f\x8b", b"PAR1", b"ARROW1"


class Record(NamedTuple):
    """One example as it was read, and where, for a message."""

    where: str
    value: Any


def read(path: str) -> str | list[Record]:
    """The text of a file, or its records: JSONL, a JSON array, CSV or TSV with a line of names,
    Parquet, Arrow; each also compressed by gzip.

    Raises:
        CliError: it can't be read, is empty, or is malformed; with the line or the row.
    """
    content = _content(path)
    if not content:
        raise CliError(f"--data: {path} has no record")
    return content


def _content(path: str) -> str | list[Record]:
    file = Path(path).expanduser()
    if not file.exists():
        raise CliError(f"--data: no such file: {path}")
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no regular file"
        raise CliError(f"--data: expected a file, {path} is {what}")
    try:
        content = file.read_bytes()
        if content.startswith(_GZIP):
            file, content = file.with_suffix(""), gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise CliError(f"--data: can't read {path}: {error}") from None
    if content.startswith((_PARQUET, _ARROW)):
        return _columnar(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CliError(f"--data: {path} is not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise CliError(f"--data: {path} is empty")
    suffix = file.suffix.lower()
    if _is_json(text) or suffix in _JSON_SUFFIXES:
        return list(_json(path, text))
    if (delimiter := _TABLES.get(suffix) or _delimiter(text)) is not None:
        return list(_table(path, text, delimiter))
    return text


def _is_json(text: str) -> bool:
    """Whether a text begins with an object, or an array of such, as no prose does."""
    start = text.lstrip()
    if start.startswith("["):
        start = start[1:].lstrip()
    if not start.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return start[1:].lstrip().startswith('"')
    return start[end:].lstrip(" \t\r")[:1] in ("", "\n", ",", "]")


def _json(path: str, text: str) -> Iterator[Record]:
    """The records of an array, of a single object over several lines, or of JSONL."""
    first = text.lstrip().partition("\n")[0]
    if first.startswith("["):
        whole = _parsed(f"--data: {path}", text)
        yield from (_checked(f"--data: {path}, record {i}", v) for i, v in enumerate(whole, 1))
        return
    if not _is_object(first) and _is_object(text):
        yield _checked(f"--data: {path}", json.loads(text))
        return
    # Only "\n" ends a line: JSON strings may hold the other characters at which splitlines() cuts.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"--data: {path}, line {number}"
            yield _checked(where, _parsed(where, line))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise CliError(f"{where}: not JSON ({error.msg} at {place}column {error.colno})") from None
    except RecursionError:
        raise CliError(f"{where}: not JSON that can be read (nested too deep)") from None
    except ValueError as error:  # a number of thousands of digits
        raise CliError(f"{where}: not JSON that can be read ({error})") from None


def _checked(where: str, value: Any) -> Record:
    """A record whose texts can be encoded: JSON may hold halves of surrogate pairs."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise CliError(f"{where}: half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise CliError(f"{where}: nested too deep") from None
    return Record(where, value)


# ---- tables ----------------------------------------------------------------------------------


def _delimiter(text: str) -> str | None:
    """What separates the columns of a table without a suffix that says so; None for prose."""
    first = text.lstrip().partition("\n")[0].strip()
    for delimiter in _TABLES.values():
        try:
            names = set(next(csv.reader([first], delimiter=delimiter)))
        except csv.Error:  # a control character in the first line of prose
            return None
        if len(names) > 1 and any(columns <= names for columns in _COLUMNS):
            return delimiter
    return None


def _table(path: str, text: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if not any(columns <= set(names) for columns in _COLUMNS):
            raise CliError(
                f"--data: {path}: expected a table with the columns prompt and completion, or "
                f"text, or messages, got {', '.join(names)}"
            )
        if twice := sorted(name for name in set(names) if names.count(name) > 1):
            raise CliError(f"--data: {path} has the column {twice[0]} twice")
        for row in reader:
            where = f"--data: {path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise CliError(f"{where}: expected {len(names)} columns")
            if "messages" in row:
                row["messages"] = _parsed(where, row["messages"])
            yield _checked(where, row)
    except csv.Error as error:
        raise CliError(f"--data: {path}, after line {reader.line_num}: {error}") from None


def _columnar(path: str, content: bytes) -> list[Record]:
    """The rows of a Parquet or an Arrow file."""
    import pyarrow as pa
    from pyarrow import parquet

    source = pa.BufferReader(content)
    try:
        if content.startswith(_PARQUET):
            table = parquet.read_table(source)
        else:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise CliError(f"--data: can't read {path}: {error}") from None
    rows = table.to_pylist()
    return [_checked(f"--data: {path}, row {i}", row) for i, row in enumerate(rows, 1)]
