"""fetch: selected blocks of a cache in host memory -> a store on the GPU.

    plan_fetch      selected blocks x what the store holds -> the place of each block, which are missing
    fetch           missing blocks of every reading head   -> the store
    write_back      the newest tokens                      -> host memory
    newest_keys     key of the newest token                -> the keys that scans read; returns the queries that scan

All heads that read one row of the selections need the same blocks, so they share one map. Each of them has `M` slots of
a block in a pool, and after these a tail of `T` blocks: a ring that always holds its newest tokens.

    pool of a head   | slot 0 | slot 1 | ... | slot M - 1 | tail 0 | ... | tail T - 1 |
    block n is       in its slot, if it has one            in tail n % T, if it is one of the T newest

`M` slots, `T` blocks of the tail, `P = (M + T) * block_size`; `L` layers with full attention, in their order.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import HAS_COMPILER, HAS_TRITON
from ..small_keys import SmallKeys
from . import reference

__all__ = ["BlockMap", "Tokens", "fetch", "newest_keys", "plan_fetch", "write_back"]


class Tokens(NamedTuple):
    """Keys and values of all layers, `[L, B, Hkv, S or P, D]`, contiguous."""

    keys: Tensor
    values: Tensor


class BlockMap(NamedTuple):
    """Which blocks of each selection the store holds, and where.

    Attributes:
        slot_of: int32 `[R, B, N]`, the slot of each block; -1: none.
        block_of: int32 `[R, B, M]`, the block in each slot; -1: none.
        used: int32 `[R, B, M]`, the clock when the slot was last selected; -1: never.
        places: int32 `[R, B, K]`, the place of each selected block: a slot, or `M + t` for the tail's block `t`.
        missing: int32 `[R, B, K]`, the blocks to fetch; the rest is -1.
        misses: int32 `[R, B]`, how many these are.
        order: int32 `[R, B, M]`, scratch of the kernel.
    """

    slot_of: Tensor
    block_of: Tensor
    used: Tensor
    places: Tensor
    missing: Tensor
    misses: Tensor
    order: Tensor

    @classmethod
    def allocate(
        cls, num_rows: int, batch: int, blocks: int, slots: int, capacity: int, device: torch.device | str
    ) -> BlockMap:
        """An empty map of `slots` slots, for selections of up to `capacity` of `blocks` blocks."""
        sizes = blocks, slots, slots, capacity, capacity, None, slots
        shapes = [(num_rows, batch) if size is None else (num_rows, batch, size) for size in sizes]
        made = [torch.full(shape, -1, dtype=torch.int32, device=device) for shape in shapes]
        made[5].zero_()
        return cls(*made)

    def rows(self, first: int, count: int) -> BlockMap:
        """View of `count` consecutive rows."""
        return BlockMap(*(part[first : first + count] for part in self))

    def forget(self, first: Tensor) -> None:
        """Empty the slots of block `first[b]`, int `[B]`, and of all that come after it."""
        gone = self.block_of >= first[:, None]
        self.block_of.masked_fill_(gone, -1)
        self.used.masked_fill_(gone, -1)
        blocks = torch.arange(self.slot_of.shape[-1], device=first.device)
        self.slot_of.masked_fill_(blocks >= first[:, None], -1)


def plan_fetch(blocks: Tensor, known: BlockMap, newest: Tensor, clock: Tensor, tail_blocks: int) -> None:
    """Assign a place to each selected block, and list the missing ones.

    A missing block gets the slot that was selected least recently; of equal ones the first. Blocks of the tail need
    none.

    Args:
        blocks: int32 `[R, B, K]`, the selections; unused entries are -1.
        known: the map of these rows; written in place.
        newest: int32 `[B]`, the newest block that these selections may hold.
        clock: int32 `[1]`, higher than at every earlier call.
        tail_blocks: `T`.
    """
    if known.block_of.shape[-1] < blocks.shape[-1]:
        raise ValueError(f"a store of {known.block_of.shape[-1]} blocks cannot hold selections of {blocks.shape[-1]}.")
    if blocks.shape != known.places.shape:
        raise ValueError(f"selections are {tuple(blocks.shape)}, but the map is for {tuple(known.places.shape)}.")
    _for(blocks).plan_fetch(blocks, known, newest, clock, tail_blocks)


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
    """Copy missing blocks into their slots, for heads that read them.

    Args:
        source: in host memory, `[L, B, Hkv, S, D]`; whole blocks of it are read. For the kernels it must be pinned.
        pool: `[L, B, Hkv, P, D]`; written in place.
        known: the map of all rows, after `plan_fetch` of those that are read here.
        readers: int32 `[Q, 4]`, of each head: the row that it reads, its layer, its head, and which keys of `scanned`
            are its own; -1: none. They are served in this order.
        scanned: keys on the device, `[H, B, S, D]`, in the dtype of the pool: what is here does not cross the link.
        starts: int32 `[B]`, slot of each sequence's first token; None: 0.
        block_size: tokens per block.
        beside: whether this is the first launch on a stream that waits for another one.
    """
    if readers.numel():
        _for(pool.keys).fetch(source, pool, known, readers, scanned, starts, block_size, beside)


def write_back(
    pool: Tokens, target: Tokens, begin: int, end: int, starts: Tensor | None, slots: int, tail: int
) -> None:
    """Copy slots `begin` to `end - 1` of all sequences from their tails to host memory.

    Args:
        pool: `[L, B, Hkv, P, D]`.
        target: `[L, B, Hkv, S, D]`; written in place.
        begin, end: slots of the sequences' newest tokens.
        starts: int32 `[B]`, slot of each sequence's first token; None: 0.
        slots: tokens of a head's pool before its tail.
        tail: tokens in the tail, no fewer than are copied.
    """
    if not 0 <= end - begin <= tail:
        raise ValueError(f"a tail of {tail} tokens does not hold slots {begin} to {end - 1}.")
    if end > begin:
        _for(pool.keys).write_back(pool, target, begin, end, starts, slots, tail)


def newest_keys(
    query: Tensor, keys: Tensor, at: Tensor, filled: Tensor, heads: tuple[int, ...], copy: SmallKeys
) -> Tensor:
    """Copy the newest token's key of some heads to where scans read it; returns the queries that scan.

    Args:
        query: `[B, Hq, D]`.
        keys: of the layer's pool, `[B, Hkv, P, D]`.
        at: int32 `[B]`, one more than the entry of the newest token in it.
        filled: int32 `[B]`, slots in use, the newest token's included.
        heads: KV heads, `H` of them.
        copy: `[B, H, S]` keys in 8 or 4 bits, or with numbers as the pool has them; written in place.

    Returns:
        `[B, H * G, D]`: the queries of these heads' groups.
    """
    return _for(keys).newest_keys(query, keys, at, filled, heads, copy)


def _for(tensor: Tensor) -> ModuleType:
    if not tensor.is_cuda or not HAS_TRITON or not HAS_COMPILER:
        return reference
    from . import triton

    return triton
