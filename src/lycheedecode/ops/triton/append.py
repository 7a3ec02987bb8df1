"""The newest token's key and value -> the cache: one launch for both, at a slot that only the device knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common


@triton.jit
def _append_kernel(
    keys, values, key, value, filled, heads,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_nkb, stride_nkh, stride_nvb, stride_nvh, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    d = tl.arange(0, DP)
    slot = tl.load(filled + b).to(tl.int64) - 1
    k = tl.load(key + b * stride_nkb + h * stride_nkh + d, mask=d < D)
    v = tl.load(value + b * stride_nvb + h * stride_nvh + d, mask=d < D)
    tl.store(keys + b * stride_kb + h * stride_kh + slot * stride_ks + d, k, mask=d < D)
    tl.store(values + b * stride_vb + h * stride_vh + slot * stride_vs + d, v, mask=d < D)


def append(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, filled: Tensor) -> None:
    """Write `key` and `value` `[B, Hkv, D]` to slot `filled[b] - 1` of each sequence of a contiguous cache.

    Args:
        keys, values: `[B, Hkv, S, D]`; written in place.
        key, value: the newest token, with a contiguous last dimension.
        filled: int32 `[B]`, slots in use, the new one included.
    """
    for name, tensor in {"key": key, "value": value, "keys": keys, "values": values}.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, not strides {tensor.stride()}.")
    batch, heads, dim = key.shape
    with common.on_device(keys):
        _append_kernel[(batch * heads,)](
            *(keys, values, key, value, filled, heads),
            *keys.stride()[:3],
            *values.stride()[:3],
            *key.stride()[:2],
            *value.stride()[:2],
            D=dim,
            DP=common.power_of_two(dim),
            num_warps=1,
        )
