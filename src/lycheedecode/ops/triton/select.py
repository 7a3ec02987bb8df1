"""Block scores -> selections, written straight into the persistent buffers; one program a row and sequence.

    keys       the bits of a score that is not negative, read as an integer, rank like the score;
               blocks that are always selected get the largest key, absent ones the least
    wanted     how many blocks: from the strategy and the capacity of the buffers
    search     cut an interval of keys in three until exactly `wanted` keys reach a cut, or it is one key:
               then of the blocks with this key the earlier ones win
    write      the selected blocks, then -1

Every step of the search counts over the whole row, which the program holds in registers; a row too long for that is
read again each time. A step takes as long as the threads take to meet, not as they take to count: hence two cuts at a
time. Long rows come with a histogram of their keys, which many programs made. Then one look at the row is enough: what
lies above the bin that the last selected block is in is selected, and only the few blocks of this bin are ranked.
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

BINS = 4096
"""Of a histogram: 128 for each power of two from 2**-32 to 1; smaller scores are in the first."""
_MOST_HISTOGRAMS, _LONG = 32, 4096
"""Rows, all together, that have histograms; a row of more blocks than that has one."""

_FORCED = tl.constexpr(0x7FFFFFFF)
_ABSENT = tl.constexpr(-1)
_BIN_BITS = tl.constexpr(16)
_FIRST_BIN = tl.constexpr((0x3F800000 >> 16) - BINS + 1)
_BINS = tl.constexpr(BINS)
_LAST_BIN = tl.constexpr(BINS - 1)
_FEW = tl.constexpr(64)


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
    wanted, there, above, low, high, key, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr
):
    """The least key that is selected, and how many of those equal to it are.

    `there` keys are not absent, `above` of them are larger than `high`, none lies between absent ones and `low`.
    """
    if wanted <= above:
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
def _write_row(blocks, key, low, ties, scores, N, sinks, recent, exist, CHUNK: tl.constexpr, HELD: tl.constexpr):
    """Store the selected blocks of a row, in ascending order."""
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
        tl.store(blocks + at, c + tl.arange(0, CHUNK), mask=chosen)
        if not HELD:
            larger_before += tl.sum(larger, 0)
            equal_before += tl.sum(equal, 0)


@triton.jit
def _bin(key):
    """Where a key belongs in a histogram."""
    return tl.minimum(tl.maximum((key >> _BIN_BITS) - _FIRST_BIN, 0), _LAST_BIN)


@triton.jit
def count_in_bins(
    histogram, row, score, n, count, num_blocks,
    SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add blocks `n` to the histogram of their `row`, but for those that are always selected."""
    exist, sinks, recent = _extent_of_blocks(count, num_blocks, SINK, RECENT, LOOKAHEAD, BLOCK)
    key = _keys(score, n, sinks, recent, exist)
    tl.atomic_add(histogram + row * _BINS + _bin(key), 1, mask=(key >= 0) & (key < _FORCED), sem="relaxed")


@triton.jit
def _write_best(to, few, count, wanted, scores, exist):
    """Store the `wanted` best of a few blocks, `count` in ascending order at `few`: each compared with each."""
    c = tl.arange(0, _FEW)
    n = tl.load(few + c, mask=c < count, other=0, cache_modifier=".cg")
    key = tl.where(c < count, _keys(tl.load(scores + n), n, 0, exist, exist), _ABSENT)
    larger, equal = key[None, :] > key[:, None], key[None, :] == key[:, None]
    rank = tl.sum((larger | (equal & (c[None, :] < c[:, None]))).to(tl.int32), 1)
    tl.store(to + rank, n, mask=rank < wanted)


