"""The definition of what `fetch` does, in plain PyTorch."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..small_keys import SmallKeys

if TYPE_CHECKING:
    from . import BlockMap, Tokens


def plan_fetch(blocks: Tensor, known: BlockMap, newest: Tensor, clock: Tensor, tail_blocks: int) -> None:
    slots = known.block_of.shape[-1]
    listed = blocks >= 0
    tail = listed & (blocks > newest[:, None] - tail_blocks)
    here = known.slot_of.gather(-1, blocks.clamp(min=0).long())
    hit = listed & ~tail & (here >= 0)
    miss = listed & ~tail & (here < 0)
    _put(known.used, here, hit, clock.expand_as(blocks))
    oldest = known.used.sort(dim=-1, stable=True).indices  # those used now come last
    number = miss.cumsum(-1) - 1
    slot = oldest.gather(-1, number.clamp(min=0)).int()
    evicted = known.block_of.gather(-1, slot.long())
    _put(known.slot_of, evicted, miss & (evicted >= 0), torch.full_like(blocks, -1))
    _put(known.slot_of, blocks, miss, slot)
    _put(known.block_of, slot, miss, blocks)
    _put(known.used, slot, miss, clock.expand_as(blocks))
    place = torch.where(tail, slots + blocks % tail_blocks, torch.where(hit, here, slot))
    known.places.copy_(place.masked_fill(~listed, -1))
    known.missing.fill_(-1)
    _put(known.missing, number, miss, blocks)
    torch.sum(miss, -1, dtype=torch.int32, out=known.misses)


def _put(target: Tensor, index: Tensor, where: Tensor, value: Tensor) -> None:
    """`target[..., index] = value` where `where`; all but `target` are `[R, B, K]`."""
    size = target.shape[-1]
    wider = F.pad(target, (0, 1))
    wider.scatter_(-1, index.masked_fill(~where, size).long(), value)
    target.copy_(wider[..., :size])


def fetch(
    source: Tokens,
    pool: Tokens,
    known: BlockMap,
    readers: Tensor,
    scanned: Tensor | None,
    starts: Tensor | None,
    block_size: int,
    beside: bool = False,
) -> None:
    batch = known.misses.shape[1]
    first = [0] * batch if starts is None else starts.tolist()
    for (row, layer, head, near), b in product(readers.tolist(), range(batch)):
        keys = source.keys[layer, b, head] if scanned is None or near < 0 else scanned[near, b]
        for block in known.missing[row, b, : known.misses[row, b]].tolist():
            slot, begin = int(known.slot_of[row, b, block]), first[b] + block * block_size
            for mine, whole in ((pool.keys, keys), (pool.values, source.values[layer, b, head])):
                there = mine[layer, b, head, slot * block_size : (slot + 1) * block_size]
                there.copy_(whole[begin : begin + block_size])


def write_back(
    pool: Tokens, target: Tokens, begin: int, end: int, starts: Tensor | None, slots: int, tail: int
) -> None:
    first = [0] * pool.keys.shape[1] if starts is None else starts.tolist()
    for b, start in enumerate(first):
        slot = torch.arange(max(begin, start), end)
        entry = slots + (slot - start) % tail
        for mine, all_tokens in zip(pool, target, strict=True):
            all_tokens[:, b, :, max(begin, start) : end] = mine[:, b, :, entry.to(mine.device)].to(all_tokens.device)


def newest_keys(
    query: Tensor, keys: Tensor, at: Tensor, filled: Tensor, heads: tuple[int, ...], copy: SmallKeys
) -> Tensor:
    sequence = torch.arange(len(at), device=at.device)
    for row, head in enumerate(heads):
        copy.write((sequence, row, filled.long() - 1), keys[sequence, head, at.long() - 1])
    return query.unflatten(1, (keys.shape[1], -1))[:, list(heads)].flatten(1, 2)
