"""The definition of a scan, in plain PyTorch."""

from __future__ import annotations

from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference_common import all_tokens, by_kv_head, existing_tokens, floats, with_sinks
from ..small_keys import SmallKeys
from ..types import KV


def scan_blocks(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    copy: SmallKeys | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    grouped = by_kv_head(query, kv)
    exists = existing_tokens(kv)
    scores = []
    for row, head in enumerate(heads):
        keys = floats(all_tokens(kv.keys, kv, head)) if copy is None else _tokens_of(copy, kv, row).floats()
        factor = scale if scales is None else scale * scales[0][head]
        logits = (grouped[:, head].float() * factor) @ keys.mT  # [B, G, S]
        if exists is not None:
            logits = logits.masked_fill_(~exists[:, None], -inf)
        weights = with_sinks(logits, sinks, kv, (head,)).softmax(-1)[..., : kv.slots]
        scores.append(block_scores(weights, kv, block_size, score))
    return torch.stack(scores)


def block_scores(weights: Tensor, kv: KV, block_size: int, score: str) -> Tensor:
    """Weights of slots, `[B, G, S]` -> what blocks are worth to the group, `[B, N]`; 0 without any token."""
    if kv.starts is not None:
        weights = _from_first_token(weights, kv.starts)
    weights = F.pad(weights, (0, -kv.slots % block_size)).unflatten(-1, (-1, block_size))
    worth = (weights.sum(-1) if score == "mass" else weights.amax(-1)).mean(1)
    return worth if kv.lengths is None and kv.starts is None else worth.nan_to_num_(0.0)


def write_copy(copy: SmallKeys, keys: Tensor, heads: tuple[int, ...], begin: int, end: int) -> None:
    """Write the keys of `heads`, slots `begin` to `end - 1`, from a store `[B, Hkv, S, D]` into a copy `[B, R, S]`.

    Keys beyond what 8-bit floats can say, 448, become that; there are none in models that we know of.
    """
    for row, head in enumerate(heads):
        copy.write((slice(None), row, slice(begin, end)), keys[:, head, begin:end])


def write_newest_to_copy(copy: SmallKeys, kv: KV, heads: tuple[int, ...], newest: int) -> None:
    """Write the last `newest` tokens of every sequence, or as many as it has, into a copy."""
    first = torch.zeros_like(kv.token_counts()) if kv.starts is None else kv.starts
    last = first + kv.token_counts() - 1
    back = torch.arange(newest, device=last.device)
    slot = (last[:, None] - back).maximum(first[:, None]).long()
    if kv.page_table is None:
        write_slots_to_copy(copy, kv.keys, heads, slot)
        return
    slot = slot[last >= first]  # a sequence without tokens has no page
    page = kv.page_table[last >= first].gather(1, slot // kv.keys.shape[2]).long()
    _write_to_copy(copy, kv.keys, heads, page, slot % kv.keys.shape[2])


def write_pages_to_copy(copy: SmallKeys, keys: Tensor, heads: tuple[int, ...], pages: Tensor) -> None:
    """Write whole pages, int64 `[n]`, of a cache `[P, Hkv, page, D]` into a copy `[P, R, page]`."""
    for row, head in enumerate(heads):
        copy.write((pages, row), keys[pages, head])


def write_slots_to_copy(copy: SmallKeys, keys: Tensor, heads: tuple[int, ...], slot: Tensor) -> None:
    """Write slots int64 `[B, n]` of each sequence from a store `[B, Hkv, S, D]` into a copy `[B, R, S]`."""
    _write_to_copy(copy, keys, heads, torch.arange(slot.shape[0], device=slot.device)[:, None], slot)


def _write_to_copy(copy: SmallKeys, keys: Tensor, heads: tuple[int, ...], page: Tensor, entry: Tensor) -> None:
    for row, head in enumerate(heads):
        copy.write((page, row, entry), keys[page, head, entry])


def _tokens_of(copy: SmallKeys, kv: KV, row: int) -> SmallKeys:
    return copy.views(lambda part: all_tokens(part, kv, row)[:, : kv.slots])


def _from_first_token(weights: Tensor, starts: Tensor) -> Tensor:
    """Weights of slots, `[B, G, S]`, -> weights of tokens: each sequence moved to the left by its padding."""
    slots = weights.shape[-1]
    slot = torch.arange(slots, device=weights.device) + starts[:, None]  # [B, S]
    moved = weights.gather(-1, slot.clamp(max=slots - 1)[:, None].expand_as(weights))
    return moved.masked_fill(slot[:, None] >= slots, 0.0)