@triton.jit
def _choose_by_histogram(blocks, histogram, scores, N, sinks, recent, exist, wanted, CHUNK: tl.constexpr):
    """Write the `wanted` best blocks of a row: more than the forced ones, fewer than exist."""
    bins = tl.arange(0, _BINS)
    size = tl.load(histogram + bins, cache_modifier=".cg")
    forced = sinks + exist - recent
    reach = tl.cumsum(size, 0, reverse=True)  # blocks in this bin or above it
    edge = tl.max(tl.where(reach >= wanted - forced, bins, 0), 0)
    inside = tl.sum(tl.where(bins == edge, size, 0), 0)
    before = forced + tl.sum(tl.where(bins > edge, size, 0), 0)  # blocks that are selected in any case
    missing = wanted - before

    sure_before, maybe_before = 0, 0
    for c in range(0, exist, CHUNK):
        n = c + tl.arange(0, CHUNK)
        _, key = _read(scores, c // CHUNK, N, sinks, recent, exist, CHUNK)
        bin_ = tl.where(key == _FORCED, _BINS, _bin(key))
        sure, maybe = ((key >= 0) & (bin_ > edge)).to(tl.int32), ((key >= 0) & (bin_ == edge)).to(tl.int32)
        both = tl.cumsum(sure | (maybe << 16), 0)
        tl.store(blocks + sure_before + (both & 0xFFFF) - 1, n, mask=sure > 0)
        at = maybe_before + ((both >> 16) & 0xFFFF) - 1
        if inside == missing:
            tl.store(blocks + before + at, n, mask=maybe > 0)
        else:  # the histogram has been read: it has room for them
            tl.store(histogram + at, n, mask=(maybe > 0) & (at < _FEW))
        sure_before += tl.sum(sure, 0)
        maybe_before += tl.sum(maybe, 0)

    tl.debug_barrier()
    if (inside != missing) & (inside <= _FEW):
        _write_best(blocks + before, histogram, inside, missing, scores, exist)
    elif inside != missing:
        low = tl.where(edge > 0, (edge + _FIRST_BIN) << _BIN_BITS, 0)
        high = tl.where(edge < _LAST_BIN, (edge + _FIRST_BIN + 1) << _BIN_BITS, _FORCED) - 1
        _, first = _read(scores, 0, N, sinks, recent, exist, CHUNK)
        low, ties = _search(wanted, exist, before, low, high, first, scores, N, sinks, recent, exist, CHUNK, False)
        _write_row(blocks, first, low, ties, scores, N, sinks, recent, exist, CHUNK, False)
    tl.debug_barrier()


@triton.jit
def _choose(
    blocks, scores, N, sinks, recent, exist, wanted, amount,
    STRATEGY: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Write the best blocks of a row, at most `wanted`, and return how many; it is read once if it is `HELD`."""
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
    _write_row(blocks, key, low, ties, scores, N, sinks, recent, exist, CHUNK, HELD)
    return wanted


@triton.jit(do_not_specialize=["slots", "N", "num_blocks", "K"])
def _select_kernel(
    blocks, counts, stride_blocks_r, stride_blocks_b, stride_counts_r, stride_counts_b,
    scores, histogram, lengths, starts, slots, N, num_blocks, K, amount,
    STRATEGY: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, HELD: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1)
    common.wait_for_inputs(EARLY)
    _first, count = common.extent(b, lengths, starts, slots)
    exist, sinks, recent = _extent_of_blocks(count, num_blocks, SINK, RECENT, LOOKAHEAD, BLOCK)
    blocks += r.to(tl.int64) * stride_blocks_r + b.to(tl.int64) * stride_blocks_b
    row = r * tl.num_programs(1) + b
    scores += row.to(tl.int64) * N
    forced = sinks + exist - recent
    wanted = tl.minimum(exist, K)
    if STRATEGY == "ratio":
        share = tl.ceil(amount * exist.to(tl.float32)).to(tl.int32)
        wanted = tl.minimum(wanted, tl.maximum(share, forced))
    k = tl.arange(0, WIDTH)
    searched = True
    if histogram is not None:
        histogram += row * _BINS
        searched = (wanted <= forced) | (wanted == exist)
        if not searched:
            _choose_by_histogram(blocks, histogram, scores, N, sinks, recent, exist, wanted, CHUNK)
        tl.store(histogram + tl.arange(0, _BINS), tl.zeros([_BINS], tl.int32))  # for the next launch
    if (STRATEGY == "top_k") & (wanted == exist):  # whatever the scores are
        tl.store(blocks + k, k, mask=k < exist)
    elif searched:
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


def take_histogram(rule: Rule, rows: int, num_blocks: int, device: torch.device) -> Tensor | None:
    """int32 `[rows, BINS]` zeros, which `select_blocks` leaves zero; None where a row is better searched without."""
    known = rule.strategy in ("top_k", "ratio")  # how many blocks are wanted
    if not known or rows > _MOST_HISTOGRAMS or num_blocks <= _LONG:
        return None
    return common.take_arrivals(rows * BINS, device).view(rows, BINS)


def select_blocks(
    scores: Tensor,
    kv: KV,
    rule: Rule,
    out: Selections,
    tuning: Tuning | None = None,
    histogram: Tensor | None = None,
) -> None:
    """See `ops.select_blocks`; `histogram`: of the rows of scores, see `count_in_bins`."""
    check_selections(out, scores.shape[:2])
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32, not {scores.dtype}.")
    scores = scores.contiguous()
    num_blocks = max(scores.shape[2], rule.num_blocks(kv.slots))
    tuning = tuning or default_tuning(num_blocks, scores.device, histogram is not None)
    blocks, counts = out
    with common.on_device(scores):
        _select_kernel[blocks.shape[:2]](
            *(blocks, counts, *blocks.stride()[:2], *counts.stride(), scores, histogram),
            *(kv.lengths, kv.starts, kv.slots, scores.shape[2], num_blocks, blocks.shape[2], rule.amount),
            **rule.constants,
            CHUNK=tuning.tile,
            HELD=num_blocks <= tuning.tile,
            WIDTH=common.power_of_two(max(blocks.shape[2], 1)),
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


def default_tuning(num_blocks: int, device: torch.device, histogram: bool = False) -> Tuning:
    """What was fastest on an H200; `bench ops --tune` measures it."""
    early = common.starts_early(device)
    if histogram:
        return Tuning(1, 4096, 16, 1, early)
    tile = min(max(common.power_of_two(num_blocks), 64), IN_REGISTERS)
    return Tuning(1, tile, min(max(tile // 512, 4), 16 if tile < 32768 else 32), 1, early)
