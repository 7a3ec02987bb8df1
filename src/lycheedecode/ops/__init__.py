"""The operations of a decode step, each defined once (`reference.py`) and implemented as often as it pays.

    scan_blocks     queries x keys of the retrieval heads      -> what every block is worth     [R, B, N]
    select_blocks   block scores                               -> selections                    [R, B, K]
    attend_blocks   all heads, each over its donor's selection -> output                        [B, H * G, D]
    attend          dense, for comparison and the paper's form -> output                        [B, H * G, D]
    scan_select     the first two
    count_bytes     what all of them read of the cache         -> added to a total              [B]

Dimensions: `B` sequences, `Hq` query heads, `Hkv` KV heads, `G = Hq / Hkv`, `D` head dim, `S` slots of the cache,
`N = ceil(S / block_size)` blocks, `K` selected blocks, `R` retrieval heads, `H` the KV heads asked for.
Every query is the newest token of its sequence, whose key and value are already in the cache. Accumulation is float32.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from math import ceil
from types import ModuleType

import torch
from torch import Tensor

from ..config import HybridConfig
from . import cpu, reference
from .copy import CopyingSelections
from .types import KV, Selections, constant

kernels: ModuleType | None = None
if torch.version.cuda and find_spec("triton"):
    from . import triton as kernels

__all__ = [
    "KV",
    "CopyingSelections",
    "Selections",
    "attend",
    "attend_blocks",
    "count_bytes",
    "has_float8",
    "scan_blocks",
    "scan_select",
    "select_blocks",
]


def scan_blocks(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    copy: Tensor | None = None,
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
            (`reference.write_copy` makes it); scanned in place of the cache's own, in half the time.

    Returns:
        float32 `[R, B, N]`; blocks beyond a sequence's length score 0.
    """
    _check(query, kv)
    _check_copy(copy, kv, heads)
    return _implementation(query).scan_blocks(query, kv, heads, block_size, scale, score, copy)


def select_blocks(scores: Tensor, kv: KV, config: HybridConfig, out: Selections) -> None:
    """Turn block scores into selections, written into `out` in place.

    Sinks and recent tokens are always selected and count towards the budget; with `refresh_every > 1` so are the
    blocks of the tokens that come before the next selection. Equal scores: the earlier block wins.

    Args:
        scores: float32 `[R, B, N]` from `scan_blocks`.
        kv: the layer's cache (only its lengths are used).
        config: strategy and budget.
        out: rows of these heads, `blocks` int32 `[R, B, K]` and `counts` int32 `[R, B]`; unused entries become -1.
    """
    if out.blocks.shape[:2] != scores.shape[:2]:
        raise ValueError(f"out.blocks is {tuple(out.blocks.shape)}, but scores are {tuple(scores.shape)}.")
    _implementation(kv.keys).select_blocks(scores, kv, config, out)


def scan_select(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    config: HybridConfig,
    scale: float,
    out: Selections,
    copy: Tensor | None = None,
) -> None:
    """`select_blocks(scan_blocks(...))`, without the scores in between; arguments as there.

    With the strategy `top_k`, sequences whose blocks all fit into the budget are selected as a whole, and not scanned.
    A `copy` may lack the last `config.refresh_every` tokens of each sequence: they are written into it first.
    """
    _check(query, kv)
    _check_copy(copy, kv, heads)
    implementation = _implementation(query)
    if implementation is kernels:
        implementation.scan_select(query, kv, heads, config, scale, out, copy)
        return
    if copy is not None:
        reference.write_newest_to_copy(copy, kv, heads, config.refresh_every)
    if kv.slots <= out.enough_tokens(config.selection, config.block_size, config.refresh_every):
        blocks = ceil(kv.slots / config.block_size)
        scores = torch.zeros(len(heads), query.shape[0], blocks, device=query.device)
    else:
        scores = implementation.scan_blocks(query, kv, heads, config.block_size, scale, config.block_score, copy)
    implementation.select_blocks(scores, kv, config, out)


