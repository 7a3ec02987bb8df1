"""Parameters of tests: not every combination, but every pair of values."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def covering(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows with a value of each axis, in which every value meets every value of every other axis at least once.

    A fault that only three values bring about together is rare, and of three axes this is half of all rows or less.
    """
    rows = list(product(*axes))
    pairs = {row: set(combinations(enumerate(row), 2)) for row in rows}
    missing, found = set().union(*pairs.values()), []
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        found.append(best)
        missing -= pairs[best]
    return sorted(found, key=rows.index)
