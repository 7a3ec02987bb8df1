"""The means of whole chunks of a cache, in one launch: a program for each new chunk of a head of a sequence.

tokens of one head of one sequence   |chunk|chunk|chunk|chunk|chu|
programs (b, h, i)                      known      i: 0     1        2: not complete, ends at once

Tokens that are not written yet are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import Tuning
from ..types import KV


@triton.jit(do_not_specialize=["slots"])
def _means_kernel(
    mean_keys, mean_values, stride_mp, stride_mh, stride_ms, known, written,
    keys, values, lengths, starts, page_table,
    stride_kp, stride_kh, stride_ks, stride_vp, stride_vh, stride_vs, stride_table, slots, PAGE: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, MEAN_OF: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    common.wait_for_inputs(PDL)
    first, count = common.extent(b, lengths, starts, slots)
    chunk = i
    if known is not None:
        chunk += tl.load(known + b)
    if (chunk + 1) * MEAN_OF > count:
        return
    there = count * 0 + MEAN_OF
    if written is not None:
        there = tl.minimum(tl.load(written + b) - chunk * MEAN_OF, MEAN_OF)
    key = tl.zeros([DP], tl.float32)
    value = tl.zeros([DP], tl.float32)
    for t in range(0, MEAN_OF, TILE):
        token = t + tl.arange(0, TILE)
        here = token < there
        page, entry = common.locate(b, first + chunk * MEAN_OF + token, here, page_table, stride_table, PAGE)
        k = common.load_tokens(keys, page, entry, h, here, stride_kp, stride_kh, stride_ks, D, DP)
        v = common.load_tokens(values, page, entry, h, here, stride_vp, stride_vh, stride_vs, D, DP)
        key += tl.sum(k.to(tl.float32), 0)
        value += tl.sum(v.to(tl.float32), 0)
    page, entry = common.locate_means(b, first, chunk, True, page_table, stride_table, PAGE, MEAN_OF)
    d = tl.arange(0, DP)
    number = tl.maximum(there, 1)
    at = page * stride_mp + h.to(tl.int64) * stride_mh + entry * stride_ms + d
    tl.store(mean_keys + at, (key / number).to(mean_keys.dtype.element_ty), mask=d < D)
    tl.store(mean_values + at, (value / number).to(mean_values.dtype.element_ty), mask=d < D)


def write_means(
    kv: KV, chunk: int, keys: Tensor, values: Tensor, first: Tensor | None, most: int, written: Tensor | None = None
) -> None:
    """See `ops.write_means`; `most` is a number here."""
    common.check_strides(None, kv)
    dim = kv.keys.shape[3]
    tile = max(min(16384 // (common.power_of_two(dim) * 4), chunk, 32), 1)
    with common.on_device(keys):
        _means_kernel[most, keys.shape[1], kv.batch](
            *(keys, values, *keys.stride()[:3], first, written),
            *common.cache_arguments(kv),
            D=dim,
            DP=common.power_of_two(dim),
            MEAN_OF=chunk,
            TILE=tile,
            **Tuning(1, tile, 4, 2, common.has_pdl(keys.device)).launch(kv),
        )
