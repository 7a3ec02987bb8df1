"""What a head plan says of each layer under a config: which heads select, for whom, how much, and what completes it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .checks import shown
from .config import HybridConfig
from .errors import ConfigError, LycheeWarning
from .ops import Shares
from .plan import HeadPlan

_MOST_BLOCKS = 1 << 30
"""More than any sequence has, and still a number of 32 bits."""


class LayerRoles(NamedTuple):
    """What the plan says of one layer, looked up once.

    Attributes:
        retrieval, sparse: KV heads.
        first_row, num_rows: the rows of the selections that it writes.
        donor_rows: the row that each head reads.
        shares: budgets of the rows that it writes; None: one for all.
        most: blocks of the largest row that it reads; None: they are all alike.
    """

    retrieval: tuple[int, ...]
    sparse: tuple[int, ...]
    first_row: int
    num_rows: int
    donor_rows: tuple[int, ...]
    shares: Shares | None = None
    most: int | None = None

    @classmethod
    def of(cls, plan: HeadPlan, config: HybridConfig, layer: int) -> LayerRoles:
        retrieval, rows = plan.retrieval_heads(layer), plan.rows(layer)
        first, donor_rows = plan.first_row(layer), plan.donor_rows(layer)
        found = cls(retrieval, plan.sparse_heads(layer), first, len(rows), donor_rows)
        if plan.budgets is None:
            return found
        shares = shares_of(rows, retrieval, config)
        most = max(shares.budget, *map(config.share_blocks, plan.budgets[layer]))
        return found._replace(shares=shares, most=min(most, _MOST_BLOCKS))


def shares_of(rows: Sequence[tuple[int, float]], heads: Sequence[int], config: HybridConfig) -> Shares:
    """Budgets of `rows`, KV heads and factors, whose scores are those of `heads`."""
    assert config.budget_blocks is not None, "check_budgets comes first"
    budget, least = (min(blocks, _MOST_BLOCKS) for blocks in (config.budget_blocks, config.forced_blocks))
    return Shares.of_factors([heads.index(head) for head, _ in rows], [factor for _, factor in rows], budget, least)


def check_budgets(plan: HeadPlan | None, config: HybridConfig) -> None:
    """Raise `ConfigError` where a plan has budgets of heads, and the config no budget that they could multiply."""
    if plan is not None and plan.budgets is not None and config.selection != "top_k":
        raise ConfigError(
            f"The head plan's budgets of heads multiply budget_tokens: selection must be 'top_k', not "
            f"{config.selection!r}, or take a plan without budgets."
        )


def completion_factors(plan: HeadPlan, config: HybridConfig, layers: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """Factors of the KV heads of every layer in which some head is completed."""
    if config.completion == "centroid":
        return dict.fromkeys(sorted(layers), (1.0,) * plan.num_kv_heads)
    if config.completion == "none" or plan.completion is None:
        return {}
    _warn_of_other_fit(plan, config)
    return {layer: plan.completion[layer] for layer in sorted(layers) if any(plan.completion[layer])}


def _warn_of_other_fit(plan: HeadPlan, config: HybridConfig) -> None:
    """Say, once, that the plan's factors were fitted for something else."""
    made = plan.provenance.get("completion")
    if not isinstance(made, Mapping):
        return
    here = {"chunk": config.chunk_tokens, "budget_tokens": config.budget_tokens}
    other = {name: made[name] for name, value in here.items() if value and made.get(name) not in (None, value)}
    if other:
        said = " and ".join(f"{name} = {shown(value)}, not {here[name]}" for name, value in other.items())
        said = f"The head plan's completion was fitted for {said}; it is used unchanged."
        warnings.warn(said, LycheeWarning, stacklevel=4)
