"""Attention of KV heads, each over the blocks that its donor selected.

    selection of head h's donor   [ 7 | 0 | 93 | 12 | 55 | 31 | 2 | -1 | -1 ]     block indices, any order
    tiles of gathered tokens      \\_ tile 0 _/\\_ tile 1 _/\\_ tile 2 _/           several blocks, or part of one
    programs (b, h, split)          split 0       split 1       split 0

A program gathers its tiles' keys and values straight from the cache and reads nothing else; every program of a fixed
grid takes an even share of the tiles that there are. Where a tile lies is looked up one tile ahead, so that loads of
keys and values do not wait for loads of indices. The last of a head's programs to arrive merges their results.

With a completion, tiles of chunks' means come after those of tokens, shared out in the same turn: a mean is read like a
token, from another place, and its logit has a bias. What is looked up ahead is then how much of the chunk was taken.
Where tokens have 8 bits, means have 16, and a loop of their own after that of the tokens.
"""

from __future__ import annotations

from math import inf, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import LOG2_E, Tuning
from ..merge import finish, merge_chunk, merge_space
from ..types import KV, Completion, Selections, constant

_ANY_LENGTH = 1 << 30
"""Slots of sequences whose blocks have places: the tokens they may have."""


@triton.jit
def _look_up(tile, tiles, blocks, K, everything, taken, complete, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of each token of a tile, the selected block that it lies in; of each mean, how many blocks were taken."""
    at = tile * TILE + tl.arange(0, TILE)
    if taken is None:
        mask = common.mask_if(everything == 0, at // BLOCK < K)
        found = tl.load(blocks + at // BLOCK, mask=mask, other=-1)
        found = tl.where(everything, at // BLOCK, found)
    else:
        is_mean = tile >= tiles
        place = tl.where(is_mean, at - tiles * TILE, at // BLOCK)
        end = tl.where(is_mean, complete, K)
        listed = is_mean | (everything == 0)
        mask = common.mask_if(listed, place < end)
        found = tl.load(tl.where(is_mean, taken, blocks) + place, mask=mask, other=-1)
        found = tl.where(listed, found, place)
    return found


@triton.jit
def _place(tile, tiles, places, K, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Of each token of a tile, the place of its block; see `ops.attend_blocks`."""
    place = (tile * TILE + tl.arange(0, TILE)) // BLOCK
    return tl.load(places + place, mask=common.mask_if(tile < tiles, place < K), other=0)


@triton.jit(do_not_specialize=["slots", "K"])
def _attend_blocks_kernel(
    output, partial, sums, arrivals, query, heads, scale, stride_qb, stride_qh,
    rows, blocks, places, counts, K, stride_blocks_r, stride_blocks_b, stride_counts_r, stride_counts_b,
    mean_keys, mean_values, stride_mp, stride_mh, stride_ms, log_factors, taken, stride_taken_r, stride_taken_b,
    sinks, key_scales, value_scales,
    keys, values, lengths, starts, page_table,
    stride_kp, stride_kh, stride_ks, stride_vp, stride_vh, stride_vs, stride_table, slots, PAGE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, MEAN_OF: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + h)  # no kernel writes it
    log_factor = 0.0
    if taken is not None:
        log_factor = tl.load(log_factors + h)  # nor this
    common.wait_for_inputs(PDL)
    head = h
    if heads is not None:
        head = tl.load(heads + h)
    first, count = common.extent(b, lengths, starts, slots)
    chosen = tl.load(counts + row * stride_counts_r + b * stride_counts_b)
    everything = chosen < 0
    chosen = tl.where(everything, tl.cdiv(count, BLOCK), chosen)
    blocks += row * stride_blocks_r + b.to(tl.int64) * stride_blocks_b
    if places is not None:
        places += row * stride_blocks_r + b.to(tl.int64) * stride_blocks_b
    q = common.load_query(query, b, head, stride_qb, stride_qh, G, D, GP, DP)

    acc = tl.zeros([GP, DP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    if sinks is not None:
        peak = common.load_sinks(sinks, head, split, G, GP)
        total = tl.where(peak > float("-inf"), 1.0, 0.0)
    if key_scales is not None:
        q, scale = common.for_8_bit_keys(q, scale * tl.load(key_scales + head))
    tiles = tl.cdiv(chosen * BLOCK, TILE)
    end, complete = tiles, 0
    if taken is not None:
        taken += row * stride_taken_r + b.to(tl.int64) * stride_taken_b
        some = (chosen * BLOCK < count) & (log_factor > float("-inf"))
        complete = tl.where(some, tl.maximum(count - 1, 0) // MEAN_OF, 0)
        end += tl.cdiv(complete, TILE)
    last = end
    if key_scales is not None:
        last = tiles
    if taken is None or key_scales is not None:
        found = _look_up(split, tiles, blocks, K, everything, None, 0, BLOCK, TILE)
    else:
        found = _look_up(split, tiles, blocks, K, everything, taken, complete, BLOCK, TILE)
    placed = found
    if places is not None:
        placed = _place(split, tiles, places, K, BLOCK, TILE)
    for tile in range(split, last, SPLITS):
        at = tile * TILE + tl.arange(0, TILE)
        if taken is None or key_scales is not None:
            token = found * BLOCK + at % BLOCK
            exists = (found >= 0) & (token < count)
            if places is not None:
                token = placed * BLOCK + at % BLOCK
            page, entry = common.locate(b, first + token, exists, page_table, stride_table, PAGE)
            k = common.load_tokens(keys, page, entry, head, exists, stride_kp, stride_kh, stride_ks, D, DP)
            v = common.load_tokens(values, page, entry, head, exists, stride_vp, stride_vh, stride_vs, D, DP)
            bias = None
        else:
            is_mean = tile >= tiles
            chunk = at - tiles * TILE
            unread = MEAN_OF - found * BLOCK
            token = tl.where(is_mean, chunk * MEAN_OF + MEAN_OF - 1, found * BLOCK + at % BLOCK)
            exists = (found >= 0) & tl.where(is_mean, unread > 0, token < count)
            slot = first + token
            if places is not None:
                slot = tl.where(is_mean, slot, placed * BLOCK + at % BLOCK)
            if PAGE > 0:  # any page of the sequence where nothing exists: Triton 3.6 fails at a mask (head dim 256)
                slot = tl.maximum(tl.minimum(slot, first + count - 1), 0)
            page, entry = common.locate(b, slot, None, page_table, stride_table, PAGE)
            entry = tl.where(is_mean, chunk if PAGE == 0 else entry // MEAN_OF, entry)
            bias = tl.where(is_mean, tl.log2(tl.maximum(unread, 1).to(tl.float32)) + log_factor, 0.0)
            k = common.load_tokens(
                tl.where(is_mean, mean_keys, keys), page, entry, head, exists, tl.where(is_mean, stride_mp, stride_kp),
                tl.where(is_mean, stride_mh, stride_kh), tl.where(is_mean, stride_ms, stride_ks), D, DP,
            )  # fmt: skip
            v = common.load_tokens(
                tl.where(is_mean, mean_values, values), page, entry, head, exists,
                tl.where(is_mean, stride_mp, stride_vp), tl.where(is_mean, stride_mh, stride_vh),
                tl.where(is_mean, stride_ms, stride_vs), D, DP,
            )  # fmt: skip
        if key_scales is not None:
            k, v = k.to(q.dtype), v.to(q.dtype)
        if taken is None or key_scales is not None:
            found = _look_up(tile + SPLITS, tiles, blocks, K, everything, None, 0, BLOCK, TILE)
        else:
            found = _look_up(tile + SPLITS, tiles, blocks, K, everything, taken, complete, BLOCK, TILE)
        if places is not None:
            placed = _place(tile + SPLITS, tiles, places, K, BLOCK, TILE)
        acc, peak, total = common.attend_tile(acc, peak, total, q, k, v, exists, scale, bias)

    if taken is not None and key_scales is not None:
        for tile in range(tiles + (split + SPLITS - tiles % SPLITS) % SPLITS, end, SPLITS):
            chunk = (tile - tiles) * TILE + tl.arange(0, TILE)
            unread = MEAN_OF - tl.load(taken + chunk, mask=chunk < complete, other=0) * BLOCK
            exists = (chunk < complete) & (unread > 0)
            page, entry = common.locate_means(b, first, chunk, exists, page_table, stride_table, PAGE, MEAN_OF)
            k = common.load_tokens(mean_keys, page, entry, head, exists, stride_mp, stride_mh, stride_ms, D, DP)
            v = common.load_tokens(mean_values, page, entry, head, exists, stride_mp, stride_mh, stride_ms, D, DP)
            bias = tl.log2(tl.maximum(unread, 1).to(tl.float32)) + log_factor
            k, v = k.to(q.dtype), v.to(q.dtype)
            acc, peak, total = common.attend_tile(acc, peak, total, q, k, v, exists, scale, bias)

    if value_scales is not None:
        acc *= tl.load(value_scales + head)
    pair = b * tl.num_programs(1) + h
    finish(output, partial, sums, arrivals, acc, peak, total, pair, split, G, D, GP, DP, SPLITS, CHUNK, PDL)


def attend_blocks(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: tuple[int, ...] | None = None,
    tuning: Tuning | None = None,
    out: Tensor | None = None,
    completion: Completion | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """See `ops.attend_blocks`."""
    common.check_strides(query, kv)
    if places is not None and places.stride() != selections.blocks.stride():
        raise ValueError(f"places have strides {places.stride()}, but blocks {selections.blocks.stride()}.")
    _check_selections(query, selections, rows, kv.keys.shape[1] if heads is None else len(heads))
    batch, num_query_heads, dim = query.shape
    group, blocks, counts = num_query_heads // kv.keys.shape[1], selections.blocks, selections.counts
    shape = (batch, len(rows) * group, dim)
    output = torch.empty(shape, dtype=query.dtype, device=query.device) if out is None else out
    if output.shape != shape or output.dtype != query.dtype or not output.is_contiguous():
        raise ValueError(f"out must be contiguous {query.dtype} {shape}, not {output.dtype} {tuple(output.shape)}.")
    if completion is not None and not any(completion.of(heads)):
        completion = None
    tuning = tuning or default_tuning(batch * len(rows), kv, blocks.shape[2] * block_size, completion is not None)
    space = merge_space(batch, len(rows), tuning.splits, group, dim, query.device)
    with common.on_device(query):
        _attend_blocks_kernel[tuning.splits, len(rows), batch](
            *(output, *space, query, common.head_index(heads, kv), scale * LOG2_E, query.stride(0), query.stride(1)),
            *(rows, blocks, places, counts, blocks.shape[2]),
            *(blocks.stride(0), blocks.stride(1), counts.stride(0), counts.stride(1)),
            *_completion_arguments(completion, selections, heads),
            *(sinks, *(scales or (None, None))),
            *common.cache_arguments(kv, None if places is None else _ANY_LENGTH),
            **common.padded(group, dim),
            BLOCK=block_size,
            MEAN_OF=1 if completion is None else completion.chunk,
            TILE=tuning.tile,
            SPLITS=tuning.splits,
            CHUNK=merge_chunk(tuning.splits, group, dim, tuning.warps),
            **tuning.launch(kv),
        )
    return output


def _completion_arguments(
    completion: Completion | None, selections: Selections, heads: tuple[int, ...] | None
) -> tuple[Any, ...]:
    """Means and their strides, factors, and what was taken of the chunks."""
    if completion is None:
        return None, None, 0, 0, 0, None, None, 0, 0
    logs = tuple(log2(factor) if factor > 0 else -inf for factor in completion.of(heads))
    keys, values, taken = completion.keys, completion.values, selections.taken
    if keys.stride(3) != 1 or taken.stride(2) != 1:
        raise ValueError("means and what was taken of chunks must have a contiguous last dimension.")
    return (
        *(keys, values, *keys.stride()[:3], constant(logs, torch.float32, keys.device)),
        *(taken, *taken.stride()[:2]),
    )


def _check_selections(query: Tensor, selections: Selections, rows: Tensor, num_heads: int) -> None:
    blocks, counts = selections.blocks, selections.counts
    if rows.shape != (num_heads,) or rows.dtype != torch.int64:
        raise ValueError(
            f"rows must be int64 [{num_heads}], a row for each head, not {rows.dtype} {tuple(rows.shape)}."
        )
    if blocks.dim() != 3 or blocks.dtype != torch.int32 or counts.dtype != torch.int32:
        raise ValueError(f"selections must be int32 [R, B, K], not {blocks.dtype} {tuple(blocks.shape)}.")
    if blocks.shape[1] != query.shape[0] or counts.shape != blocks.shape[:2]:
        raise ValueError(
            f"selections are {tuple(blocks.shape)} with counts {tuple(counts.shape)}, for {query.shape[0]} queries."
        )
    if blocks.stride(2) != 1:
        raise ValueError(f"selections must have a contiguous last dimension, not strides {blocks.stride()}.")


def default_tuning(pairs: int, kv: KV, capacity: int, completed: bool = False) -> Tuning:
    """What was fastest on an H200, within a step for up to 32 pairs; `experiments tune-ops` measures it alone."""
    pdl = common.has_pdl(kv.keys.device)
    if pairs <= 16:
        programs, tuning = 128, Tuning(1, min(common.tile_of(kv, 32768), 128), 4, 3, 2 * pdl)
    elif pairs <= 32:
        programs, tuning = 256, Tuning(1, min(common.tile_of(kv, 16384), 64), 2, 3, pdl)
    else:
        programs, tuning = 512, Tuning(1, min(common.tile_of(kv, 16384), 64), 2, 2, 2 * pdl)
    tuning = common.fitting(tuning, kv)
    if completed and kv.page_table is not None and kv.keys.shape[3] > 128:  # two places of each token, in registers
        tuning = tuning._replace(tile=max(tuning.tile // (4 if kv.keys.element_size() == 1 else 2), 16))
    tiles = triton.cdiv(min(capacity, max(kv.slots, 1)), tuning.tile)
    return tuning._replace(splits=common.even_splits(pairs, tiles, programs, 32))
