"""New tokens on their way into the cache: one launch, at slots that only the device knows.

key    (-> RMSNorm) (-> rotation) -> cache        a program for each KV head ...
value  -> cache
query  (-> RMSNorm)  -> rotation  -> new tensor   ... and, if anything is rotated, for each query head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import Tuning
from .rope import Rotation


@triton.jit
def _rotated(x, cos, sin, norm, eps, D: tl.constexpr, DP: tl.constexpr):
    """`[DP]` float32: a head of `D` channels at `x`, after its norm and rotation."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, DP)
    other = tl.where(d < HALF, d + HALF, d - HALF)
    here = tl.load(x + d, mask=d < D, other=0.0)
    there = tl.load(x + other, mask=d < D, other=0.0)
    if norm is not None:
        wide = here.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
        here = (wide * scale).to(here.dtype) * tl.load(norm + d, mask=d < D)
        there = (there.to(tl.float32) * scale).to(there.dtype) * tl.load(norm + other, mask=d < D)
    c = tl.load(cos + d, mask=d < D).to(tl.float32)
    s = tl.load(sin + d, mask=d < D).to(tl.float32)
    turned = tl.where(d < HALF, -there.to(tl.float32), there.to(tl.float32))
    return here.to(tl.float32) * c + turned * s


@triton.jit
def _append_kernel(
    keys, values, key, value, filled, out, query, cos, sin, key_norm, query_norm, eps, heads, query_heads,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_nkb, stride_nkh, stride_nvb, stride_nvh, stride_qb, stride_qh, stride_cb, stride_sb,
    T: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    common.wait_for_inputs(PDL)
    d = tl.arange(0, DP)
    if h < heads:
        slot = tl.load(filled + b).to(tl.int64) - 1
        v = tl.load(value + b * stride_nvb + h * stride_nvh + d, mask=d < D)
        tl.store(values + b // T * stride_vb + h * stride_vh + slot * stride_vs + d, v, mask=d < D)
        at = key + b * stride_nkb + h * stride_nkh
        if cos is None:
            k = tl.load(at + d, mask=d < D)
        else:
            k = _rotated(at, cos + b * stride_cb, sin + b * stride_sb, key_norm, eps, D, DP).to(v.dtype)
        tl.store(keys + b // T * stride_kb + h * stride_kh + slot * stride_ks + d, k, mask=d < D)
    elif cos is not None:
        h -= heads
        at = query + b * stride_qb + h * stride_qh
        q = _rotated(at, cos + b * stride_cb, sin + b * stride_sb, query_norm, eps, D, DP)
        tl.store(out + (b * query_heads + h) * D + d, q.to(out.dtype.element_ty), mask=d < D)


def append(
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    filled: Tensor,
    query: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor | None:
    """See `ops.append`; here the cache and every tensor have a contiguous last dimension."""
    named = {"key": key, "value": value, "keys": keys, "values": values, "query": query}
    for name, tensor in {**named, **(rotation._asdict() if rotation else {})}.items():
        if isinstance(tensor, Tensor) and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, not strides {tensor.stride()}.")
    batch, heads, dim = key.shape
    if rotation is None:
        out, query_heads = query, 0
        constants: tuple[Tensor | float | None, ...] = (None, None, None, None, 0.0)
        strides = (0, 0, 0, 0)
    else:
        out, query_heads = torch.empty(query.shape, dtype=query.dtype, device=query.device), query.shape[1]
        constants = (rotation.cos, rotation.sin, rotation.key_norm, rotation.query_norm, rotation.eps)
        strides = (*query.stride()[:2], rotation.cos.stride(0), rotation.sin.stride(0))
    with common.on_device(keys):
        _append_kernel[heads + query_heads, batch](
            *(keys, values, key, value, filled, out, query, *constants, heads, query_heads),
            *keys.stride()[:3],
            *values.stride()[:3],
            *key.stride()[:2],
            *value.stride()[:2],
            *strides,
            T=batch // keys.shape[0],
            D=dim,
            DP=common.power_of_two(dim),
            **Tuning(1, 1, 1, 1, common.has_pdl(keys.device)).options,
        )
    return out
