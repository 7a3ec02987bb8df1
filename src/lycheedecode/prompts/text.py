"""Where the filler text of prompts comes from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from ..errors import LycheeError, first_line
from . import builtin
from .records import SUFFIXES, RecordsError, read_records

Split = Literal["identify", "evaluate"]

MAX_CHARACTERS = 8_000_000
"""More text than any prompt needs; reading stops there."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class TextError(LycheeError):
    """Text that cannot be read; the message is one sentence."""


def load_text(source: str) -> str:
    """Text to hide passkeys in.

    Args:
        source: `prose` (the manual and long docstrings that come with Python), `code` (sources of its library), `noise`
            (a few sentences, repeated), a text file, `FILE:COLUMN` for records in a file (`.jsonl`, `.json`, `.csv`,
            `.tsv`), or `DATASET:COLUMN` for a hub or local data set of the package `datasets` (its `train` split).
            Records that say the same count once.

    Raises:
        TextError: missing file or column, wrong encoding, too little text.
    """
    if source == "noise":
        return NOISE * (400_000 // len(NOISE))
    if source in ("prose", "code"):
        return "\n\n".join(text for _, text in _builtin(source))
    path, _, column = source.rpartition(":")
    if Path(source).is_file() or not path:
        text = _read(source)
    elif path.lower().endswith(SUFFIXES):
        text = _join(_column(path, column), source)
    else:
        text = _join(_dataset(path, column), source)
    if len(text.split()) < 100:
        raise TextError(f"The text {source!r} has fewer than 100 words.")
    return text[:MAX_CHARACTERS]


def load_side(source: str, split: Split) -> list[str]:
    """The documents of a text that identification, or that evaluation, draws from; they have none in common.

    Built-in text is divided document by document; any other in the middle, at the end of a line. `noise` says nothing,
    so both draw from all of it.
    """
    if source == "noise":
        return [load_text(source)]
    if source in ("prose", "code"):
        wanted = split == "evaluate"
        return [text for name, text in _builtin(source) if builtin.is_for_evaluation(name) == wanted]
    text = load_text(source)
    middle = text.find("\n", len(text) // 2) + 1 or len(text) // 2
    return [text[:middle] if split == "identify" else text[middle:]]


def name_of(source: str) -> str:
    """What results call a text: they do not say in which folder a file lies."""
    return Path(source).name


def _builtin(source: str) -> tuple[builtin.Document, ...]:
    return builtin.prose() if source == "prose" else builtin.code()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read(MAX_CHARACTERS)
    except FileNotFoundError:
        raise TextError(f"There is no text file {path!r} (built in: prose, code, noise).") from None
    except UnicodeDecodeError:
        raise TextError(f"The text file {path!r} is not UTF-8.") from None
    except OSError as error:
        raise TextError(f"The text file {path!r} cannot be read: {error.strerror}.") from None


def _column(path: str, column: str) -> Iterator[str]:
    try:
        for record in read_records(path):
            if column not in record:
                raise TextError(f"{path}: a record has no column {column!r} (it has {', '.join(map(str, record))}).")
            if not isinstance(record[column], (str, int, float)):
                raise TextError(f"{path}: the column {column!r} holds {type(record[column]).__name__}, not text.")
            yield str(record[column])
    except RecordsError as error:
        raise TextError(str(error)) from None


def _dataset(name: str, column: str) -> Iterator[str]:
    if importlib.util.find_spec("datasets") is None:
        raise TextError(f"Reading the data set {name!r} needs the package datasets: pip install 'lycheedecode[eval]'.")
    from datasets import load_dataset

    try:
        records = load_dataset(name, split="train", streaming=True)
        for record in records:
            yield str(record[column])
    except KeyError:
        raise TextError(f"The data set {name!r} has no column {column!r}.") from None
    except (OSError, ValueError) as error:
        raise TextError(f"The data set {name!r} cannot be read: {first_line(error)}.") from None


def _join(pieces: Iterator[str], source: str) -> str:
    taken: dict[str, None] = {}  # a document that comes again with each of its questions would be on both sides
    size = 0
    for piece in islice(pieces, 1_000_000):
        size += 0 if piece in taken else len(piece)
        taken[piece] = None
        if size > MAX_CHARACTERS:
            break
    if not taken:
        raise TextError(f"{source}: no records.")
    return "\n\n".join(taken)
