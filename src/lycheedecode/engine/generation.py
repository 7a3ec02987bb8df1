"""What goes into and comes out of a generation: prompts, stop conditions, pieces of text, results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from .sampling import TokenText

PromptLike = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or a chat: messages with `role` and `content`."""
FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        token_ids: the new tokens, the one that ended the sequence included.
        text: their text without special tokens, up to a stop string; None without a tokenizer.
        finish_reason: `eos` (an end token), `stop` (a stop string) or `length`.
        prompt_tokens: tokens of the prompt.
        prefill_seconds: time until the first token could be drawn, for the whole batch.
        decode_seconds: time in decode steps until this sequence ended.
        kv_bytes_per_token: mean bytes of the KV cache that a decode step read for this sequence.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    kv_bytes_per_token: float

    @property
    def tokens_per_second(self) -> float:
        """Decode steps a second; the first token comes from the prefill and does not count."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the speed included."""
        return {**asdict(self), "token_ids": list(self.token_ids), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Piece:
    """Text that became certain, and, with the last piece of a sequence, what was generated in all."""

    sequence: int
    text: str
    generation: Generation | None = None


class Progress:
    """One sequence while it is generated."""

    def __init__(self, tokenizer: Any, ends: set[int], stop: Sequence[str], max_new_tokens: int) -> None:
        if stop and (tokenizer is None or not all(stop)):
            raise ConfigError("Stop strings must not be empty, and need a tokenizer.")
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._ends = ends
        self._most = max_new_tokens
        self._text = TokenText(tokenizer, stop)
        self._has_text = tokenizer is not None

    @property
    def text(self) -> str | None:
        return self._text.text if self._has_text else None

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that it settles, and sets `finish_reason` when it is the last."""
        self.token_ids.append(token_id)
        piece = self._text.push(token_id)
        if self._text.stopped:
            self.finish_reason = "stop"
        elif token_id in self._ends:
            self.finish_reason = "eos"
        elif len(self.token_ids) >= self._most:
            self.finish_reason = "length"
        return piece + self._text.finish() if self.finish_reason else piece


class Coming:
    """Token ids `[B]` on their way to the host; what the device was given to do after them does not delay them."""

    def __init__(self, token_ids: Tensor) -> None:
        self._host, self._arrived = token_ids, None
        if token_ids.is_cuda:
            self._host = torch.empty_like(token_ids, device="cpu", pin_memory=True)
            self._host.copy_(token_ids, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[int]:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def encode(prompts: PromptLike | Sequence[PromptLike], tokenizer: Any, chat: bool) -> list[list[int]]:
    """Token ids of one or several prompts.

    Raises:
        ValueError: text without a tokenizer, or a chat without a chat template.
    """
    batch = [prompts] if _is_one(prompts) else prompts
    return [_encode_one(prompt, tokenizer, chat) for prompt in batch]


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, Mapping)))


def _encode_one(prompt: PromptLike, tokenizer: Any, chat: bool) -> list[int]:
    if not isinstance(prompt, str) and not _is_one(prompt):
        return list(prompt)
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        return list(prompt)
    if tokenizer is None:
        raise InputError("Text prompts need a tokenizer.")
    if isinstance(prompt, str) and not chat:
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise InputError("This tokenizer has no chat template.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The end tokens of a model and its tokenizer."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(said) if isinstance(said, (list, tuple)) else {said}
    ends.add(getattr(tokenizer, "eos_token_id", None))
    return ends - {None}
