"""Block scores -> selections, written straight into the persistent buffers; one program a row and sequence.

    keys       the bits of a score that is not negative, read as an integer, rank like the score;
               blocks that are always selected get the largest key, absent ones the least
    wanted     how many blocks: from the strategy and the capacity of the buffers
    search     cut an interval of keys in three until exactly `wanted` keys reach a cut, or it is one key:
               then of the blocks with this key the earlier ones win
    write      the selected blocks in ascending order, then -1

Every step of the search counts over the whole row, which the program holds in registers; a row too long for that is
read again each time. A step takes as long as the threads take to meet, not as they take to count: hence two cuts at a
time. Nothing depends on the order in which threads run, and nothing travels to the host.
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
def _choose(
    blocks, at_count, score, scores, N, sinks, recent, exist, K, amount,
    STRATEGY: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Select for one row: `score` holds its first `CHUNK` blocks; more of them are read from `scores` unless `HELD`."""
    n = tl.arange(0, CHUNK)
    key = _keys(score, n, sinks, recent, exist)
    forced = sinks + exist - recent
    low, high = _range(key, scores, N, sinks, recent, exist, CHUNK, HELD)
    wanted = tl.minimum(exist, K)
    if STRATEGY == "ratio":
        share = tl.ceil(amount * exist.to(tl.float32)).to(tl.int32)
        wanted = tl.minimum(wanted, tl.maximum(share, forced))
    elif STRATEGY == "threshold":
        least = tl.full((), amount, tl.float32).to(tl.int32, bitcast=True)
        wanted = tl.minimum(wanted, _count(least, key, scores, N, sinks, recent, exist, CHUNK, HELD))
    elif STRATEGY == "top_p":
        fewest = _blocks_of_mass(amount, low, high, forced, score, key, scores, N, sinks, recent, exist, CHUNK, HELD)
        wanted = tl.minimum(wanted, fewest)

    above = forced  # keys larger than `high`
    if wanted <= forced:
        low, high, above = _FORCED, _FORCED, 0
    elif wanted == exist:
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
    ties = wanted - above  # of the keys equal to `low`, so many are selected: all, when `wanted` keys reach it

    larger_before, equal_before = 0, 0
    for c in range(0, exist, CHUNK):
        if not HELD:
            _, key = _read(scores, c // CHUNK, N, sinks, recent, exist, CHUNK)
        larger, equal = (key > low).to(tl.int32), (key == low).to(tl.int32)
        both = tl.cumsum(larger | (equal << 16), 0)
        before_larger = larger_before + (both & 0xFFFF) - larger
        before_equal = equal_before + ((both >> 16) & 0xFFFF) - equal
        chosen = (larger > 0) | ((equal > 0) & (before_equal < ties))
        at = before_larger + tl.minimum(before_equal, ties)
        tl.store(blocks + at, c + n, mask=chosen)
        if not HELD:
            larger_before += tl.sum(larger, 0)
            equal_before += tl.sum(equal, 0)
    tl.store(at_count, wanted)
    for k in range(wanted, K, CHUNK):
        tl.store(blocks + k + n, n * 0 - 1, mask=k + n < K)


@triton.jit(do_not_specialize=["slots", "N", "num_blocks", "K"])
def _select_kernel(
    blocks, counts, stride_blocks_r, stride_blocks_b, stride_counts_r, stride_counts_b,
    scores, lengths, starts, slots, N, num_blocks, K, amount,
    STRATEGY: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1)
    common.wait_for_inputs(EARLY)
    _first, count = common.extent(b, lengths, starts, slots)
    exist, sinks, recent = _extent_of_blocks(count, num_blocks, SINK, RECENT, LOOKAHEAD, BLOCK)
    blocks += r.to(tl.int64) * stride_blocks_r + b.to(tl.int64) * stride_blocks_b
    scores += (r * tl.num_programs(1) + b).to(tl.int64) * N
    at_count = counts + r * stride_counts_r + b * stride_counts_b
    if (STRATEGY == "top_k") & (exist <= K):  # whatever the scores are
        for k in range(0, K, CHUNK):
            n = k + tl.arange(0, CHUNK)
            tl.store(blocks + n, tl.where(n < exist, n, -1), mask=n < K)
        tl.store(at_count, exist)
    else:
        score, _key = _read(scores, 0, N, sinks, recent, exist, CHUNK)
        _choose(blocks, at_count, score, scores, N, sinks, recent, exist, K, amount, STRATEGY, CHUNK, HELD)


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
    with common.on_device(scores):
        _select_kernel[blocks.shape[:2]](
            *(blocks, counts, *blocks.stride()[:2], *counts.stride()),
            *(scores, kv.lengths, kv.starts, kv.slots, scores.shape[2], num_blocks, blocks.shape[2], rule.amount),
            **rule.constants,
            CHUNK=tuning.tile,
            HELD=num_blocks <= tuning.tile,
            **tuning.launch(kv),
        )


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
    return Tuning(1, tile, min(max(tile // 512, 4), 16 if tile < 32768 else 32), 1, common.starts_early(device))
