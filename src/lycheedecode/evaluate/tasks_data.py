"""Data sets: from a folder, or from the hub."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import LycheeError


class DataError(LycheeError):
    """A data set that cannot be found or read; the message says where to put it."""


@lru_cache(maxsize=4)
def find_records(
    task: str, names: tuple[str, ...], data: Path | None, hub: str, config: str | None = None, split: str = "test"
) -> list[dict[str, Any]]:
    """The records of a data set.

    Args:
        task: who asks, for errors.
        names: file names, JSON or JSON lines; the first that lies in `data` is read.
        data: folder; None looks on the hub alone.
        hub: repository on the hub, read when no file is there.
        config: its configuration.
        split: its split.

    Raises:
        DataError: neither is there, or a file cannot be read.
    """
    for path in [data / name for name in names] if data is not None else []:
        if path.is_file():
            return _read(path)
    return _from_hub(task, names[0], data, hub, config, split)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.") from None
    if isinstance(records, dict) and isinstance(records.get("data"), list):  # SQuAD as published
        records = records["data"]
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: there is no list of records in it.")
    return records


def _from_hub(
    task: str, name: str, data: Path | None, hub: str, config: str | None, split: str
) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return [dict(record) for record in load_dataset(hub, config, split=split)]
    except (OSError, ValueError, RuntimeError) as error:  # a LookupError is a mistake of ours
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = "a folder and name it with --data" if data is None else str(data)
        raise DataError(
            f"The data of {task} is neither on this machine nor within reach ({reason}): put {name} into {where}."
        ) from None
