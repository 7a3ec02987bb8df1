"""What the references share: the tokens of a cache, whatever its layout, and the end of a softmax."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .types import KV


def by_kv_head(query: Tensor, kv: KV, heads: tuple[int, ...] | None = None) -> Tensor:
    """`[B, Hq, D]` -> `[B, H, G, D]`."""
    grouped = query.unflatten(1, (kv.keys.shape[1], -1))
    return grouped if heads is None else grouped[:, list(heads)]


def existing_tokens(kv: KV) -> Tensor | None:
    """bool `[B, S]`: which slots hold a token; None when all do."""
    if kv.lengths is None and kv.starts is None:
        return None
    slot = torch.arange(kv.slots, device=kv.keys.device)
    first = torch.zeros_like(kv.token_counts()) if kv.starts is None else kv.starts
    return (slot >= first[:, None]) & (slot < (first + kv.token_counts())[:, None])


def all_tokens(cache: Tensor, kv: KV, heads: int | tuple[int, ...] | None) -> Tensor:
    """Every slot of some heads: `[B, S, D]` for one head, `[B, H, S, D]` for several; a view where that is possible."""
    if heads is not None:
        cache = cache[:, heads if isinstance(heads, int) else list(heads)]
    if kv.page_table is not None:
        cache = cache[kv.page_table.clamp(min=0).long()]  # [B, pages, (H,) page, D]
        cache = cache.movedim(1, -3).flatten(-3, -2)
    return cache


def some_tokens(cache: Tensor, kv: KV, token: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    """Tokens `[B, H, T]` of each head, `[B, H, T, D]`, read as rows of the cache's storage: one gather, any layout."""
    slot = token if kv.starts is None else token + kv.starts[:, None, None]
    sequence = torch.arange(token.shape[0], device=token.device)[:, None, None]
    head = torch.arange(cache.shape[1], device=token.device) if heads is None else token.new_tensor(heads)
    head = head[:, None]
    page = sequence
    if kv.page_table is not None:
        page = kv.page_table[sequence, slot // cache.shape[2]].long()  # times a stride may need 64 bits
        slot = slot % cache.shape[2]
    dim = cache.shape[3]
    if cache.stride(3) != 1 or any(stride % dim for stride in cache.stride()[:3]):
        return cache[page, head, slot]
    strides = [stride // dim for stride in cache.stride()[:3]]
    row = page * strides[0] + head * strides[1] + slot.long() * strides[2]
    num_rows = 1 + sum((size - 1) * stride for size, stride in zip(cache.shape, strides, strict=False))
    rows = cache.as_strided((num_rows, dim), (dim, 1))
    return rows.index_select(0, row.flatten()).view(*token.shape, dim)


def with_sinks(logits: Tensor, sinks: Tensor | None, kv: KV, heads: tuple[int, ...] | None) -> Tensor:
    """Logits `[B, (H,) G, T]`, and one more that stands for no token: the sink of each query head, if there are."""
    if sinks is None:
        return logits
    grouped = sinks.float().view(kv.keys.shape[1], -1)
    grouped = grouped if heads is None else grouped[list(heads)]
    return torch.cat((logits, grouped.expand(*logits.shape[:-1]).unsqueeze(-1)), -1)


def scaled(query: Tensor, scale: float, kv: KV, scales: tuple[Tensor, Tensor] | None, heads: Any) -> Tensor:
    """The query `[B, H, G, D]` in float32, times the factor on logits, and that of keys in 8 bits."""
    return query.float() * (scale if scales is None else scale * _of_heads(scales[0], heads))


def unscaled(output: Tensor, scales: tuple[Tensor, Tensor] | None, heads: Any) -> Tensor:
    """Attention output `[B, H * G, D]` times the factor of values in 8 bits."""
    if scales is None:
        return output
    factor = _of_heads(scales[1], heads)
    return (output.unflatten(1, (len(factor), -1)) * factor).flatten(1, 2).to(output.dtype)


def _of_heads(scales: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    return (scales if heads is None else scales[list(heads)])[:, None, None]


def finish(logits: Tensor, values: Tensor, query: Tensor, some_empty: bool) -> Tensor:
    """softmax(logits) @ values, `[B, H, G, >= T]` x `[B, H, T, D]` -> `[B, H * G, D]`; a row without tokens gives 0."""
    weights = logits.softmax(-1)[..., : values.shape[-2]]
    if some_empty:
        weights = weights.nan_to_num_(0.0)
    return (weights @ values).flatten(1, 2).to(query.dtype)


class _Scratch(threading.local):
    memory = torch.empty(0)


_scratch = _Scratch()


def floats(tokens: Tensor, copy: bool = False) -> Tensor:
    """`tokens` in float32, valid until the next call.

    On a CPU the copy reuses memory: the page faults of fresh megabytes would cost several times the arithmetic.
    """
    if tokens.dtype == torch.float32 and not copy:
        return tokens
    if tokens.device.type != "cpu":
        return tokens.to(torch.float32, copy=copy)
    if _scratch.memory.numel() < tokens.numel():
        with torch.inference_mode(False):  # memory from inside inference mode could not be written outside it
            _scratch.memory = torch.empty(tokens.numel() * 5 // 4)
    return _scratch.memory[: tokens.numel()].view(tokens.shape).copy_(tokens.detach())
