"""count: what a step read of the cache, in bytes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import HAS_COMPILER, HAS_TRITON
from ..types import Selections, constant
from . import reference
from .reference import Means

__all__ = ["Means", "count_bytes"]


def count_bytes(
    total: Tensor,
    lengths: Tensor,
    selections: Selections,
    costs: tuple[float, ...],
    block_size: int,
    whole_up_to: int = 0,
    means: Means | None = None,
    limits: Tensor | None = None,
) -> None:
    """Add what a step read of the cache to `total`, float64 `[B]`, in place; nothing reaches the host.

    Args:
        total: bytes so far.
        lengths: int32 `[B]`, cached tokens of each sequence.
        selections: all selections of the model, `[R, B, K]`.
        costs: bytes read for each token in the blocks of each row, and last those for each token of the whole cache
            (scanned, or attended to densely); `R + 1` of them.
        block_size: tokens per block.
        whole_up_to: sequences of up to so many tokens got everything, and were not looked at.
        means: what a completion reads; None: nothing.
        limits: those of `select_blocks`, where such sequences are not looked at that get everything, or, with
            `whole_up_to`, whose blocks all fit into theirs.
    """
    if len(costs) != len(selections.blocks) + 1:
        raise ValueError(f"costs must be one for each of {len(selections.blocks)} rows, and one; not {len(costs)}.")
    implementation: ModuleType = reference
    if total.is_cuda and HAS_TRITON and HAS_COMPILER:
        from . import triton

        implementation = triton
    each = constant(costs, torch.float64, total.device)
    implementation.count_bytes(total, lengths, selections, each, block_size, whole_up_to, means, limits)
