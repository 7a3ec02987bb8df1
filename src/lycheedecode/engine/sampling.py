"""Logits -> tokens, and tokens -> text.

    token = argmax(what the settings leave of logits / temperature + noise(seed, sequence, position))

The noise is Gumbel's, so the token is a draw from the softmax. It is a function of numbers that name the token's place
and of nothing else: neither of what was drawn before, nor of the neighbours in a batch, nor of the device. Two ways of
computing the same logits therefore write the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..checks import check_temperature, check_types
from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The default is greedy.

    >>> Sampling(temperature=0.7, top_p=0.9, seed=0)
    Sampling(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0, seed=0)

    Attributes:
        temperature: 0 is greedy; otherwise, from 1e-20 to 1e20, logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens that holds this probability, in (0, 1].
        min_p: keep tokens that are at least this share as probable as the most probable one, in [0, 1].
        seed: makes the draw reproducible; None makes every draw different.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_temperature("temperature", self.temperature)
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], not {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be in [0, 1], not {self.min_p}.")

    def filters(self) -> list[Callable[[None, Tensor], Tensor]]:
        """transformers' logits processors for these settings, in order; each maps `[rows, V]` to `[rows, V]`."""
        from transformers.generation import logits_process as processes

        made: list[Callable[[None, Tensor], Tensor]] = []
        if self.temperature not in (0, 1):
            made.append(processes.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            made.append(processes.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            made.append(processes.TopPLogitsWarper(self.top_p))
        if self.min_p:
            made.append(processes.MinPLogitsWarper(self.min_p))
        return made


class Sampler:
    """A token for every row of logits, as a function of the row, the seed, and where the token stands.

    Without a seed it picks one. Its launches depend on shapes alone; the seed lies on the device, so that a
    CUDA graph serves every seed.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str) -> None:
        self._greedy = sampling.temperature == 0
        self._filters = sampling.filters()
        self._seed = torch.zeros(2, dtype=torch.int32, device=device)
        self.reseed(sampling)

    def reseed(self, sampling: Sampling) -> None:
        """Take the seed of other settings, which must be the same otherwise."""
        self._seed.copy_(ops.seed_words(torch.Generator().seed() if sampling.seed is None else sampling.seed))

    def __call__(self, logits: Tensor, sequences: Tensor | None = None, positions: Tensor | int = 0) -> Tensor:
        """Draw.

        Args:
            logits: float `[..., V]`.
            sequences: int `[...]`, or something that expands to it: which prompt of the batch; None: row i of `[B, V]`
                belongs to prompt i.
            positions: int `[...]`, or something that expands to it: place of the token in its answer, from 0.

        Returns:
            int64 `[...]`.
        """
        return self.scores(logits, sequences, positions).argmax(-1)

    def scores(self, logits: Tensor, sequences: Tensor | None = None, positions: Tensor | int = 0) -> Tensor:
        """Scores float `[..., V]`, of which the drawn token has the highest; arguments as above."""
        if self._greedy:
            return logits
        shape = logits.shape[:-1]
        if sequences is None:
            sequences = torch.arange(shape[0], device=logits.device)
        if not isinstance(positions, Tensor):
            positions = torch.full((), positions, device=logits.device)
        places = [place.int().expand(shape).flatten() for place in (sequences, positions)]
        rows = logits.float().flatten(0, -2)
        for keep in self._filters:
            rows = keep(None, rows)
        return ops.add_noise(rows, self._seed, *places).unflatten(0, shape)


# ---------------------------------------------------------------------- text


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
        return self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True)

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
