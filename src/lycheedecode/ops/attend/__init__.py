"""attend: queries x the keys and values of selected blocks, or of everything -> output."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import check, kernels_for
from ..types import KV, Selections
from . import cpu, reference

__all__ = ["attend", "attend_blocks"]


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
    check(query, kv)
    arguments = (query, kv, selections, rows, block_size, scale, heads)
    kernels = kernels_for(query)
    if kernels is not None:
        return kernels.attend_blocks(*arguments, out)
    result = (cpu if query.device.type == "cpu" else reference).attend_blocks(*arguments)
    return result if out is None else out.copy_(result)


def attend(query: Tensor, kv: KV, scale: float, heads: tuple[int, ...] | None = None) -> Tensor:
    """Dense attention of KV heads over the whole cache; arguments and result as in `attend_blocks`."""
    check(query, kv)
    return (kernels_for(query) or reference).attend(query, kv, scale, heads)
