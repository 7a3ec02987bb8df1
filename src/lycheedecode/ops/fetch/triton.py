"""Blocks from host memory into their slots, planned and copied without the host.

    plan         a program for each row and sequence: look up, find the slots used least recently, write the map
    fetch        some programs, which take turns in (head, block that it lacks)
    write_back   a program for each token, sequence and layer
    newest_keys  a program for each head and sequence

Host memory is pinned, so kernels read and write it in place. A fetch beside the model has few and small programs: they
keep the link busy and leave the processors to the model. One that the model waits for takes what it can get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import Tuning
from ..small_keys import SmallKeys
from ..small_keys_triton import small_arguments, write_small_keys
from ..types import constant

if TYPE_CHECKING:
    from . import BlockMap, Tokens


class Launch(NamedTuple):
    """How the kernels are launched.

    Attributes:
        programs, warps: of a fetch beside the model.
        piece: numbers of a key's and of a value's block that each of its programs has on their way at once.
        programs_alone, warps_alone, piece_alone: of a fetch that the model waits for.
        plan_warps: of a program that plans, at least; more for more than eight slots a lane.
    """

    programs: int = 32
    warps: int = 4
    piece: int = 1024
    programs_alone: int = 128
    warps_alone: int = 16
    piece_alone: int = 4096
    plan_warps: int = 4


LAUNCH = Launch()
"""The fastest steps of 3 x 128K on an H100; `python -m experiments tune-memory` tries others."""


@triton.jit(
    do_not_specialize=["N", "M", "K"],
    do_not_specialize_on_alignment=["blocks", "slot_of", "block_of", "used", "places", "missing", "misses", "order"],
)
def _plan_kernel(
    blocks, stride_r, stride_b, slot_of, block_of, used, places, missing, misses, order, newest, clock, N, M, K,
    TAIL: tl.constexpr, KP: tl.constexpr, MP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b, r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    common.wait_for_inputs(PDL)
    pair = r * tl.num_programs(0) + b
    slot_of += pair * N
    block_of += pair * M
    used += pair * M
    order += pair * M
    now = tl.load(clock)
    k, m = tl.arange(0, KP), tl.arange(0, MP)
    block = tl.load(blocks + r * stride_r + b * stride_b + k, mask=k < K, other=-1)
    tail = (block >= 0) & (block > tl.load(newest + b) - TAIL)
    stored = (block >= 0) & (tail == 0)
    here = tl.load(slot_of + block, mask=stored, other=-1)
    hit, miss = stored & (here >= 0), stored & (here < 0)
    tl.store(used + here, now, mask=hit)
    tl.debug_barrier()  # the next load reads what other threads of the program wrote
    last = tl.load(used + m, mask=m < M, other=0x7FFFFFFF).to(tl.int64)
    oldest = tl.sort((last << 32) + m) & 0x7FFFFFFF
    tl.store(order + m, oldest.to(tl.int32), mask=m < M)
    tl.debug_barrier()
    number = tl.cumsum(miss.to(tl.int32), 0) - 1
    slot = tl.load(order + number, mask=miss, other=0)
    evicted = tl.load(block_of + slot, mask=miss, other=-1)
    tl.store(slot_of + evicted, -1, mask=miss & (evicted >= 0))
    tl.store(slot_of + block, slot, mask=miss)
    tl.debug_barrier()  # each slot's block has been read
    tl.store(block_of + slot, block, mask=miss)
    tl.store(used + slot, now, mask=miss)
    place = tl.where(tail, M + block % TAIL, tl.where(hit, here, slot))
    tl.store(places + pair * K + k, tl.where(block < 0, -1, place), mask=k < K)
    total = tl.sum(miss.to(tl.int32), 0)
    tl.store(missing + pair * K + k, -1, mask=(k < K) & (k >= total))
    tl.store(missing + pair * K + number, block, mask=miss)
    tl.store(misses + pair, total)


def plan_fetch(blocks: Tensor, known: BlockMap, newest: Tensor, clock: Tensor, tail_blocks: int) -> None:
    """See `ops.fetch`; here the map is contiguous, and selections have a contiguous last dimension."""
    if blocks.stride(-1) != 1 or not all(part.is_contiguous() for part in known):
        raise ValueError("the map must be contiguous, and selections must have a contiguous last dimension.")
    rows, batch, capacity = blocks.shape
    slots = known.block_of.shape[-1]
    width = common.power_of_two(slots)
    warps = min(max(width // 256, LAUNCH.plan_warps), 16)
    tuning = Tuning(1, width, warps, 1, common.has_pdl(blocks.device))
    with common.on_device(blocks):
        _plan_kernel[batch, rows](
            *(blocks, *blocks.stride()[:2], *known, newest, clock, known.slot_of.shape[-1], slots, capacity),
            TAIL=tail_blocks,
            KP=common.power_of_two(capacity),
            MP=width,
            **tuning.options,
        )


# How many heads read, and of which layer, makes no kernel of its own.
@triton.jit(do_not_specialize=["S", "P", "N", "K", "near_slots", "pairs"], do_not_specialize_on_alignment=["readers"])
def _fetch_kernel(
    keys, values, source_keys, source_values, near_keys, slot_of, missing, misses, readers, starts,
    S, P, N, K, near_slots, pairs, batch,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    w = tl.arange(0, WIDTH)
    row = tl.load(readers + w // batch * 4, mask=w < pairs, other=0)
    common.wait_for_inputs(PDL)
    count = tl.load(misses + row * batch + w % batch, mask=w < pairs, other=0)
    end = tl.cumsum(count, 0)
    dim = SIZE // BLOCK
    for item in range(tl.program_id(0), tl.sum(count, 0), tl.num_programs(0)):
        w_item = tl.sum((end <= item).to(tl.int32), 0)
        number = item - tl.sum(tl.where(w < w_item, count, 0), 0)
        b = (w_item % batch).to(tl.int64)
        reader = readers + w_item // batch * 4
        pair = tl.load(reader).to(tl.int64) * batch + b
        layer, head = tl.load(reader + 1).to(tl.int64), tl.load(reader + 2)
        near = tl.load(reader + 3).to(tl.int64)
        block = tl.load(missing + pair * K + number).to(tl.int64)
        slot = tl.load(slot_of + pair * N + block).to(tl.int64)
        first = block * BLOCK
        if starts is not None:
            first += tl.load(starts + b)
        line = (layer * batch + b) * HEADS + head
        far, at = (line * S + first) * dim, (line * P + slot * BLOCK) * dim
        close = ((near * batch + b) * near_slots + first) * dim
        for begin in range(0, SIZE, PIECE):
            i = begin + tl.arange(0, PIECE)
            v = tl.load(source_values + far + i, mask=i < SIZE)
            far_k = tl.load(source_keys + far + i, mask=common.mask_if(near < 0, i < SIZE))
            near_k = tl.load(near_keys + close + i, mask=common.mask_if(near >= 0, i < SIZE))
            tl.store(keys + at + i, tl.where(near < 0, far_k, near_k), mask=i < SIZE)
            tl.store(values + at + i, v, mask=i < SIZE)


def fetch(
    source: Tokens,
    pool: Tokens,
    known: BlockMap,
    readers: Tensor,
    scanned: Tensor | None,
    starts: Tensor | None,
    block_size: int,
    beside: bool = False,
) -> None:
    """See `ops.fetch`; what waits for another stream does not start early."""
    _check_tokens(source, pool)
    near = source.keys if scanned is None else scanned
    if not near.is_contiguous():
        raise ValueError(f"scanned keys must be contiguous, not strides {near.stride()}.")
    _, batch, heads, entries, dim = pool.keys.shape
    size, pairs = block_size * dim, len(readers) * batch
    pdl = 0 if beside else common.has_pdl(pool.keys.device)
    if beside:
        programs, warps, piece = LAUNCH.programs, LAUNCH.warps, LAUNCH.piece
    else:
        programs, warps, piece = LAUNCH.programs_alone, LAUNCH.warps_alone, LAUNCH.piece_alone
    with common.on_device(pool.keys):
        _fetch_kernel[programs,](
            *(*pool, *source, near, known.slot_of, known.missing, known.misses, readers, starts),
            *(source.keys.shape[3], entries, known.slot_of.shape[-1], known.missing.shape[-1], near.shape[-2]),
            *(pairs, batch),
            HEADS=heads,
            SIZE=size,
            WIDTH=common.power_of_two(pairs),
            PIECE=min(common.power_of_two(size), piece),
            BLOCK=block_size,
            **Tuning(1, size, warps, 1, pdl).options,
        )


@triton.jit(do_not_specialize=["begin", "S", "P", "slots"])
def _write_back_kernel(
    keys, values, target_keys, target_values, starts, begin, S, P, slots, batch,
    HEADS: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, TAIL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    slot = begin + tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    common.wait_for_inputs(PDL)
    token = slot
    if starts is not None:
        token -= tl.load(starts + pair % batch)
    h, d = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    here = common.mask_if(token >= 0, (h < HEADS) & (d < D))
    at = ((pair * HEADS + h) * P + slots + tl.maximum(token, 0) % TAIL) * D + d
    to = ((pair * HEADS + h) * S + slot) * D + d
    tl.store(target_keys + to, tl.load(keys + at, mask=here), mask=here)
    tl.store(target_values + to, tl.load(values + at, mask=here), mask=here)


def write_back(
    pool: Tokens, target: Tokens, begin: int, end: int, starts: Tensor | None, slots: int, tail: int
) -> None:
    """See `ops.fetch`."""
    _check_tokens(target, pool)
    layers, batch, heads, entries, dim = pool.keys.shape
    with common.on_device(pool.keys):
        _write_back_kernel[end - begin, layers * batch](
            *(*pool, *target, starts, begin, target.keys.shape[3], entries, slots, batch),
            HEADS=heads,
            D=dim,
            HP=common.power_of_two(heads),
            DP=common.power_of_two(dim),
            TAIL=tail,
            **Tuning(1, 1, 2, 1, common.has_pdl(pool.keys.device)).options,
        )


@triton.jit
def _newest_kernel(
    out, query, keys, at, filled, heads, stride_qb, stride_qh, stride_kb, stride_kh, stride_ks,
    copy, stride_cb, stride_ch, stride_cs, pairs, stride_pb, stride_ph, stride_ps,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.load(heads + r).to(tl.int64)
    common.wait_for_inputs(PDL)
    d, one = tl.arange(0, DP), tl.arange(0, 1)
    entry, slot = tl.load(at + b + one).to(tl.int64) - 1, tl.load(filled + b + one).to(tl.int64) - 1
    write_small_keys(
        copy, stride_cb, stride_ch, stride_cs, pairs, stride_pb, stride_ph, stride_ps, r, b + one, slot,
        keys, b + one, entry, head, stride_kb, stride_kh, stride_ks, one == 0, D, DP,
    )  # fmt: skip
    q = common.load_query(query, b, head, stride_qb, stride_qh, G, D, GP, DP)
    g = tl.arange(0, GP)[:, None]
    line = (b * tl.num_programs(0) + r) * G + g
    tl.store(out + line * D + d[None, :], q, mask=(g < G) & (d < D)[None, :])


def newest_keys(
    query: Tensor, keys: Tensor, at: Tensor, filled: Tensor, heads: tuple[int, ...], copy: SmallKeys
) -> Tensor:
    """See `ops.fetch`; here every tensor has a contiguous last dimension."""
    if not query.stride(-1) == keys.stride(-1) == 1:
        raise ValueError("query and keys must have a contiguous last dimension.")
    batch, dim = query.shape[0], query.shape[2]
    group = query.shape[1] // keys.shape[1]
    out = torch.empty((batch, len(heads) * group, dim), dtype=query.dtype, device=query.device)
    with common.on_device(query):
        _newest_kernel[len(heads), batch](
            *(out, query, keys, at, filled, constant(heads, torch.int32, query.device)),
            *query.stride()[:2],
            *keys.stride()[:3],
            *small_arguments(copy),
            G=group,
            D=dim,
            GP=common.power_of_two(group),
            DP=common.power_of_two(dim),
            **Tuning(1, 1, 1, 1, common.has_pdl(query.device)).options,
        )
    return out


def _check_tokens(whole: Tokens, pool: Tokens) -> None:
    for part in (*whole, *pool):
        if not part.is_contiguous():
            raise ValueError(f"pools and tensors in host memory must be contiguous, not strides {part.stride()}.")
