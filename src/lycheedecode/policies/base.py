"""What every policy has: a config, and a way to become ready for a model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from ..attention import DecodeAttention, HybridAttention
from ..config import HybridConfig
from ..errors import LycheeError
from ..models.shape import ModelShape
from ..plan import Head, HeadPlan


class PolicyError(LycheeError):
    """A policy that does not exist, or cannot be made of what was given; the message is one sentence."""


class Decoding(NamedTuple):
    """What `Engine(model, tokenizer, attention=decoding.attention, config=decoding.config)` takes."""

    attention: DecodeAttention
    config: HybridConfig


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a decode step does, for any model; subclasses are small, and have a file each.

    Attributes:
        config: budget, block size, strategy, and what else a policy honours of it.
        needs_plan: whether it is made of a head plan.
        fills_budget: whether its scores are no attention mass, so that only a budget makes sense (`top_k`, `ratio`).
        has_budget: whether the bytes that it reads depend on the budget.
        has_blocks: whether what it selects depends on the block size.
        follows_plan: whether it is a fold over a head plan, and can do what that can: scans in 8 or 4 bits, completion.
    """

    config: HybridConfig = field(default_factory=HybridConfig)

    needs_plan: ClassVar[bool] = False
    fills_budget: ClassVar[bool] = False
    has_budget: ClassVar[bool] = True
    has_blocks: ClassVar[bool] = True
    follows_plan: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.fills_budget and self.config.selection not in ("top_k", "ratio"):
            raise PolicyError(f"{name} fills a budget: selection must be top_k or ratio.")
        if self.has_budget and not self.follows_plan and self.config.completion == "centroid":
            raise PolicyError(f"{name} completes nothing: completion must be plan or none.")

    def on(self, shape: ModelShape) -> Decoding:
        """Ready for a model of this shape."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PlanPolicy(Policy):
    """A policy that is a head plan: the fold of `HybridAttention` with roles and donors of its own.

    Attributes:
        changes: settings that it has whatever the config says.
    """

    follows_plan: ClassVar[bool] = True
    changes: ClassVar[dict[str, Any]] = {}

    def head_plan(self, shape: ModelShape) -> HeadPlan:
        """Roles and donors."""
        raise NotImplementedError

    def on(self, shape: ModelShape) -> Decoding:
        """See `Policy`."""
        config = replace(self.config, **self.changes)
        return Decoding(HybridAttention(self.head_plan(shape), config, shape.global_layers), config)


def roles_of(plan: HeadPlan, shape: ModelShape) -> list[Head]:
    """A plan's retrieval heads, where there is something to retrieve."""
    return [head for head in plan.retrieval if head[0] in shape.global_layers]
