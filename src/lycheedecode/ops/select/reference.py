"""The definition of a selection, in plain PyTorch."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import PARTS, HybridConfig
from ..types import EVERYTHING, KV, Selections, Shares


def select_blocks(
    scores: Tensor,
    kv: KV,
    config: HybridConfig,
    out: Selections,
    limits: Tensor | None = None,
    shares: Shares | None = None,
) -> None:
    capacity = out.blocks.shape[-1]
    if kv.lengths is None and kv.starts is None:
        exists, forced = _blocks_of_full_slots(kv.slots, config, scores.device)
    else:
        exists, forced = _blocks_of(kv.token_counts(), kv.slots, config)
    if shares is not None:
        scores = scores[list(shares.heads)]
    scores = F.pad(scores, (0, exists.shape[-1] - scores.shape[-1]))
    ranked = scores.masked_fill(forced, inf).masked_fill_(~exists, -inf)
    value, chosen = ranked.sort(dim=-1, descending=True, stable=True)
    value, chosen = value[..., :capacity], chosen[..., :capacity]

    keep = value > -inf
    if config.selection == "ratio" and config.budget_ratio is not None:
        wanted = torch.ceil(config.budget_ratio * exists.sum(-1, keepdim=True))
        keep &= (torch.arange(value.shape[-1], device=value.device) < wanted) | (value == inf)
    elif config.selection == "threshold" and config.threshold is not None:
        keep &= value >= config.threshold
    elif config.selection == "top_p" and config.top_p is not None:
        mass = scores.gather(-1, chosen).masked_fill(~keep, 0.0)
        keep &= (mass.cumsum(-1) - mass < config.top_p) | (value == inf)
    if shares is not None:
        limits_of_rows = _most_blocks(exists.sum(-1), shares, limits)  # [R, B]
        keep &= torch.arange(value.shape[-1], device=value.device) < limits_of_rows[..., None]
    elif limits is not None:
        keep &= torch.arange(value.shape[-1], device=value.device) < limits[:, None]

    out.blocks[..., : value.shape[-1]] = chosen.masked_fill_(~keep, -1)
    out.blocks[..., value.shape[-1] :] = -1
    torch.sum(keep, -1, dtype=torch.int32, out=out.counts)
    if limits is not None:
        out.counts.masked_fill_(limits == EVERYTHING, EVERYTHING)
    if out.taken is not None:
        out.count_taken(config.chunk_tokens // config.block_size)


def _most_blocks(exist: Tensor, shares: Shares, limits: Tensor | None) -> Tensor:
    """Most blocks of every row, int64 `[R, B]`, for sequences that have so many."""
    parts = torch.tensor(shares.parts, device=exist.device)[:, None]
    budget = torch.full_like(exist, shares.budget) if limits is None else limits
    share = ((budget * parts + PARTS - 1) // PARTS).clamp(min=shares.least)
    share = torch.where(exist <= budget, exist, share)
    return share.masked_fill(budget == EVERYTHING, 0)


def _blocks_of(lengths: Tensor, slots: int, config: HybridConfig) -> tuple[Tensor, Tensor]:
    """Which blocks a selection may hold, and which it must, bool `[B, N]` each, for sequences of `lengths` tokens."""
    size, lookahead = config.block_size, config.refresh_every - 1
    lengths = lengths[:, None]
    block = torch.arange(ceil((slots + lookahead) / size), device=lengths.device)
    exists = (block * size < lengths + lookahead) & (lengths > 0)
    forced = exists & ((block * size < config.sink_tokens) | ((block + 1) * size > lengths - config.recent_tokens))
    return exists, forced


@lru_cache(maxsize=4)
def _blocks_of_full_slots(slots: int, config: HybridConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same, `[1, N]`, where every slot holds a token: all layers of a step ask the same."""
    return _blocks_of(torch.tensor([slots], device=device), slots, config)
