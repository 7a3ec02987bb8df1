"""One layer of a decode step: scan -> select -> attend. Here a plan meets the operations.

`HybridAttention.__call__` is the method. `State`, above it, is what stays from layer to layer and from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops
from .config import HybridConfig
from .ops import KV, ChunkMeans, Completion, KeyCopy, Selections, SmallKeys
from .ops.count import Means
from .ops.types import constant
from .plan import HeadPlan
from .roles import LayerRoles, check_budgets, completion_factors


@dataclass(eq=False)
class State:
    """What an attention keeps beside the cache of a batch, from layer to layer and from step to step.

    A policy that remembers what the cache holds (copies of keys, bounds, means) has a subclass, which keeps that up to
    date; whoever owns the cache calls `before_step` before every step, and `truncate` when tokens are forgotten.
    """

    selections: Selections

    def before_step(
        self,
        store_of: Callable[[int], tuple[Tensor, Tensor]],
        filled: int,
        refresh: bool,
        starts: Tensor | None = None,
    ) -> None:
        """Prepare for the next step; idempotent.

        Args:
            store_of: a layer's keys and values, `[B, Hkv, capacity, D]`.
            filled: slots in use so far.
            refresh: whether retrieval heads select in this step.
            starts: int32 `[B]`, slot of each sequence's first token; None: 0.
        """

    def truncate(self, slots: int) -> None:
        """The cache forgets every slot from `slots` on."""

    def follow(
        self,
        store_of: Callable[[int], tuple[Tensor, Tensor]],
        begin: Tensor,
        written: Tensor,
        end: Tensor,
        most: int,
        starts: Tensor | None = None,
    ) -> None:
        """Catch up after a dense pass, which may write a different number of tokens for each sequence; no host sync.

        Steps between such passes run without `before_step`.

        Args:
            store_of: a layer's keys and values, `[B, Hkv, capacity, D]`.
            begin, written, end: int32 `[B]`, first slot of each sequence that was written, the one after the last, and
                the one after those that may be read before the next pass.
            most: slots from `begin` to `end`, at most.
            starts: as in `before_step`.
        """


@dataclass(eq=False)
class HybridState(State):
    """What `HybridAttention` keeps.

    Attributes:
        copy: of the keys that retrieval heads scan; None where they scan the cache.
        means: of chunks, where some head is completed.
        limits: int32 `[B]`, where sequences have budgets of their own (`ops.select_blocks`).
    """

    copy: KeyCopy | None = None
    means: ChunkMeans | None = None
    limits: Tensor | None = None

    def before_step(
        self,
        store_of: Callable[[int], tuple[Tensor, Tensor]],
        filled: int,
        refresh: bool,
        starts: Tensor | None = None,
    ) -> None:
        """See `State`."""
        if self.copy is not None:
            self.copy.before_step(store_of, filled, refresh)
        if self.means is not None:
            self.means.before_step(store_of, filled, starts)

    def truncate(self, slots: int) -> None:
        """See `State`."""
        for part in (self.copy, self.means):
            if part is not None:
                part.truncate(slots)

    def follow(
        self,
        store_of: Callable[[int], tuple[Tensor, Tensor]],
        begin: Tensor,
        written: Tensor,
        end: Tensor,
        most: int,
        starts: Tensor | None = None,
    ) -> None:
        """See `State`."""
        if self.copy is not None:
            self.copy.follow(store_of, begin, most)
        if self.means is not None:
            self.means.follow(store_of, begin, written, end, most, starts)

    def copy_of(self, layer: int) -> SmallKeys | None:
        """What the retrieval heads of a layer scan in place of the cache (`ops.scan_blocks`)."""
        return None if self.copy is None else self.copy.of_layer(layer)

    def means_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean keys and mean values of a completed layer, as a `Completion` has them."""
        assert self.means is not None
        return self.means.of_layer(layer)

    def scan_bytes(self, key_bytes: int) -> float:
        """Bytes of a key that is scanned, where the cache's have `key_bytes`."""
        return key_bytes if self.copy is None else self.copy.key_bytes

    def mean_bytes(self, key_bytes: int) -> float:
        """Bytes of a mean key, likewise."""
        return key_bytes


class DecodeAttention(Protocol):
    """What a decode step does in its attention layers; `Engine` decodes with any of these.

    Layers are called in order, once a step; the selections that a layer writes serve it and the layers after it.
    An attention whose launches depend on shapes alone, and which reads nothing from the device, says so by an attribute
    `graph_safe = True`; its steps may then be replayed as a CUDA graph.
    """

    refresh_every: int
    """Steps from one selection to the next."""

    def allocate(self, batch: int, slots: int, device: torch.device | str) -> State | None:
        """What it keeps of `batch` sequences whose cache has up to `slots` slots; None: nothing."""

    def __call__(self, layer: int, query: Tensor, kv: KV, state: Any, scale: float, refresh: bool = True) -> Tensor:
        """Attention output `[B, Hq, D]` of one layer for one new token a sequence; `state` is what `allocate` made."""

    def count_bytes(self, total: Tensor, lengths: Tensor, state: Any, refreshed: bool, key_bytes: int) -> None:
        """Add the bytes of the KV cache that the step just made read for each sequence.

        Args:
            total: float64 `[B]`, added to in place.
            lengths: int32 `[B]`, cached tokens of each sequence at that step.
            state: as the step left it.
            refreshed: whether it selected.
            key_bytes: bytes of one key of one KV head, `D * itemsize`; a value has as many.
        """


