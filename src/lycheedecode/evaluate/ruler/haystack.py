"""What facts are hidden in: running text, repeated sentences, other facts, documents."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from ...prompts.text import NOISE, TextError
from .questions import QuestionSet, read_hotpotqa, read_squad

_FEWEST_WORDS = 100
_LONGEST_WORD = 30
"""What is longer is no word but a table or a ruled line, with tokens by the dozen."""
_ENDS = (".", "!", "?", "\N{IDEOGRAPHIC FULL STOP}", "\N{FULLWIDTH EXCLAMATION MARK}", "\N{FULLWIDTH QUESTION MARK}")
_CLAUSE = re.compile(r"[^\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]+[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]*")
"""Up to the commas and full stops of scripts that put no spaces between words."""


def _pieces(text: str) -> Iterator[str]:
    """The words of a text, clauses where it has no spaces."""
    for word in text.split():
        parts = [word] if len(word) <= _LONGEST_WORD else _CLAUSE.findall(word)
        yield from (part for part in parts if len(part) <= _LONGEST_WORD)


class Sources:
    """Texts and question sets, each read when it is first asked for.

    Args:
        text: running text for haystacks and words.
        length: tokens of the items that are made of them.
        data: folder of question sets.
    """

    def __init__(self, text: str, length: int, data: Path | None = None) -> None:
        self.prose = list(_pieces(text))
        if len(self.prose) < _FEWEST_WORDS:
            raise TextError(
                f"RULER's haystacks need a text of {_FEWEST_WORDS} words or more, of 30 characters at most each; this "
                f"one has {len(self.prose)}."
            )
        self.length = length
        self.noise = NOISE.split()
        self._data = data

    @cached_property
    def words(self) -> list[str]:
        """Different words of the text, in any script, in lower case where it has one, in the order of their letters."""
        found = {
            word
            for word in re.findall(r"[^\W\d_]+", " ".join(self.prose))
            if 4 <= len(word) <= 12 and word == word.lower()
        }
        if len(found) < _FEWEST_WORDS:
            raise TextError(
                f"The text has {len(found)} different words of 4 to 12 letters, and this task draws from "
                f"{_FEWEST_WORDS} or more: give another text."
            )
        return sorted(found)

    @cached_property
    def squad(self) -> QuestionSet:
        return read_squad(self._data)

    @cached_property
    def hotpotqa(self) -> QuestionSet:
        return read_hotpotqa(self._data)


def running(words: list[str], size: int, start: int = 0) -> list[str]:
    """`size` words of a text from word `start` on; it begins anew at its end."""
    start %= len(words)
    taken = words[start : start + size]
    while len(taken) < size:
        taken += words[: size - len(taken)]
    return taken


def hide(facts: list[str], words: list[str], depths: list[float]) -> str:
    """Running text with facts between its sentences, each at a depth in [0, 1] of the text, in the order of depths."""
    ends = [0, *(i + 1 for i, word in enumerate(words) if word.endswith(_ENDS)), len(words)]
    text, done = [], 0
    for fact, depth in zip(facts, sorted(depths), strict=True):
        place = max(ends[max(bisect_left(ends, depth * len(words)) - 1, 0)], done)
        text += [*words[done:place], fact]
        done = place
    return " ".join(text + words[done:])


def vocabulary(words: list[str], size: int, rng: random.Random) -> list[str]:
    """`size` different words in random order; compounds of two where the text has too few, of more if need be."""
    if size <= len(words):
        return rng.sample(words, size)
    chosen, parts = dict.fromkeys(rng.sample(words, len(words))), 2
    while len(chosen) < size:
        # Of more than half of all pairs, drawing would find those that are left ever more seldom.
        parts += len(chosen) > len(words) ** parts // 2
        chosen["".join(rng.choice(words) for _ in range(parts))] = None
    return list(chosen)
