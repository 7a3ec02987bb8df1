"""What the operations read and write: one layer's cache, and the selections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import parts_of, share_of

EVERYTHING = -1
"""In place of a number of blocks: all that there are."""


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
        counts: int32 `[R, B]`, entries in use; `EVERYTHING`: all blocks are selected, and none is listed.
        taken: int32 `[R, B, C]`, how many blocks of each chunk are selected; None without completion.
    """

    blocks: Tensor
    counts: Tensor
    taken: Tensor | None = None

    @classmethod
    def allocate(
        cls, num_rows: int, batch: int, capacity: int, device: torch.device | str, chunks: int = 0
    ) -> Selections:
        """Empty selections of up to `capacity` blocks; counted by chunk if there are `chunks`."""
        return cls(
            torch.full((num_rows, batch, capacity), -1, dtype=torch.int32, device=device),
            torch.zeros((num_rows, batch), dtype=torch.int32, device=device),
            torch.zeros((num_rows, batch, chunks), dtype=torch.int32, device=device) if chunks else None,
        )

    def rows(self, first: int, count: int) -> Selections:
        """View of `count` consecutive rows."""
        return self._views(lambda part: part[first : first + count])

    def sequences(self, count: int) -> Selections:
        """View of the first `count` sequences."""
        return self._views(lambda part: part[:, :count])

    def up_to(self, blocks: int) -> Selections:
        """View of the first `blocks` entries of every row."""
        return self._replace(blocks=self.blocks[..., :blocks])

    def _views(self, of: Callable[[Tensor], Tensor]) -> Selections:
        return Selections(of(self.blocks), of(self.counts), None if self.taken is None else of(self.taken))

    def count_taken(self, blocks_per_chunk: int) -> None:
        """Recompute `taken` from `blocks`."""
        chunks = self.taken.shape[-1]
        chunk = (self.blocks // blocks_per_chunk).masked_fill(self.blocks < 0, chunks).clamp(max=chunks).long()
        found = self.taken.new_zeros((*self.taken.shape[:-1], chunks + 1))
        found.scatter_add_(-1, chunk, torch.ones_like(self.blocks))
        everything = (self.counts == EVERYTHING)[..., None]
        self.taken.copy_(found[..., :chunks].masked_fill_(everything, blocks_per_chunk))

    def tokens(self, lengths: Tensor, block_size: int) -> Tensor:
        """int64 `[R, B]`: tokens in the selected blocks of sequences of `lengths` tokens, int32 `[B]`."""
        inside = (lengths[:, None] - self.blocks * block_size).clamp(0, block_size)  # [R, B, K]
        listed = inside.masked_fill(self.blocks < 0, 0).sum(-1)
        return torch.where(self.counts == EVERYTHING, lengths, listed)

    def whole_up_to(self, strategy: str, block_size: int, refresh_every: int, shares: Shares | None = None) -> int:
        """Tokens up to which a sequence is selected as a whole, whatever its blocks are worth."""
        blocks = self.blocks.shape[-1] if shares is None else shares.budget
        return max(blocks * block_size - (refresh_every - 1), 0) if strategy == "top_k" else 0


class Shares(NamedTuple):
    """Budgets of the rows of selections, several of which may come from the scores of one head.

    Sequences that fit into the budget are selected as a whole by every row.

    Attributes:
        heads: the row of the scores that each row of the selections is chosen from.
        parts: each row's share of the budget, in units of 1 / `PARTS`; in blocks it is rounded up (`share_of`).
        budget: its blocks. Where sequences have limits, these take its place.
        least: blocks that every share holds, however small the budget: room for sinks and recent tokens.
    """

    heads: tuple[int, ...]
    parts: tuple[int, ...]
    budget: int
    least: int

    @classmethod
    def of_factors(cls, heads: Sequence[int], factors: Sequence[float], budget: int, least: int) -> Shares:
        """Rows that have `factors` times the budget."""
        return cls(tuple(heads), tuple(map(parts_of, factors)), budget, least)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Most blocks of each row, without limits."""
        return tuple(share_of(self.budget, parts, self.least) for parts in self.parts)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int] | None) -> Shares | None:
        """Inverse of `numbers`."""
        if numbers is None:
            return None
        rows = len(numbers) // 2 - 1
        return cls(tuple(numbers[:rows]), tuple(numbers[rows:-2]), *numbers[-2:])

    @property
    def numbers(self) -> tuple[int, ...]:
        """All of it, `2 R + 2` numbers."""
        return (*self.heads, *self.parts, self.budget, self.least)


class Completion(NamedTuple):
    """What stands for the tokens of a layer that its heads leave unread: the mean key and mean value of every chunk.

    Chunk `c` of a sequence is its tokens from `c * chunk` to `(c + 1) * chunk - 1`. Chunks that end before the newest
    token are complete, `(length - 1) // chunk` of them; unread tokens of the last, incomplete one do not count.

    The means of chunk `c` of a contiguous cache are entry `c` of page `b`. Of a paged cache they belong to the page of
    the chunk's last token, slot `s`: entry `s % page // chunk` of page `page_table[b, s // page]`, so sequences that
    share pages share means; a page has `ceil(page / chunk)` of them.

    Attributes:
        keys: `[P, Hkv, C, D]`, in the dtype of queries. Of a cache in 8-bit floats: before its scales.
        values: like `keys`, with the same strides.
        chunk: tokens per chunk, a power of two, and whole blocks.
        factors: of each KV head of the layer, on the weight of an unread token; 0: its unread tokens do not count.
    """

    keys: Tensor
    values: Tensor
    chunk: int
    factors: tuple[float, ...]

    def of(self, heads: tuple[int, ...] | None) -> tuple[float, ...]:
        """The factors of some heads; None: all."""
        return self.factors if heads is None else tuple(self.factors[head] for head in heads)


@lru_cache(maxsize=16384)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[len(values)]`, made once: CUDA graphs hold on to its address."""
    return torch.tensor(values, dtype=dtype, device=device)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
