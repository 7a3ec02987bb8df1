"""scan: queries x keys of the retrieval heads -> what every block is worth."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from ...config import HybridConfig
from ...errors import DeviceError
from ..dispatch import check, kernels_for
from ..select import select_blocks
from ..small_keys import SmallKeys
from ..types import EVERYTHING, KV, Selections, Shares
from . import reference

__all__ = ["has_float8", "scan_blocks", "scan_select"]


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
    """What every block is worth to each of the retrieval heads `heads`; reads keys only.

    A query head's attention weights over the whole cache are a softmax of `scale * q . k`. The block's score is the
    sum (`mass`) or the largest (`max`) of the weights inside it, averaged over the query heads of the group.

    Args:
        query: `[B, Hq, D]`.
        kv: the layer's cache.
        heads: KV heads to scan, `R` of them.
        block_size: tokens per block.
        scale: factor on the logits, usually `D ** -0.5`.
        score: `mass` or `max`.
        copy: the keys of `heads` in 8 or 4 bits, in this order: `[B, R, S]` of them, in the slots of a contiguous cache
            (`reference.write_copy` makes it), or `[P, R, page]`, in its pages (`reference.write_pages_to_copy`);
            scanned in place of the cache's own.
        sinks, scales: as in `attend_blocks`.

    Returns:
        float32 `[R, B, N]`; blocks beyond a sequence's length score 0.
    """
    check(query, kv, sinks, scales)
    _check_copy(copy, kv, heads)
    more = (score, copy, sinks, scales)
    return (kernels_for(query) or reference).scan_blocks(query, kv, heads, block_size, scale, *more)


def scan_select(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    config: HybridConfig,
    scale: float,
    out: Selections,
    copy: SmallKeys | None = None,
    limits: Tensor | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    shares: Shares | None = None,
    newest: int | None = None,
) -> None:
    """`select_blocks(scan_blocks(...))`, without the scores in between; arguments as there.

    With the strategy `top_k`, sequences whose blocks all fit into the budget are selected as a whole, and not scanned;
    with any strategy, those that get everything (see `limits` of `select_blocks`) are not.
    A `copy` may lack the last `newest` tokens of each sequence, which are written into it first; None stands for
    `config.refresh_every` of them. With 0, the keys of `kv` are never read.
    """
    check(query, kv, sinks, scales)
    _check_copy(copy, kv, heads)
    kernels = kernels_for(query)
    if kernels is not None:
        kernels.scan_select(query, kv, heads, config, scale, out, copy, limits, sinks, scales, shares, newest)
        return
    if copy is not None:
        reference.write_newest_to_copy(copy, kv, heads, config.refresh_every if newest is None else newest)
    whole_up_to = out.whole_up_to(config.strategy, config.block_size, config.refresh_every, shares)
    fits = limits is None and kv.slots <= whole_up_to
    if fits or (limits is not None and bool((limits == EVERYTHING).all())):
        blocks = ceil(kv.slots / config.block_size)
        scores = torch.zeros(len(heads), query.shape[0], blocks, device=query.device)
    else:
        asked = (query, kv, heads, config.block_size, scale, config.block_score, copy)
        scores = reference.scan_blocks(*asked, sinks, scales)
    select_blocks(scores, kv, config, out, limits, shares)


def has_float8(device: torch.device) -> bool:
    """Whether kernels on this device know 8-bit floats, by which they also widen numbers in 4 bits."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _check_copy(copy: SmallKeys | None, kv: KV, heads: tuple[int, ...]) -> None:
    if copy is None:
        return
    numbers, scales = copy
    if not has_float8(numbers.device):
        raise DeviceError("scan_keys='float8' and 'int4' need a GPU of compute capability 8.9 or above.")
    dtypes = torch.float8_e4m3fn if scales is None else torch.uint8, None if scales is None else torch.bfloat16
    if (numbers.dtype, None if scales is None else scales.dtype) != dtypes:
        raise ValueError(f"copy must be float8_e4m3fn, or uint8 with scales in bfloat16, not {numbers.dtype}.")
    pages, _, slots, dim = kv.keys.shape
    shape = (*numbers.shape[:-1], copy.dim)
    if len(shape) != 4 or shape[2] < slots:
        raise ValueError(f"copy must have [B, R, >= {slots}, D] numbers, not {shape}.")
    if shape[:2] != (pages, len(heads)) or shape[3] != dim:
        raise ValueError(f"copy {shape} does not fit {len(heads)} heads of keys {tuple(kv.keys.shape)}.")
    if scales is not None and scales.shape != (*shape[:3], 2):
        raise ValueError(f"the scales of copy {shape} must be {(*shape[:3], 2)}, not {tuple(scales.shape)}.")
