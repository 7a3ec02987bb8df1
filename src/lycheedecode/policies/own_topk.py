"""Every head selects for itself: the most faithful selection of a budget, and as many bytes as all keys."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.shape import ModelShape
from ..plan import HeadPlan
from .base import PlanPolicy


@dataclass(frozen=True, kw_only=True)
class OwnTopK(PlanPolicy):
    """Every head is a retrieval head."""

    def head_plan(self, shape: ModelShape) -> HeadPlan:
        """See `PlanPolicy`."""
        return HeadPlan.all_retrieval(shape.num_layers, shape.num_kv_heads)
