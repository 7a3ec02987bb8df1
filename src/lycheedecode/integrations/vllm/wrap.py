"""Methods of vLLM's classes that the plugin wraps, each of them once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "wrapped_by_lycheedecode"


def wrap(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by what `make` makes of it, unless that has been done before.

    A decorator of vLLM's own leaves `__wrapped__` behind, too: what is ours bears a mark.
    """
    stock = getattr(owner, name)
    if hasattr(stock, _MARK):
        return
    ours = functools.wraps(stock)(make(stock))
    setattr(ours, _MARK, True)
    setattr(owner, name, ours)
