"""Scan and selection in one launch.

    programs (b, r, split)    score their tiles' blocks, as in `scan`
    the last of a head        normalises the scores, which lie in the L2, and selects, as in `select`

A launch of its own for the selection would take longer than the selection does. Rows that one program cannot hold
beside its share of the scan are selected by a second kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import KV, Selections
from . import common, scan, select
from .common import Tuning
from .select import Rule

PER_THREAD = 32
"""Most blocks that a thread holds."""


@triton.jit(do_not_specialize=["slots", "num_blocks", "K"])
def _scan_select_kernel(
    blocks, counts, stride_blocks_r, stride_blocks_b, stride_counts_r, stride_counts_b, num_blocks, K, amount, arrivals,
    worth, sums, query, heads, scale, stride_qb, stride_qh, copy, stride_cb, stride_cr, stride_cs,
    keys, lengths, starts, page_table, stride_kp, stride_kh, stride_ks, stride_table, slots, N, PAGE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    NEWEST: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, WARPS: tl.constexpr,
    STRATEGY: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, LOOKAHEAD: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    common.wait_for_inputs(EARLY)
    scan.scan_tiles(
        worth, sums, query, heads, scale, stride_qb, stride_qh, copy, stride_cb, stride_cr, stride_cs,
        keys, lengths, starts, page_table, stride_kp, stride_kh, stride_ks, stride_table, slots, N, PAGE,
        G, D, GP, DP, BLOCK, LARGEST, NEWEST, TILE, SPLITS, WARPS,
    )  # fmt: skip
    r, b = tl.program_id(1), tl.program_id(2)
    row = r * tl.num_programs(2) + b
    if common.is_last(arrivals, row, SPLITS):
        _first, count = common.extent(b, lengths, starts, slots)
        exist, sinks, recent = select.extent_of_blocks(count, num_blocks, SINK, RECENT, LOOKAHEAD, BLOCK)
        n = tl.arange(0, CHUNK)
        score = scan.block_scores(worth, sums, row.to(tl.int64), n, n < tl.cdiv(count, BLOCK), N, G, SPLITS)
        blocks += r.to(tl.int64) * stride_blocks_r + b.to(tl.int64) * stride_blocks_b
        at_count = counts + r * stride_counts_r + b * stride_counts_b
        select.choose(blocks, at_count, score, worth, N, sinks, recent, exist, K, amount, STRATEGY, CHUNK, True)


def scan_select(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    rule: Rule,
    scale: float,
    score: str,
    out: Selections,
    tuning: Tuning | None = None,
    copy: Tensor | None = None,
) -> None:
    """See `ops.scan_select`."""
    batch, block_size, num_blocks = query.shape[0], rule.block_size, rule.num_blocks(kv.slots)
    select.check_selections(out, (len(heads), batch))
    tuning = tuning or default_tuning(batch * len(heads), num_blocks, kv)
    chunk = common.power_of_two(max(num_blocks, 16))
    if chunk > PER_THREAD * 32 * tuning.warps:
        scores = scan.scan_blocks(query, kv, heads, block_size, scale, score, copy, rule.refresh_every)
        select.select_blocks(scores, kv, rule, out)
        return
    _worth, values, constants = scan.scan_arguments(
        query, kv, heads, block_size, scale, score, tuning, copy, rule.refresh_every
    )
    with common.on_device(query):
        _scan_select_kernel[tuning.splits, len(heads), batch](
            *(*select.selection_arguments(out), num_blocks, out.blocks.shape[2], rule.amount),
            *(common.take_arrivals(len(heads) * batch, query.device), *values),
            **{**constants, **rule.constants},
            CHUNK=chunk,
        )


def default_tuning(pairs: int, num_blocks: int, kv: KV) -> Tuning:
    """What was fastest on an H200; `bench ops --tune` measures it."""
    warps = 8 if num_blocks <= 4096 else 16
    tile = common.tile_of(kv, 32768) * warps // 8
    splits = common.even_splits(pairs, triton.cdiv(kv.slots, tile), 256, 256)
    return Tuning(splits, tile, warps, 3, common.starts_early(kv.keys.device))
