"""Logits -> tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The default is greedy.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens that holds this probability, in (0, 1].
        seed: makes the draw reproducible; None draws anew every time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be at least 0, not {self.temperature}.")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], not {self.top_p}.")


class Sampler:
    """Draws one token a sequence, and remembers its random state."""

    def __init__(self, sampling: Sampling, device: torch.device | str) -> None:
        self._sampling = sampling
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """float `[B, V]` -> int64 `[B]`."""
        if self._sampling.temperature == 0:
            return logits.argmax(-1)
        kept = _keep_likely(logits.float() / self._sampling.temperature, self._sampling)
        return torch.multinomial(kept.softmax(-1), 1, generator=self._generator)[:, 0]


def _keep_likely(logits: Tensor, sampling: Sampling) -> Tensor:
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        mass = ranked.softmax(-1)
        beyond = mass.cumsum(-1) - mass >= sampling.top_p  # the token that crosses top_p stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return logits


class TokenText:
    """Token ids of one sequence -> text, a piece at a time, until a stop string.

    A piece never ends inside a UTF-8 character, and never shows the beginning of what may become a stop string.

    Args:
        tokenizer: None gives no text.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: object | None, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._settled = 0
        self._known = ""
        self._context = 0
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token settles, often empty; sets `stopped` when a stop string is complete."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def finish(self) -> str:
        """The text that was held back."""
        return "" if self.stopped else self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self._tokenizer is None:
            return ""
        self._decode(final)
        found = [at for at in (self._known.find(stop, len(self.text)) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._known) - (0 if final else _overlap(self._known, self._stop)))

    def _decode(self, final: bool) -> None:
        """Append to `_known` what the newest tokens add.

        Tokens are decoded together with a few before them, because a tokenizer may drop the space that starts a text.
        """
        before = self._decoded(self._context, self._settled)
        now = self._decoded(self._context, len(self._ids))
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return  # half a character; the next token may complete it
        self._known += now[len(before) :]
        self._context, self._settled = self._settled, len(self._ids)

    def _decoded(self, first: int, last: int) -> str:
        return self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True)  # type: ignore[attr-defined]

    def _release(self, end: int) -> str:
        piece = self._known[len(self.text) : end]
        self.text += piece
        return piece


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    return max(
        (size for word in stop for size in range(1, min(len(word), len(text)) + 1) if text.endswith(word[:size])),
        default=0,
    )
