"""Block scores -> selections, written straight into the persistent buffers; one program a row and sequence.

    keys       the bits of a score that is not negative, read as an integer, rank like the score;
               blocks that are always selected get the largest key, absent ones the least
    wanted     how many blocks: from the strategy and the capacity of the buffers
    search     cut an interval of keys in three until exactly `wanted` keys reach a cut, or it is one key:
               then of the blocks with this key the earlier ones win
    write      the selected blocks in ascending order, then -1

Every step of the search counts over the whole row, which the program holds in registers; a row too long for that is
read again each time. Two cuts at a time, since for threads to meet takes longer than to count. In long rows counting is
what takes time: there the program first selects as many groups of neighbours by their largest keys, and then among
their blocks. Each group before a selected block's has a better block, so no block is missed, ties included.
Nothing depends on the order in which threads run, and nothing travels to the host.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import HybridConfig
from ..types import KV, Selections
from . import common
from .common import Tuning

IN_REGISTERS = 32768
"""Longest row of blocks that a program holds at once."""

_FORCED = tl.constexpr(0x7FFFFFFF)
_ABSENT = tl.constexpr(-1)


@triton.jit
def _keys(score, n, sinks, recent, exist):
    """Integers that rank blocks as the contract does."""
    key = tl.maximum(score, 0.0).to(tl.int32, bitcast=True)
    key = tl.where((n < sinks) | (n >= recent), _FORCED, key)
    return tl.where(n < exist, key, _ABSENT)


@triton.jit
def _read(scores, c, N, sinks, recent, exist, CHUNK: tl.constexpr):
    """Scores and keys of a chunk of the row."""
    n = c * CHUNK + tl.arange(0, CHUNK)
    score = tl.load(scores + n, mask=n < N, other=0.0)
    return score, _keys(score, n, sinks, recent, exist)


@triton.jit
def _count(least, key, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr):
    """How many keys are at least `least`."""
    if HELD:
        found = tl.sum((key >= least).to(tl.int32), 0)
    else:
        found = 0
        for c in range(tl.cdiv(exist, CHUNK)):
            _, key = _read(scores, c, N, sinks, recent, exist, CHUNK)
            found += tl.sum((key >= least).to(tl.int32), 0)
    return found


@triton.jit
def _count_two(less, more, key, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr):
    """How many keys are at least `less`, and at least `more`: one reduction of two packed counts."""
    if HELD:
        both = tl.sum((key >= less).to(tl.int32) | ((key >= more).to(tl.int32) << 16), 0)
        of_less, of_more = both & 0xFFFF, (both >> 16) & 0xFFFF
    else:
        of_less, of_more = 0, 0
        for c in range(tl.cdiv(exist, CHUNK)):
            _, key = _read(scores, c, N, sinks, recent, exist, CHUNK)
            both = tl.sum((key >= less).to(tl.int32) | ((key >= more).to(tl.int32) << 16), 0)
            of_less += both & 0xFFFF
            of_more += (both >> 16) & 0xFFFF
    return of_less, of_more


@triton.jit
def _mass(least, score, key, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr):
    """Scores of the blocks whose keys are at least `least`, added up."""
    if HELD:
        found = tl.sum(tl.where(key >= least, score, 0.0), 0)
    else:
        found = 0.0
        for c in range(tl.cdiv(exist, CHUNK)):
            score, key = _read(scores, c, N, sinks, recent, exist, CHUNK)
            found += tl.sum(tl.where(key >= least, score, 0.0), 0)
    return found


@triton.jit
def _range(key, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr):
    """Least and largest key of the blocks that are neither forced nor absent."""
    low = tl.min(tl.where(key < 0, _FORCED, key), 0)
    high = tl.max(tl.where(key == _FORCED, 0, key), 0)
    if not HELD:
        for c in range(1, tl.cdiv(exist, CHUNK)):
            _, key = _read(scores, c, N, sinks, recent, exist, CHUNK)
            low = tl.minimum(low, tl.min(tl.where(key < 0, _FORCED, key), 0))
            high = tl.maximum(high, tl.max(tl.where(key == _FORCED, 0, key), 0))
    return low, high


@triton.jit
def _blocks_of_mass(
    amount, low, high, forced, score, key, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr
):
    """Fewest blocks, best first after the forced ones, that hold the mass `amount`."""
    wanted = exist
    if _mass(_FORCED, score, key, scores, N, sinks, recent, exist, CHUNK, HELD) >= amount:
        wanted = forced
    elif _mass(0, score, key, scores, N, sinks, recent, exist, CHUNK, HELD) >= amount:
        while low < high:  # the largest key such that the keys from it on hold enough
            middle = low + (high - low + 1) // 2
            enough = _mass(middle, score, key, scores, N, sinks, recent, exist, CHUNK, HELD) >= amount
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        above = _count(low + 1, key, scores, N, sinks, recent, exist, CHUNK, HELD)
        equal = _count(low, key, scores, N, sinks, recent, exist, CHUNK, HELD) - above
        missing = amount - _mass(low + 1, score, key, scores, N, sinks, recent, exist, CHUNK, HELD)
        ties = tl.ceil(missing / tl.maximum(low.to(tl.float32, bitcast=True), 1e-38))
        wanted = above + tl.minimum(tl.maximum(ties, 1.0), equal.to(tl.float32)).to(tl.int32)
    return wanted


@triton.jit
def _extent_of_blocks(
    count, num_blocks, SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr, BLOCK: tl.constexpr
):
    """How many blocks exist; sinks are the blocks before `sinks`, recent ones those from `recent` on."""
    exist = tl.where(count > 0, tl.minimum(tl.cdiv(count + LOOKAHEAD, BLOCK), num_blocks), 0)
    sinks = tl.minimum((SINK + BLOCK - 1) // BLOCK, exist)
    recent = tl.maximum(tl.minimum(tl.maximum(count - RECENT, 0) // BLOCK, exist), sinks)
    return exist, sinks, recent


@triton.jit
def _search(
    wanted, there, forced, low, high, key, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr
):
    """The least key that is selected, and how many that are equal to it.

    `there` keys are not absent, `forced` of them are the largest key; the others lie between `low` and `high`.
    """
    above = forced  # keys larger than `high`
    if wanted <= forced:
        low, high, above = _FORCED, _FORCED, 0
    elif wanted == there:
        high, above = low, 0
    while low < high:
        third = (high - low + 2) // 3
        less = low + third
        more = tl.minimum(less + third, high)
        of_less, of_more = _count_two(less, more, key, scores, N, sinks, recent, exist, CHUNK, HELD)
        if of_more >= wanted:
            low = more
            high = tl.where(of_more == wanted, more, high)
        elif of_less >= wanted:
            low = less
            high = tl.where(of_less == wanted, less, more - 1)
            above = of_more
        else:
            high = less - 1
            above = of_less
    return low, wanted - above  # all of the equal ones, when `wanted` keys reach `low`


@triton.jit
def _search_held(wanted, key):
    """`_search` in keys that are all at hand."""
    low, high = _range(key, key, 0, 0, 0, 0, 1, True)
    there, forced = tl.sum((key >= 0).to(tl.int32), 0), tl.sum((key == _FORCED).to(tl.int32), 0)
    return _search(tl.minimum(wanted, there), there, forced, low, high, key, key, 0, 0, 0, 0, 1, True)


@triton.jit
def _write(to, what, key, low, ties, larger_before, equal_before):
    """Store what is selected of `what`, in order; returns how many keys were larger than `low` and how many equal."""
    larger, equal = (key > low).to(tl.int32), (key == low).to(tl.int32)
    both = tl.cumsum(larger | (equal << 16), 0)
    before_larger = larger_before + (both & 0xFFFF) - larger
    before_equal = equal_before + ((both >> 16) & 0xFFFF) - equal
    chosen = (larger > 0) | ((equal > 0) & (before_equal < ties))
    tl.store(to + before_larger + tl.minimum(before_equal, ties), what, mask=chosen)
    return larger, equal


@triton.jit
def _choose_in_groups(
    blocks, scores, N, sinks, recent, exist, wanted, CHUNK: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr
):
    """Write the `wanted` best blocks, at most `WIDTH`, of a row of at most `CHUNK`; groups pass through `blocks`."""
    g = tl.arange(0, CHUNK // GROUP)
    within = tl.arange(0, GROUP)[None, :]
    n = g[:, None] * GROUP + within
    key = _keys(tl.load(scores + n, mask=n < N, other=0.0), n, sinks, recent, exist)
    best = tl.max(key, 1)
    low, ties = _search_held(wanted, best)
    _write(blocks, g, best, low, ties, 0, 0)
    tl.debug_barrier()
    k = tl.arange(0, WIDTH)
    taken = k < tl.minimum(wanted, tl.cdiv(exist, GROUP))
    group = tl.load(blocks + k, mask=taken, other=0, cache_modifier=".cg")
    tl.debug_barrier()  # from here on blocks take the place of groups
    n = group[:, None] * GROUP + within
    there = taken[:, None] & (n < N)
    key = _keys(tl.load(scores + n, mask=there, other=0.0), n, sinks, recent, exist)
    key = tl.reshape(tl.where(taken[:, None], key, _ABSENT), [WIDTH * GROUP])
    low, ties = _search_held(wanted, key)
    _write(blocks, tl.reshape(n, [WIDTH * GROUP]), key, low, ties, 0, 0)


@triton.jit
def _choose(
    blocks, scores, N, sinks, recent, exist, wanted, amount,
    STRATEGY: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Write the best blocks of a row, at most `wanted`, and return how many; it is read once if it is `HELD`."""
    n = tl.arange(0, CHUNK)
    score, key = _read(scores, 0, N, sinks, recent, exist, CHUNK)
    forced = sinks + exist - recent
    low, high = _range(key, scores, N, sinks, recent, exist, CHUNK, HELD)
    if STRATEGY == "threshold":
        least = tl.full((), amount, tl.float32).to(tl.int32, bitcast=True)
        wanted = tl.minimum(wanted, _count(least, key, scores, N, sinks, recent, exist, CHUNK, HELD))
    elif STRATEGY == "top_p":
        fewest = _blocks_of_mass(amount, low, high, forced, score, key, scores, N, sinks, recent, exist, CHUNK, HELD)
        wanted = tl.minimum(wanted, fewest)

    low, ties = _search(wanted, exist, forced, low, high, key, scores, N, sinks, recent, exist, CHUNK, HELD)
    larger_before, equal_before = 0, 0
    for c in range(0, exist, CHUNK):
        if not HELD:
            _, key = _read(scores, c // CHUNK, N, sinks, recent, exist, CHUNK)
        larger, equal = _write(blocks, c + n, key, low, ties, larger_before, equal_before)
        if not HELD:
            larger_before += tl.sum(larger, 0)
            equal_before += tl.sum(equal, 0)
    return wanted


@triton.jit(do_not_specialize=["slots", "N", "num_blocks", "K"])
def _select_kernel(
    blocks, counts, stride_blocks_r, stride_blocks_b, stride_counts_r, stride_counts_b,
    scores, lengths, starts, slots, N, num_blocks, K, amount,
    STRATEGY: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1)
    common.wait_for_inputs(EARLY)
    _first, count = common.extent(b, lengths, starts, slots)
    exist, sinks, recent = _extent_of_blocks(count, num_blocks, SINK, RECENT, LOOKAHEAD, BLOCK)
    blocks += r.to(tl.int64) * stride_blocks_r + b.to(tl.int64) * stride_blocks_b
    scores += (r * tl.num_programs(1) + b).to(tl.int64) * N
    k = tl.arange(0, WIDTH)
    if (STRATEGY == "top_k") & (exist <= K):  # whatever the scores are
        tl.store(blocks + k, k, mask=k < exist)
        wanted = exist
    else:
        wanted = tl.minimum(exist, K)
        if STRATEGY == "ratio":
            share = tl.ceil(amount * exist.to(tl.float32)).to(tl.int32)
            wanted = tl.minimum(wanted, tl.maximum(share, sinks + exist - recent))
        if GROUP > 1:
            _choose_in_groups(blocks, scores, N, sinks, recent, exist, wanted, CHUNK, GROUP, WIDTH)
        else:
            wanted = _choose(blocks, scores, N, sinks, recent, exist, wanted, amount, STRATEGY, CHUNK, HELD)
    tl.store(counts + r * stride_counts_r + b * stride_counts_b, wanted)
    tl.store(blocks + k, k * 0 - 1, mask=(k >= wanted) & (k < K))


class Rule(NamedTuple):
    """What a `HybridConfig` says about selections, as plain values that an operator can take."""

    strategy: str
    amount: float
    sink_tokens: int
    recent_tokens: int
    refresh_every: int
    block_size: int

    @classmethod
    def of(cls, config: HybridConfig) -> Rule:
        amount = {"ratio": config.budget_ratio, "threshold": config.threshold, "top_p": config.top_p}
        return cls(
            config.selection,
            float(amount.get(config.selection) or 0.0),
            config.sink_tokens,
            config.recent_tokens,
            config.refresh_every,
            config.block_size,
        )

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are specialised for."""
        return {
            "STRATEGY": self.strategy,
            "SINK": self.sink_tokens,
            "RECENT": self.recent_tokens,
            "LOOKAHEAD": self.refresh_every - 1,
            "BLOCK": self.block_size,
        }

    def num_blocks(self, slots: int) -> int:
        """Blocks that may exist, those of the tokens before the next selection included."""
        return ceil((slots + self.refresh_every - 1) / self.block_size)


def select_blocks(scores: Tensor, kv: KV, rule: Rule, out: Selections, tuning: Tuning | None = None) -> None:
    """See `ops.select_blocks`."""
    check_selections(out, scores.shape[:2])
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32, not {scores.dtype}.")
    scores = scores.contiguous()
    num_blocks = max(scores.shape[2], rule.num_blocks(kv.slots))
    tuning = tuning or default_tuning(num_blocks, scores.device)
    blocks, counts = out
    held, most = num_blocks <= tuning.tile, blocks.shape[2]
    with common.on_device(scores):
        _select_kernel[blocks.shape[:2]](
            *(blocks, counts, *blocks.stride()[:2], *counts.stride()),
            *(scores, kv.lengths, kv.starts, kv.slots, scores.shape[2], num_blocks, most, rule.amount),
            **rule.constants,
            CHUNK=tuning.tile,
            HELD=held,
            GROUP=group_size(tuning.tile, most) if held and rule.strategy in ("top_k", "ratio") else 1,
            WIDTH=common.power_of_two(max(most, 1)),
            **tuning.launch(kv),
        )


def group_size(num_blocks: int, most: int) -> int:
    """Neighbours in a group, which make two short searches of a long one; 1: it is short by itself."""
    wide = num_blocks // common.power_of_two(max(most, 1))
    return min(1 << (wide.bit_length() - 1) // 2, 8) if wide >= 16 else 1


def check_selections(out: Selections, shape: tuple[int, ...]) -> None:
    """Refuse buffers that do not fit `shape`, `[R, B]`."""
    blocks, counts = out
    if blocks.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"out must be int32, not {blocks.dtype} and {counts.dtype}.")
    if tuple(blocks.shape[:2]) != tuple(shape) or counts.shape != blocks.shape[:2]:
        raise ValueError(f"out is {tuple(blocks.shape)} with counts {tuple(counts.shape)} for rows {tuple(shape)}.")
    if blocks.stride(2) != 1:
        raise ValueError(f"out.blocks must have a contiguous last dimension, not strides {blocks.stride()}.")


def default_tuning(num_blocks: int, device: torch.device) -> Tuning:
    """What was fastest on an H200; `bench ops --tune` measures it."""
    tile = min(max(common.power_of_two(num_blocks), 64), IN_REGISTERS)
    return Tuning(1, tile, min(max(tile // 256, 1), 32), 1, common.starts_early(device))
