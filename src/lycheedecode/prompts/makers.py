"""Prompts over long text: its plain continuation, and answers hidden in it (passkeys and chains of assignments).

A prompt has exactly the length that was asked for, so that prompts of one cell form a batch without padding. Text is
divided once (`text.load_side`), so no evaluation prompt shares text with identification.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..checks import check_types, is_count
from ..errors import ConfigError, InputError
from .text import NOISE, Split, TextError, load_side, name_of

Task = Literal["passkey", "multi_hop", "continuation"]

_NAMES = """
Alice Boris Clara David Elena Felix Grace Henry Irene Jonas Karin Louis Maria
Nadia Oscar Paula Quinn Rosa Simon Tessa Ursula Viktor Wanda Xavier Yvonne Zoltan
"""
_MARK = "<<haystack>>"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the answer to teach, and what a right answer must contain (nothing, where no answer is right)."""

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
        self._tokenizer, self._text, self._split = tokenizer, text, split
        pieces = [piece for document in load_side(text, split) for piece in _pieces(document)]
        encoded = tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids  # in parallel
        self._filler = [token for piece in encoded for token in piece]
        self._head, self._tail = self._frame()
        self._bos = self._begin()

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

    def continuation(self, length: int, tokens: int, rng: random.Random, where: tuple[int, int] = (0, 1)) -> Prompt:
        """Plain text; the answer is the `tokens` tokens that follow it. No chat template: the text is in the middle.

        Args:
            length: of the prompt, the tokenizer's beginning-of-sequence token included where it has one.
            tokens: of the answer.
            rng: says where the text begins.
            where: `(i, n)`: inside the i-th of n stretches of the text, so that n prompts spread over all of it.
        """
        size = length - len(self._bos)
        share = (where[0] + rng.random()) / where[1]
        text = self._window(size + tokens, lambda starts: int(share * starts))
        return Prompt(tuple(self._bos + text[:size]), tuple(text[size:]), ())

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
        bos = [] if self._head else self._bos  # a chat template has its own
        head = bos + self._encode(f"{self._head}{task}\n\n")
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
        return self._window(size, rng.randrange)

    def _window(self, size: int, choose: Callable[[int], int]) -> list[int]:
        """`size` tokens of the text from a place that `choose` finds, given how many there are."""
        if size > len(self._filler):
            purpose = "identification" if self._split == "identify" else "evaluation"
            raise TextError(
                f"A prompt needs {size} tokens of text, but what {purpose} may use of {self._text!r} has "
                f"{len(self._filler)}: prompts that are {size - len(self._filler)} tokens shorter would fit."
            )
        start = choose(len(self._filler) - size + 1)
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

    def _begin(self) -> list[int]:
        """The token that the tokenizer itself puts before a text, if it puts one."""
        ids, bos = list(self._tokenizer("a", verbose=False).input_ids), getattr(self._tokenizer, "bos_token_id", None)
        return ids[:1] if bos is not None and ids[0] == bos else []

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@dataclass(frozen=True)
class Cell:
    """A kind of prompt: what is hidden in what, and how long the prompt is.

    Attributes:
        text: source of the filler, as in `load_text`.
        length: tokens of the prompt.
        task: `passkey`, `multi_hop`, or `continuation`, which hides nothing.
        count: passkeys hidden, hops of the chain, or tokens that follow.

    Raises `ConfigError` for a continuation of less than two tokens, and for a number of facts that no prompt has.
    """

    text: str
    length: int
    task: Task = "passkey"
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Cell:
        """From `TEXT:TOKENS:TASK:COUNT`, as `prose:2048:passkey:5`."""
        source, *numbers = text.rsplit(":", 3)
        if len(numbers) != 3 or not all(map(is_count, numbers[::2])):
            raise ConfigError(f"{text!r} is not TEXT:TOKENS:TASK:COUNT, for instance prose:2048:passkey:5.")
        if numbers[1] not in ("continuation", "passkey", "multi_hop"):
            raise ConfigError(f"{text!r}: the task must be continuation, passkey or multi_hop, not {numbers[1]!r}.")
        return cls(source, int(numbers[0]), numbers[1], int(numbers[2]))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        check_types(self)
        if self.task == "continuation" and self.count < 2:
            raise ConfigError(f"A continuation has at least 2 tokens, not {self.count}.")
        most = {"passkey": len(_NAMES.split()), "multi_hop": max(self.length, 1)}.get(self.task)
        if most is not None and not 1 <= self.count <= most:
            what = "passkeys" if self.task == "passkey" else "hops"
            raise ConfigError(f"A prompt of {self.length} tokens has 1 to {most} {what}, not {self.count}.")

    def __str__(self) -> str:
        if self.task == "continuation":
            return f"{self.length} tokens of {name_of(self.text)}, {self.count} tokens continued"
        what = f"{self.count} passkey{'s' * (self.count > 1)}" if self.task == "passkey" else f"{self.count} hops"
        return f"{self.length} tokens of {name_of(self.text)}, {what}"

    def make(self, makers: dict[str, PromptMaker], number: int, rng: random.Random) -> list[Prompt]:
        """`number` prompts of this kind."""
        maker = makers[self.text]
        if self.task == "continuation":
            return [maker.continuation(self.length, self.count, rng, (i, number)) for i in range(number)]
        make = maker.passkeys if self.task == "passkey" else maker.multi_hop
        return [make(self.length, self.count, rng) for _ in range(number)]


class _OfText(Protocol):
    """A kind of prompts that is made of a text."""

    @property
    def text(self) -> str: ...


def makers_for(tokenizer: Any, cells: Sequence[_OfText], split: Split) -> dict[str, PromptMaker]:
    """One maker for each text that the cells name."""
    return {text: PromptMaker(tokenizer, text, split) for text in sorted({cell.text for cell in cells})}


def _pieces(document: str, size: int = 50_000) -> Iterator[str]:
    """A document in pieces of about `size` characters that end where lines do: they are encoded side by side."""
    start = 0
    while start < len(document):
        end = document.find("\n", start + size) + 1 or len(document)
        yield document[start:end] + ("\n\n" if end == len(document) else "")
        start = end


def _number(rng: random.Random, digits: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(digits))


__all__ = ["NOISE", "Cell", "Prompt", "PromptMaker", "Split", "makers_for"]
