"""Dense attention of some KV heads.

    tokens of one head of one sequence   |tile|tile|tile|tile|tile|tile|tile|tile|til|
    programs (b, h, split)                split: 0    1    2    0    1    2    0    1   2

A program reads its tiles once, keys and values, for the whole query group. Tiles go round the splits: at any time all
programs together read one stretch of memory, and every program of a fixed grid takes an even share of the tokens that
there are. The last of a head's programs to arrive merges their results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import LOG2_E, Tuning
from ..merge import finish, merge_chunk, merge_space
from ..types import KV


@triton.jit(do_not_specialize=["slots"])
def _attend_kernel(
    output, partial, sums, arrivals, query, heads, scale, stride_qb, stride_qh,
    sinks, key_scales, value_scales, keys, values, lengths, starts, page_table,
    stride_kp, stride_kh, stride_ks, stride_vp, stride_vh, stride_vs, stride_table, slots, PAGE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    common.wait_for_inputs(PDL)
    head = h
    if heads is not None:
        head = tl.load(heads + h)
    first, count = common.extent(b, lengths, starts, slots)
    q = common.load_query(query, b, head, stride_qb, stride_qh, G, D, GP, DP)

    acc = tl.zeros([GP, DP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    if sinks is not None:
        peak = common.load_sinks(sinks, head, split, G, GP)
        total = tl.where(peak > float("-inf"), 1.0, 0.0)
    if key_scales is not None:
        q, scale = common.for_8_bit_keys(q, scale * tl.load(key_scales + head))
    tile_0 = split
    # Whole tiles need no masks, which take a third of the instructions; in 8 bits two loops take too many registers.
    for masked in tl.static_range(key_scales is not None, 2):
        tile_1 = tl.cdiv(count, TILE) if masked else count // TILE
        for tile in range(tile_0, tile_1, SPLITS):
            token = tile * TILE + tl.arange(0, TILE)
            exists = None
            if masked:
                exists = token < count
            page, entry = common.locate(b, first + token, exists, page_table, stride_table, PAGE)
            k = common.load_tokens(keys, page, entry, head, exists, stride_kp, stride_kh, stride_ks, D, DP)
            v = common.load_tokens(values, page, entry, head, exists, stride_vp, stride_vh, stride_vs, D, DP)
            if key_scales is not None:
                k, v = k.to(q.dtype), v.to(q.dtype)
            acc, peak, total = common.attend_tile(acc, peak, total, q, k, v, exists, scale)
        tile_0 = common.tile_after(tile_0, tile_1, SPLITS)

    if value_scales is not None:
        acc *= tl.load(value_scales + head)
    pair = b * tl.num_programs(1) + h
    finish(output, partial, sums, arrivals, acc, peak, total, pair, split, G, D, GP, DP, SPLITS, CHUNK, PDL)


def attend(
    query: Tensor,
    kv: KV,
    scale: float,
    heads: tuple[int, ...] | None = None,
    tuning: Tuning | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `ops.attend`."""
    common.check_strides(query, kv)
    batch, num_query_heads, dim = query.shape
    group = num_query_heads // kv.keys.shape[1]
    count = kv.keys.shape[1] if heads is None else len(heads)
    output = torch.empty((batch, count * group, dim), dtype=query.dtype, device=query.device)
    tuning = tuning or default_tuning(batch * count, kv)
    space = merge_space(batch, count, tuning.splits, group, dim, query.device)
    with common.on_device(query):
        _attend_kernel[tuning.splits, count, batch](
            *(output, *space, query, common.head_index(heads, kv), scale * LOG2_E, query.stride(0), query.stride(1)),
            *(sinks, *(scales or (None, None))),
            *common.cache_arguments(kv),
            **common.padded(group, dim),
            TILE=tuning.tile,
            SPLITS=tuning.splits,
            CHUNK=merge_chunk(tuning.splits, group, dim, tuning.warps),
            **tuning.launch(kv),
        )
    return output


def default_tuning(pairs: int, kv: KV) -> Tuning:
    """What was fastest on an H200; `bench lossless --parts attend --tune` measures it.

    A program's arithmetic takes about as long as an H200 takes to read its tile, and longer where keys and values are
    in 8 bits: then processors hold several programs, one of which computes while others wait. For 16 bits tiles of 32
    tokens in four stages read 93% of the bandwidth at 1 x 128K, of 64 in three 72%.
    """
    device, pdl = kv.keys.device, common.has_pdl(kv.keys.device)
    size = kv.keys.element_size()
    if size == 1 or (size == 2 and pairs <= 16 and common.reads_fast(device)):
        tuning = common.fitting(Tuning(1, min(common.tile_of(kv, 8192), 64), 4, 4, pdl), kv)
        splits = common.filling_splits(pairs, (3 if size == 1 else 2) * common.processors(device))
        return tuning._replace(splits=max(min(splits, triton.cdiv(kv.slots, tuning.tile)), 1))
    few = pairs <= 16
    tile, stages = (16384, 4) if few else (32768, 3)
    tuning = common.fitting(Tuning(8, common.tile_of(kv, tile), 4, stages, pdl), kv)
    if few:
        tuning = tuning._replace(splits=common.even_splits(pairs, triton.cdiv(kv.slots, tuning.tile), 128, 64))
    return tuning
