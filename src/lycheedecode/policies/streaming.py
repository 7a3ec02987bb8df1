"""StreamingLLM: every head sees the first and the last tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..models.shape import ModelShape
from .base import Decoding, Policy
from .window import WindowAttention


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Sinks and a window."""

    fills_budget: ClassVar[bool] = True

    def on(self, shape: ModelShape) -> Decoding:
        """See `Policy`."""
        return Decoding(WindowAttention(self.config, shape), self.config)