def attend_blocks(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: tuple[int, ...] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of KV heads, each over the blocks of one row of the selections; reads nothing else.

    Args:
        query: `[B, Hq, D]`.
        kv: the layer's cache.
        selections: all selections of the model, `[R, B, K]`.
        rows: int64 `[H]`, the row that each of these heads attends over.
        block_size: tokens per block.
        scale: factor on the logits.
        heads: the `H` KV heads, ascending; None means all of the layer.
        out: where to write the result, and return it; None: a new tensor.

    Returns:
        `[B, H * G, D]` in the dtype of `query`; zeros for a sequence of length 0.
    """
    _check(query, kv)
    arguments = (query, kv, selections, rows, block_size, scale, heads)
    implementation = _implementation(query)
    if implementation is kernels:
        return implementation.attend_blocks(*arguments, out)
    result = implementation.attend_blocks(*arguments)
    return result if out is None else out.copy_(result)


def attend(query: Tensor, kv: KV, scale: float, heads: tuple[int, ...] | None = None) -> Tensor:
    """Dense attention of KV heads over the whole cache; arguments and result as in `attend_blocks`."""
    _check(query, kv)
    return _implementation(query).attend(query, kv, scale, heads)


def count_bytes(
    total: Tensor, lengths: Tensor, selections: Selections, costs: tuple[float, ...], block_size: int, enough: int = 0
) -> None:
    """Add what a step read of the cache to `total`, float64 `[B]`, in place; nothing reaches the host.

    Args:
        total: bytes so far.
        lengths: int32 `[B]`, cached tokens of each sequence.
        selections: all selections of the model, `[R, B, K]`.
        costs: bytes read for each token in the blocks of each row, and last those for each token of the whole cache
            (scanned, or attended to densely); `R + 1` of them.
        block_size: tokens per block.
        enough: tokens up to which the whole of a sequence was not looked at.
    """
    if len(costs) != len(selections.blocks) + 1:
        raise ValueError(f"costs must be one for each of {len(selections.blocks)} rows, and one; not {len(costs)}.")
    launches = total.is_cuda and kernels is not None and kernels.HAS_COMPILER
    implementation = kernels if launches else reference
    each = constant(costs, torch.float64, total.device)
    implementation.count_bytes(total, lengths, selections, each, block_size, enough)


def _implementation(tensor: Tensor) -> ModuleType:
    """The kernels on a CUDA GPU that can run them; on a CPU its own way; else the reference."""
    if not tensor.is_cuda:
        return cpu if tensor.device.type == "cpu" else reference
    obstacle = "Triton is not installed" if kernels is None else kernels.why_not(tensor)
    if obstacle is None:
        return kernels
    warnings.warn(f"Decode attention takes the slow path in plain PyTorch: {obstacle}.", stacklevel=3)
    return reference


def _check(query: Tensor, kv: KV) -> None:
    keys, values = kv.keys, kv.values
    if query.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            f"query must be [B, Hq, D] and keys and values [P, Hkv, S, D]; they are {tuple(query.shape)}, "
            f"{tuple(keys.shape)} and {tuple(values.shape)}."
        )
    if query.shape[2] != keys.shape[3] or query.shape[1] % keys.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} does not fit keys {tuple(keys.shape)}: Hq = G * Hkv, same D.")
    if query.dtype != keys.dtype or keys.dtype != values.dtype or not query.dtype.is_floating_point:
        raise ValueError(f"query, keys and values must share one float dtype, not {query.dtype}, {keys.dtype}.")
    if kv.page_table is None and keys.shape[0] != query.shape[0]:
        raise ValueError(f"a contiguous cache needs one page a sequence: {keys.shape[0]} for {query.shape[0]} queries.")
    for name in ("lengths", "starts", "page_table"):
        tensor = getattr(kv, name)
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.shape[0] != query.shape[0]):
            raise ValueError(f"{name} must be int32 with a row for each of the {query.shape[0]} sequences.")


def has_float8(device: torch.device) -> bool:
    """Whether scans on this device can read a copy of keys in 8-bit floats."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _check_copy(copy: Tensor | None, kv: KV, heads: tuple[int, ...]) -> None:
    if copy is None:
        return
    if kv.page_table is not None:
        raise ValueError("a copy of keys goes with a contiguous cache, not with pages.")
    if not has_float8(copy.device):
        raise ValueError("8-bit floats (scan_keys='float8') need a GPU of compute capability 8.9 or above.")
    batch, _, slots, dim = kv.keys.shape
    if copy.dtype != torch.float8_e4m3fn or copy.dim() != 4 or copy.shape[2] < slots:
        raise ValueError(f"copy must be float8_e4m3fn [B, R, >= {slots}, D], not {copy.dtype} {tuple(copy.shape)}.")
    if copy.shape[:2] != (batch, len(heads)) or copy.shape[3] != dim:
        raise ValueError(f"copy {tuple(copy.shape)} does not fit {batch} sequences, {len(heads)} heads of {dim}.")
