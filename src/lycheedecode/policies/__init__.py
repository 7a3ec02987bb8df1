"""What a decode step may do instead of following its plan, for comparison: one name for each, over the same operations.

    make          name -> what decodes (a `DecodeAttention`) and the settings that `Engine` needs
    match_bytes   name -> the budget at which it reads as many bytes as the plan does

All of them decode after the same dense prefill, keep the whole cache, and attend to sinks and recent tokens as the
config says. Equal budgets are not equal work: what a policy reads to find its tokens counts, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import DecodeAttention, FullAttention, HybridAttention
from ..config import HybridConfig
from ..errors import LycheeError
from ..models.routing import check_plan
from ..models.shape import ModelShape
from ..plan import Head, HeadPlan
from . import plans
from .quest import QuestAttention
from .window import WindowAttention

CORRECTION_EVERY = 32
"""Tokens between corrections of `+correction` where the config has no number."""
STEPS = 64
"""Over how many steps bytes are compared: at a single one, how full the last block is would decide."""
_EXTRAS: dict[str, dict[str, Any]] = {
    "correction": {"correction_every": CORRECTION_EVERY},
    "refresh2": {"refresh_every": 2},
    "float8": {"scan_keys": "float8"},
}
"""Settings that a name may carry."""


class PolicyError(LycheeError):
    """A policy that does not exist, or cannot be made of what was given; the message is one sentence."""


class Policy(NamedTuple):
    """What `Engine(model, tokenizer, attention=policy.attention, config=policy.config)` takes."""

    attention: DecodeAttention
    config: HybridConfig


@dataclass(frozen=True)
class _Given:
    """What policies are made of."""

    shape: ModelShape
    config: HybridConfig
    plan: HeadPlan | None
    coverage: Tensor | None
    seed: int

    @property
    def roles(self) -> list[Head]:
        """The plan's retrieval heads, where there is something to retrieve."""
        return [head for head in self.plan.retrieval if head[0] in self.shape.global_layers]

    def follow(self, plan: HeadPlan, **changes: Any) -> Policy:
        """Decode with a plan, and a config that differs in `changes`."""
        config = replace(self.config, **changes)
        return Policy(HybridAttention(plan, config, self.shape.global_layers), config)


def _full(given: _Given) -> Policy:
    shape, config = given.shape, replace(given.config, correction_every=0)
    return Policy(FullAttention(len(shape.global_layers), shape.num_kv_heads), config)


def _hybrid(given: _Given) -> Policy:
    return given.follow(given.plan)


def _paper(given: _Given) -> Policy:
    return given.follow(plans.same_index(given.roles, given.shape), retrieval_attention="full")


def _same_index(given: _Given) -> Policy:
    return given.follow(plans.same_index(given.roles, given.shape))


def _random(given: _Given) -> Policy:
    return given.follow(plans.random_roles(len(given.roles), given.shape, given.seed))


def _own_topk(given: _Given) -> Policy:
    return given.follow(HeadPlan.all_retrieval(given.shape.num_layers, given.shape.num_kv_heads))


