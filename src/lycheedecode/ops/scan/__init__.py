"""scan: queries x keys of the retrieval heads -> what every block is worth."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from ...config import HybridConfig
from ...errors import DeviceError
from ..dispatch import check, kernels_for
from ..select import select_blocks
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
    copy: Tensor | None = None,
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
        copy: float8_e4m3fn `[B, R, S, D]`, the keys of `heads` in this order and in the slots of a contiguous cache
            (`reference.write_copy` makes it), or `[P, R, page, D]`, in its pages (`reference.write_pages_to_copy`);
            scanned in place of the cache's own, in half the time.
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
    copy: Tensor | None = None,
    limits: Tensor | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    shares: Shares | None = None,
) -> None:
    """`select_blocks(scan_blocks(...))`, without the scores in between; arguments as there.

    With the strategy `top_k`, sequences whose blocks all fit into the budget are selected as a whole, and not scanned;
    with any strategy, those that get everything (see `limits` of `select_blocks`) are not.
    A `copy` may lack the last `config.refresh_every` tokens of each sequence: they are written into it first.
    """
    check(query, kv, sinks, scales)
    _check_copy(copy, kv, heads)
    kernels = kernels_for(query)
    if kernels is not None:
        kernels.scan_select(query, kv, heads, config, scale, out, copy, limits, sinks, scales, shares)
        return
    if copy is not None:
        reference.write_newest_to_copy(copy, kv, heads, config.refresh_every)
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
    """Whether scans on this device can read a copy of keys in 8-bit floats."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _check_copy(copy: Tensor | None, kv: KV, heads: tuple[int, ...]) -> None:
    if copy is None:
        return
    if not has_float8(copy.device):
        raise DeviceError("8-bit floats (scan_keys='float8') need a GPU of compute capability 8.9 or above.")
    pages, _, slots, dim = kv.keys.shape
    if copy.dtype != torch.float8_e4m3fn or copy.dim() != 4 or copy.shape[2] < slots:
        raise ValueError(f"copy must be float8_e4m3fn [B, R, >= {slots}, D], not {copy.dtype} {tuple(copy.shape)}.")
    if copy.shape[:2] != (pages, len(heads)) or copy.shape[3] != dim:
        raise ValueError(f"copy {tuple(copy.shape)} does not fit {len(heads)} heads of keys {tuple(kv.keys.shape)}.")
