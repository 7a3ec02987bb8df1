"""Equal budgets are not equal work: what policies read of the KV cache, and budgets at which they read as much."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..attention import HybridAttention, HybridState
from ..config import HybridConfig
from ..models.shape import ModelShape
from ..plan import HeadPlan
from .base import Decoding, PolicyError
from .names import has_budget, make

STEPS = 64
"""Over how many steps bytes are compared: at a single one, how full the last block is would decide."""


def bytes_at(policy: Decoding, shape: ModelShape, context: int, steps: int = STEPS, itemsize: int = 2) -> float:
    """KV bytes that a decode step reads, in bytes of one key of one head: the mean of `steps` steps, of which the first
    sees `context` tokens.

    Exact for selections that fill their budget (`top_k`, `ratio`) or hold everything.

    Args:
        policy, shape, context, steps: see above.
        itemsize: bytes of a number of the cache, beside which copies in 8 or 4 bits have their own.

    Raises:
        PolicyError: a strategy whose selections are known only when they are made.
    """
    attention, config = policy
    if config.selection not in ("top_k", "ratio"):
        raise PolicyError(f"What {config.selection} reads is not known in advance: take a budget.")
    lengths = torch.linspace(context, context + steps - 1, min(steps, STEPS)).round().int()
    state = attention.allocate(len(lengths), context + steps - 1, "cpu")
    if state is not None:  # the newest blocks: the last of them, which may be in part empty, is always selected
        selections = state.selections
        in_all = [-(-length // config.block_size) for length in lengths.tolist()]
        if isinstance(attention, HybridAttention):
            held = torch.tensor([attention.row_blocks(blocks) for blocks in in_all]).T
        else:
            held = torch.tensor([config.capacity_blocks(blocks) for blocks in in_all])
        selections.counts[:] = held
        place = torch.arange(selections.blocks.shape[-1])
        newest = (lengths[:, None] - 1) // config.block_size - place
        selections.blocks[:] = newest.where(place < selections.counts[..., None], -1)
    if isinstance(state, HybridState) and state.copy is not None:
        nothing = torch.empty(len(lengths), shape.num_kv_heads, 0, shape.head_dim)
        state.copy.before_step(lambda _: (nothing, nothing), 0, False)  # how large a key of it is
    rest, key_bytes = attention.refresh_every - 1, shape.head_dim * itemsize
    total = torch.zeros(2, len(lengths), dtype=torch.float64)
    for read, refreshed in zip(total, (True, False), strict=True):
        attention.count_bytes(read, lengths, state, refreshed, key_bytes)
    once, again = (total.mean(1) / key_bytes).tolist()
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
    like: HeadPlan | None = None,
    itemsize: int = 2,
) -> HybridConfig:
    """The config whose budget, in whole blocks, lets a policy read at most what `hybrid` reads with `config`, and one
    block more would be too much; in `steps` steps of which the first sees `context` tokens.

    Args:
        name, shape, config, plan, coverage: as in `make`.
        context, steps, itemsize: as in `bytes_at`.
        like: the plan that `hybrid` has; None: `plan`.

    Raises:
        PolicyError: the policy has no budget, or reads more even with the smallest.
    """
    if not has_budget(name):
        raise PolicyError(f"The policy {name!r} has no budget.")
    held = shape, context, steps, itemsize
    allowed = bytes_at(make("hybrid", shape=shape, config=config, plan=like or plan), *held)
    block = make(name, shape=shape, config=config, plan=plan, coverage=coverage).config.block_size

    def with_blocks(blocks: int) -> HybridConfig:
        return replace(config, selection="top_k", budget_ratio=None, budget_tokens=blocks * block)

    def cost(blocks: int) -> float:
        policy = make(name, shape=shape, config=with_blocks(blocks), plan=plan, coverage=coverage)
        return bytes_at(policy, *held)

    least, most = -(-config.forced_blocks * config.block_size // block), -(-context // block)
    if least > most:
        raise PolicyError(f"A context of {context} tokens is too short to compare budgets.")
    if cost(least) > allowed:
        full = bytes_at(make("full", shape=shape), *held)
        raise PolicyError(
            f"The policy {name!r} reads at least {cost(least) / full:.1%} of the cache at {context} tokens, but hybrid "
            f"no more than {allowed / full:.1%}."
        )
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if cost(middle) <= allowed else (least, middle - 1)
    return with_blocks(least)
