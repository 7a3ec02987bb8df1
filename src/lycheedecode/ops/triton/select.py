"""Block scores -> selections, written straight into the persistent buffers; one program a row and sequence.

    keys       the bits of a score that is not negative, read as an integer, rank like the score;
               blocks that are always selected get the largest key, absent ones the least
    wanted     how many blocks: from the strategy and the capacity of the buffers
    search     halve an interval of keys until exactly `wanted` keys reach its middle, or it is one key:
               then of the blocks with this key the earlier ones win
    write      the selected blocks in ascending order, then -1

Every step of the search counts over the whole row, which the program holds in registers; a row too long for that is
read again each time. Nothing depends on the order in which threads run, and nothing travels to the host.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import HybridConfig
from ..types import KV, Selections
from . import common
from .common import Tuning
from .scan import Worth, block_scores, normalise, scan

IN_REGISTERS = 16384
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
    """Keys that are at least `least`."""
    if HELD:
        found = tl.sum((key >= least).to(tl.int32), 0)
    else:
        found = 0
        for c in range(tl.cdiv(exist, CHUNK)):
            _, key = _read(scores, c, N, sinks, recent, exist, CHUNK)
            found += tl.sum((key >= least).to(tl.int32), 0)
    return found


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


@triton.jit(do_not_specialize=["slots", "num_blocks", "K"])
def _select_kernel(
    blocks, counts, stride_blocks_r, stride_blocks_b, stride_counts_r, stride_counts_b,
    scores, worth, sums, lengths, starts, slots, N, num_blocks, K, amount,
    STRATEGY: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr,
    BLOCK: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1)
    common.wait_for_inputs(EARLY)
    _first, count = common.extent(b, lengths, starts, slots)
    row = (r * tl.num_programs(1) + b).to(tl.int64)
    blocks += r.to(tl.int64) * stride_blocks_r + b.to(tl.int64) * stride_blocks_b

    # Which blocks exist; sinks are the blocks before `sinks`, recent ones those from `recent` on.
    exist = tl.where(count > 0, tl.minimum(tl.cdiv(count + LOOKAHEAD, BLOCK), num_blocks), 0)
    sinks = tl.minimum((SINK + BLOCK - 1) // BLOCK, exist)
    recent = tl.maximum(tl.minimum(tl.maximum(count - RECENT, 0) // BLOCK, exist), sinks)
    forced = sinks + exist - recent

    n = tl.arange(0, CHUNK)
    if SPLITS > 0:  # straight from a scan
        score = block_scores(worth, sums, row * G, n, n < tl.cdiv(count, BLOCK), N, G, SPLITS)
        key = _keys(score, n, sinks, recent, exist)
    else:
        scores += row * N
        score, key = _read(scores, 0, N, sinks, recent, exist, CHUNK)

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
        middle = low + (high - low + 1) // 2
        found = _count(middle, key, scores, N, sinks, recent, exist, CHUNK, HELD)
        above = tl.where(found < wanted, found, above)
        high = tl.where(found < wanted, middle - 1, tl.where(found == wanted, middle, high))
        low = tl.where(found < wanted, low, middle)
    ties = wanted - above  # of the keys equal to `low`, so many are selected: all, when `wanted` keys reach it

    larger_before, equal_before = 0, 0
    for c in range(tl.cdiv(exist, CHUNK)):
        if not HELD:
            _, key = _read(scores, c, N, sinks, recent, exist, CHUNK)
        larger, equal = (key > low).to(tl.int32), (key == low).to(tl.int32)
        both = tl.cumsum(larger | (equal << 16), 0)
        before_larger = larger_before + (both & 0xFFFF) - larger
        before_equal = equal_before + (both >> 16) - equal
        chosen = (larger > 0) | ((equal > 0) & (before_equal < ties))
        at = before_larger + tl.minimum(before_equal, ties)
        tl.store(blocks + at, c * CHUNK + n, mask=chosen)
        larger_before += tl.sum(larger, 0)
        equal_before += tl.sum(equal, 0)
    tl.store(counts + r * stride_counts_r + b * stride_counts_b, wanted)
    for k in range(wanted, K, CHUNK):
        tl.store(blocks + k + n, n * 0 - 1, mask=k + n < K)


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

    def num_blocks(self, slots: int) -> int:
        """Blocks that may exist, those of the tokens before the next selection included."""
        return ceil((slots + self.refresh_every - 1) / self.block_size)


def select_blocks(scores: Tensor, kv: KV, rule: Rule, out: Selections, tuning: Tuning | None = None) -> None:
    """See `ops.select_blocks`."""
    _check_selections(out, scores.shape[:2])
    if scores.dtype != torch.float32 or not scores.is_contiguous():
        raise ValueError(f"scores must be contiguous float32, not {scores.dtype} with strides {scores.stride()}.")
    num_blocks = max(scores.shape[2], rule.num_blocks(kv.slots))
    _launch(scores, None, None, kv, rule, out, num_blocks, tuning)


def select_from_scan(worth: Worth, kv: KV, rule: Rule, out: Selections, tuning: Tuning | None = None) -> None:
    """Like `select_blocks`, on what a scan left behind."""
    num_blocks = rule.num_blocks(kv.slots)
    if num_blocks > IN_REGISTERS:
        _launch(normalise(worth, kv, rule.block_size), None, None, kv, rule, out, num_blocks, tuning)
    else:
        _launch(None, *worth, kv, rule, out, num_blocks, tuning)


def _launch(
    scores: Tensor | None,
    worth: Tensor | None,
    sums: Tensor | None,
    kv: KV,
    rule: Rule,
    out: Selections,
    num_blocks: int,
    tuning: Tuning | None,
) -> None:
    blocks, counts = out
    tuning = tuning or default_tuning(num_blocks)
    source = worth if scores is None else scores
    with common.on_device(blocks):
        _select_kernel[blocks.shape[:2]](
            *(blocks, counts, blocks.stride(0), blocks.stride(1), counts.stride(0), counts.stride(1)),
            *(scores, worth, sums, kv.lengths, kv.starts, kv.slots, source.shape[-1], num_blocks, blocks.shape[2]),
            rule.amount,
            STRATEGY=rule.strategy,
            SINK=rule.sink_tokens,
            RECENT=rule.recent_tokens,
            LOOKAHEAD=rule.refresh_every - 1,
            BLOCK=rule.block_size,
            G=1 if worth is None else worth.shape[2],
            SPLITS=0 if sums is None else sums.shape[3],
            CHUNK=tuning.tile,
            HELD=num_blocks <= tuning.tile,
            **tuning.launch,
        )


def scan_select(
    query: Tensor, kv: KV, heads: tuple[int, ...], rule: Rule, scale: float, score: str, out: Selections
) -> None:
    """See `ops.scan_select`."""
    _check_selections(out, (len(heads), query.shape[0]))
    select_from_scan(scan(query, kv, heads, rule.block_size, scale, score), kv, rule, out)


def _check_selections(out: Selections, shape: tuple[int, ...]) -> None:
    blocks, counts = out
    if blocks.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"out must be int32, not {blocks.dtype} and {counts.dtype}.")
    if tuple(blocks.shape[:2]) != tuple(shape) or counts.shape != blocks.shape[:2]:
        raise ValueError(f"out is {tuple(blocks.shape)} with counts {tuple(counts.shape)} for rows {tuple(shape)}.")
    if blocks.stride(2) != 1:
        raise ValueError(f"out.blocks must have a contiguous last dimension, not strides {blocks.stride()}.")


def default_tuning(num_blocks: int) -> Tuning:
    """What was fastest on an H200; `bench ops --tune` measures it."""
    tile = min(max(common.power_of_two(num_blocks), 64), IN_REGISTERS)
    return Tuning(1, tile, min(max(tile // 256, 1), 32), 1)
