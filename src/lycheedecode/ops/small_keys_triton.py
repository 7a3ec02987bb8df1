"""Keys in 8 or 4 bits inside kernels: see `small_keys`."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from . import kernel_common as common
from .small_keys import SmallKeys

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""The interpreter has no machine instructions."""


def small_arguments(small: SmallKeys | None) -> tuple[Any, ...]:
    """As kernels take them: numbers, their strides, and the two scales of a key as one number of 32 bits."""
    if small is None:
        return None, 0, 0, 0, None, 0, 0, 0
    numbers, scales = small
    if numbers.stride(-1) != 1 or (scales is not None and scales.stride(-1) != 1):
        raise ValueError(f"copy must have a contiguous last dimension, not strides {numbers.stride()}.")
    if scales is None:
        return numbers, *numbers.stride()[:3], None, 0, 0, 0
    pairs = scales.view(torch.int32)[..., 0]
    return numbers, *numbers.stride()[:3], pairs, *pairs.stride()


@triton.jit
def write_small_keys(
    numbers, stride_p, stride_r, stride_s, scales, stride_sp, stride_sr, stride_ss, r, page, entry,
    keys, from_page, from_entry, head, stride_kp, stride_kh, stride_ks, mine, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Round keys `[tokens]` of one head of the cache into row `r`; pages and entries are 64-bit."""
    row = page * stride_p + r.to(tl.int64) * stride_r + entry * stride_s
    if scales is None:
        d = tl.arange(0, DP)[None, :]
        k = common.load_tokens(keys, from_page, from_entry, head, mine, stride_kp, stride_kh, stride_ks, D, DP)
        if numbers.dtype.element_ty == tl.float8e4nv:
            k = tl.clamp(k.to(tl.float32), -448.0, 448.0)
        k = k.to(numbers.dtype.element_ty)
        tl.store(numbers + row[:, None] + d, k, mask=mine[:, None] & (d < D))
    else:
        HALF: tl.constexpr = D // 2
        HP: tl.constexpr = triton.next_power_of_2(HALF)
        d = tl.arange(0, HP)[None, :]
        k = common.load_tokens(keys, from_page, from_entry, head, mine, stride_kp, stride_kh, stride_ks, HALF, HP)
        first, scale = _in_4_bits(k)
        k = common.load_tokens(
            keys + HALF, from_page, from_entry, head, mine, stride_kp, stride_kh, stride_ks, HALF, HP
        )
        second, other = _in_4_bits(k)
        tl.store(numbers + row[:, None] + d, (first | (second << 4)).to(tl.uint8), mask=mine[:, None] & (d < HALF))
        to = page * stride_sp + r.to(tl.int64) * stride_sr + entry * stride_ss
        tl.store(scales + to, ((scale >> 16) | (other & 0xFFFF0000)).to(tl.int32, bitcast=True), mask=mine)


@triton.jit
def _in_4_bits(k):
    """Halves of keys `[tokens, HP]` as whole numbers, and the bits of their scales as float32, `[tokens]`.

    Every operation rounds as PyTorch's does: bfloat16 to nearest by whole numbers, numbers by the addition of one that
    leaves no room for a fraction.
    """
    k = k.to(tl.float32)
    bits = tl.div_rn(tl.max(tl.abs(k), 1), 7.0).to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    scale = bits.to(tl.float32, bitcast=True)
    n = tl.div_rn(k, tl.where(scale == 0.0, 1.0, scale)[:, None])
    n = tl.clamp((n + 12582912.0) - 12582912.0, -7.0, 7.0)
    return (n + 8.0).to(tl.int32), bits


@triton.jit
def halves_of_query(query, b, head, stride_b, stride_h, scale, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr):
    """A group's queries for `logits_of_4_bits`: halves `[GP, HP]`, what makes up for `OFFSET` in each, and the scale.

    bfloat16 becomes float16, which numbers in 4 bits become in one step.
    """
    HALF: tl.constexpr = D // 2
    HP: tl.constexpr = max(16, triton.next_power_of_2(HALF))
    first = common.load_query(query, b, head, stride_b, stride_h, G, HALF, GP, HP)
    second = common.load_query(query + HALF, b, head, stride_b, stride_h, G, HALF, GP, HP)
    if first.dtype == tl.bfloat16:
        most = tl.maximum(tl.max(tl.abs(first.to(tl.float32))), tl.max(tl.abs(second.to(tl.float32))))
        most = tl.maximum(most, 1e-30)
        first, second = (first / most).to(tl.float16), (second / most).to(tl.float16)
        scale *= most
    less = -8.0 / 512
    return first, second, tl.sum(first.to(tl.float32), 1) * less, tl.sum(second.to(tl.float32), 1) * less, scale * 512.0


@triton.jit
def widened(n):
    """Both halves of keys, `[tokens, HP]` bytes, in float16: numbers plus `OFFSET`, over 512.

    A number of 4 bits is one of e4m3, over 512; two of those take one instruction to become float16.
    """
    if _INTERPRETED:
        first, second = (n & 15).to(tl.float16) / 512, (n >> 4).to(tl.float16) / 512
    else:
        first, second = tl.inline_asm_elementwise(
            "{ .reg .b32 x, y; .reg .b16 a, b, c, d;"
            " and.b32 x, $4, 0x0F0F0F0F; shr.u32 y, $4, 4; and.b32 y, y, 0x0F0F0F0F;"
            " mov.b32 {a, b}, x; mov.b32 {c, d}, y;"
            " cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;"
            " cvt.rn.f16x2.e4m3x2 $2, c; cvt.rn.f16x2.e4m3x2 $3, d; }",
            "=r,=r,=r,=r,r", [n], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    return first, second


@triton.jit
def logits_of_4_bits(first, second, less, other_less, n, pairs, exists, scale):
    """`[GP, tokens]` logits in base 2; -inf where nothing exists.

    `n [tokens, HP]`: bytes of keys; `pairs [tokens]`: their two scales.
    """
    low, high = widened(n)
    bits = pairs.to(tl.uint32, bitcast=True)
    zeros = tl.zeros([first.shape[0], n.shape[0]], tl.float32)
    x = tl.dot(first, tl.trans(low.to(first.dtype)), zeros + less[:, None], input_precision="ieee")
    y = tl.dot(second, tl.trans(high.to(first.dtype)), zeros + other_less[:, None], input_precision="ieee")
    x_scale = (bits << 16).to(tl.float32, bitcast=True)[None, :] * scale
    y_scale = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)[None, :] * scale
    return tl.where(exists[None, :], x * x_scale + y * y_scale, float("-inf"))
