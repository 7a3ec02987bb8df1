"""A context variable that has a value while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Value = TypeVar("Value")


@contextmanager
def scoped(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """Set it for this thread and task while this is open; scopes may lie in each other."""
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)
