"""A head plan from what users give: a plan, the name or file of one, or `auto`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..checks import shown
from ..config import HybridConfig
from ..errors import ConfigError
from ..plan import HeadPlan

PlanLike = HeadPlan | str | os.PathLike[str] | Mapping[str, Any] | None
"""A plan, the name or file of one, `auto`, or a plan's parsed JSON."""


def plan_from(plan: PlanLike, model: nn.Module, tokenizer: Any, config: HybridConfig) -> HeadPlan | None:
    """The plan that is meant.

    Args:
        plan: a plan; a name or file, as in `HeadPlan.load`; `auto`: see `identify.auto`; its JSON, parsed; None stays
            None.
        model, tokenizer, config: what decodes, for `auto`.

    Raises:
        ConfigError: something else.
        PlanError: there is no such plan, or it is not valid.
    """
    if plan is None or isinstance(plan, HeadPlan):
        return plan
    if isinstance(plan, Mapping):
        return HeadPlan.from_json(plan, source="plan")
    if not isinstance(plan, (str, os.PathLike)):
        raise ConfigError(f"plan must be a HeadPlan, the name or file of one, 'auto' or None, not {shown(plan)}.")
    if plan != "auto":
        return HeadPlan.load(plan)
    # The one import upwards: identification is made of engines' parts, but here a user asks for all of it in a word.
    from ..identify.auto import auto_plan

    return auto_plan(model, tokenizer, config)
