"""Heads that see the first and the last tokens only: StreamingLLM, and the streaming heads of DuoAttention."""

from __future__ import annotations

from collections.abc import Collection
from math import ceil

import torch
from torch import Tensor

from .. import ops
from ..attention import State, attend_in_two_forms
from ..config import HybridConfig
from ..models.shape import ModelShape
from ..ops import KV, Selections
from ..plan import Head


class WindowAttention:
    """Some heads attend densely, all others to sinks and the latest blocks of the budget; a `DecodeAttention`.

    One row of the selections serves all of them: `ops.select_blocks` with the position of a block as its score.

    Args:
        config: budget, sinks, block size; `selection` is `top_k` or `ratio`.
        shape: of the model.
        dense: KV heads that attend to everything.
    """

    graph_safe = True

    def __init__(self, config: HybridConfig, shape: ModelShape, dense: Collection[Head] = ()) -> None:
        self.config = config
        self.refresh_every = config.refresh_every
        self._first_layer = shape.global_layers[0]
        heads = range(shape.num_kv_heads)
        self._dense = {layer: tuple(h for h in heads if (layer, h) in dense) for layer in shape.global_layers}
        self._windowed = {layer: tuple(h for h in heads if (layer, h) not in dense) for layer in shape.global_layers}

    def allocate(self, batch: int, slots: int, device: torch.device | str) -> State:
        """One row of blocks."""
        num_blocks = ceil((slots + self.refresh_every - 1) / self.config.block_size)
        return State(Selections.allocate(1, batch, self.config.capacity_blocks(num_blocks), device))

    def __call__(self, layer: int, query: Tensor, kv: KV, state: State, scale: float, refresh: bool = True) -> Tensor:
        """See `DecodeAttention`."""
        if layer == self._first_layer and refresh:
            num_blocks = ceil(kv.slots / self.config.block_size)
            position = torch.arange(num_blocks, dtype=torch.float32, device=query.device)
            scores = position.expand(1, kv.batch, num_blocks).contiguous()
            ops.select_blocks(scores, kv, self.config, out=state.selections)
        dense, windowed, size = self._dense[layer], self._windowed[layer], self.config.block_size
        return attend_in_two_forms(query, kv, state.selections, dense, windowed, (0,) * len(windowed), size, scale)

    def count_bytes(self, total: Tensor, lengths: Tensor, state: State, refreshed: bool, key_bytes: int) -> None:
        """Keys and values, of everything by dense heads and of the window by the others."""
        dense, windowed = (sum(map(len, heads.values())) for heads in (self._dense, self._windowed))
        costs = 2.0 * key_bytes * windowed, 2.0 * key_bytes * dense
        ops.count_bytes(total, lengths, state.selections, costs, self.config.block_size)
