"""Records from files as the world has them: the one reader of JSON, JSON lines and CSV."""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ..errors import InputError

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
"""Names that `read_records` reads; what is JSON and what JSON lines, the content says."""

_FIELD_LIMIT = threading.Lock()
_ENCODINGS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_SURROGATE = re.compile("[\ud800-\udfff]")


class RecordsError(InputError):
    """A file that cannot be read as records; the message is one sentence."""


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file, one at a time where its form allows.

    JSON may be a list of records, an object whose `data` is one, a single record, or records one after the other
    (JSON lines), whatever the file is called. Lines end at `\\n` only: a raw U+2028 inside a string is valid JSON. CSV
    has a header; its separator is the comma, semicolon or tab that the header has most of. UTF-8 with or without a
    byte-order mark, UTF-16 with one; `\\r\\n` anywhere.

    Raises:
        RecordsError: no such file, not text, not valid, not records, or a CSV row whose length is not the header's.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            start = raw.read(3)
        encoding = next((name for mark, name in _ENCODINGS if start.startswith(mark)), "utf-8")
        # Without translation of line ends: a csv field keeps its own, and JSON takes any of them for a space.
        with path.open(encoding=encoding, newline="" if _is_csv(path) else "\n") as file:
            yield from _csv(path, file) if _is_csv(path) else _json(path, file)
    except FileNotFoundError:
        raise RecordsError(f"There is no file {str(path)!r}.") from None
    except UnicodeError:
        raise RecordsError(f"{path} cannot be read: it is not UTF-8.") from None
    except OSError as error:
        raise RecordsError(f"{path} cannot be read: {error.strerror}.") from None


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".tsv")


# ---------------------------------------------------------------------- JSON


def _json(path: Path, file: IO[str]) -> Iterator[Record]:
    """Line by line if the first line is complete in itself, else as one text."""
    first, number = "", 0
    while not first.strip():
        first, number = file.readline(), number + 1
        if not first:
            raise RecordsError(f"{path}: there are no records in it.")
    try:
        values = list(_values(first))
    except (
        ValueError,
        RecursionError,
    ):  # an object or a list over several lines, or a mistake that the whole tells better
        yield from _unpacked(path, list(_parsed(path, "".join(chain([first], file)), number)))
        return
    later = ((at, line) for at, line in enumerate(file, start=number + 1) if line.strip())
    following = next(later, None)
    if following is None:
        yield from _unpacked(path, values)
        return
    yield from (_record(path, number, value) for value in values)
    for at, line in chain([following], later):
        yield from (_record(path, at, value) for value in _parsed(path, line, at))


def _parsed(path: Path, text: str, line: int) -> Iterator[Any]:
    """JSON values one after the other; `line` is the number of the text's first."""
    try:
        yield from _values(text)
    except json.JSONDecodeError as error:
        raise RecordsError(f"{path}: not valid JSON (line {line + error.lineno - 1}: {error.msg}).") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets by the thousand
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise RecordsError(f"{path}: not JSON that can be read (from line {line}: {reason}).") from None


def _values(text: str) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(), 0
    while at := _skipped(text, at):
        value, at = decoder.raw_decode(text, at - 1)
        yield value


def _skipped(text: str, at: int) -> int:
    """One more than the place of the next character that is no space; 0 at the end."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at + 1 if at < len(text) else 0


def _unpacked(path: Path, values: list[Any]) -> Iterator[Record]:
    """The records of a whole file: its only value may hold them all."""
    if len(values) == 1 and isinstance(values[0], dict) and isinstance(values[0].get("data"), list):
        values = values[0]["data"]  # SQuAD as published
    elif len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not values:
        raise RecordsError(f"{path}: there are no records in it.")
    for number, value in enumerate(values, start=1):
        yield _record(path, number, value, "record")


def _record(path: Path, number: int, value: Any, what: str = "line") -> Record:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")
        raise RecordsError(f"{path}: {what} {number} is {kind}, not a record: a record is an object with named fields.")
    if any(isinstance(text, str) and _SURROGATE.search(text) for text in (*value, *value.values())):
        raise RecordsError(
            f"{path}: {what} {number} has half a surrogate pair (\\ud800 to \\udfff), which is not text."
        )
    return value


# ---------------------------------------------------------------------- CSV


def _csv(path: Path, file: IO[str]) -> Iterator[Record]:
    header = file.readline()
    unquoted = re.sub(r'"[^"]*"', "", header)
    separator = max(",;\t", key=unquoted.count)
    rows = csv.reader(chain([header], file), delimiter=separator)
    names = _next_row(path, rows)
    if not names or not any(names):
        raise RecordsError(f"{path}: there is no header in its first line.")
    while (row := _next_row(path, rows)) is not None:
        if row and len(row) != len(names):
            raise RecordsError(
                f"{path}: the row that ends in line {rows.line_num} has {len(row)} fields, the header {len(names)}."
            )
        if row:
            yield dict(zip(names, row, strict=True))


def _next_row(path: Path, rows: Any) -> list[str] | None:
    # The module's limit on the length of a field (131072) is the process's: it is raised for a row and put back.
    with _FIELD_LIMIT:
        before = csv.field_size_limit(sys.maxsize)
        try:
            return next(rows, None)
        except csv.Error as error:
            raise RecordsError(f"{path}: not valid CSV (line {rows.line_num}: {error}).") from None
        finally:
            csv.field_size_limit(before)
