"""What decides how many blocks a selection holds, as kernels and operators take it."""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

from ...config import HybridConfig


class Rule(NamedTuple):
    """What a `HybridConfig` says about selections, as plain values that an operator can take."""

    strategy: str
    amount: float
    sink_tokens: int
    recent_tokens: int
    refresh_every: int
    block_size: int
    chunk_tokens: int

    @classmethod
    def of(cls, config: HybridConfig) -> Rule:
        amount = {"ratio": config.budget_ratio, "threshold": config.threshold, "top_p": config.top_p}
        rest = (getattr(config, name) for name in cls._fields[2:])
        return cls(config.strategy, float(amount.get(config.strategy) or 0.0), *rest)

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are specialised for."""
        return {
            "STRATEGY": self.strategy,
            "SINK": self.sink_tokens,
            "RECENT": self.recent_tokens,
            "LOOKAHEAD": self.refresh_every - 1,
            "BLOCK": self.block_size,
        }

    def num_blocks(self, slots: int) -> int:
        """Blocks that may exist, those of the tokens before the next selection included."""
        return ceil((slots + self.refresh_every - 1) / self.block_size)
