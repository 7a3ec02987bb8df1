"""Kascade: all heads of some anchor layers retrieve, and serve the best-covered heads of the layers that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..models.shape import ModelShape
from ..plan import HeadPlan
from . import plans
from .base import PlanPolicy, roles_of


@dataclass(frozen=True, kw_only=True)
class Kascade(PlanPolicy):
    """As many anchor layers as a plan's retrieval heads would fill.

    Attributes:
        coverage: float `[L * Hkv, L * Hkv]` from `identify.donors.measure_coverage`.
    """

    plan: HeadPlan
    coverage: Tensor
    needs_plan: ClassVar[bool] = True

    def head_plan(self, shape: ModelShape) -> HeadPlan:
        """See `PlanPolicy`."""
        anchors = max(len(roles_of(self.plan, shape)) // shape.num_kv_heads, 1)
        return plans.kascade(self.coverage, shape, anchors)
