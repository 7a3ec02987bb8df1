"""Attention over blocks on a CPU: copies whole blocks instead of token by token.

A decode step of a small model is some twenty milliseconds, so here every tensor operation counts.
"""

from __future__ import annotations

from functools import lru_cache
from math import inf

import torch
from torch import Tensor

from ..complete.reference import unread
from ..reference_common import by_kv_head, floats
from ..types import KV, Completion, Selections
from . import reference


def attend_blocks(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: tuple[int, ...] | None = None,
    completion: Completion | None = None,
) -> Tensor:
    if not _has_whole_blocks(kv, block_size):
        return reference.attend_blocks(query, kv, selections, rows, block_size, scale, heads, completion)
    grouped = by_kv_head(query, kv, heads)  # [B, H, G, D]
    first = selections.blocks.index_select(0, rows).transpose(0, 1) * block_size  # [B, H, K]
    # A block is read from at most `limit` on, so that the last one ends where the tokens end, and an unused entry
    # (whose `first` is -block_size) reads the first block: nothing is touched that holds no token. What does not
    # belong to the block is masked; the mask also drops the tokens that the last block then shares with its neighbour.
    if kv.starts is None and kv.lengths is None:
        slot = first.clamp(0, kv.slots - block_size)
    else:
        start = torch.zeros_like(kv.token_counts()) if kv.starts is None else kv.starts
        start, limit = start[:, None, None], (start + kv.token_counts() - block_size)[:, None, None]
        first = first + start
        slot = torch.minimum(torch.maximum(first, start), limit)
    token = slot[..., None] + _steps(block_size)  # [B, H, K, block_size]
    outside = ((token < first[..., None]) | (token >= (first + block_size)[..., None])).flatten(2)[:, :, None]
    shape = (*grouped.shape[:2], -1, query.shape[2])
    row = (slot + _first_rows(kv.keys.shape[0], kv.keys.shape[1], _row_strides(kv.keys), heads)).flatten()
    # Keys and values [B, H, K * block_size, D] use the same memory, one after the other.
    keys = floats(_blocks(kv.keys, row, block_size).view(shape))
    logits = ((grouped.float() * scale) @ keys.mT).masked_fill_(outside, -inf)
    values = floats(_blocks(kv.values, row, block_size).view(shape))
    rest = None
    if completion is not None:
        rest = unread(grouped.float() * scale, kv, selections, rows, block_size, heads, completion)
    if rest is None:
        return (logits.softmax(-1) @ values).flatten(1, 2).to(query.dtype)
    read, more = torch.cat((logits, rest[0]), -1).softmax(-1).split((logits.shape[-1], rest[0].shape[-1]), -1)
    return torch.add(read @ values, more @ rest[1]).flatten(1, 2).to(query.dtype)


def _has_whole_blocks(kv: KV, block_size: int) -> bool:
    """Whether tokens lie one after another in memory, and every sequence has enough of them to fill a block."""
    if kv.page_table is not None or kv.keys.stride() != kv.values.stride():
        return False
    dim = kv.keys.shape[3]
    batch, head, slot, last = kv.keys.stride()
    shortest = kv.slots if kv.starts is None and kv.lengths is None else int(kv.token_counts().min())
    return last == 1 and slot == dim and batch % dim == 0 and head % dim == 0 and shortest >= block_size


def _row_strides(cache: Tensor) -> tuple[int, int]:
    """Tokens from one sequence to the next, and from one head to the next."""
    return cache.stride(0) // cache.shape[3], cache.stride(1) // cache.shape[3]


def _blocks(cache: Tensor, row: Tensor, block_size: int) -> Tensor:
    """The `block_size` tokens from each `row` `[n]` of the cache on, `[n, block_size * D]`."""
    batch, num_heads, slots, dim = cache.shape
    strides = _row_strides(cache)
    num_rows = (batch - 1) * strides[0] + (num_heads - 1) * strides[1] + slots - block_size + 1
    overlapping = cache.as_strided((num_rows, block_size * dim), (dim, 1))  # row i: tokens i to i + block_size - 1
    return overlapping.index_select(0, row)


@lru_cache(maxsize=256)
def _first_rows(batch: int, num_heads: int, strides: tuple[int, int], heads: tuple[int, ...] | None) -> Tensor:
    """Row of slot 0 of each sequence and head, `[B, H, 1]`."""
    chosen = torch.arange(num_heads) if heads is None else torch.tensor(heads)
    return torch.arange(batch)[:, None, None] * strides[0] + chosen[:, None] * strides[1]


@lru_cache(maxsize=16)
def _steps(block_size: int) -> Tensor:
    return torch.arange(block_size, dtype=torch.int32)
