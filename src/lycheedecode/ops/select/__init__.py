"""select: what blocks are worth -> the blocks that a retrieval head chooses."""

from __future__ import annotations

from torch import Tensor

from ...config import HybridConfig
from ..dispatch import kernels_for
from ..types import KV, Selections, Shares
from . import reference

__all__ = ["select_blocks"]


def select_blocks(
    scores: Tensor,
    kv: KV,
    config: HybridConfig,
    out: Selections,
    limits: Tensor | None = None,
    shares: Shares | None = None,
) -> None:
    """Turn block scores into selections, written into `out` in place.

    Sinks and recent tokens are always selected and count towards the budget; with `refresh_every > 1` so are the
    blocks of the tokens that come before the next selection. Equal scores: the earlier block wins.

    Args:
        scores: float32 `[R, B, N]` from `scan_blocks`; with `shares`, of as many heads as they name.
        kv: the layer's cache (only its lengths are used).
        config: strategy and budget.
        out: rows of these heads, `blocks` int32 `[R, B, K]` and `counts` int32 `[R, B]`; unused entries become -1.
            Where it has `taken`, that counts them by chunks of `config.chunk_tokens`.
        limits: int32 `[B]`, most blocks of each sequence, no fewer than it must have; `EVERYTHING`: so become its
            counts, and its scores mean nothing. None: as many as fit into `out`.
        shares: budgets of rows, with the strategy `top_k`. None: one budget for all; row r is chosen from scores r.
    """
    rows = len(scores) if shares is None else len(shares.heads)
    if out.blocks.shape[:2] != (rows, scores.shape[1]):
        raise ValueError(f"out.blocks is {tuple(out.blocks.shape)}, but scores are {tuple(scores.shape)}.")
    (kernels_for(kv.keys) or reference).select_blocks(scores, kv, config, out, limits, shares)
