"""The definition of the bytes that a step reads, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..types import Selections


def count_bytes(
    total: Tensor, lengths: Tensor, selections: Selections, costs: Tensor, block_size: int, enough: int
) -> None:
    attended = costs[:-1, None] * selections.tokens(lengths, block_size)  # [R, B]
    total += attended.sum(0) + costs[-1] * lengths.masked_fill(lengths <= enough, 0)
