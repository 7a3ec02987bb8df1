"""What every block is worth to the retrieval heads; reads keys only.

    keys of one head of one sequence    |tile|tile|tile|tile|tile|tile|tile|tile|til|
    programs (b, r, split)              \\____ split 0 ____/\\____ split 1 ____/\\_ 2 _/
    worth  [R, B, G, N]                  one number a query head and block: log2 of its mass, or its largest logit;
                                         rows are padded to whole vectors
    sums   [R, B, G, splits]             log2 of the mass of everything that a program saw

Nothing is normalised while the keys stream by: `block_scores` does that once all sums are known, in a kernel of its own
(`scan_blocks`) or on the way into the selection (`select.scan_select`). The number of splits depends on the slots,
never on a length: every program of a fixed grid takes an even share of the tokens that there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import KV
from . import common
from .common import LOG2_E, Tuning


class Worth(NamedTuple):
    """What a scan leaves behind: `worth [R, B, G, >= N]` and `sums [R, B, G, splits]`, float32, in base 2."""

    worth: Tensor
    sums: Tensor


@triton.jit(do_not_specialize=["slots"])
def _scan_kernel(
    worth, sums, query, heads, scale, stride_qb, stride_qh,
    keys, lengths, starts, page_table, stride_kp, stride_kh, stride_ks, stride_table, slots, N, PAGE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    split, r, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    common.wait_for_inputs(EARLY)
    head = r
    if heads is not None:
        head = tl.load(heads + r)
    first, count = common.extent(b, lengths, starts, slots)
    q = common.load_query(query, b, head, stride_qb, stride_qh, G, D, GP, DP)

    TILE_BLOCKS: tl.constexpr = TILE // BLOCK
    g = tl.arange(0, GP)
    line = ((r * tl.num_programs(2) + b) * G + g).to(tl.int64)
    peak = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    tiles = tl.cdiv(count, TILE)
    share = tl.cdiv(tiles, SPLITS)
    for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
        token = tile * TILE + tl.arange(0, TILE)
        exists = token < count
        page, entry = common.locate(b, first + token, exists, page_table, stride_table, PAGE)
        k = common.load_tokens(keys, page, entry, head, exists, stride_kp, stride_kh, stride_ks, D, DP)
        x = tl.reshape(common.logits_of(q, k, exists, scale), [GP, TILE_BLOCKS, BLOCK])
        largest = tl.max(x, 2)  # [GP, TILE_BLOCKS]
        shift = common.finite(largest)
        mass = shift + tl.log2(tl.sum(tl.exp2(x - shift[:, :, None]), 2))

        new_peak = tl.maximum(peak, tl.max(largest, 1))
        total = total * tl.exp2(peak - common.finite(new_peak))
        total += tl.sum(tl.exp2(mass - common.finite(new_peak)[:, None]), 1)
        peak = new_peak
        n = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        at = worth + line[:, None] * N + n[None, :]
        tl.store(at, largest if LARGEST else mass, mask=(g < G)[:, None] & (n < N)[None, :])
    tl.store(sums + line * SPLITS + split, peak + tl.log2(total), mask=g < G)


@triton.jit
def block_scores(worth, sums, line, n, mask, stride_worth, G: tl.constexpr, SPLITS: tl.constexpr):
    """Scores of blocks `n`: weights normalised for each query head, averaged over the group, 0 outside `mask`.

    `line` is the first row of the group in `worth [.., stride_worth]` and `sums [.., SPLITS]`.
    """
    s = tl.arange(0, triton.next_power_of_2(SPLITS))
    score = tl.zeros(n.shape, tl.float32)
    for g in tl.static_range(G):
        mass = tl.load(sums + (line + g) * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
        peak = common.finite(tl.max(mass, 0))
        total = peak + tl.log2(tl.sum(tl.exp2(mass - peak), 0))
        part = tl.load(worth + (line + g) * stride_worth + n, mask=n < stride_worth, other=0.0)
        score += tl.exp2(part - total)
    return tl.where(mask, score / G, 0.0)


@triton.jit(do_not_specialize=["slots", "N"])
def _normalise_kernel(
    scores, worth, sums, lengths, starts, slots, N, stride_worth,
    G: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(1), tl.program_id(2)
    common.wait_for_inputs(EARLY)
    _first, count = common.extent(b, lengths, starts, slots)
    row = (r * tl.num_programs(2) + b).to(tl.int64)
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    score = block_scores(worth, sums, row * G, n, n < tl.cdiv(count, BLOCK), stride_worth, G, SPLITS)
    tl.store(scores + row * N + n, score, mask=n < N)


def scan(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    tuning: Tuning | None = None,
) -> Worth:
    """The scan alone, not normalised; arguments as in `ops.scan_blocks`."""
    common.check_strides(query, kv)
    if score not in ("mass", "max"):
        raise ValueError(f"score must be 'mass' or 'max', not {score!r}.")
    batch, num_query_heads, dim = query.shape
    group, num_blocks = num_query_heads // kv.keys.shape[1], triton.cdiv(kv.slots, 16 * block_size) * 16
    tuning = tuning or default_tuning(batch * len(heads), kv, dim)
    shape = (len(heads), batch, group)
    worth = torch.empty((*shape, num_blocks), dtype=torch.float32, device=query.device)
    sums = torch.empty((*shape, tuning.splits), dtype=torch.float32, device=query.device)
    cache = common.cache_arguments(kv._replace(values=kv.keys))
    with common.on_device(query):
        _scan_kernel[tuning.splits, len(heads), batch](
            *(worth, sums, query, common.head_index(heads, kv), scale * LOG2_E, query.stride(0), query.stride(1)),
            *(kv.keys, *cache[2:8], *cache[11:13], num_blocks, cache[13]),
            **common.padded(group, dim),
            BLOCK=block_size,
            LARGEST=score == "max",
            TILE=max(tuning.tile, block_size),
            SPLITS=tuning.splits,
            **tuning.launch,
        )
    return Worth(worth, sums)


def normalise(worth: Worth, kv: KV, block_size: int, early: bool = False) -> Tensor:
    """float32 `[R, B, N]`: the scores that `ops.scan_blocks` returns."""
    rows, batch, group, stride_worth = worth.worth.shape
    num_blocks = triton.cdiv(kv.slots, block_size)
    scores = torch.empty((rows, batch, num_blocks), dtype=torch.float32, device=worth.worth.device)
    chunk = 512
    with common.on_device(scores):
        _normalise_kernel[triton.cdiv(num_blocks, chunk), rows, batch](
            *(scores, *worth, kv.lengths, kv.starts, kv.slots, num_blocks, stride_worth),
            G=group,
            BLOCK=block_size,
            SPLITS=worth.sums.shape[3],
            CHUNK=chunk,
            **Tuning(1, chunk, 4, 1, early).launch,
        )
    return scores


def scan_blocks(
    query: Tensor, kv: KV, heads: tuple[int, ...], block_size: int, scale: float, score: str = "mass"
) -> Tensor:
    """See `ops.scan_blocks`."""
    return normalise(scan(query, kv, heads, block_size, scale, score), kv, block_size)


def default_tuning(pairs: int, kv: KV, dim: int) -> Tuning:
    """What was fastest on an H200; `bench ops --tune` measures it."""
    row_bytes = common.power_of_two(dim) * kv.keys.element_size()
    tile = max(min(32768 // row_bytes, 128), 16)
    return Tuning(common.even_splits(pairs, triton.cdiv(kv.slots, tile), 512, 512), tile, 4, 4)
