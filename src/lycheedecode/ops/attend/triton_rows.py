"""Dense causal attention of the newest few tokens of every sequence, whose queries share one reading of the cache.

    rows of a program    query token 0: its G heads | query token 1: its G heads | ...       all of one KV head
    tokens of the cache  |tile|tile|tile|tile|tile|til|
    programs             split: 0    1    2    0    1    2                             then `_merge_kernel`, a row each

As long as the rows of a KV head fit into one program, more query tokens cost no more reading. Which split has a tile
does not depend on how many tokens there are, and a tile that a row does not see leaves it as it is, to the bit: so a
query gives the same result whichever place it has among the rows.

A cache in 8-bit floats is widened to float16 in registers.
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import LOG2_E, Tuning
from ..types import KV
from . import triton_dense


@triton.jit(do_not_specialize=["slots"])
def _attend_rows_kernel(
    output, partial, sums, query, begins, key_scales, value_scales, scale, stride_qb, stride_qt, stride_qh,
    keys, values, lengths, starts, page_table,
    stride_kp, stride_kh, stride_ks, stride_vp, stride_vh, stride_vs, stride_table, slots, PAGE: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split, head, b = tl.program_id(0) % SPLITS, tl.program_id(1), tl.program_id(2)
    r = tl.program_id(0) // SPLITS * RP + tl.arange(0, RP)
    d = tl.arange(0, DP)
    t = r // G
    mask = (r < T * G)[:, None] & (d < D)[None, :]
    common.wait_for_inputs(PDL)
    first, count = common.extent(b, lengths, starts, slots)
    at = query + b.to(tl.int64) * stride_qb + t * stride_qt + (head * G + r % G) * stride_qh
    q = tl.load(at[:, None] + d[None, :], mask=mask, other=0.0)
    size = tl.full([RP], 1.0, tl.float32) * scale
    if key_scales is not None:
        largest = tl.max(tl.abs(q.to(tl.float32)), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        q = (q.to(tl.float32) / largest[:, None]).to(tl.float16)
        size *= largest * tl.load(key_scales + head)

    end = count - (T - 1) + t  # tokens that a row sees, its own the last
    low = t * 0
    tile_0 = 0
    if begins is not None:
        low = tl.load(begins + b * T + t, mask=r < T * G, other=0)
        tile_0 = tl.load(begins + b * T) // TILE
    acc = tl.zeros([RP, DP], tl.float32)
    peak = tl.full([RP], float("-inf"), tl.float32)
    total = tl.zeros([RP], tl.float32)
    tile_1 = tl.cdiv(count, TILE)
    # Before `edge` every row sees whole tiles: without masks, a third of a tile's instructions are saved. Both loops
    # compute the same bits, hence `fma`, which a compiler may use in one and not in the other.
    edge = tile_0 if begins is not None else tl.maximum(count - (T - 1), 0) // TILE
    begin = common.tile_after(split, tile_0, SPLITS)
    for masked in tl.static_range(2):
        until = tile_1 if masked else edge
        for tile in range(begin, until, SPLITS):
            token = tile * TILE + tl.arange(0, TILE)
            exists = None
            if masked:
                exists = token < count
            page, entry = common.locate(b, first + token, exists, page_table, stride_table, PAGE)
            k = common.load_tokens(keys, page, entry, head, exists, stride_kp, stride_kh, stride_ks, D, DP)
            v = common.load_tokens(values, page, entry, head, exists, stride_vp, stride_vh, stride_vs, D, DP)
            k, v = k.to(q.dtype), v.to(q.dtype)
            x = tl.dot(q, tl.trans(k), input_precision="ieee")
            if masked:
                seen = token[None, :] < end[:, None]
                if begins is not None:
                    seen = seen & (token[None, :] >= low[:, None])
                x = tl.where(seen, x, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(x, 1) * size)
            shift = common.finite(new_peak)
            p = tl.exp2(tl.fma(x, size[:, None], -shift[:, None]))
            fade = tl.exp2(peak - shift)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            peak, total = new_peak, total * fade + tl.sum(p, 1)
        begin = common.tile_after(begin, until, SPLITS)

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if value_scales is not None:
        result *= tl.load(value_scales + head)
    heads = tl.num_programs(1)
    if SPLITS == 1:
        row = (b.to(tl.int64) * T + t) * heads * G + head * G + r % G
        tl.store(output + row[:, None] * D + d[None, :], result.to(output.dtype.element_ty), mask=mask)
    else:
        row = ((b.to(tl.int64) * heads + head) * SPLITS + split) * (T * G) + r
        tl.store(partial + row[:, None] * D + d[None, :], result, mask=mask)
        tl.store(sums + row, peak + tl.log2(total), mask=r < T * G)


@triton.jit
def _merge_kernel(
    output, partial, sums,
    T: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row of all splits: the average of their results, weighted by their mass."""
    r, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    d = tl.arange(0, DP)
    split = tl.arange(0, triton.next_power_of_2(SPLITS))
    common.wait_for_inputs(PDL)
    row = ((b * heads + head) * SPLITS + split) * (T * G) + r
    mass = tl.load(sums + row, mask=split < SPLITS, other=float("-inf"))
    mask = (split < SPLITS)[:, None] & (d < D)[None, :]
    parts = tl.load(partial + row[:, None] * D + d[None, :], mask=mask, other=0.0)
    weight = tl.exp2(mass - common.finite(tl.max(mass, 0)))
    total = tl.sum(weight, 0)
    result = tl.sum(weight[:, None] * parts, 0) / tl.where(total > 0, total, 1.0)
    at = output + ((b * T + r // G) * heads * G + head * G + r % G) * D + d
    tl.store(at, result.to(output.dtype.element_ty), mask=d < D)


def attend_tokens(
    query: Tensor,
    kv: KV,
    scale: float,
    begins: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """See `ops.attend_tokens`."""
    common.check_strides(query, kv)
    batch, tokens, num_query_heads, dim = query.shape
    heads, device = kv.keys.shape[1], query.device
    group = num_query_heads // heads
    rows = tokens * group
    tuning = tuning or default_tuning(batch * heads, rows, kv)
    row_tile = min(common.padded(rows, dim)["GP"], most_rows(kv))
    output = torch.empty(query.shape, dtype=query.dtype, device=device)
    partial = sums = None
    if tuning.splits > 1:
        partial = torch.empty((batch, heads, tuning.splits, rows, dim), dtype=torch.float32, device=device)
        sums = torch.empty(partial.shape[:-1], dtype=torch.float32, device=device)
    sizes = {"T": tokens, "G": group, "D": dim, "DP": common.padded(rows, dim)["DP"], "SPLITS": tuning.splits}
    with common.on_device(query):
        _attend_rows_kernel[tuning.splits * ceil(rows / row_tile), heads, batch](
            *(output, partial, sums, query, begins, *(scales or (None, None)), scale * LOG2_E, *query.stride()[:3]),
            *common.cache_arguments(kv),
            **sizes,
            RP=row_tile,
            TILE=tuning.tile,
            **tuning.launch(kv),
        )
        if partial is not None:
            warps = max(common.power_of_two(tuning.splits) * sizes["DP"] // 2048, 1)  # 64 registers a thread
            merging = Tuning(1, 1, min(warps, 8), 1, min(tuning.pdl, 1))
            _merge_kernel[rows, heads, batch](output, partial, sums, **sizes, **merging.options)
    return output


def most_rows(kv: KV) -> int:
    """Rows that a program can hold: their results stay in registers."""
    wide = common.power_of_two(kv.keys.shape[3]) > 128
    if kv.keys.dtype == torch.float32:
        return 16 if wide else 32
    return 64 if wide else 128


def default_tuning(pairs: int, rows: int, kv: KV) -> Tuning:
    """What was fastest on an H100 and on an H200; `bench lossless --parts attend --tune` measures it.

    A single token in 8 bits is read as by `triton_dense`. Up to 64 rows of 16 bits a processor has one program, which
    computes beside its own loads, and there is half as much to merge as with two: on an H100 with tiles of 64, on an
    H200, whose memory is faster, of 128, or of 64 in four stages where few of them come to a program. Otherwise one of
    two programs computes while the other waits. In 8 bits attention takes about as long as in 16: it waits for
    conversions, not for bytes.
    """
    device, pdl = kv.keys.device, common.has_pdl(kv.keys.device)
    size = kv.keys.element_size()
    if rows <= 16 and size == 1:
        return triton_dense.default_tuning(pairs, kv)
    tile = min(common.tile_of(kv, 16384), 64)
    tiles = triton.cdiv(max(kv.slots, 1), tile)
    if rows <= 16:
        tuning = common.fitting(Tuning(8, tile, 4, 4, pdl), kv)
        return tuning._replace(splits=common.even_splits(pairs, tiles, 128, 64)) if pairs <= 16 else tuning
    row_tile = min(common.power_of_two(rows), most_rows(kv))
    held = row_tile * common.power_of_two(kv.keys.shape[3])
    warps = 8 if held > 64 * 128 or size == 4 else 4
    fast = common.reads_fast(device)
    one = row_tile == 64 and size == 2 and (held <= 64 * 128 or not fast)
    splits = min(common.filling_splits(pairs, (1 if one else 2) * common.processors(device)), tiles)
    stages = 3
    if one and fast:
        tile, stages = (2 * tile, 3) if tiles >= 256 * splits else (tile, 4)
    return common.fitting(Tuning(splits, tile, warps, stages, pdl), kv, row_tile)
