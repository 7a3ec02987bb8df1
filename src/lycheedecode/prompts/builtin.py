"""Text that every Python installation has: its manual, and the sources of its library.

Both are lists of documents in an order, and with a division, that depend on names alone: the same on every machine with
the same version of Python. A file's docstrings count as prose and its lines as code, and both lie on the same side.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

MAX_CODE = 6_000_000
"""Characters of code, both sides together: thirty prompts of 30000 tokens on either without a token twice."""

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
"""Folders that are no library, or tables of numbers, or the manual itself."""
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_LONG = 400
"""Characters from which on a docstring is prose rather than a label."""

Document = tuple[str, str]
"""Name and text."""


@lru_cache(maxsize=1)
def prose() -> tuple[Document, ...]:
    """The reference manual's topics, and the long docstrings of the library."""
    from pydoc_data import topics

    found = [(f"topic {name}", text) for name, text in topics.topics.items()]
    for name, text in _library():
        pieces = [inspect.cleandoc(piece) for piece in _DOCSTRING.findall(text) if len(piece) >= _LONG]
        if pieces:
            found.append((name, "\n\n".join(pieces)))
    return tuple(sorted(found, key=lambda document: _digest(document[0])))


@lru_cache(maxsize=1)
def code() -> tuple[Document, ...]:
    """Sources of the library, up to `MAX_CODE` characters."""
    found, size = [], 0
    for name, text in sorted(_library(), key=lambda document: _digest(document[0])):
        if size + len(text) <= MAX_CODE:
            found.append((name, f"# {name}\n{text}"))
            size += len(text)
    return tuple(found)


def is_for_evaluation(name: str) -> bool:
    """On which side of the division a document lies; its name alone decides."""
    return _digest(name)[-1] & 1 == 1


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts):
            try:
                yield name.as_posix(), path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # not all of them are UTF-8
