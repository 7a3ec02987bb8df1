"""What the operations read and write: one layer's cache, and the selections."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class KV(NamedTuple):
    """One layer's keys and values as the operations see them; views, never copies.

    A sequence's tokens lie in consecutive *slots*: token `t` of sequence `b` in slot `starts[b] + t`. Slot `s` is
    entry `s % page` of page `page_table[b, s // page]`; without a page table, page `b` is all of sequence `b`.
    Blocks count from the sequence's first token, so padding never shifts them.

    Attributes:
        keys: `[P, Hkv, page, D]`, any strides with a contiguous last dimension.
        values: like `keys`.
        lengths: int32 `[B]`, cached tokens of each sequence; None: every slot from its start on holds a token.
        starts: int32 `[B]`, slot of the first token (left padding); None: 0.
        page_table: int32 `[B, pages]`; None: contiguous.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor | None = None
    starts: Tensor | None = None
    page_table: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.keys.shape[0] if self.page_table is None else self.page_table.shape[0]

    @property
    def slots(self) -> int:
        """Slots `S` that a sequence can reach."""
        return self.keys.shape[2] * (1 if self.page_table is None else self.page_table.shape[1])

    def token_counts(self) -> Tensor:
        """int32 `[B]`: the lengths, written out where they are implied."""
        if self.lengths is not None:
            return self.lengths
        full = torch.full((self.batch,), self.slots, dtype=torch.int32, device=self.keys.device)
        return full if self.starts is None else full - self.starts


class Selections(NamedTuple):
    """The blocks that retrieval heads chose at this step; fixed buffers that every step overwrites.

    Attributes:
        blocks: int32 `[R, B, K]`, block indices in any order; unused entries are -1 and come last.
        counts: int32 `[R, B]`, entries in use.
    """

    blocks: Tensor
    counts: Tensor

    @classmethod
    def allocate(cls, num_rows: int, batch: int, capacity: int, device: torch.device | str) -> Selections:
        """Empty selections of up to `capacity` blocks."""
        return cls(
            torch.full((num_rows, batch, capacity), -1, dtype=torch.int32, device=device),
            torch.zeros((num_rows, batch), dtype=torch.int32, device=device),
        )

    def rows(self, first: int, count: int) -> Selections:
        """View of `count` consecutive rows."""
        return Selections(self.blocks[first : first + count], self.counts[first : first + count])

    def tokens(self, lengths: Tensor, block_size: int) -> Tensor:
        """int64 `[R, B]`: tokens in the selected blocks of sequences of `lengths` tokens, int32 `[B]`."""
        inside = (lengths[:, None] - self.blocks * block_size).clamp(0, block_size)  # [R, B, K]
        return inside.masked_fill(self.blocks < 0, 0).sum(-1)

    def enough_tokens(self, strategy: str, block_size: int, refresh_every: int) -> int:
        """Tokens up to which a sequence is selected as a whole, whatever its blocks are worth."""
        return max(self.blocks.shape[-1] * block_size - (refresh_every - 1), 0) if strategy == "top_k" else 0


@lru_cache(maxsize=16384)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[len(values)]`, made once: CUDA graphs hold on to its address."""
    return torch.tensor(values, dtype=dtype, device=device)
