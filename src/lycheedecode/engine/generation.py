"""What comes out of a generation: pieces of text, results. What goes in is in `prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.shape import ModelError, inner_model
from .sampling import TokenText

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        token_ids: the new tokens, the one that ended the sequence included.
        text: their text without special tokens, up to a stop string; None without a tokenizer.
        finish_reason: `eos` (an end token), `stop` (a stop string) or `length`.
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of these a given `context` held already.
        prefill_seconds: time until the first token could be drawn, for the whole batch.
        decode_seconds: time in decode steps until this sequence ended.
        kv_bytes_per_token: mean bytes of the KV cache that were read for a token of this sequence, drafts included.
        rounds: with `verify_every`: passes of full attention over this sequence, those without drafts included.
        drafted: tokens drafted in these rounds.
        accepted: drafts that full attention chose as well.
        bytes_on_gpu: of the whole batch's KV cache, and what is kept beside it, on the device that attends.
        bytes_on_host: of the whole batch's KV cache in host memory.
        miss_rate: share of selected blocks that were fetched from host memory, counted for every head that reads them.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    kv_bytes_per_token: float
    cached_tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    bytes_on_gpu: int = 0
    bytes_on_host: int = 0
    miss_rate: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second; the first one comes from the prefill and does not count."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the speed included."""
        return {**asdict(self), "token_ids": list(self.token_ids), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class Piece:
    """Text of one sequence, as soon as no later token can change it.

    Attributes:
        sequence: index of the prompt.
        text: what is new.
        generation: all that was generated, with the last piece of the sequence; None before.
    """

    sequence: int
    text: str
    generation: Generation | None = None


class SequenceState:
    """One sequence while it is generated."""

    def __init__(self, tokenizer: Any, ends: set[int], stop: Sequence[str], max_new_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._ends = ends
        self._most = max_new_tokens
        self._text = TokenText(tokenizer, stop)
        self._has_text = tokenizer is not None

    @property
    def text(self) -> str | None:
        return self._text.text if self._has_text else None

    def push_all(self, token_ids: Sequence[int]) -> str:
        """`push` for each of them, up to the last."""
        pieces = []
        for token_id in token_ids:
            pieces.append(self.push(token_id))
            if self.finish_reason is not None:
                break
        return "".join(pieces)

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


class PendingTokens:
    """Token ids `[B]` on their way to the host, which later work on the device does not delay."""

    def __init__(self, token_ids: Tensor) -> None:
        self._host, self._arrived = token_ids, None
        if token_ids.is_cuda:
            self._host = torch.empty_like(token_ids, device="cpu", pin_memory=True)
            self._host.copy_(token_ids, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def refuse_nan(token_id: int, logits: Tensor) -> None:
    """Raise `ModelError` when a token was drawn from logits `[V]` that are all NaN: it is always token 0."""
    if token_id == 0 and bool(logits.isnan().all()):
        raise ModelError(
            "The model's logits are not numbers (NaN): its weights are damaged, or overflow in this dtype; "
            "try float32 or bfloat16."
        )


def stop_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The end tokens of a model and its tokenizer."""
    said = getattr(getattr(inner_model(model), "generation_config", None), "eos_token_id", None)
    ends = [*said] if isinstance(said, (list, tuple)) else [said]
    ends.append(getattr(tokenizer, "eos_token_id", None))
    return {token for token in ends if token is not None}
