"""Bytes that a step read of the cache, in one launch.

A program for each row of the selections counts the tokens in its blocks, the last program those that were scanned. They
add to the total of their sequence as they come: whole numbers in float64 have the same sum in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import Tuning
from ..types import Selections


@triton.jit
def _count_kernel(
    total, lengths, blocks, costs, stride_r, stride_b, K, enough,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    r, b = tl.program_id(0), tl.program_id(1)
    cost = tl.load(costs + r)
    common.wait_for_inputs(EARLY)
    length = tl.load(lengths + b)
    if r < tl.num_programs(0) - 1:
        blocks += r.to(tl.int64) * stride_r + b.to(tl.int64) * stride_b
        n = tl.arange(0, CHUNK)
        inside = tl.zeros([CHUNK], tl.int32)
        for k in range(0, K, CHUNK):
            block = tl.load(blocks + k + n, mask=k + n < K, other=-1)
            left = tl.minimum(tl.maximum(length - block * BLOCK, 0), BLOCK)
            inside += tl.where(block < 0, 0, left)
        tokens = tl.sum(inside, 0)
    else:
        tokens = tl.where(length > enough, length, 0)
    tl.atomic_add(total + b, tokens.to(tl.float64) * cost, sem="relaxed")


def count_bytes(
    total: Tensor, lengths: Tensor, selections: Selections, costs: Tensor, block_size: int, enough: int
) -> None:
    """See `ops.count_bytes`; here the costs are float64 `[R + 1]`."""
    blocks = selections.blocks
    num_rows, batch, capacity = blocks.shape
    chunk = min(max(common.power_of_two(capacity), 32), 4096)
    tuning = Tuning(1, chunk, max(chunk // 1024, 1), 1, common.starts_early(total.device))
    with common.on_device(total):
        _count_kernel[num_rows + 1, batch](
            *(total, lengths, blocks, costs, *blocks.stride()[:2], capacity, enough),
            BLOCK=block_size,
            CHUNK=tuning.tile,
            **tuning.options,
        )
