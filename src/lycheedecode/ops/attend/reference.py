"""The definition of attention over blocks and over everything, in plain PyTorch."""

from __future__ import annotations

from math import ceil, inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import HybridConfig
from ..complete.reference import unread
from ..reference_common import (
    all_tokens,
    by_kv_head,
    existing_tokens,
    finish,
    floats,
    scaled,
    some_tokens,
    unscaled,
    with_sinks,
)
from ..scan.reference import block_scores
from ..select.reference import select_blocks
from ..types import EVERYTHING, KV, Completion, Selections


def attend_blocks(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: tuple[int, ...] | None = None,
    completion: Completion | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    grouped = by_kv_head(query, kv, heads)  # [B, H, G, D]
    blocks = _listed(selections, kv, block_size).index_select(0, rows).transpose(0, 1)  # [B, H, K]
    within = torch.arange(block_size, device=query.device)
    token = (blocks[..., None] * block_size + within).flatten(-2)  # [B, H, K * block_size]
    lengths = kv.slots if kv.lengths is None and kv.starts is None else kv.token_counts()[:, None, None]
    chosen = (token >= 0) & (token < lengths)
    if places is not None:  # from here on the token's number in `kv`
        placed = places.index_select(0, rows).transpose(0, 1)
        token = (placed[..., None] * block_size + within).flatten(-2)
    token = token.masked_fill(~chosen, 0)
    keys = some_tokens(kv.keys, kv, token, heads).float()
    # A weight of 0 does not silence a NaN that was read on behalf of an unused entry.
    values = some_tokens(kv.values, kv, token, heads).float().masked_fill_(~chosen[..., None], 0.0)
    logits = (scaled(grouped, scale, kv, scales, heads) @ keys.mT).masked_fill_(~chosen[:, :, None], -inf)
    if completion is not None:
        most = None if places is None else completion.keys.shape[2]
        asked = scaled(grouped, scale, kv, scales, heads)
        rest = unread(asked, kv, selections, rows, block_size, heads, completion, most)
        if rest is not None:
            logits, values = torch.cat((logits, rest[0]), -1), torch.cat((values, rest[1]), -2)
    logits = with_sinks(logits, sinks, kv, heads)
    return unscaled(finish(logits, values, query, some_empty=True), scales, heads)


def _listed(selections: Selections, kv: KV, block_size: int) -> Tensor:
    """`[R, B, >= K]`: the selected blocks, all of them listed."""
    everything = selections.counts == EVERYTHING
    if not everything.any():
        return selections.blocks
    size = max(ceil(kv.slots / block_size), selections.blocks.shape[-1])
    blocks = F.pad(selections.blocks, (0, size - selections.blocks.shape[-1]), value=-1)
    return torch.where(everything[..., None], torch.arange(size, dtype=torch.int32, device=blocks.device), blocks)


def attend(
    query: Tensor,
    kv: KV,
    scale: float,
    heads: tuple[int, ...] | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    grouped = by_kv_head(query, kv, heads)
    logits = scaled(grouped, scale, kv, scales, heads) @ floats(all_tokens(kv.keys, kv, heads)).mT
    exists = existing_tokens(kv)
    if exists is None:
        values = floats(all_tokens(kv.values, kv, heads))
    else:
        logits = logits.masked_fill_(~exists[:, None, None], -inf)
        values = floats(all_tokens(kv.values, kv, heads), copy=True).masked_fill_(~exists[:, None, :, None], 0.0)
    logits = with_sinks(logits, sinks, kv, heads)
    return unscaled(finish(logits, values, query, some_empty=exists is not None), scales, heads)


def attend_tokens(
    query: Tensor,
    kv: KV,
    scale: float,
    begins: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    kv = _without_unused(kv)
    tokens, counts = query.shape[1], kv.token_counts()
    rows = query.unflatten(2, (kv.keys.shape[1], -1)).transpose(1, 2)  # [B, Hkv, T, G, D]
    slot = torch.arange(kv.slots, device=query.device)
    token = slot - (torch.zeros_like(counts) if kv.starts is None else kv.starts)[:, None]  # [B, S]
    end = counts[:, None] - torch.arange(tokens - 1, -1, -1, device=query.device)  # [B, T]
    low = torch.zeros_like(end) if begins is None else begins.clamp(min=0)
    seen = (token[:, None] >= low[..., None]) & (token[:, None] < end[..., None])  # [B, T, S]
    unused = ~seen.any(1)
    logits = (rows.flatten(2, 3).float() * scale) @ _wide(kv.keys, kv, scales and scales[0]).mT
    logits = logits.unflatten(2, rows.shape[2:4]).masked_fill_(~seen[:, None, :, None], -inf)
    if query.device.type == "cpu" and not unused.any():
        values = _wide(kv.values, kv, scales and scales[1])
    else:  # a weight of 0 does not silence a NaN
        values = _wide(kv.values, kv, scales and scales[1], copy=True)
        values.masked_fill_(unused[:, None, :, None], 0.0)
    weights = logits.softmax(-1).nan_to_num_(0.0).flatten(2, 3)
    output = (weights @ values).unflatten(2, rows.shape[2:4])  # [B, Hkv, T, G, D]
    return output.transpose(1, 2).flatten(2, 3).to(query.dtype)


def _without_unused(kv: KV) -> KV:
    """On a CPU, where looking costs nothing: without the slots after the last token of all sequences."""
    if kv.keys.device.type != "cpu" or kv.page_table is not None or kv.lengths is None:
        return kv
    last = int((kv.lengths if kv.starts is None else kv.lengths + kv.starts).max())
    return kv._replace(keys=kv.keys[:, :, :last], values=kv.values[:, :, :last])


def _wide(cache: Tensor, kv: KV, scale: Tensor | None, copy: bool = False) -> Tensor:
    wide = floats(all_tokens(cache, kv, None), copy)
    return wide if scale is None else wide * scale[:, None, None]


def attend_select(
    query: Tensor, kv: KV, heads: tuple[int, ...], config: HybridConfig, scale: float, out: Selections
) -> Tensor:
    grouped, exists = by_kv_head(query, kv, heads), existing_tokens(kv)
    logits = (grouped.float() * scale) @ floats(all_tokens(kv.keys, kv, heads)).mT  # [B, R, G, S]
    if exists is not None:
        logits = logits.masked_fill_(~exists[:, None, None], -inf)
    weights = logits.softmax(-1)
    scores = [block_scores(weights[:, r], kv, config.block_size, config.block_score) for r in range(len(heads))]
    select_blocks(torch.stack(scores), kv, config, out)
    if exists is None:
        return (weights @ floats(all_tokens(kv.values, kv, heads))).flatten(1, 2).to(query.dtype)
    values = floats(all_tokens(kv.values, kv, heads), copy=True).masked_fill_(~exists[:, None, :, None], 0.0)
    return (weights.nan_to_num_(0.0) @ values).flatten(1, 2).to(query.dtype)
