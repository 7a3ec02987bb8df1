"""The paper's donors in our form: a sparse head reuses the selection of its own index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..models.shape import ModelShape
from ..plan import HeadPlan
from . import plans
from .base import PlanPolicy, roles_of


@dataclass(frozen=True, kw_only=True)
class SameIndex(PlanPolicy):
    """A plan's roles, and donors of the same index."""

    plan: HeadPlan
    needs_plan: ClassVar[bool] = True

    def head_plan(self, shape: ModelShape) -> HeadPlan:
        """See `PlanPolicy`."""
        return plans.same_index(roles_of(self.plan, shape), shape)
