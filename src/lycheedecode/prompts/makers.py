"""Prompts whose answers lie hidden in long text: passkeys and chains of assignments.

A prompt has exactly the length that was asked for, so that prompts of one cell form a batch without padding. Text is
divided once: identification draws from the first four fifths, evaluation from the last, so no evaluation prompt shares
filler with identification.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from .text import NOISE, load_text

Split = Literal["identify", "evaluate"]

_NAMES = """
Alice Boris Clara David Elena Felix Grace Henry Irene Jonas Karin Louis Maria
Nadia Oscar Paula Quinn Rosa Simon Tessa Ursula Viktor Wanda Xavier Yvonne Zoltan
"""
_MARK = "<<haystack>>"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the answer to teach, and what a right answer must contain."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    expected: tuple[str, ...]

    def is_solved_by(self, text: str) -> bool:
        """Whether `text` contains everything that was hidden."""
        return all(value in text for value in self.expected)


class PromptMaker:
    """Makes prompts over one text.

    Args:
        tokenizer: the model's tokenizer; its chat template is used when it has one.
        text: a source as in `load_text`.
        split: which part of the text to draw filler from.
    """

    def __init__(self, tokenizer: Any, text: str, split: Split = "identify") -> None:
        self._tokenizer = tokenizer
        self._filler = self._encode(load_text(text))
        if text != "noise":
            cut = len(self._filler) * 4 // 5
            self._filler = self._filler[:cut] if split == "identify" else self._filler[cut:]
        self._head, self._tail = self._frame()

    def passkeys(self, length: int, count: int, rng: random.Random, digits: int = 5) -> Prompt:
        """`count` numbers hidden in `length` tokens; the question asks for all of them.

        Raises `ValueError` when the prompt or the text is too short for that.
        """
        if count == 1:
            value = _number(rng, digits)
            facts = [f"\nThe pass key is {value}. Remember it. {value} is the pass key.\n"]
            return self._assemble(
                "There is a pass key hidden in the text below. Find it and memorize it.",
                facts, "Which number is the pass key?", f"The pass key is {value}.", (value,), length, rng,
            )  # fmt: skip
        names = rng.sample(_NAMES.split(), count)
        values = [_number(rng, digits) for _ in names]
        facts = [f"\nThe pass key of {name} is {value}.\n" for name, value in zip(names, values, strict=True)]
        answer = "\n".join(fact.strip() for fact in facts)
        return self._assemble(
            "There are pass keys hidden in the text below. Find them and memorize them.",
            facts, f"What are the pass keys of {', '.join(names)}?", answer, tuple(values), length, rng,
        )  # fmt: skip

    def multi_hop(self, length: int, hops: int, rng: random.Random) -> Prompt:
        """A chain of `hops` variables, each assigned from the one before; the question asks for the whole chain."""
        names = ["".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(4)) for _ in range(hops)]
        value = _number(rng, 5)
        facts = [
            f"\nThe variable {name} is set to {value if i == 0 else names[i - 1]}.\n" for i, name in enumerate(names)
        ]
        return self._assemble(
            "Variables are set in the text below. Keep track of them.",
            facts, f"Which variables have the value {value}?",
            f"The variables {', '.join(names)} have the value {value}.", tuple(names), length, rng, ordered=True,
        )  # fmt: skip

    def open_ended(self, length: int, rng: random.Random) -> Prompt:
        """Text, and a request with a long answer; nothing is hidden, and no answer is known."""
        return self._assemble(
            "Read the text below.",
            [],
            "Explain what the text says, step by step and in many words.",
            "",
            (),
            length,
            rng,
        )

    def _assemble(
        self, task: str, facts: list[str], question: str, answer: str, expected: tuple[str, ...], length: int,
        rng: random.Random, ordered: bool = False,
    ) -> Prompt:  # fmt: skip
        head = self._encode(f"{self._head}{task}\n\n")
        tail = self._encode(f"\n\n{question}{self._tail}")
        pieces = [self._encode(fact) for fact in facts]
        filler = self._take(length - len(head) - len(tail) - sum(map(len, pieces)), rng)
        cuts = sorted(rng.randrange(len(filler) + 1) for _ in pieces)
        if not ordered:
            rng.shuffle(pieces)
        ends = [*cuts, len(filler)]
        body = filler[: ends[0]]
        for piece, start, end in zip(pieces, cuts, ends[1:], strict=True):
            body += piece + filler[start:end]
        return Prompt(tuple(head + body + tail), tuple(self._encode(answer)), expected)

    def _take(self, size: int, rng: random.Random) -> list[int]:
        if size < 0:
            raise InputError(f"The prompt is {-size} tokens too short for its question and hidden facts.")
        if size > len(self._filler):
            raise InputError(f"The prompt needs {size} tokens of filler, but the text has {len(self._filler)}.")
        start = rng.randrange(len(self._filler) - size + 1)
        return self._filler[start : start + size]

    def _frame(self) -> tuple[str, str]:
        """What the chat template puts before and after the user's words."""
        if not getattr(self._tokenizer, "chat_template", None):
            return "", "\n"
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        head, _, tail = rendered.partition(_MARK)
        return head, tail

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@dataclass(frozen=True)
class Cell:
    """A kind of prompt: what is hidden in what, and how long the prompt is.

    Attributes:
        text: source of the filler, as in `load_text`.
        length: tokens of the prompt.
        task: `passkey` or `multi_hop`.
        count: passkeys hidden, or hops of the chain.
    """

    text: str
    length: int
    task: Literal["passkey", "multi_hop"] = "passkey"
    count: int = 1

    def __str__(self) -> str:
        what = f"{self.count} passkey{'s' * (self.count > 1)}" if self.task == "passkey" else f"{self.count} hops"
        return f"{self.length} tokens of {self.text}, {what}"

    def make(self, makers: dict[str, PromptMaker], number: int, rng: random.Random) -> list[Prompt]:
        """`number` prompts of this kind."""
        maker = makers[self.text]
        make = maker.passkeys if self.task == "passkey" else maker.multi_hop
        return [make(self.length, self.count, rng) for _ in range(number)]


def makers_for(tokenizer: Any, cells: Sequence[Cell], split: Split) -> dict[str, PromptMaker]:
    """One maker for each text that the cells name."""
    return {text: PromptMaker(tokenizer, text, split) for text in sorted({cell.text for cell in cells})}


def _number(rng: random.Random, digits: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(digits))


__all__ = ["NOISE", "Cell", "Prompt", "PromptMaker", "makers_for"]
