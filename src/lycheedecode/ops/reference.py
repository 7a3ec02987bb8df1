"""The operations in plain PyTorch: their definition, the oracle of every kernel, and the CPU path.

Written to be read next to the contracts in `ops/__init__.py`, and not slow by carelessness: sparse heads gather only
their blocks, query heads of a group share one matrix product, nothing is expanded to `Hq` heads.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from math import ceil, inf

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import HybridConfig
from .types import KV, Selections


def scan_blocks(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    copy: Tensor | None = None,
) -> Tensor:
    grouped = by_kv_head(query, kv)
    exists = _existing_tokens(kv)
    scores = []
    for row, head in enumerate(heads):
        keys = _all_tokens(kv.keys, kv, head) if copy is None else copy[:, row, : kv.slots]
        logits = (grouped[:, head].float() * scale) @ floats(keys).mT  # [B, G, S]
        if exists is not None:
            logits = logits.masked_fill_(~exists[:, None], -inf)
        weights = logits.softmax(-1)
        if kv.starts is not None:
            weights = _from_first_token(weights, kv.starts)
        weights = F.pad(weights, (0, -kv.slots % block_size)).unflatten(-1, (-1, block_size))
        per_query_head = weights.sum(-1) if score == "mass" else weights.amax(-1)
        scores.append(per_query_head.mean(1))
    return torch.stack(scores).nan_to_num_(0.0) if exists is not None else torch.stack(scores)


def write_copy(copy: Tensor, keys: Tensor, heads: tuple[int, ...], begin: int, end: int) -> None:
    """Write the keys of `heads`, slots `begin` to `end - 1`, from a store `[B, Hkv, S, D]` into a copy `[B, R, S, D]`.

    Keys beyond what 8 bits can say, 448, become that; there are none in models that we know of.
    """
    for row, head in enumerate(heads):
        copy[:, row, begin:end] = _as_float8(keys[:, head, begin:end])


def write_newest_to_copy(copy: Tensor, kv: KV, heads: tuple[int, ...], newest: int) -> None:
    """Write the last `newest` tokens of every sequence, or as many as it has, into a copy `[B, R, S, D]`."""
    first = torch.zeros_like(kv.token_counts()) if kv.starts is None else kv.starts
    last = first + kv.token_counts() - 1
    back = torch.arange(newest, device=last.device)
    slot = (last[:, None] - back).maximum(first[:, None]).long()  # [B, newest]
    sequence = torch.arange(kv.batch, device=last.device)[:, None]
    for row, head in enumerate(heads):
        key = _as_float8(kv.keys[sequence, head, slot])
        copy.view(torch.uint8)[sequence, row, slot] = key.view(torch.uint8)  # floats of 8 bits cannot be indexed


def _as_float8(keys: Tensor) -> Tensor:
    most = torch.finfo(torch.float8_e4m3fn).max
    return keys.float().clamp(-most, most).to(torch.float8_e4m3fn)


def _from_first_token(weights: Tensor, starts: Tensor) -> Tensor:
    """Weights of slots, `[B, G, S]`, -> weights of tokens: each sequence moved to the left by its padding."""
    slots = weights.shape[-1]
    slot = torch.arange(slots, device=weights.device) + starts[:, None]  # [B, S]
    moved = weights.gather(-1, slot.clamp(max=slots - 1)[:, None].expand_as(weights))
    return moved.masked_fill(slot[:, None] >= slots, 0.0)


def select_blocks(scores: Tensor, kv: KV, config: HybridConfig, out: Selections) -> None:
    capacity = out.blocks.shape[-1]
    if kv.lengths is None and kv.starts is None:
        exists, forced = _blocks_of_full_slots(kv.slots, config, scores.device)
    else:
        exists, forced = _blocks_of(kv.token_counts(), kv.slots, config)
    scores = F.pad(scores, (0, exists.shape[-1] - scores.shape[-1]))
    ranked = scores.masked_fill(forced, inf).masked_fill_(~exists, -inf)
    value, chosen = ranked.sort(dim=-1, descending=True, stable=True)
    value, chosen = value[..., :capacity], chosen[..., :capacity]

    keep = value > -inf
    if config.selection == "ratio":
        wanted = torch.ceil(config.budget_ratio * exists.sum(-1, keepdim=True))
        keep &= (torch.arange(value.shape[-1], device=value.device) < wanted) | (value == inf)
    elif config.selection == "threshold":
        keep &= value >= config.threshold
    elif config.selection == "top_p":
        mass = scores.gather(-1, chosen).masked_fill(~keep, 0.0)
        keep &= (mass.cumsum(-1) - mass < config.top_p) | (value == inf)

    out.blocks[..., : value.shape[-1]] = chosen.masked_fill_(~keep, -1)
    out.blocks[..., value.shape[-1] :] = -1
    torch.sum(keep, -1, dtype=torch.int32, out=out.counts)


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
    keys = _some_tokens(kv.keys, kv, token, heads).float()
    # A weight of 0 does not silence a NaN that was read on behalf of an unused entry.
    values = _some_tokens(kv.values, kv, token, heads).float().masked_fill_(~chosen[..., None], 0.0)
    logits = ((grouped.float() * scale) @ keys.mT).masked_fill_(~chosen[:, :, None], -inf)
    return _finish(logits, values, query, some_empty=True)


def attend(query: Tensor, kv: KV, scale: float, heads: tuple[int, ...] | None = None) -> Tensor:
    grouped = by_kv_head(query, kv, heads)
    logits = (grouped.float() * scale) @ floats(_all_tokens(kv.keys, kv, heads)).mT
    exists = _existing_tokens(kv)
    if exists is None:
        return _finish(logits, floats(_all_tokens(kv.values, kv, heads)), query, some_empty=False)
    logits = logits.masked_fill_(~exists[:, None, None], -inf)
    values = floats(_all_tokens(kv.values, kv, heads), copy=True).masked_fill_(~exists[:, None, :, None], 0.0)
    return _finish(logits, values, query, some_empty=True)


def count_bytes(
    total: Tensor, lengths: Tensor, selections: Selections, costs: Tensor, block_size: int, enough: int
) -> None:
    attended = costs[:-1, None] * selections.tokens(lengths, block_size)  # [R, B]
    total += attended.sum(0) + costs[-1] * lengths.masked_fill(lengths <= enough, 0)


def _finish(logits: Tensor, values: Tensor, query: Tensor, some_empty: bool) -> Tensor:
    """softmax(logits) @ values, `[B, H, G, T]` x `[B, H, T, D]` -> `[B, H * G, D]`; a row without tokens gives 0."""
    weights = logits.softmax(-1)
    if some_empty:
        weights = weights.nan_to_num_(0.0)
    return (weights @ values).flatten(1, 2).to(query.dtype)


def by_kv_head(query: Tensor, kv: KV, heads: tuple[int, ...] | None = None) -> Tensor:
    """`[B, Hq, D]` -> `[B, H, G, D]`."""
    grouped = query.unflatten(1, (kv.keys.shape[1], -1))
    return grouped if heads is None else grouped[:, list(heads)]


def _existing_tokens(kv: KV) -> Tensor | None:
    """bool `[B, S]`: which slots hold a token; None when all do."""
    if kv.lengths is None and kv.starts is None:
        return None
    slot = torch.arange(kv.slots, device=kv.keys.device)
    first = torch.zeros_like(kv.token_counts()) if kv.starts is None else kv.starts
    return (slot >= first[:, None]) & (slot < (first + kv.token_counts())[:, None])


def _all_tokens(cache: Tensor, kv: KV, heads: int | tuple[int, ...] | None) -> Tensor:
    """Every slot of some heads: `[B, S, D]` for one head, `[B, H, S, D]` for several; a view where that is possible."""
    if heads is not None:
        cache = cache[:, heads if isinstance(heads, int) else list(heads)]
    if kv.page_table is not None:
        cache = cache[kv.page_table.clamp(min=0).long()]  # [B, pages, (H,) page, D]
        cache = cache.movedim(1, -3).flatten(-3, -2)
    return cache


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


def _some_tokens(cache: Tensor, kv: KV, token: Tensor, heads: tuple[int, ...] | None) -> Tensor:
    """Tokens `[B, H, T]` of each head, `[B, H, T, D]`, read as rows of the cache's storage: one gather, any layout."""
    slot = token if kv.starts is None else token + kv.starts[:, None, None]
    sequence = torch.arange(token.shape[0], device=token.device)[:, None, None]
    head = torch.arange(cache.shape[1], device=token.device) if heads is None else token.new_tensor(heads)
    head = head[:, None]
    page = sequence
    if kv.page_table is not None:
        page = kv.page_table[sequence, slot // cache.shape[2]]
        slot = slot % cache.shape[2]
    dim = cache.shape[3]
    if cache.stride(3) != 1 or any(stride % dim for stride in cache.stride()[:3]):
        return cache[page, head, slot]
    strides = [stride // dim for stride in cache.stride()[:3]]
    row = page * strides[0] + head * strides[1] + slot.long() * strides[2]
    num_rows = 1 + sum((size - 1) * stride for size, stride in zip(cache.shape, strides, strict=False))
    rows = cache.as_strided((num_rows, dim), (dim, 1))
    return rows.index_select(0, row.flatten()).view(*token.shape, dim)
