"""What every block is worth to the retrieval heads; reads keys only.

    keys of one head of one sequence    |tile|tile|tile|tile|tile|tile|tile|tile|til|
    programs (b, r, split)               split: 0    1    2    0    1    2    0    1   2
    worth  [R, B, G, N]                  one number a query head and block: log2 of its mass, or its largest logit;
                                         rows are padded to whole vectors
    sums   [R, B, G, splits]             log2 of the mass of everything that a program saw

With a copy of the keys in 8 or 4 bits, that is what streams by; the newest tokens are written into it first, each by
the program whose tile it lies in.

Tiles go round the splits: at any time all programs together read one stretch of memory, and every program of a fixed
grid takes an even share of the tokens that there are. Nothing is normalised while the keys stream by: `_block_scores`
does that once all sums are known, in a kernel of its own: the one program that then selects would take longer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ConfigError
from .. import kernel_common as common
from ..kernel_common import LOG2_E, Tuning
from ..small_keys import SmallKeys
from ..small_keys_triton import halves_of_query, logits_of_4_bits, small_arguments, write_small_keys
from ..types import KV


class Worth(NamedTuple):
    """What a scan leaves behind: `worth [R, B, G, >= N]` and `sums [R, B, G, splits]`, float32, in base 2."""

    worth: Tensor
    sums: Tensor


@triton.jit
def _write_newest(
    copy, stride_cb, stride_cr, stride_cs, pairs, stride_pb, stride_pr, stride_ps, keys, b, r, head, first, count,
    stride_kp, stride_kh, stride_ks, split, page_table, stride_table, PAGE: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, NEWEST: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The last `NEWEST` tokens of a sequence, those that lie in this program's tiles: from the cache to the copy."""
    token = count - 1 - tl.arange(0, triton.next_power_of_2(NEWEST))
    mine = (token >= tl.maximum(count - NEWEST, 0)) & (token // TILE % SPLITS == split)
    page, entry = common.locate(b, first + token, mine, page_table, stride_table, PAGE)
    write_small_keys(
        copy, stride_cb, stride_cr, stride_cs, pairs, stride_pb, stride_pr, stride_ps, r, page, entry,
        keys, page, entry, head, stride_kp, stride_kh, stride_ks, mine, D, DP,
    )  # fmt: skip
    tl.debug_barrier()  # other threads of the program read it


@triton.jit
def _load_pairs(
    pairs, stride_pb, stride_pr, stride_ps, b, r, first, token, count, page_table, stride_table, PAGE: tl.constexpr
):
    """Scales of keys in 4 bits."""
    exists = token < count
    page, entry = common.locate(b, first + token, exists, page_table, stride_table, PAGE)
    at = pairs + page * stride_pb + r.to(tl.int64) * stride_pr + entry * stride_ps
    return tl.load(at, mask=exists, other=0)


@triton.jit(do_not_specialize=["slots", "whole_up_to"])
def _scan_kernel(
    worth, sums, query, heads, scale, stride_qb, stride_qh,
    copy, stride_cb, stride_cr, stride_cs, pairs, stride_pb, stride_pr, stride_ps,
    keys, lengths, starts, page_table, stride_kp, stride_kh, stride_ks, stride_table, slots, whole_up_to, N,
    limits, sinks, key_scales, PAGE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    NEWEST: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program's share of a scan.

    A matrix instruction deals the columns of its result to the warps eight at a time. A tile's tokens are laid out so
    that a warp gets whole blocks, and reduces them without asking the others: `EIGHT` consecutive tokens of block
    `(turn, warp)` stand together, then those of the next warp's block, and after a round the next eight of each.
    """
    EIGHT: tl.constexpr = min(BLOCK, 8)
    LANES: tl.constexpr = min(WARPS * 8 // EIGHT, TILE // BLOCK)
    ROUNDS: tl.constexpr = BLOCK // EIGHT
    TURNS: tl.constexpr = TILE // (BLOCK * LANES)
    column = tl.arange(0, TILE)
    block = column // (EIGHT * LANES * ROUNDS) * LANES + column // EIGHT % LANES
    dealt = block * BLOCK + column // (EIGHT * LANES) % ROUNDS * EIGHT + column % EIGHT

    split, r, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    common.wait_for_inputs(PDL)
    head = r
    if heads is not None:
        head = tl.load(heads + r)
    first, count = common.extent(b, lengths, starts, slots)
    if copy is not None and NEWEST > 0:
        _write_newest(
            copy, stride_cb, stride_cr, stride_cs, pairs, stride_pb, stride_pr, stride_ps, keys, b, r, head, first,
            count, stride_kp, stride_kh, stride_ks, split, page_table, stride_table, PAGE, D, DP, NEWEST, TILE, SPLITS,
        )  # fmt: skip
    if pairs is not None:
        q, q_high, less, less_high, scale = halves_of_query(query, b, head, stride_qb, stride_qh, scale, G, D, GP)
        coming = _load_pairs(
            pairs, stride_pb, stride_pr, stride_ps, b, r, first, split * TILE + dealt, count,
            page_table, stride_table, PAGE,
        )  # fmt: skip
    else:
        q = common.load_query(query, b, head, stride_qb, stride_qh, G, D, GP, DP)
        if key_scales is not None:
            scale *= tl.load(key_scales + head)
        if copy is not None or key_scales is not None:
            q, scale = common.for_8_bit_keys(q, scale)
    g = tl.arange(0, GP)
    line = ((r * tl.num_programs(2) + b) * G + g).to(tl.int64)
    peak = tl.full([GP, TURNS, LANES], float("-inf"), tl.float32)
    total = tl.zeros([GP, TURNS, LANES], tl.float32)
    scanned = tl.where(count > common.whole_of(b, whole_up_to, limits, BLOCK), count, 0)
    tile_0 = split
    for masked in tl.static_range(pairs is not None, 2):  # whole tiles need no masks
        tile_1 = tl.cdiv(scanned, TILE) if masked else scanned // TILE
        for tile in range(tile_0, tile_1, SPLITS):
            token = tile * TILE + dealt
            exists = None
            if masked:
                exists = token < count
            page, entry = common.locate(b, first + token, exists, page_table, stride_table, PAGE)
            if pairs is not None:
                scales = coming  # they are no operand of a product, and the compiler would wait for each tile's
                coming = _load_pairs(
                    pairs, stride_pb, stride_pr, stride_ps, b, r, first, token + SPLITS * TILE, count,
                    page_table, stride_table, PAGE,
                )  # fmt: skip
                HALF: tl.constexpr = D // 2
                n = common.load_tokens(copy, page, entry, r, exists, stride_cb, stride_cr, stride_cs, HALF, q.shape[1])
                x = logits_of_4_bits(q, q_high, less, less_high, n, scales, exists, scale)
            else:
                if copy is None:
                    k = common.load_tokens(keys, page, entry, head, exists, stride_kp, stride_kh, stride_ks, D, DP)
                else:
                    k = common.load_tokens(copy, page, entry, r, exists, stride_cb, stride_cr, stride_cs, D, DP)
                if copy is not None or key_scales is not None:
                    k = k.to(q.dtype)
                x = common.logits_of(q, k, exists, scale)
            x = tl.reshape(x, [GP, TURNS, ROUNDS, LANES, EIGHT])
            largest = tl.max(tl.max(x, 2), 3)  # [GP, TURNS, LANES]
            shift = common.finite(largest)
            part = tl.sum(tl.sum(tl.exp2(x - shift[:, :, None, :, None]), 2), 3)

            new_peak = tl.maximum(peak, largest)
            new_shift = common.finite(new_peak)
            total = total * tl.exp2(peak - new_shift) + part * tl.exp2(shift - new_shift)
            peak = new_peak
            value = tl.reshape(largest if LARGEST else shift + tl.log2(part), [GP, TURNS * LANES])
            n = tile * (TILE // BLOCK) + tl.arange(0, TURNS * LANES)
            tl.store(worth + line[:, None] * N + n[None, :], value, mask=(g < G)[:, None] & (n < N)[None, :])
        tile_0 = common.tile_after(tile_0, tile_1, SPLITS)
    highest = tl.max(tl.max(peak, 2), 1)
    mass = tl.sum(tl.sum(total * tl.exp2(peak - common.finite(highest)[:, None, None]), 2), 1)
    if sinks is not None:
        sink = common.load_sinks(sinks, head, split, G, GP)
        top = common.finite(tl.maximum(highest, sink))
        mass = mass * tl.exp2(highest - top) + tl.exp2(sink - top)
        highest = top
    tl.store(sums + line * SPLITS + split, highest + tl.log2(mass), mask=g < G)


@triton.jit
def _block_scores(worth, sums, row, n, mask, stride_worth, G: tl.constexpr, SPLITS: tl.constexpr):
    """Scores of blocks `n`: weights normalised for each query head, averaged over the group, 0 outside `mask`.

    `row` counts groups in `worth [.., G, stride_worth]` and `sums [.., G, SPLITS]`.
    """
    GROUP: tl.constexpr = triton.next_power_of_2(G)
    gs = tl.arange(0, GROUP)
    s = tl.arange(0, triton.next_power_of_2(SPLITS))
    at = sums + (row * G + gs)[:, None] * SPLITS + s[None, :]
    here = (gs < G)[:, None] & (s < SPLITS)[None, :]
    mass = tl.load(at, mask=here, other=float("-inf"))
    peak = common.finite(tl.max(mass, 1))
    total = common.finite(peak + tl.log2(tl.sum(tl.exp2(mass - peak[:, None]), 1)))

    score = tl.zeros(n.shape, tl.float32)
    for g in tl.static_range(G):
        at = worth + (row * G + g) * stride_worth + n
        part = tl.load(at, mask=n < stride_worth, other=float("-inf"))
        score += tl.exp2(part - tl.sum(tl.where(gs == g, total, 0.0), 0))
    return tl.where(mask, score / G, 0.0)


@triton.jit(do_not_specialize=["slots", "whole_up_to", "N"])
def _normalise_kernel(
    scores, worth, sums, lengths, starts, limits, slots, whole_up_to, N, stride_worth,
    G: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(1), tl.program_id(2)
    common.wait_for_inputs(PDL)
    _first, count = common.extent(b, lengths, starts, slots)
    row = (r * tl.num_programs(2) + b).to(tl.int64)
    whole_up_to = common.whole_of(b, whole_up_to, limits, BLOCK)
    if (whole_up_to > 0) & (count <= whole_up_to):
        return
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    score = _block_scores(worth, sums, row, n, n < tl.cdiv(count, BLOCK), stride_worth, G, SPLITS)
    tl.store(scores + row * N + n, score, mask=n < N)


def scan(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    tuning: Tuning | None = None,
    copy: SmallKeys | None = None,
    newest: int = 0,
    whole_up_to: int = 0,
    limits: Tensor | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Worth:
    """The scan alone, not normalised; arguments as in `ops.scan_blocks`.

    `newest` tokens are written into `copy` first; sequences of up to `whole_up_to` tokens are left out, where `limits`
    do not say otherwise (`ops.scan_select`).
    """
    common.check_strides(query, kv)
    if score not in ("mass", "max"):
        raise ValueError(f"score must be 'mass' or 'max', not {score!r}.")
    batch, num_query_heads, dim = query.shape
    tuning = tuning or default_tuning(batch * len(heads), block_size, kv, copy is not None or scales is not None)
    group, num_blocks = num_query_heads // kv.keys.shape[1], triton.cdiv(kv.slots, 16 * block_size) * 16
    shape = (len(heads), batch, group)
    worth = Worth(
        torch.empty((*shape, num_blocks), dtype=torch.float32, device=query.device),
        torch.empty((*shape, tuning.splits), dtype=torch.float32, device=query.device),
    )
    cache = common.cache_arguments(kv._replace(values=kv.keys))
    with common.on_device(query):
        _scan_kernel[tuning.splits, len(heads), batch](
            *(*worth, query, common.head_index(heads, kv), scale * LOG2_E, query.stride(0), query.stride(1)),
            *small_arguments(copy),
            *(kv.keys, *cache[2:8], *cache[11:13], whole_up_to, num_blocks),
            *(limits, sinks, scales and scales[0], cache[13]),
            **common.padded(group, dim),
            BLOCK=block_size,
            LARGEST=score == "max",
            NEWEST=0 if copy is None else newest,
            TILE=max(tuning.tile, block_size),
            SPLITS=tuning.splits,
            WARPS=tuning.warps,
            **tuning.launch(kv),
        )
    return worth


def normalise(worth: Worth, kv: KV, block_size: int, whole_up_to: int = 0, limits: Tensor | None = None) -> Tensor:
    """float32 `[R, B, N]`: the scores that `ops.scan_blocks` returns; anything for what a scan left out."""
    rows, batch, group, stride_worth = worth.worth.shape
    num_blocks = triton.cdiv(kv.slots, block_size)
    scores = torch.empty((rows, batch, num_blocks), dtype=torch.float32, device=worth.worth.device)
    chunk = 512
    with common.on_device(scores):
        _normalise_kernel[triton.cdiv(num_blocks, chunk), rows, batch](
            *(scores, *worth, kv.lengths, kv.starts, limits, kv.slots, whole_up_to, num_blocks, stride_worth),
            G=group,
            SPLITS=worth.sums.shape[3],
            BLOCK=block_size,
            CHUNK=chunk,
            **Tuning(1, chunk, 4, 1, common.has_pdl(scores.device)).launch(kv),
        )
    return scores


def scan_blocks(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    copy: SmallKeys | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `ops.scan_blocks`."""
    worth = scan(query, kv, heads, block_size, scale, score, None, copy, sinks=sinks, scales=scales)
    return normalise(worth, kv, block_size)


def default_tuning(pairs: int, block_size: int, kv: KV, copied: bool = False) -> Tuning:
    """What was fastest on an H200; `experiments tune-ops` measures it. A copy's keys are half as long."""
    tile = max(common.tile_of(kv, 32768 if copied else 16384), block_size)
    warps = 8 if kv.keys.dtype == torch.float32 else max(tile // 32, 2)  # float32 takes more registers
    splits = common.even_splits(pairs, triton.cdiv(kv.slots, tile), 256, 256)
    tile_bytes = tile * common.power_of_two(kv.keys.shape[3]) * kv.keys.element_size()
    room = common.room_for_tiles(kv, 16)
    if kv.keys.dtype == torch.float32 and tile_bytes > room:  # those of other types can stay in registers
        raise ConfigError(f"A block of {block_size} float32 keys exceeds this GPU's shared memory: halve block_size.")
    stages = min(room // tile_bytes + 1, 4)  # of large blocks, fewer fit
    return Tuning(splits, tile, warps, stages, common.has_pdl(kv.keys.device))
