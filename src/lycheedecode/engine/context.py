"""Context: prompts that were prefilled, and what belongs to them from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .cache import KVCache


@dataclass
class Context:
    """Prompts that were prefilled, and what was decoded after them. Engines of one model may share it, in turn.

    Attributes:
        cache: keys and values of prompts and decoded tokens.
        logits: float32 `[B, V]`, of the first token after each prompt.
        prompt_lengths: tokens of each prompt.
        prefill_seconds: time that the prefill took.
        kv_bytes: float64 `[B]`, bytes of the KV cache that decode steps have read for each sequence.
        steps: decode steps since the prompt.
        token_ids: int64 `[B, S]`, the padded prompts.
        is_long: whether the cache was made with the positions of a text past the model's turn (`models.positions`).
        model: the model that read the prompts; None: not known.
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
    _decoded: list[Tensor] = field(default_factory=list)
    _uncorrected: list[Tensor] = field(default_factory=list)
    _kept_steps: dict[Any, Any] = field(default_factory=dict)
    _place: int = -1
    _turn: int = 0

    @property
    def padding(self) -> list[int] | None:
        """Unused slots before each prompt; None where there are none."""
        longest = max(self.prompt_lengths)
        return [longest - length for length in self.prompt_lengths] if min(self.prompt_lengths) < longest else None

    def rewind(self) -> None:
        """Forget all that was decoded; the prompts stay. A generation that was still going on cannot go on."""
        self._turn += 1
        self.cache.truncate(max(self.prompt_lengths))
        self.kv_bytes.zero_()
        self.steps = 0
        self._uncorrected.clear()
        self._decoded.clear()

    def memory(self, sequence: int) -> dict[str, Any]:
        """What a `Generation` says of where the cache lies."""
        near, far = self.cache.memory()
        asked, missed = self.cache.fetches(sequence)
        return {"bytes_on_gpu": near, "bytes_on_host": far, "miss_rate": missed / asked if asked else 0.0}

    @property
    def kept_steps(self) -> dict[Any, Any]:
        """What engines keep of their steps over the cache's buffers, as long as these stay where they are."""
        if self._place != self.cache.place:
            self._kept_steps.clear()
            self._place = self.cache.place
        return self._kept_steps
