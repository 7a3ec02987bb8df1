"""Data sets: from a folder, or from the hub."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import LycheeError, first_line
from ..prompts.records import RecordsError, read_records


class DataError(LycheeError):
    """A data set that cannot be found or read; the message says where to put it."""


class MissingDataError(DataError):
    """Data sets that are neither on this machine nor within reach.

    Args:
        tasks: who asks for them.
        files: names under which they would be found in a folder, one for each.
        data: the folder that was named, if any.
        reason: why the hub does not give the first of them.
    """

    def __init__(self, tasks: Sequence[str], files: Sequence[str], data: Path | None, reason: str) -> None:
        self.tasks, self.files, self.data, self.reason = tasks, files, data, reason
        where = "a folder and name it with --data" if data is None else str(data)
        super().__init__(
            f"The data of {listed(tasks)} is neither on this machine nor within reach ({reason}): "
            f"put {listed(files)} into {where}."
        )


def all_at_once(errors: Sequence[DataError]) -> DataError:
    """One error that says what several say; missing data sets are listed together."""
    missing = [error for error in errors if isinstance(error, MissingDataError)]
    said = [error for error in errors if not isinstance(error, MissingDataError)]
    if missing:
        tasks, files = ([name for error in missing for name in getattr(error, each)] for each in ("tasks", "files"))
        said.insert(0, MissingDataError(tasks, files, missing[0].data, missing[0].reason))
    if len(said) == 1:
        return said[0]
    first, *others = (str(error).rstrip(".") for error in said)
    return DataError("; ".join([first, *(f"{text[0].lower()}{text[1:]}" for text in others)]) + ".")


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


class Documents(list[dict[str, Any]]):
    """The items of a task's split, as the harness reads them: a list that names its columns.

    A `datasets.Dataset` would do as well, but it pickles the package pyarrow to hash itself, which fails where packages
    lie in a folder that is not called `site-packages` (findings/datasets_outside_site_packages.sh).
    """

    @property
    def features(self) -> dict[str, None]:
        """The names of the columns; all items have the same."""
        return dict.fromkeys(self[0])


def _any(record: Mapping[str, Any]) -> str | None:
    return None


@lru_cache(maxsize=4)
def find_records(
    task: str,
    names: tuple[str, ...],
    data: Path | None,
    hub: str,
    config: str | None = None,
    split: str = "test",
    misfit: Callable[[Mapping[str, Any]], str | None] = _any,
) -> list[dict[str, Any]]:
    """The records of a data set.

    Args:
        task: who asks, for errors.
        names: file names; of those that lie in `data` the first whose records fit is read.
        data: folder; None looks on the hub alone.
        hub: repository on the hub, read when no file is there.
        config: its configuration.
        split: its split.
        misfit: what is wrong with a record of another form, None for one that fits; it is shown a file's first.

    Raises:
        DataError: neither is there, a file cannot be read, or what is there has another form.
    """
    reason = None
    for path in [data / name for name in names] if data is not None else []:
        if path.is_file():
            records = _read(path)
            wrong = misfit(records[0])
            if wrong is None:
                return records
            reason = reason or f"{path} does not fit {task}: {wrong}."
    if reason is not None:
        raise DataError(reason)
    return _from_hub(task, names[0], data, hub, config, split)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_records(path))
    except RecordsError as error:
        raise DataError(str(error)) from None


def texts(value: Any) -> list[str]:
    """A field that holds one text or several, as files have it: a list, one text, or a list written out as text."""
    if isinstance(value, str) and value.strip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
                return found
    several = value if isinstance(value, (list, tuple)) else [value]
    return [str(one) for one in several if one is not None]


def _from_hub(
    task: str, name: str, data: Path | None, hub: str, config: str | None, split: str
) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return [dict(record) for record in load_dataset(hub, config, split=split)]
    except (OSError, ValueError, RuntimeError) as error:  # a LookupError is a mistake of ours
        raise MissingDataError([task], [name], data, first_line(error)) from None
