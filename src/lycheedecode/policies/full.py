"""Full attention: every head reads everything. The baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..attention import FullAttention
from ..models.shape import ModelShape
from .base import Decoding, Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Full attention; of the config only `correction_every` and `step_weights` matter."""

    has_budget: ClassVar[bool] = False
    has_blocks: ClassVar[bool] = False

    def on(self, shape: ModelShape) -> Decoding:
        """See `Policy`."""
        return Decoding(FullAttention(len(shape.global_layers), shape.num_kv_heads), self.config)
