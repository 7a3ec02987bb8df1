"""attend: queries x the keys and values of selected blocks, or of everything -> output."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import HybridConfig
from ..dispatch import check, kernels_for
from ..scan import has_float8
from ..types import KV, Completion, Selections
from . import cpu, reference

__all__ = ["attend", "attend_blocks", "attend_select", "attend_tokens"]

MAX_TOKENS = 32
"""Query tokens that the kernel takes at once."""


def attend_blocks(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: tuple[int, ...] | None = None,
    out: Tensor | None = None,
    completion: Completion | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Attention of KV heads, each over the blocks of one row of the selections; reads nothing else.

    With a `completion` the tokens of complete chunks that are not in these blocks count, too: the `n` of a chunk as one
    entry of the softmax with the chunk's mean key and mean value, and `log(factor * n)` added to its logit. Where
    everything is selected, that changes nothing.

    Args:
        query: `[B, Hq, D]`.
        kv: the layer's cache.
        selections: all selections of the model, `[R, B, K]`.
        rows: int64 `[H]`, the row that each of these heads attends over.
        block_size: tokens per block.
        scale: factor on the logits.
        heads: the `H` KV heads, ascending; None means all of the layer.
        out: where to write the result, and return it; None: a new tensor.
        completion: the layer's; then the selections have counted what was `taken`. None: what is unread is nothing.
        sinks: float32 `[Hq]`, a logit of each query head that takes its part of the softmax and stands for no token.
        scales: float32 `[Hkv]` of keys and of values, which then are float8_e4m3fn: what they stand for is their
            product.
        places: int32 `[R, B, K]`, where `kv`, whose sequences then have lengths and start at 0, holds the selected
            blocks: the tokens of block `blocks[r, b, k]` are its slots from `places[r, b, k] * block_size` on. No
            sequence may have everything selected. None: block n lies at place n.

    Returns:
        `[B, H * G, D]` in the dtype of `query`; zeros for a sequence of length 0.
    """
    check(query, kv, sinks, scales)
    if places is not None:
        _check_places(places, kv, selections)
    if completion is not None:
        _check_completion(completion, query, selections, kv, block_size, places is not None)
    arguments = (query, kv, selections, rows, block_size, scale, heads)
    kernels = kernels_for(query)
    if kernels is not None:
        return kernels.attend_blocks(*arguments, out, completion, sinks, scales, places)
    if query.device.type == "cpu" and sinks is None and scales is None and places is None:
        result = cpu.attend_blocks(*arguments, completion)
    else:
        result = reference.attend_blocks(*arguments, completion, sinks, scales, places)
    return result if out is None else out.copy_(result)


def attend(
    query: Tensor,
    kv: KV,
    scale: float,
    heads: tuple[int, ...] | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Dense attention of KV heads over the whole cache; arguments and result as in `attend_blocks`."""
    check(query, kv, sinks, scales)
    return (kernels_for(query) or reference).attend(query, kv, scale, heads, sinks, scales)


def attend_select(
    query: Tensor, kv: KV, heads: tuple[int, ...], config: HybridConfig, scale: float, out: Selections
) -> Tensor:
    """Dense attention of retrieval heads, and their selections from the same weights: keys are read once.

    It is `attend` and `scan_select`, with their arguments, for the time of the former.

    Returns:
        `[B, R * G, D]` in the dtype of `query`.
    """
    check(query, kv)
    return (kernels_for(query) or reference).attend_select(query, kv, heads, config, scale, out)


def attend_tokens(
    query: Tensor,
    kv: KV,
    scale: float,
    begins: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Dense causal attention of the newest `T` tokens of each sequence, for the time of one.

    Args:
        query: `[B, T, Hq, D]`, 1 <= T <= 32; token t is the one before the T - 1 - t last ones of its sequence.
        kv: the layer's cache, the T tokens included; a sequence may have fewer than T.
        scale: factor on the logits.
        begins: int32 `[B, T]`, not falling: the first token that each query sees; None: they see all before them.
        scales: float32 `[Hkv]` of keys and of values, which then are float8_e4m3fn: what they stand for is their
            product.

    Returns:
        `[B, T, Hq, D]` in the dtype of `query`; zeros for a query before its sequence begins.
    """
    _check_tokens(query, kv, begins, scales)
    kernels = kernels_for(query)
    return (reference if kernels is None else kernels).attend_tokens(query, kv, scale, begins, scales)


def _check_tokens(query: Tensor, kv: KV, begins: Tensor | None, scales: tuple[Tensor, Tensor] | None) -> None:
    if query.dim() != 4 or not 1 <= query.shape[1] <= MAX_TOKENS:
        raise ValueError(f"query must be [B, T, Hq, D] with 1 <= T <= {MAX_TOKENS}, not {tuple(query.shape)}.")
    widened = kv
    if kv.keys.dtype == torch.float8_e4m3fn:
        heads = kv.keys.shape[1]
        if scales is None or any(one.shape != (heads,) or one.dtype != torch.float32 for one in scales):
            raise ValueError(f"keys and values in 8 bits need two scales, float32 [{heads}] each.")
        if not has_float8(kv.keys.device):
            raise ValueError("A cache in 8-bit floats needs a GPU of compute capability 8.9 or above.")
        widened = kv._replace(keys=_named(kv.keys, query), values=_named(kv.values, query))
    elif scales is not None:
        raise ValueError(f"scales belong to keys and values in float8_e4m3fn, not in {kv.keys.dtype}.")
    check(query[:, 0], widened)
    if begins is not None and (begins.dtype != torch.int32 or begins.shape != query.shape[:2]):
        raise ValueError(f"begins must be int32 {tuple(query.shape[:2])}, not {begins.dtype} {tuple(begins.shape)}.")


def _named(cache: Tensor, query: Tensor) -> Tensor:
    """Something of the cache's shape in the query's dtype, without memory."""
    return torch.empty(1, dtype=query.dtype, device=query.device).expand(cache.shape)


def _check_places(places: Tensor, kv: KV, selections: Selections) -> None:
    if places.dtype != torch.int32 or places.shape != selections.blocks.shape:
        raise ValueError(
            f"places must be int32 {tuple(selections.blocks.shape)}, not {places.dtype} {tuple(places.shape)}."
        )
    if kv.lengths is None or kv.starts is not None or kv.page_table is not None:
        raise ValueError("where blocks have places, sequences have lengths, and neither starts nor pages.")


def _check_completion(
    completion: Completion, query: Tensor, selections: Selections, kv: KV, block_size: int, placed: bool = False
) -> None:
    keys, values, chunk, factors = completion
    if keys.shape != values.shape or keys.stride() != values.stride() or {keys.dtype, values.dtype} != {query.dtype}:
        raise ValueError("mean keys and mean values must have one shape, the same strides, and the query's dtype.")
    heads, dim = kv.keys.shape[1], kv.keys.shape[3]
    if keys.shape[1] != heads or keys.shape[3] != dim or keys.shape[0] != kv.keys.shape[0] or len(factors) != heads:
        raise ValueError(
            f"means {tuple(keys.shape)} and {len(factors)} factors do not fit keys {tuple(kv.keys.shape)}."
        )
    if chunk % block_size or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two and whole blocks of {block_size}, not {chunk}.")
    if selections.taken is None or selections.taken.shape[:2] != selections.blocks.shape[:2]:
        raise ValueError("a completion needs selections that count what was taken of each chunk.")
    if kv.page_table is None and keys.shape[2] < (kv.slots - 1) // chunk and not placed:
        raise ValueError(f"there are means of {keys.shape[2]} chunks for a cache of {kv.slots} slots.")
