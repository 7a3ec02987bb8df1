"""What is compared: policies under plans, budgets and block sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import policies
from ..config import HybridConfig
from ..models.shape import ModelShape
from ..plan import HeadPlan
from ..policies.base import roles_of
from ..roles import check_budgets

POLICIES = ("hybrid", "paper", "same-index", "random", "own-topk")
"""What is compared unless asked otherwise."""


@dataclass(frozen=True)
class Variant:
    """A policy under one config.

    Attributes:
        label: names it among the others.
        policy: a name that `policies.make` knows.
        config: budget, block size, form.
        plan: roles and donors; `plan_name` says which.
        like: the plan whose bytes it is to read, where bytes are matched; None: `plan`.
        exact: it is full attention in another way, whose budget is everything.
    """

    label: str
    policy: str
    config: HybridConfig
    plan: HeadPlan | None = None
    plan_name: str | None = None
    like: HeadPlan | None = None
    exact: bool = False

    @property
    def is_calibrated(self) -> bool:
        """Whether it needs the coverage of calibration prompts."""
        return self.policy.startswith("kascade")

    def make(
        self,
        shape: ModelShape,
        coverage: Callable[[HybridConfig], Tensor] | None = None,
        match_at: int = 0,
        steps: int = policies.STEPS,
        itemsize: int = 2,
    ) -> policies.Decoding:
        """The policy, ready to decode.

        With `match_at`, its budget is the one at which `steps` steps after so many tokens read as many bytes as
        `hybrid` does with the plan `like`, over a cache of numbers of `itemsize` bytes. `coverage` is asked for at that
        budget.
        """
        config, given = self.config, dict[str, Any](shape=shape, plan=self.plan)
        if match_at and policies.has_budget(self.policy) and not self.exact:
            heads = len(shape.global_layers) * shape.num_kv_heads
            any_anchors = torch.zeros(heads, heads) if self.is_calibrated else None  # all read as much
            config = policies.match_bytes(
                self.policy, config=config, context=match_at, steps=steps, itemsize=itemsize, coverage=any_anchors,
                like=self.like, **given,
            )  # fmt: skip
        calibrated = coverage(config) if self.is_calibrated and coverage is not None else None
        return policies.make(self.policy, config=config, coverage=calibrated, **given)

    def describe(self, config: HybridConfig, shape: ModelShape) -> dict[str, Any]:
        """What a row of results is about; `config` is the one that decodes, `shape` the model's."""
        if self.exact:
            return {"policy": "rounding"}
        row: dict[str, Any] = {"policy": self.policy}
        if self.plan is not None and policies.needs_plan(self.policy):
            row |= {"plan": self.plan_name, "retrieval_heads": len(roles_of(self.plan, shape))}
        if policies.has_budget(self.policy):
            row |= {"budget_tokens": config.budget_tokens, "block_size": config.block_size}
        if config.correction_every:
            row["correction_every"] = config.correction_every
        return row


def check_policy(name: str, plans: Collection[str] | None = None) -> None:
    """Raise `PolicyError` for an unknown policy, or one that goes with a plan and cannot, or is not among `plans`."""
    policy, at, only = name.partition("@")
    policies.check_name(policy)
    if at and not policies.needs_plan(policy):
        raise policies.PolicyError(f"The policy {policy!r} has no plan: leave {at + only!r} away.")
    if at and plans is not None and only not in plans:
        raise policies.PolicyError(f"{name!r}: there is no plan {only!r} among {', '.join(plans) or 'none'}.")


def variants(
    names: Sequence[str],
    plans: Mapping[str, HeadPlan],
    config: HybridConfig,
    budgets: Sequence[int] = (),
    block_sizes: Sequence[int] = (),
    match_bytes: bool = False,
) -> list[Variant]:
    """Full attention, and every policy with every plan, budget and block size that makes a difference to it.

    Args:
        names: policies; `paper@NAME` goes with one of the plans only.
        plans: head plans by name.
        config: what is common to all.
        budgets: in tokens; none: that of `config`.
        block_sizes: none: that of `config`.
        match_bytes: budgets will be matched to the bytes of `hybrid` with the first plan.

    Raises:
        PolicyError: an unknown policy, a plan that is not among these.
        ConfigError: a plan with budgets of heads, and a config without a budget.
    """
    for name in names:
        check_policy(name, plans)
    found, like = [Variant("full", "full", config)], next(iter(plans.values()), None) if match_bytes else None
    for full_name in dict.fromkeys(names):
        name, _, only = full_name.partition("@")
        if name == "full":
            continue
        budgeted = policies.has_budget(name)
        planned = policies.needs_plan(name)
        choices = product(
            (only,) if only else (*plans,) if planned and plans else (next(iter(plans), None),),
            (budgets if budgeted else ()) or (None,),
            (block_sizes if policies.has_blocks(name) else ()) or (None,),
        )
        for plan, budget, block in choices:
            parts = [name] + [f"plan {plan}"] * (planned and len(plans) > 1)
            parts += [f"{budget} tokens"] * (budget is not None and len(budgets) > 1)
            parts += [f"blocks of {block}"] * (block is not None and len(block_sizes) > 1)
            changes: dict[str, Any] = {} if block is None else {"block_size": block}
            if budget is not None:
                changes |= {"budget_tokens": budget, "budget_ratio": None, "selection": "top_k"}
            form = replace(config, **changes)
            if name == "hybrid":
                check_budgets(plans.get(plan or ""), form)
            found.append(Variant(", ".join(parts), name, form, plans.get(plan or ""), plan, like))
    return found
