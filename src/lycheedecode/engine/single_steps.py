"""Generation token by token, a decode step each; `verify` has the rounds of lossless decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .context import Context
from .generation import PendingTokens, refuse_nan
from .sampling import Sampler, Sampling

if TYPE_CHECKING:
    from .engine import Engine


class SingleSteps:
    """A token a step for every sequence, until no more are asked for; the alternative to `Rounds`."""

    def __init__(self, engine: Engine, context: Context, sampling: Sampling, most: int) -> None:
        self._engine, self._context, self._most = engine, context, most
        self._sampler = Sampler(sampling, engine.device)
        self._logits = context.logits
        self._next_ids = self._sampler(self._logits)
        engine._decoder.prepare(context, self._next_ids)

    def run(self) -> Iterator[tuple[list[list[int]], float]]:
        """The new token of every sequence, and the seconds until then."""
        next_ids, seconds, drawn = self._next_ids, 0.0, 1
        while True:
            began = time.perf_counter()
            pending, following = PendingTokens(next_ids), None
            if next_ids.is_cuda and drawn < self._most:  # the GPU need not wait for what the host makes of a token
                following, drawn = self._step(next_ids, drawn), drawn + 1
            token_ids = pending.tolist()
            seconds += time.perf_counter() - began
            yield [[token_id] for token_id in token_ids], seconds
            began = time.perf_counter()
            if following is None:
                following, drawn = self._step(next_ids, drawn), drawn + 1
            next_ids = following
            seconds += time.perf_counter() - began

    def check(self, sequence: int, token_ids: Sequence[int]) -> None:
        """Refuse tokens that were drawn from NaN logits."""
        refuse_nan(token_ids[-1], self._logits[sequence])

    def finish(self, sequence: int) -> None:
        """Finished sequences stay in the batch; their tokens are dropped."""

    def report(self, sequence: int) -> dict[str, Any]:
        """Statistics of one sequence, for its `Generation`."""
        return {"kv_bytes_per_token": float(self._context.kv_bytes[sequence]) / max(self._context.steps, 1)}

    def _step(self, token_ids: Tensor, drawn: int) -> Tensor:
        self._logits = self._engine.decode_one_token(self._context, token_ids)
        return self._sampler(self._logits, positions=drawn)
