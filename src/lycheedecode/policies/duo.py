"""DuoAttention: retrieval heads are dense, all others see the first and the last tokens only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..models.shape import ModelShape
from ..plan import HeadPlan
from .base import Decoding, Policy, roles_of
from .window import WindowAttention


@dataclass(frozen=True, kw_only=True)
class Duo(Policy):
    """A plan's roles, without its donors."""

    plan: HeadPlan
    needs_plan: ClassVar[bool] = True
    fills_budget: ClassVar[bool] = True

    def on(self, shape: ModelShape) -> Decoding:
        """See `Policy`."""
        return Decoding(WindowAttention(self.config, shape, roles_of(self.plan, shape)), self.config)
