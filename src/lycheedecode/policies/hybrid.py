"""Our form: retrieval heads look first, then every head attends over its donor's selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..models.shape import ModelShape
from ..plan import HeadPlan
from .base import PlanPolicy


@dataclass(frozen=True, kw_only=True)
class Hybrid(PlanPolicy):
    """Follow a plan as it is."""

    plan: HeadPlan
    needs_plan: ClassVar[bool] = True

    def head_plan(self, shape: ModelShape) -> HeadPlan:
        """See `PlanPolicy`."""
        return self.plan
