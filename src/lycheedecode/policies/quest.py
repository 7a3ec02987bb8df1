"""Quest: every head selects blocks by an upper bound of their logits, from the least and largest key in each.

    bounds    of every block and dimension: the least and the largest of its keys; kept, and extended as tokens come
    score     sum over dimensions of the larger of q * least and q * largest: no key of the block has a larger logit
    select    the best blocks of the budget, by the largest bound among a group's query heads

Two vectors a block are read instead of all its keys. The first two layers stay dense. Plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..attention import State
from ..config import HybridConfig
from ..errors import ConfigError
from ..models.shape import ModelShape
from ..ops import KV, Selections
from ..ops.reference_common import by_kv_head
from .base import Decoding, Policy

_DENSE = 2
"""Layers at the bottom that select nothing."""


@dataclass(eq=False)
class QuestState(State):
    """Selections, and the bounds that they are made from.

    Attributes:
        num_blocks: blocks that there is room for.
        bounds: of a layer, least and largest keys `[B, Hkv, num_blocks + 2, D]` of every block.
        known: of a layer, the slots whose tokens are within its bounds.
    """

    num_blocks: int
    bounds: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    known: dict[int, int] = field(default_factory=dict)

    def truncate(self, slots: int) -> None:
        """See `State`: blocks from `slots` on will be read again."""
        self.known = {layer: min(known, slots) for layer, known in self.known.items()}


@dataclass(frozen=True, kw_only=True)
class Quest(Policy):
    """Quest (arXiv 2406.10774)."""

    fills_budget: ClassVar[bool] = True

    def on(self, shape: ModelShape) -> Decoding:
        """See `Policy`."""
        return Decoding(QuestAttention(self.config, shape), self.config)


class QuestAttention:
    """Decode attention that selects by bounds of blocks; a `DecodeAttention`.

    Args:
        config: budget, sinks, recent tokens, block size; `selection` is `top_k` or `ratio`.
        shape: of the model.
    """

    def __init__(self, config: HybridConfig, shape: ModelShape) -> None:
        self.config = config
        self.refresh_every = config.refresh_every
        self._width = shape.num_kv_heads
        self._dense, selecting = shape.global_layers[:_DENSE], shape.global_layers[_DENSE:]
        self._rows = {layer: i * self._width for i, layer in enumerate(selecting)}

    def allocate(self, batch: int, slots: int, device: torch.device | str) -> QuestState:
        """A row for every head that selects; bounds come with the first keys."""
        num_blocks = ceil((slots + self.refresh_every - 1) / self.config.block_size)
        capacity = self.config.capacity_blocks(num_blocks)
        return QuestState(Selections.allocate(len(self._rows) * self._width, batch, capacity, device), num_blocks)

    def __call__(
        self, layer: int, query: Tensor, kv: KV, state: QuestState, scale: float, refresh: bool = True
    ) -> Tensor:
        """See `DecodeAttention`."""
        if layer in self._dense:
            return ops.attend(query, kv, scale)
        first = self._rows[layer]
        if refresh:
            low, high = self._extend(state, layer, kv)
            scores = score_by_bounds(query * scale, low, high)
            ops.select_blocks(scores, kv, self.config, out=state.selections.rows(first, self._width))
        rows = torch.arange(first, first + self._width, device=query.device)
        return ops.attend_blocks(query, kv, state.selections, rows, self.config.block_size, scale)

    def count_bytes(self, total: Tensor, lengths: Tensor, state: QuestState, refreshed: bool, key_bytes: int) -> None:
        """Keys and values that are attended to, and two vectors for every block."""
        size = self.config.block_size
        attended = state.selections.tokens(lengths, size).sum(0) + len(self._dense) * self._width * lengths.double()
        bounds = (lengths.double() / size).ceil() * len(state.selections.counts)
        total += 2 * key_bytes * (attended + bounds * refreshed)

    def _extend(self, state: QuestState, layer: int, kv: KV) -> tuple[Tensor, Tensor]:
        """The layer's bounds `[B, Hkv, N, D]`, after a look at the blocks whose tokens are new."""
        if kv.page_table is not None:
            raise ConfigError("quest keeps bounds of a contiguous cache only.")
        size, slots = self.config.block_size, kv.slots
        if layer not in state.bounds:
            batch, width, _, dim = kv.keys.shape
            room = kv.keys.new_zeros(2, batch, width, state.num_blocks + 2, dim)
            state.bounds[layer], state.known[layer] = (room[0], room[1]), 0
        low, high = state.bounds[layer]
        # Where lengths lie on the device nothing says which tokens are new.
        known = state.known[layer] if kv.lengths is None else 0
        lengths = kv.token_counts()[:, None, None]
        starts = torch.zeros_like(lengths) if kv.starts is None else kv.starts[:, None, None]
        # [B, W] blocks of each sequence, from the one of its first new token on; two more than fit between the ends.
        first = (known - starts[:, :, 0]).clamp(min=0) // size
        block = first + torch.arange((slots - known) // size + 2, device=kv.keys.device)
        token = block[..., None] * size + torch.arange(size, device=kv.keys.device)  # [B, W, size]
        sequence = torch.arange(kv.batch, device=kv.keys.device)[:, None]
        keys = kv.keys[sequence[..., None], :, (token + starts).clamp(max=slots - 1)]  # [B, W, size, Hkv, D]
        absent = (token >= lengths)[..., None, None]
        exists = ~absent.all(2)  # [B, W, 1, 1]
        low[sequence, :, block] = keys.masked_fill(absent, torch.inf).amin(2).where(exists, 0.0)
        high[sequence, :, block] = keys.masked_fill(absent, -torch.inf).amax(2).where(exists, 0.0)
        state.known[layer] = slots
        num_blocks = ceil(slots / size)
        return low[:, :, :num_blocks], high[:, :, :num_blocks]


def score_by_bounds(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The bound of every block's logits, the largest of a group's query heads.

    Args:
        query: `[B, Hq, D]`, scaled.
        low, high: least and largest keys, `[B, Hkv, N, D]`.

    Returns:
        float32 `[Hkv, B, N]`, moved so that the least is 0: selection takes no negative scores.
    """
    grouped = by_kv_head(query, KV(low, high)).float()  # [B, Hkv, G, D]
    bound = grouped.clamp(min=0) @ high.float().mT + grouped.clamp(max=0) @ low.float().mT
    bound = bound.amax(2).transpose(0, 1)
    return bound - bound.amin(-1, keepdim=True)
