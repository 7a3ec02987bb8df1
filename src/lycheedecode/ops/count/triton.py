"""Bytes that a step read of the cache, in one launch.

A program for each row of the selections counts the tokens in its blocks, and the means that stand for the others; the
last program those that were scanned. They
add to the total of their sequence as they come: whole numbers in float64 have the same sum in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import Tuning
from ..types import Selections, constant
from .reference import Means


@triton.jit
def _count_kernel(
    total, lengths, blocks, counts, costs, stride_r, stride_b, stride_cr, stride_cb, K, whole_up_to, limits, means,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1)
    cost = tl.load(costs + r)
    common.wait_for_inputs(PDL)
    length = tl.load(lengths + b)
    if r < tl.num_programs(0) - 1:
        blocks += r.to(tl.int64) * stride_r + b.to(tl.int64) * stride_b
        n = tl.arange(0, WIDTH)
        inside = tl.zeros([WIDTH], tl.int32)
        for k in range(0, K, WIDTH):
            block = tl.load(blocks + k + n, mask=k + n < K, other=-1)
            left = tl.minimum(tl.maximum(length - block * BLOCK, 0), BLOCK)
            inside += tl.where(block < 0, 0, left)
        chosen = tl.load(counts + r * stride_cr + b * stride_cb)
        tokens = tl.where(chosen < 0, length, tl.sum(inside, 0))
        size = tokens.to(tl.float64) * cost
        if means is not None:
            complete = tl.where(tokens < length, tl.maximum(length - 1, 0) // CHUNK, 0)
            size += complete.to(tl.float64) * tl.load(means + r)
    else:
        whole_up_to = common.whole_of(b, whole_up_to, limits, BLOCK)
        size = tl.where(length > whole_up_to, length, 0).to(tl.float64) * cost
    tl.atomic_add(total + b, size, sem="relaxed")


def count_bytes(
    total: Tensor,
    lengths: Tensor,
    selections: Selections,
    costs: Tensor,
    block_size: int,
    whole_up_to: int,
    means: Means | None = None,
    limits: Tensor | None = None,
) -> None:
    """See `ops.count_bytes`; here the costs are float64 `[R + 1]`."""
    blocks, counts = selections.blocks, selections.counts
    num_rows, batch, capacity = blocks.shape
    readers = None
    if means is not None:
        readers = constant(tuple(means.each * number for number in means.readers), torch.float64, total.device)
    width = min(max(common.power_of_two(capacity), 32), 4096)
    tuning = Tuning(1, width, max(width // 1024, 1), 1, common.has_pdl(total.device))
    with common.on_device(total):
        _count_kernel[num_rows + 1, batch](
            *(total, lengths, blocks, counts, costs, *blocks.stride()[:2], *counts.stride()),
            *(capacity, whole_up_to, limits, readers),
            BLOCK=block_size,
            WIDTH=tuning.tile,
            CHUNK=1 if means is None else means.chunk,
            **tuning.options,
        )
