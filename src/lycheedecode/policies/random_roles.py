"""As many retrieval heads as a plan has, drawn at random; donors of the same index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..models.shape import ModelShape
from ..plan import HeadPlan
from . import plans
from .base import PlanPolicy, roles_of


@dataclass(frozen=True, kw_only=True)
class RandomRoles(PlanPolicy):
    """Random roles, the same ones for the same `seed`."""

    plan: HeadPlan
    seed: int = 0
    needs_plan: ClassVar[bool] = True

    def head_plan(self, shape: ModelShape) -> HeadPlan:
        """See `PlanPolicy`."""
        return plans.random_roles(len(roles_of(self.plan, shape)), shape, self.seed)