def _kascade(given: _Given) -> Policy:
    if given.coverage is None:
        raise PolicyError("The policy 'kascade' needs the coverage of calibration prompts (identify.donors).")
    anchors = max(len(given.roles) // given.shape.num_kv_heads, 1)
    return given.follow(plans.kascade(given.coverage, given.shape, anchors))


def _tidaldecode(given: _Given) -> Policy:
    return given.follow(plans.tidaldecode(given.shape), retrieval_attention="full", block_size=1)


def _quest(given: _Given) -> Policy:
    return Policy(QuestAttention(given.config, given.shape), given.config)


def _duo(given: _Given) -> Policy:
    return Policy(WindowAttention(given.config, given.shape, given.roles), given.config)


def _streaming(given: _Given) -> Policy:
    return Policy(WindowAttention(given.config, given.shape), given.config)


class _Kind(NamedTuple):
    """How a policy is made, and what it depends on.

    Attributes:
        needs_plan: a head plan.
        fills_budget: its scores are no attention mass, so that only a budget makes sense (`top_k`, `ratio`).
        has_budget: the bytes that it reads depend on the budget.
        has_blocks: what it selects depends on the block size.
    """

    make: Callable[[_Given], Policy]
    needs_plan: bool = False
    fills_budget: bool = False
    has_budget: bool = True
    has_blocks: bool = True

    @property
    def extras(self) -> tuple[str, ...]:
        """What its name may carry."""
        scans = ("float8",) if self.has_budget and not self.fills_budget else ()
        return ("correction", *(("refresh2",) if self.has_budget else ()), *scans)


_KINDS = {
    "full": _Kind(_full, has_budget=False, has_blocks=False),
    "hybrid": _Kind(_hybrid, needs_plan=True),
    "paper": _Kind(_paper, needs_plan=True),
    "same-index": _Kind(_same_index, needs_plan=True),
    "random": _Kind(_random, needs_plan=True),
    "own-topk": _Kind(_own_topk),
    "kascade": _Kind(_kascade, needs_plan=True),
    "tidaldecode": _Kind(_tidaldecode, has_blocks=False),
    "quest": _Kind(_quest, fills_budget=True),
    "duo": _Kind(_duo, needs_plan=True, fills_budget=True),
    "streaming": _Kind(_streaming, fills_budget=True),
}
NAMES = (*_KINDS, "full+correction", *(f"hybrid+{extra}" for extra in _EXTRAS))
"""Any name may carry `+correction` (Cache Correction), what selects also `+refresh2`, what scans keys `+float8`, and
`random` a seed, as `random:3`."""


def make(
    name: str,
    *,
    shape: ModelShape,
    config: HybridConfig | None = None,
    plan: HeadPlan | None = None,
    coverage: Tensor | None = None,
) -> Policy:
    """A policy by its name.

    Args:
        name: one of `NAMES`.
        shape: of the model (`ModelShape.of`).
        config: budget, block size, strategy.
        plan: roles and donors, for policies that have them (`needs_plan`).
        coverage: for `kascade`: float `[L * Hkv, L * Hkv]` from `identify.donors.measure_coverage`. It gets as many
            anchor layers as the plan's retrieval heads would fill.

    Raises:
        PolicyError: an unknown name, a plan or coverage that is missing, a strategy that the policy does not know.
        PlanError: a plan that does not fit the model.
    """
    kind, seed, extras = _parse(name)
    config = config or HybridConfig()
    corrects = "correction_every" in extras
    if corrects and config.correction_every:
        extras |= {"correction_every": config.correction_every}
    config = replace(config, **extras)
    if kind.needs_plan and plan is None:
        raise PolicyError(f"The policy {name!r} needs a head plan.")
    if kind.fills_budget and config.selection not in ("top_k", "ratio"):
        raise PolicyError(f"The policy {name!r} fills a budget: selection must be top_k or ratio.")
    if plan is not None:
        check_plan(plan, shape)
    policy = kind.make(_Given(shape, config, plan, coverage, seed))
    if corrects:
        policy = policy._replace(config=replace(policy.config, correction_every=config.correction_every))
    return policy


def check_name(name: str) -> None:
    """Raise `PolicyError` for an unknown name; the message has the near ones and all."""
    _parse(name)


def needs_plan(name: str) -> bool:
    """Whether a policy is made of a plan."""
    return _parse(name)[0].needs_plan


def has_budget(name: str) -> bool:
    """Whether a policy's bytes depend on the budget."""
    return _parse(name)[0].has_budget


def has_blocks(name: str) -> bool:
    """Whether what a policy selects depends on the block size."""
    return _parse(name)[0].has_blocks


def _parse(name: str) -> tuple[_Kind, int, dict[str, Any]]:
    """The kind, the seed, and the settings that the name carries."""
    bare, *extras = name.split("+")
    base, colon, seed = bare.partition(":")
    known = base in _KINDS and (not colon or (base == "random" and seed.isdigit()))
    if not known or not set(extras) <= set(_KINDS[base].extras):
        near = get_close_matches(name, NAMES, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PolicyError(f"There is no policy {name!r}: {hint}There are {', '.join(NAMES)}.")
    return _KINDS[base], int(seed or 0), {key: value for extra in extras for key, value in _EXTRAS[extra].items()}


# ---------------------------------------------------------------------- equal bytes


def bytes_at(policy: Policy, shape: ModelShape, context: int, steps: int = STEPS) -> float:
    """KV bytes that a decode step reads, in bytes of one key of one head: the mean of `steps` steps, of which the first
    sees `context` tokens.

    Exact for selections that fill their budget (`top_k`, `ratio`) or hold everything.

    Raises:
        PolicyError: a strategy whose selections are known only when they are made.
    """
    attention, config = policy
    if config.selection not in ("top_k", "ratio"):
        raise PolicyError(f"What {config.selection} reads is not known beforehand: take a budget.")
    lengths = torch.linspace(context, context + steps - 1, min(steps, STEPS)).round().int()
    state = attention.allocate(len(lengths), context + steps - 1, "cpu")
    if state is not None:  # the newest blocks: the last of them, which may be in part empty, is always selected
        selections = state.selections
        held = [config.capacity_blocks(-(-length // config.block_size)) for length in lengths.tolist()]
        selections.counts[:] = torch.tensor(held)
        place = torch.arange(selections.blocks.shape[-1])
        newest = (lengths[:, None] - 1) // config.block_size - place
        selections.blocks[:] = newest.where(place < selections.counts[0, :, None], -1)
    rest = attention.refresh_every - 1
    total = torch.zeros(2, len(lengths), dtype=torch.float64)
    for read, refreshed in zip(total, (True, False), strict=True):
        attention.count_bytes(read, lengths, state, refreshed, 1)
    once, again = total.mean(1).tolist()
    mean = (once + rest * again) / (rest + 1)
    if config.correction_every:
        dense = 2 * len(shape.global_layers) * shape.num_kv_heads * float(lengths.double().mean())
        mean += (dense - mean) / config.correction_every
    return mean


def match_bytes(
    name: str,
    *,
    shape: ModelShape,
    config: HybridConfig,
    plan: HeadPlan,
    context: int,
    steps: int = STEPS,
    coverage: Tensor | None = None,
) -> HybridConfig:
    """The config whose budget, in whole blocks, lets a policy read at most what `hybrid` reads with `config`, and one
    block more would be too much; in `steps` steps of which the first sees `context` tokens.

    Raises:
        PolicyError: the policy has no budget, or reads more even with the smallest.
    """
    if not has_budget(name):
        raise PolicyError(f"The policy {name!r} has no budget.")
    allowed = bytes_at(make("hybrid", shape=shape, config=config, plan=plan), shape, context, steps)
    block = make(name, shape=shape, config=config, plan=plan, coverage=coverage).config.block_size

    def with_blocks(blocks: int) -> HybridConfig:
        return replace(config, selection="top_k", budget_ratio=None, budget_tokens=blocks * block)

    def cost(blocks: int) -> float:
        policy = make(name, shape=shape, config=with_blocks(blocks), plan=plan, coverage=coverage)
        return bytes_at(policy, shape, context, steps)

    least, most = -(-config.forced_blocks * config.block_size // block), -(-context // block)
    if least > most:
        raise PolicyError(f"A context of {context} tokens is too short to compare budgets.")
    if cost(least) > allowed:
        full = bytes_at(make("full", shape=shape), shape, context, steps)
        raise PolicyError(
            f"The policy {name!r} reads at least {cost(least) / full:.1%} of the cache at {context} tokens, but hybrid "
            f"no more than {allowed / full:.1%}."
        )
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if cost(middle) <= allowed else (least, middle - 1)
    return with_blocks(least)
