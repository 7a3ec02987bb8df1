"""The definition of attention over blocks and over everything, in plain PyTorch."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..common import all_tokens, by_kv_head, existing_tokens, finish, floats, some_tokens
from ..types import KV, Selections


def attend_blocks(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: tuple[int, ...] | None = None,
) -> Tensor:
    grouped = by_kv_head(query, kv, heads)  # [B, H, G, D]
    blocks = selections.blocks.index_select(0, rows).transpose(0, 1)  # [B, H, K]
    within = torch.arange(block_size, device=query.device)
    token = (blocks[..., None] * block_size + within).flatten(-2)  # [B, H, K * block_size]
    lengths = kv.slots if kv.lengths is None and kv.starts is None else kv.token_counts()[:, None, None]
    chosen = (token >= 0) & (token < lengths)
    token = token.masked_fill(~chosen, 0)
    keys = some_tokens(kv.keys, kv, token, heads).float()
    # A weight of 0 does not silence a NaN that was read on behalf of an unused entry.
    values = some_tokens(kv.values, kv, token, heads).float().masked_fill_(~chosen[..., None], 0.0)
    logits = ((grouped.float() * scale) @ keys.mT).masked_fill_(~chosen[:, :, None], -inf)
    return finish(logits, values, query, some_empty=True)


def attend(query: Tensor, kv: KV, scale: float, heads: tuple[int, ...] | None = None) -> Tensor:
    grouped = by_kv_head(query, kv, heads)
    logits = (grouped.float() * scale) @ floats(all_tokens(kv.keys, kv, heads)).mT
    exists = existing_tokens(kv)
    if exists is None:
        return finish(logits, floats(all_tokens(kv.values, kv, heads)), query, some_empty=False)
    logits = logits.masked_fill_(~exists[:, None, None], -inf)
    values = floats(all_tokens(kv.values, kv, heads), copy=True).masked_fill_(~exists[:, None, :, None], 0.0)
    return finish(logits, values, query, some_empty=True)