class FullAttention:
    """Dense decode attention: every head reads everything. The baseline."""

    refresh_every = 1
    graph_safe = True

    def __init__(self, num_layers: int, num_kv_heads: int) -> None:
        self._num_heads = num_layers * num_kv_heads

    def allocate(self, batch: int, slots: int, device: torch.device | str) -> None:
        """Nothing is selected."""

    def __call__(
        self, layer: int, query: Tensor, kv: KV, state: State | None, scale: float, refresh: bool = True
    ) -> Tensor:
        return ops.attend(query, kv, scale)

    def count_bytes(self, total: Tensor, lengths: Tensor, state: State | None, refreshed: bool, key_bytes: int) -> None:
        total.add_(lengths, alpha=2 * self._num_heads * key_bytes)


class HybridAttention:
    """Decode attention of a model whose heads follow a plan; a `DecodeAttention`.

    Args:
        plan: the donor of every KV head.
        config: budget, strategy, form, completion.
        layers: the layers that follow the plan, None for all.

    Attributes:
        completed: layers in which some head is completed.
        scanned: the retrieval heads of every layer that follows the plan.

    Raises:
        ConfigError: the plan has budgets of heads, but the config has no budget for them to multiply.
    """

    graph_safe = True

    def __init__(self, plan: HeadPlan, config: HybridConfig, layers: Sequence[int] | None = None) -> None:
        self.plan = plan
        self.config = config
        self.refresh_every = config.refresh_every
        check_budgets(plan, config)
        self._layers = [LayerRoles.of(plan, config, layer) for layer in range(plan.num_layers)]
        layers = range(plan.num_layers) if layers is None else layers
        self._factors = completion_factors(plan, config, layers)
        self.completed = tuple(self._factors)
        self._scans, self._readers, self._completed = self._count_readers(layers)
        self.scanned = {layer: plan.retrieval_heads(layer) for layer in layers}

    def allocate(self, batch: int, slots: int, device: torch.device | str) -> HybridState:
        config = self.config
        num_blocks = ceil((slots + config.refresh_every - 1) / config.block_size)
        size = len(self.plan.selections), batch, self.capacity_blocks(num_blocks)
        chunks = max(slots // config.chunk_tokens, 1) if self._factors else 0
        copy = None
        if config.scan_keys != "cache":
            copy = KeyCopy(config.scan_keys, self.scanned, config.refresh_every)
        means = ChunkMeans(tuple(self._factors), config.chunk_tokens) if self._factors else None
        return HybridState(Selections.allocate(*size, device, chunks), copy, means)

    def capacity_blocks(self, num_blocks: int) -> int:
        """Most blocks of a selection of a sequence of up to `num_blocks` blocks."""
        return max(self.config.capacity_blocks(num_blocks), *self.row_blocks(num_blocks))

    def row_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Most blocks of each row of the selections, of a sequence of `num_blocks` blocks."""
        config, rows = self.config, self.plan.selections
        if self.plan.budgets is None or num_blocks <= (config.budget_blocks or 0):
            return (config.capacity_blocks(num_blocks),) * len(rows)
        return tuple(min(config.share_blocks(factor), num_blocks) for _, factor in rows)

    def __call__(
        self,
        layer: int,
        query: Tensor,
        kv: KV,
        state: HybridState,
        scale: float,
        refresh: bool = True,
        out: Tensor | None = None,
        sinks: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention output of one layer for one new token a sequence.

        Args:
            layer: index of the layer in the plan.
            query: `[B, Hq, D]`.
            kv: the layer's cache, the new token included.
            state: of this batch; the selections of this layer's retrieval heads are rewritten.
            scale: factor on the logits.
            refresh: False keeps the selections of the step before.
            out: where to write the output, and return it; None: a new tensor.
            sinks, scales: of the layer, as in `ops.attend_blocks`.

        Returns:
            `[B, Hq, D]`.
        """
        config, roles, selections = self.config, self._layers[layer], state.selections
        more: dict[str, Any] = {"sinks": sinks, "scales": scales}
        selects, own = bool(roles.retrieval) and refresh, {}
        if selects:
            chosen = selections.rows(roles.first_row, roles.num_rows)
            own = {"out": chosen, "copy": state.copy_of(layer), "limits": state.limits, "shares": roles.shares, **more}
        completion = self.completion_of(layer, state)
        read = selections if roles.most is None else selections.up_to(roles.most)
        if config.retrieval_attention == "full" and roles.retrieval:  # the paper's form
            if selects and state.limits is roles.shares is sinks is scales is None:
                dense = ops.attend_select(query, kv, roles.retrieval, config, scale, out=chosen)
            else:
                if selects:
                    self.select(layer, query, kv, roles.retrieval, scale, **own)
                dense = ops.attend(query, kv, scale, roles.retrieval, **more)
            rows = tuple(roles.donor_rows[head] for head in roles.sparse)
            forms = (roles.retrieval, roles.sparse, rows)
            output = attend_in_two_forms(query, kv, read, *forms, config.block_size, scale, dense, completion, **more)
            return output if out is None else out.copy_(output)
        if selects:
            self.select(layer, query, kv, roles.retrieval, scale, **own)
        donor_rows = constant(roles.donor_rows, torch.int64, query.device)
        more["completion"] = completion
        return ops.attend_blocks(query, kv, read, donor_rows, config.block_size, scale, out=out, **more)

    def completion_of(self, layer: int, state: HybridState) -> Completion | None:
        """The means that stand for what the layer's heads leave unread; None where no head is completed."""
        factors = self._factors.get(layer)
        return None if factors is None else Completion(*state.means_of(layer), self.config.chunk_tokens, factors)

    def select(
        self, layer: int, query: Tensor, kv: KV, heads: tuple[int, ...], scale: float, out: Selections, **more: Any
    ) -> None:
        """Let a layer's retrieval heads select; arguments as for `ops.scan_select`."""
        ops.scan_select(query, kv, heads, self.config, scale, out=out, **more)

    def count_bytes(self, total: Tensor, lengths: Tensor, state: HybridState, refreshed: bool, key_bytes: int) -> None:
        """Keys scanned by retrieval heads, keys and values attended by every head, and means (see `DecodeAttention`).

        Dense retrieval heads read keys and values once: their scan is a by-product of their attention. What fits into
        the budget as a whole is not scanned.
        """
        config, dense, selections = self.config, self.config.retrieval_attention == "full", state.selections
        scan_bytes = 2 * key_bytes if dense else refreshed * state.scan_bytes(key_bytes)
        costs = *(2.0 * key_bytes * readers for readers in self._readers), float(scan_bytes * self._scans)
        shares = self._layers[0].shares  # any layer's: all of them are shares of one budget
        whole_up_to = selections.whole_up_to(config.strategy, config.block_size, config.refresh_every, shares)
        mean_bytes = 2.0 * state.mean_bytes(key_bytes)
        means = Means(self._completed, config.chunk_tokens, mean_bytes) if self._factors else None
        whole_up_to, limits = (0, None) if dense else (whole_up_to, state.limits)
        ops.count_bytes(total, lengths, selections, costs, config.block_size, whole_up_to, means, limits)

    def _count_readers(self, layers: Sequence[int]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """How many heads scan, how many attend over each row of the selections, and how many of those are completed."""
        dense = self.config.retrieval_attention == "full"
        scans, readers, completed = 0, *([0] * len(self.plan.selections) for _ in range(2))
        for layer in layers:
            roles, factors = self._layers[layer], self._factors.get(layer)
            scans += len(roles.retrieval)
            for head in roles.sparse if dense else range(self.plan.num_kv_heads):
                readers[roles.donor_rows[head]] += 1
                completed[roles.donor_rows[head]] += factors is not None and factors[head] > 0
        return scans, tuple(readers), tuple(completed)


def attend_in_two_forms(
    query: Tensor,
    kv: KV,
    selections: Selections,
    dense: tuple[int, ...],
    sparse: tuple[int, ...],
    rows: tuple[int, ...],
    block_size: int,
    scale: float,
    whole: Tensor | None = None,
    completion: Completion | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one layer: KV heads `dense` attend to everything, heads `sparse` each over one of `rows`.

    Together they are all heads of the layer. `whole` is the output of the dense ones, if it is known already; the other
    arguments are as for `ops.attend_blocks`.
    """
    layers_own: dict[str, Any] = {"sinks": sinks, "scales": scales}
    more: dict[str, Any] = {"completion": completion, **layers_own}
    chosen = constant(rows, torch.int64, query.device)
    if not dense:
        return ops.attend_blocks(query, kv, selections, chosen, block_size, scale, **more)
    if whole is None:
        whole = ops.attend(query, kv, scale, dense, **layers_own)
    if not sparse:
        return whole
    output = torch.empty_like(query).unflatten(1, (len(dense) + len(sparse), -1))  # [B, Hkv, G, D]
    output[:, constant(dense, torch.int64, query.device)] = whole.unflatten(1, (len(dense), -1))
    part = ops.attend_blocks(query, kv, selections, chosen, block_size, scale, sparse, **more)
    output[:, constant(sparse, torch.int64, query.device)] = part.unflatten(1, (len(sparse), -1))
    return output.flatten(1, 2)
