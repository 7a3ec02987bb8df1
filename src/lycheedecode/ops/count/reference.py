"""The definition of the bytes that a step reads, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import EVERYTHING, Selections, constant


class Means(NamedTuple):
    """What a completion reads: the means of every complete chunk, unless all tokens are selected.

    Attributes:
        readers: heads that are completed over each row of the selections, `R` of them.
        chunk: tokens per chunk.
        each: bytes of one chunk's mean key and mean value.
    """

    readers: tuple[int, ...]
    chunk: int
    each: float


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
    unseen = lengths <= whole_up_to
    if limits is not None:
        unseen = (unseen & (lengths <= limits * block_size)) | (limits == EVERYTHING)
    read = selections.tokens(lengths, block_size)  # [R, B]
    total += (costs[:-1, None] * read).sum(0) + costs[-1] * lengths.masked_fill(unseen, 0)
    if means is not None:
        complete = ((lengths - 1) // means.chunk).clamp(min=0) * (read < lengths)
        readers = constant(means.readers, torch.float64, total.device)
        total += (readers[:, None] * complete).sum(0) * means.each
