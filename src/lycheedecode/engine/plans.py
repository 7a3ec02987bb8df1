"""A head plan from what users give: a plan, the name or file of one, or `auto`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import HybridConfig
from ..plan import HeadPlan

PlanLike = HeadPlan | str | None


def plan_from(plan: PlanLike, model: nn.Module, tokenizer: Any, config: HybridConfig) -> HeadPlan | None:
    """The plan that is meant.

    Args:
        plan: a plan; a name or file, as in `HeadPlan.load`; `auto`: see `identify.auto`; None stays None.
        model, tokenizer, config: what decodes, for `auto`.
    """
    if not isinstance(plan, str):
        return plan
    if plan != "auto":
        return HeadPlan.load(plan)
    # The one import upwards: identification is made of engines' parts, but here a user asks for all of it in a word.
    from ..identify.auto import auto_plan

    return auto_plan(model, tokenizer, config)
