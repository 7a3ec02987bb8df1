"""TidalDecode: the first layers are dense, one selects single tokens for those that follow, and one selects again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..models.shape import ModelShape
from ..plan import HeadPlan
from . import plans
from .base import PlanPolicy


@dataclass(frozen=True, kw_only=True)
class TidalDecode(PlanPolicy):
    """Layers that select, as its authors place them."""

    has_blocks: ClassVar[bool] = False
    changes: ClassVar[dict[str, Any]] = {"retrieval_attention": "full", "block_size": 1}

    def head_plan(self, shape: ModelShape) -> HeadPlan:
        """See `PlanPolicy`."""
        return plans.tidaldecode(shape)
