"""One layer of a hybrid decode step: scan -> select -> attend. The only module that knows both plan and operations."""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from . import ops
from .config import HybridConfig
from .ops import KV, Selections
from .plan import HeadPlan


class HybridAttention:
    """Decode attention of a model whose heads follow a plan.

    Layers are called in order, once a step; the selections that a layer writes serve it and the layers after it.

    Args:
        plan: the donor of every KV head.
        config: budget, strategy, form.
    """

    def __init__(self, plan: HeadPlan, config: HybridConfig) -> None:
        self.plan = plan
        self.config = config

    def allocate(self, batch: int, slots: int, device: torch.device | str) -> Selections:
        """Selections for `batch` sequences whose cache has up to `slots` slots."""
        config = self.config
        num_blocks = ceil((slots + config.refresh_every - 1) / config.block_size)
        return Selections.allocate(len(self.plan.retrieval), batch, config.capacity_blocks(num_blocks), device)

    def __call__(
        self, layer: int, query: Tensor, kv: KV, selections: Selections, scale: float, refresh: bool = True
    ) -> Tensor:
        """Attention output of one layer for one new token a sequence.

        Args:
            layer: index of the layer in the plan.
            query: `[B, Hq, D]`.
            kv: the layer's cache, the new token included.
            selections: the buffers of this batch; the rows of this layer's retrieval heads are rewritten.
            scale: factor on the logits.
            refresh: False keeps the selections of the step before.

        Returns:
            `[B, Hq, D]`.
        """
        plan, config = self.plan, self.config
        retrieval = plan.retrieval_heads(layer)
        if retrieval and refresh:
            scores = ops.scan_blocks(query, kv, retrieval, config.block_size, scale, config.block_score)
            ops.select_blocks(scores, kv, config, out=selections.rows(plan.first_row(layer), len(retrieval)))

        rows = _as_index(plan.donor_rows(layer), query.device)
        if config.retrieval_attention == "selected" or not retrieval:
            return ops.attend_blocks(query, kv, selections, rows, config.block_size, scale)

        output = torch.empty_like(query).unflatten(1, (plan.num_kv_heads, -1))  # [B, Hkv, G, D]
        output[:, list(retrieval)] = ops.attend(query, kv, scale, retrieval).unflatten(1, (len(retrieval), -1))
        sparse = plan.sparse_heads(layer)
        if sparse:
            attended = ops.attend_blocks(query, kv, selections, rows[list(sparse)], config.block_size, scale, sparse)
            output[:, list(sparse)] = attended.unflatten(1, (len(sparse), -1))
        return output.flatten(1, 2)


@lru_cache(maxsize=4096)
def _as_index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
