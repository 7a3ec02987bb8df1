"""Dense attention of retrieval heads that select, too: what every block is worth falls off on the way.

    tokens of one head of one sequence   |tile|tile|tile|tile|tile|tile|tile|tile|til|
    programs (b, h, split)                split: 0    1    2    0    1    2    0    1   2
    output                               as in `triton_dense`
    worth, sums                          as a scan leaves them (`scan.triton`), for the selection that follows

A tile's tokens are dealt as a scan deals them, so that a warp gets whole blocks; attention does not mind their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import HybridConfig
from .. import kernel_common as common
from ..kernel_common import LOG2_E, Tuning
from ..merge import finish, merge_chunk, merge_space
from ..scan import triton as scan
from ..scan.triton import Worth
from ..select import triton as select
from ..select.rule import Rule
from ..types import KV, Selections
from .triton_dense import attend


@triton.jit(do_not_specialize=["slots"])
def _attend_worth_kernel(
    output, partial, sums, arrivals, worth, masses, query, heads, scale, stride_qb, stride_qh, N,
    keys, values, lengths, starts, page_table,
    stride_kp, stride_kh, stride_ks, stride_vp, stride_vh, stride_vs, stride_table, slots, PAGE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    EIGHT: tl.constexpr = min(BLOCK, 8)  # see `scan.triton._scan_kernel`
    LANES: tl.constexpr = min(WARPS * 8 // EIGHT, TILE // BLOCK)
    ROUNDS: tl.constexpr = BLOCK // EIGHT
    TURNS: tl.constexpr = TILE // (BLOCK * LANES)
    column = tl.arange(0, TILE)
    block = column // (EIGHT * LANES * ROUNDS) * LANES + column // EIGHT % LANES
    dealt = block * BLOCK + column // (EIGHT * LANES) % ROUNDS * EIGHT + column % EIGHT

    split, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    common.wait_for_inputs(PDL)
    head = h
    if heads is not None:
        head = tl.load(heads + h)
    first, count = common.extent(b, lengths, starts, slots)
    q = common.load_query(query, b, head, stride_qb, stride_qh, G, D, GP, DP)
    g = tl.arange(0, GP)
    line = ((h * tl.num_programs(2) + b) * G + g).to(tl.int64)

    acc = tl.zeros([GP, DP], tl.float32)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    for tile in range(split, tl.cdiv(count, TILE), SPLITS):
        token = tile * TILE + dealt
        exists = token < count
        page, entry = common.locate(b, first + token, exists, page_table, stride_table, PAGE)
        k = common.load_tokens(keys, page, entry, head, exists, stride_kp, stride_kh, stride_ks, D, DP)
        v = common.load_tokens(values, page, entry, head, exists, stride_vp, stride_vh, stride_vs, D, DP)
        x = common.logits_of(q, k, exists, scale)
        by_block = tl.reshape(x, [GP, TURNS, ROUNDS, LANES, EIGHT])
        largest = tl.max(tl.max(by_block, 2), 3)  # [GP, TURNS, LANES]
        new_peak = tl.maximum(peak, tl.max(tl.max(largest, 2), 1))
        shift = common.finite(new_peak)
        p = tl.exp2(x - shift[:, None])
        part = tl.sum(tl.sum(tl.reshape(p, [GP, TURNS, ROUNDS, LANES, EIGHT]), 2), 3)
        value = tl.reshape(largest if LARGEST else shift[:, None, None] + tl.log2(part), [GP, TURNS * LANES])
        n = tile * (TILE // BLOCK) + tl.arange(0, TURNS * LANES)
        tl.store(worth + line[:, None] * N + n[None, :], value, mask=(g < G)[:, None] & (n < N)[None, :])
        fade = tl.exp2(peak - shift)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(tl.sum(part, 2), 1)
        peak = new_peak
    tl.store(masses + line * SPLITS + split, peak + tl.log2(total), mask=g < G)
    pair = b * tl.num_programs(1) + h
    finish(output, partial, sums, arrivals, acc, peak, total, pair, split, G, D, GP, DP, SPLITS, CHUNK, PDL)


def attend_worth(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    tuning: Tuning | None = None,
) -> tuple[Tensor, Worth]:
    """Dense attention of `heads`, `[B, R * G, D]`, and what their blocks are worth; arguments as of a scan."""
    common.check_strides(query, kv)
    batch, num_query_heads, dim = query.shape
    tuning = tuning or default_tuning(batch * len(heads), kv)
    group, num_blocks = num_query_heads // kv.keys.shape[1], triton.cdiv(kv.slots, 16 * block_size) * 16
    shape = (len(heads), batch, group)
    worth = Worth(
        torch.empty((*shape, num_blocks), dtype=torch.float32, device=query.device),
        torch.empty((*shape, tuning.splits), dtype=torch.float32, device=query.device),
    )
    output = torch.empty((batch, len(heads) * group, dim), dtype=query.dtype, device=query.device)
    space = merge_space(batch, len(heads), tuning.splits, group, dim, query.device)
    with common.on_device(query):
        _attend_worth_kernel[tuning.splits, len(heads), batch](
            *(output, *space, *worth, query, common.head_index(heads, kv), scale * LOG2_E),
            *(query.stride(0), query.stride(1), num_blocks),
            *common.cache_arguments(kv),
            **common.padded(group, dim),
            BLOCK=block_size,
            LARGEST=score == "max",
            TILE=tuning.tile,
            SPLITS=tuning.splits,
            CHUNK=merge_chunk(tuning.splits, group, dim, tuning.warps),
            WARPS=tuning.warps,
            **tuning.launch(kv),
        )
    return output, worth


def attend_select(
    query: Tensor, kv: KV, heads: tuple[int, ...], config: HybridConfig, scale: float, out: Selections
) -> Tensor:
    """See `ops.attend_select`."""
    select.check_selections(out, (len(heads), query.shape[0]))
    rule, size = Rule.of(config), config.block_size
    whole_up_to = out.whole_up_to(config.strategy, size, config.refresh_every)
    if size <= default_tuning(query.shape[0] * len(heads), kv).tile:
        output, worth = attend_worth(query, kv, heads, size, scale, config.block_score)
    else:  # a tile would not hold a block
        output = attend(query, kv, scale, heads)
        worth = scan.scan(query, kv, heads, size, scale, config.block_score, whole_up_to=whole_up_to)
    select.select_blocks(scan.normalise(worth, kv, size, whole_up_to), kv, rule, out)
    return output


def default_tuning(pairs: int, kv: KV) -> Tuning:
    """As dense attention, with tiles of which every warp has whole blocks; not timed on its own."""
    tuning = Tuning(8, common.tile_of(kv, 32768), 4, 3, common.has_pdl(kv.keys.device))
    tuning = common.fitting(tuning, kv)
    if pairs <= 16:
        tuning = tuning._replace(splits=common.even_splits(pairs, triton.cdiv(kv.slots, tuning.tile), 128, 64))
    return tuning
