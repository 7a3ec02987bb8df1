"""Linear layers of a few rows, at the speed at which the GPU reads their weights.

A program multiplies all rows of the input with `TN` rows of a weight, or with one of `SPLITS` shares of their columns;
then the program that arrives last adds the shares up. One launch goes over up to three weights, wherever they lie, so
the projections of one input need no fused copy of their weights. Early starts (programmatic dependent launch): weights
depend on no kernel before, so while the one before drains, a program already calls its first ones into the L2.

Names in kernels: `n` a row of a weight, `k` a column of it, `b` a row of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import kernel_common as common
from ..ops.kernel_common import power_of_two
from ..ops.merge import is_last, take_arrivals
from .launches import Kind, LinearTuning, launch_of
from .operator import EIGHT_BITS, KERNEL_ROWS, KERNEL_ROWS_8_BITS, MAX_WEIGHTS


@triton.jit
def _call_into_l2(weight, tile, N, K, k, columns, TN: tl.constexpr, THREADS: tl.constexpr):
    """Columns from `k` on of the program's rows, in as many pieces, of a multiple of 16 bytes, as it has threads."""
    PIECES: tl.constexpr = (THREADS + TN - 1) // TN
    piece = tl.arange(0, TN * PIECES)
    n = tl.minimum(tile * TN + piece // PIECES, N - 1).to(tl.int64)
    at = weight + n * K + k + piece % PIECES * (columns // PIECES)
    size = piece * 0 + columns // PIECES * (weight.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [at.to(tl.int64), size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _let_next_start(now):
    """`gdc_launch_dependents` on a condition; a branch would cost the loop registers."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p griddepcontrol.launch_dependents; mov.b32 $0, 0; }", "=r,r",
        [now.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _read(at, exists, EVEN: tl.constexpr):
    """Load; `exists` matters only where the columns do not fill whole tiles."""
    return tl.load(at) if EVEN else tl.load(at, mask=exists, other=0.0)


@triton.jit
def _multiply(acc, w, v, DOT: tl.constexpr):
    """Add the product of `w [TN, TK]` and `v [TK, BP]`; without `DOT`, `v` is `[1, TK]` and columns stay apart.

    Weights in 8-bit floats become what `v` is, which holds all of their values. On Hopper two of them become float16
    in one instruction, and two float32 become bfloat16 in one; from float16 straight to bfloat16 each number takes an
    instruction of an eighth of the usual rate, which would take longer than reading it.
    """
    if w.dtype == tl.float8e4nv and v.dtype == tl.bfloat16:
        w = w.to(tl.float16).to(tl.float32)
    if DOT:
        acc = tl.dot(w.to(v.dtype), v, acc, input_precision="ieee")
    else:
        acc += w.to(tl.float32) * v.to(tl.float32)
    return acc


@triton.jit
def _squared(v, NEIGHBOURS: tl.constexpr):
    """Squares of `v [TK, BP]`, of so many columns in a row added up: a thread has them, and keeps fewer registers."""
    square = v * v
    if NEIGHBOURS > 1:
        square = tl.sum(tl.reshape(square, [v.shape[0] // NEIGHBOURS, NEIGHBOURS, v.shape[1]]), 1)
    return square


@triton.jit
def _store(
    out, y, gate, s_y, s_gate, b_y, b_gate, residual, n, b, N, first, stride_out, stride_r,
    B: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Write sums `y [TN, BP]`, after everything that follows them."""
    exists = (n < N)[:, None] & (b < B)[None, :]
    if s_y is not None:
        y *= tl.load(s_y + n, mask=n < N, other=0.0)[:, None]
        if GATED:
            gate *= tl.load(s_gate + n, mask=n < N, other=0.0)[:, None]
    if b_y is not None:
        y += tl.load(b_y + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if b_gate is not None:
            gate += tl.load(b_gate + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        y = gate * tl.sigmoid(gate) * y
    at = first + n[:, None]
    if residual is not None:
        y += tl.load(residual + b[None, :] * stride_r + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + b[None, :] * stride_out + at, y.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["N0", "N1", "N2", "steps", "trigger", "prefetch", "eps"])
def _linear_kernel(
    out, x, w0, w1, w2, s0, s1, s2, b0, b1, b2, residual, norm, partial, sums, arrivals,
    N0, N1, N2, K, steps, trigger, prefetch, stride_out, stride_x, stride_r, eps,
    B: tl.constexpr, BP: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    program, split = tl.program_id(0), tl.program_id(1)
    weight, size, bias, N, first, tile = w0, s0, b0, N0, N0 * 0, program
    if GATED:
        size, bias = s1, b1  # what the gate multiplies comes from w1, s1 and b1
    elif w1 is not None:
        tiles = tl.cdiv(N0, TN)
        if program >= tiles:
            weight, size, bias, N, first, tile = w1, s1, b1, N1, N0, program - tiles
        if w2 is not None:
            tiles += tl.cdiv(N1, TN)
            if program >= tiles:
                weight, size, bias, N, first, tile = w2, s2, b2, N2, N0 + N1, program - tiles

    n = tile * TN + tl.arange(0, TN)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K  # rows past the end are the last one again, never stored
    b = tl.arange(0, BP)
    begin = split * steps * TK
    if PDL:
        _call_into_l2(weight, tile, N, K, begin, prefetch, TN, THREADS)
        if GATED:
            _call_into_l2(w1, tile, N, K, begin, prefetch, TN, THREADS)
        tl.extra.cuda.gdc_wait()

    y = tl.zeros([TN, BP if DOT else TK], tl.float32)
    gate = y
    NEIGHBOURS: tl.constexpr = 8 if BP > 16 else 1
    squares = tl.zeros([TK // NEIGHBOURS, BP] if DOT else [1, TK], tl.float32)
    for step in tl.range(steps, num_stages=STAGES):
        if PDL:
            _let_next_start(step == trigger)
        k = begin + step * TK + tl.arange(0, TK)
        if DOT:
            v = tl.load(x + b[None, :] * stride_x + k[:, None], mask=(b < B)[None, :] & (k < K)[:, None], other=0.0)
        else:
            v = _read(x + k[None, :], (k < K)[None, :], EVEN)
        if norm is not None:
            scale = _read(norm + k, k < K, EVEN).to(tl.float32)
            v = v.to(tl.float32)
            squares += _squared(v, NEIGHBOURS)
            v = (v * (scale[:, None] if DOT else scale[None, :])).to(x.dtype.element_ty)
        at = row + k[None, :]
        if GATED:
            gate = _multiply(gate, _read(w0 + at, (k < K)[None, :], EVEN), v, DOT)
            y = _multiply(y, _read(w1 + at, (k < K)[None, :], EVEN), v, DOT)
        else:
            y = _multiply(y, _read(weight + at, (k < K)[None, :], EVEN), v, DOT)

    square = tl.sum(squares, 0 if DOT else 1)
    if not DOT:
        y = tl.sum(y, 1)[:, None]
        gate = tl.sum(gate, 1)[:, None]
    last = True
    if SPLITS > 1:
        cell = tl.arange(0, TN)[:, None] * BP + b[None, :]
        there = (b < B)[None, :] if BP > 16 else None  # padding of 36 rows is 44% of 64
        part = (program * SPLITS + split).to(tl.int64)
        tl.store(partial + part * (TN * BP) + cell, y, mask=there)
        if norm is not None:
            tl.store(sums + part * BP + b, square)
        last = is_last(arrivals, program, SPLITS)
    if last:
        if SPLITS > 1:
            y = tl.zeros([TN, BP], tl.float32)
            square = tl.zeros([BP], tl.float32)
            for other in tl.static_range(SPLITS):  # always in this order, whoever is last
                part = (program * SPLITS + other).to(tl.int64)
                y += tl.load(partial + part * (TN * BP) + cell, mask=there, cache_modifier=".cg")
                if norm is not None:
                    square += tl.load(sums + part * BP + b, cache_modifier=".cg")
        if norm is not None:
            scale = tl.rsqrt(square / K + eps)[None, :]
            y *= scale
            gate *= scale
        _store(out, y, gate, size, s0, bias, b0, residual, n, b, N, first, stride_out, stride_r, B, GATED)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    scales: Sequence[Tensor] = (),
    tuning: LinearTuning | None = None,
) -> Tensor:
    """See `operator.linear`."""
    check(x, weights, biases, residual, norm, gated, scales)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    sizes = [weight.shape[0] for weight in weights]
    width = sizes[0] if gated else sum(sizes)
    out = x.new_empty((*x.shape[:-1], width))
    if tuning is None:
        kind = Kind(rows, tuple(sizes), columns, weights[0].dtype, gated, norm is not None, residual is not None)
        tuning = launch_of(kind)
    if gated and tuning.splits > 1:
        raise ValueError("A gated linear layer takes no splits.")
    flat = x.reshape(rows, columns)
    flat_residual = None if residual is None else residual.reshape(rows, width)
    tiles = -(-sizes[0] // tuning.rows) if gated else sum(-(-size // tuning.rows) for size in sizes)
    steps = -(-columns // (tuning.depth * tuning.splits))
    even = steps * tuning.depth * tuning.splits == columns
    padded = max(tuning.dot, power_of_two(rows)) if tuning.dot else 1
    if rows > padded:
        raise ValueError(f"{rows} rows need matrix instructions.")
    partial, sums, arrivals = _workspace(x, tiles, padded, norm is not None, tuning)
    number_bytes = weights[0].element_size()
    left = tuning.overlap * 2**20 / (sum(sizes) * columns * number_bytes)
    piece = -(-32 * tuning.warps // tuning.rows) * (16 // number_bytes)  # columns, at 16 bytes for every thread
    prefetch = min(tuning.prefetch, steps * tuning.depth) // piece * piece
    pdl = prefetch > 0 and even and _aligned(weights) and common.has_pdl(x.device)
    missing = [None] * (MAX_WEIGHTS - len(weights))
    with common.on_device(x):
        _linear_kernel[(tiles, tuning.splits)](
            *(out, flat, *weights, *missing, *scales, *[None] * (MAX_WEIGHTS - len(scales))),
            *(*biases, *[None] * (MAX_WEIGHTS - len(biases))),
            *(flat_residual, norm, partial, sums, arrivals, *sizes, *[0] * len(missing), columns, steps),
            *(max(steps - ceil(steps * left), 0), prefetch),
            *(width, flat.stride(0), 0 if residual is None else flat_residual.stride(0), eps),
            B=rows,
            BP=padded,
            TN=tuning.rows,
            TK=tuning.depth,
            SPLITS=tuning.splits,
            STAGES=tuning.stages,
            DOT=tuning.dot > 0,
            GATED=gated,
            EVEN=even,
            PDL=pdl,
            THREADS=32 * tuning.warps,
            num_warps=tuning.warps,
            **({"launch_pdl": True} if pdl else {}),
        )
    return out


def _workspace(
    x: Tensor, tiles: int, padded: int, has_norm: bool, tuning: LinearTuning
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where programs that share a row's columns leave partial results, sums of squares and their arrival."""
    if tuning.splits == 1:
        return None, None, None
    partial = x.new_empty((tiles, tuning.splits, tuning.rows, padded), dtype=torch.float32)
    sums = x.new_empty((tiles, tuning.splits, padded), dtype=torch.float32) if has_norm else None
    return partial, sums, take_arrivals(tiles, x.device)


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    norm: Tensor | None,
    gated: bool,
    scales: Sequence[Tensor] = (),
) -> None:
    """Refuse what the kernel cannot compute, naming the argument."""
    rows, columns = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    most = KERNEL_ROWS_8_BITS if scales else KERNEL_ROWS
    if not 1 <= rows <= most:
        raise ValueError(f"x must have 1 to {most} rows, not {rows}.")
    if not 1 <= len(weights) <= MAX_WEIGHTS or (gated and len(weights) != 2):
        raise ValueError(f"There are {len(weights)} weights; it takes {'2' if gated else f'1 to {MAX_WEIGHTS}'}.")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != columns or not weight.is_contiguous():
            raise ValueError(f"A weight must be contiguous [out, {columns}], not {tuple(weight.shape)}.")
        if weight.dtype != (EIGHT_BITS if scales else x.dtype) or weight.device != x.device:
            raise ValueError(f"A weight is {weight.dtype} on {weight.device}, but x {x.dtype} on {x.device}.")
    if gated and weights[0].shape != weights[1].shape:
        raise ValueError("The gate and what it multiplies must have the same shape.")
    if scales and [(scale.shape[0], scale.dtype) for scale in scales] != [(w.shape[0], torch.float32) for w in weights]:
        raise ValueError("scales must fit weights, one in float32 for each.")
    if biases and [bias.shape[0] for bias in biases] != [weight.shape[0] for weight in weights]:
        raise ValueError("biases must fit weights, one for each.")
    if norm is not None and tuple(norm.shape) != (columns,):
        raise ValueError(f"norm must be [{columns}], not {tuple(norm.shape)}.")
    width = weights[0].shape[0] if gated else sum(weight.shape[0] for weight in weights)
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], width):
        raise ValueError(f"residual must be {(*x.shape[:-1], width)}, not {tuple(residual.shape)}.")


def _aligned(weights: Sequence[Tensor]) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    size = weights[0].element_size()
    return all(weight.data_ptr() % 16 == 0 and weight.shape[1] * size % 16 == 0 for weight in weights)
