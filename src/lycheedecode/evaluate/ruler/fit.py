"""Items, and the largest one that fits a number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import LycheeError

_SLACK = 2
"""Tokens that may stay unused before another size is tried, and a thousandth of long items."""
_TRIES = 12


class TaskLengthError(LycheeError):
    """A context that is too short for a task; the message is one sentence."""


@dataclass
class Item:
    """A question about a long text.

    Attributes:
        text: the user's words: task, haystack, question.
        prefix: how the answer begins.
        answers: what a right answer contains.
        match: `all` of them are asked for, or `any` one will do.
    """

    text: str
    prefix: str
    answers: list[str]
    match: str = "all"


class Fitter:
    """Finds how much haystack an item can take; what it learns from one item makes the next ones quick.

    Args:
        count: tokens of an item.
        limit: most tokens of an item.
        what: the item in words, for errors.
    """

    def __init__(self, count: Callable[[Item], int], limit: int, what: str) -> None:
        self._count, self._limit, self._what = count, limit, what
        self._size: int | None = None

    def longest(self, build: Callable[[int], Item]) -> Item:
        """The largest `build(size)` within the limit, up to a unit of its haystack or a thousandth of the limit.

        Sizes are counted in units of the haystack.

        `build` may stop growing when it runs out of text.
        """
        low, best = 0, build(0)
        base = tokens = self._count(best)
        if tokens > self._limit:
            raise TaskLengthError(f"{self._what} has no room: the question alone takes {tokens} of {self._limit}.")
        high: int | None = None
        slack = max(self._limit // 1000, _SLACK)
        size, before = self._size or max((self._limit - base) // 2, 1), (0, base)
        for _ in range(_TRIES):
            item = build(size)
            found = self._count(item)
            if found > self._limit:
                high = size
            else:
                exhausted = found == tokens and low > 0
                low, best, tokens = size, item, found
                if exhausted:
                    break
            if self._limit - tokens <= slack or high == low + 1:
                break
            # Along the line through the last two sizes, to half the slack: how many tokens a word has varies.
            per_unit = (found - before[1]) / (size - before[0]) or 1.0
            before = size, found
            size += round((self._limit - slack / 2 - found) / per_unit)
            size = max(size, low + 1) if high is None else min(max(size, low + 1), high - 1)
        self._size = max(low, 1)
        return best
