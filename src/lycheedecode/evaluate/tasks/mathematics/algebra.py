"""Algebra by math-verify, for single expressions that are spelled alike already."""

from __future__ import annotations

import logging
import re
import threading
from functools import lru_cache

from .values import value

_SECONDS = 5
_MOST_CHARACTERS = 200
_MOST_EXPONENT = 64
_HEAVY = re.compile(r"\\(?:sum|prod|int|lim|iint|oint|bigcup|bigcap)(?![a-zA-Z])")
_EXPONENT = re.compile(r"\^\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")


@lru_cache(maxsize=4096)
def is_equal(one: str, two: str) -> bool:
    """Whether two expressions or equations are equal for math-verify; False for what it could not do in seconds.

    Its limit of time works in a process's main thread alone; sizes are limited everywhere.
    """
    if not (_is_small(one) and _is_small(two)):
        return False
    import math_verify

    for name in ("math_verify", "math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    sides = [math_verify.parse(f"${text}$", parsing_timeout=seconds) for text in (two, one)]
    if not all(sides):
        return False
    # A side that it could not read is a text alone: two texts are compared as such already.
    if any(isinstance(side[0], str) for side in sides):
        return False
    return bool(math_verify.verify(sides[0][:1], sides[1][:1], timeout_seconds=seconds))


def _is_small(text: str) -> bool:
    """Whether an expression can be simplified in no time: powers, factorials and binomials of small numbers only."""
    if len(text) > _MOST_CHARACTERS or _HEAVY.search(text):
        return False
    for exponent in _EXPONENT.findall(text):
        number = value(exponent)
        if number is not None and not -_MOST_EXPONENT <= number <= _MOST_EXPONENT:
            return False
        if number is None and not re.search("[a-zA-Z]", exponent):
            return False
        if "^" in exponent and re.search(r"\d{2}", exponent):
            return False
    large = re.search(r"\d{3}", text)
    return not (large and ("!" in text or "binom" in text))
