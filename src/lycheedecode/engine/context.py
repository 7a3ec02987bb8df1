"""Context: prompts that were prefilled, and what belongs to them from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LycheeError
from ..models.state import ModelState
from .cache import KVCache


@dataclass
class Context:
    """Prompts that were prefilled, and what was decoded after them. Engines of one model may use it in turn.

    Passed back to `Engine.prefill`, `generate` or `stream` as `context`, it takes on new prompts, and only what it does
    not hold of them is read.

    Attributes:
        cache: keys and values of prompts and decoded tokens.
        logits: float32 `[B, V]`, of the first token after each prompt.
        prompt_lengths: tokens of each prompt.
        prefill_seconds: time that the last prefill took.
        kv_bytes: float64 `[B]`, bytes of the KV cache that decode steps have read for each sequence.
        steps: decode steps since the prompt.
        token_ids: int64 `[B, S]`, the prompts, padded on the left.
        is_long: whether positions are those of a text past the length at which the model changes them
            (`models.positions`).
        model: the model that read the prompts; None: not known.
        model_state: its parameters and buffers at that time; None: not known.
        cached_tokens: tokens of each prompt that the last prefill did not have to read.
        is_whole: whether the prompts were read to their end; an interrupt may leave them in the middle.
    """

    cache: KVCache
    logits: Tensor
    prompt_lengths: list[int]
    prefill_seconds: float
    kv_bytes: Tensor
    steps: int = 0
    token_ids: Tensor | None = None
    is_long: bool = False
    model: nn.Module | None = field(default=None, repr=False)
    model_state: ModelState | None = field(default=None, repr=False)
    cached_tokens: list[int] = field(default_factory=list)
    is_whole: bool = True
    _decoded: list[Tensor] = field(default_factory=list)
    _uncorrected: list[Tensor] = field(default_factory=list)
    _kept_steps: dict[Any, Any] = field(default_factory=dict)
    _in_step: bool = False
    _place: int = -1
    _turn: int = 0

    @property
    def padding(self) -> list[int] | None:
        """Unused slots before each prompt; None where there are none."""
        return left_padding(self.prompt_lengths)

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt, as far as it was read."""
        rows = [] if self.token_ids is None else self.token_ids.tolist()
        return [row[start:] for row, start in zip(rows, self._starts(), strict=True)]

    def take(self, token_ids: Tensor, logits: Tensor) -> None:
        """For engines: tokens int64 `[B, T]` of the prompts were read, and these are the logits after them."""
        assert self.token_ids is not None
        read = torch.cat([self.token_ids, token_ids], 1)
        lengths = [max(read.shape[1] - start, 0) for start in self._starts()]
        self.token_ids, self.logits, self.prompt_lengths = read, logits, lengths  # all or, after an interrupt, nothing

    def hold_nothing(self) -> None:
        """For engines: entries of the prompts are about to move or to be rewritten; after an interrupt none count."""
        assert self.token_ids is not None
        lengths = [0] * len(self.prompt_lengths)
        self.is_whole, self.token_ids, self.prompt_lengths = False, self.token_ids[:, :0], lengths

    @contextmanager
    def step(self) -> Iterator[None]:
        """For engines: around a decode step.

        Refused before it wrote entries, it leaves all as it was; after an interrupt some layers may have its token.
        """
        filled, decoded, uncorrected = self.cache.length, len(self._decoded), len(self._uncorrected)
        self._in_step = True
        try:
            yield
        except LycheeError:
            if self.cache.length == filled:
                del self._decoded[decoded:], self._uncorrected[uncorrected:]
                self._in_step = False
            raise
        self.steps += 1
        self._in_step = False

    def _starts(self) -> list[int]:
        return self.cache.first_slots(len(self.prompt_lengths))

    def rewind(self) -> None:
        """Forget all that was decoded; the prompts stay. A generation that is under way cannot continue."""
        self._turn += 1
        self.cache.truncate(max(self.prompt_lengths))
        self.kv_bytes.zero_()
        self.steps = 0
        self._uncorrected.clear()
        self._decoded.clear()
        self._in_step = False

    def memory(self, sequence: int) -> dict[str, Any]:
        """For engines: what a `Generation` of this sequence says of the memory that the cache takes."""
        near, far = self.cache.memory()
        asked, missed = self.cache.fetches(sequence)
        return {"bytes_on_gpu": near, "bytes_on_host": far, "miss_rate": missed / asked if asked else 0.0}

    @property
    def kept_steps(self) -> dict[Any, Any]:
        """For engines: captured steps over the cache's buffers, forgotten when these move."""
        if self._place != self.cache.place:
            self._kept_steps.clear()
            self._place = self.cache.place
        return self._kept_steps


def left_padding(lengths: Sequence[int]) -> list[int] | None:
    """Unused slots before each sequence; None where there are none."""
    longest = max(lengths)
    return [longest - length for length in lengths] if min(lengths) < longest else None
