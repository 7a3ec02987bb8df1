"""What facts are hidden in: running text, repeated sentences, other facts, documents."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from functools import cached_property
from pathlib import Path

from ...prompts.text import NOISE
from .questions import QuestionSet, read_hotpotqa, read_squad


class Sources:
    """Texts and question sets, each read when it is first asked for.

    Args:
        text: running text for haystacks and words.
        length: tokens of the items that are made of them.
        data: folder of question sets.
    """

    def __init__(self, text: str, length: int, data: Path | None = None) -> None:
        # What is longer is no word but a table or a ruled line, with tokens by the dozen.
        self.prose = [word for word in text.split() if len(word) <= 30]
        self.length = length
        self.noise = NOISE.split()
        self._data = data

    @cached_property
    def words(self) -> list[str]:
        """Different words of the text, all in lower case, in alphabetical order."""
        found = {word for word in re.findall(r"\b[a-z]+\b", " ".join(self.prose)) if 4 <= len(word) <= 12}
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
    ends = [0, *(i + 1 for i, word in enumerate(words) if word.endswith((".", "!", "?"))), len(words)]
    text, done = [], 0
    for fact, depth in zip(facts, sorted(depths), strict=True):
        place = max(ends[max(bisect_left(ends, depth * len(words)) - 1, 0)], done)
        text += [*words[done:place], fact]
        done = place
    return " ".join(text + words[done:])


def vocabulary(words: list[str], size: int, rng: random.Random) -> list[str]:
    """`size` different words in random order; compounds of two where the text has too few."""
    if size <= len(words):
        return rng.sample(words, size)
    chosen = dict.fromkeys(rng.sample(words, len(words)))
    while len(chosen) < size:
        chosen[rng.choice(words) + rng.choice(words)] = None
    return list(chosen)
