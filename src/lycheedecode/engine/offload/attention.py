"""Hybrid attention over a cache in host memory, its state on the GPU, and its decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...attention import HybridAttention, HybridState
from ...config import HybridConfig
from ...errors import ConfigError
from ...models.shape import ModelShape
from ...ops import KV, ChunkMeans, Selections
from ...ops.append.rope import Rotation
from ...ops.fetch import newest_keys
from ...ops.types import constant
from ...plan import HeadPlan
from ..step import FixedStep, Forward
from .cache import HostCache
from .size import CacheSize, offloaded_size
from .store import BlockStore, ScannedKeys, readers_of


@dataclass(eq=False)
class OffloadedState(HybridState):
    """What `OffloadedAttention` keeps on the GPU.

    Attributes:
        store: blocks on the GPU.
        scanned: keys that retrieval heads scan.
    """

    store: BlockStore = field(kw_only=True)
    scanned: ScannedKeys = field(kw_only=True)

    def before_step(
        self,
        store_of: Callable[[int], tuple[Tensor, Tensor]],
        filled: int,
        refresh: bool,
        starts: Tensor | None = None,
    ) -> None:
        """See `State`."""
        self.store.before_step(filled, now=self.means is not None and self.means.has_new(filled))
        self.scanned.before_step(store_of, filled)
        if self.means is not None:
            self.means.before_step(store_of, filled, starts)

    def truncate(self, slots: int) -> None:
        """See `State`."""
        for part in (self.store, self.scanned, self.means):
            if part is not None:
                part.truncate(slots)

    def write_back(self, filled: int) -> None:
        """Write new tokens to host memory."""
        self.store.write_back(filled)

    def scan_bytes(self, key_bytes: int) -> float:
        """See `HybridState`."""
        return self.scanned.key_bytes

    @property
    def nbytes(self) -> int:
        """Bytes on the GPU."""
        means = 0 if self.means is None or self.means.means is None else self.means.means.nbytes
        chosen = sum(part.nbytes for part in self.selections if part is not None)
        return self.store.nbytes + self.scanned.keys.nbytes + means + chosen


class OffloadedAttention(HybridAttention):
    """`HybridAttention` that can also decode over a `HostCache`.

    Args:
        plan, config, layers: as there; of a config that `refuse_unfit` lets pass.
        store_ratio: blocks of a head that are kept on the GPU, as a multiple of a selection.
        ahead: fetch blocks for later layers in the background; False: before the model goes on.
    """

    def __init__(
        self, plan: HeadPlan, config: HybridConfig, layers: Sequence[int], store_ratio: float, ahead: bool = True
    ) -> None:
        super().__init__(plan, config, layers)
        self._global, self._ratio, self._ahead = tuple(layers), store_ratio, ahead
        self._position = {layer: number for number, layer in enumerate(layers)}  # as in every HostCache of the model

    def size(self, shape: ModelShape, batch: int, slots: int, itemsize: int) -> CacheSize:
        """The memory that a batch will need."""
        retrieval = sum(len(self.scanned[layer]) for layer in self._global)
        config = self.config if self._factors else replace(self.config, completion="none")
        return offloaded_size(shape, batch, slots, itemsize, config, retrieval, self._ratio)

    def allocate_offloaded(self, cache: HostCache) -> OffloadedState:
        """The state for the batch of a cache in host memory."""
        config, slots, device = self.config, cache.capacity, cache.layers[self._global[0]].device
        blocks = ceil((slots + config.refresh_every - 1) / config.block_size)
        chunks = max(slots // config.chunk_tokens, 1) if self._factors else 0
        size = len(self.plan.retrieval), cache.batch, config.capacity_blocks(blocks)
        selections = Selections.allocate(*size, device, chunks)
        readers, rows = readers_of(self.plan, self._position)
        shape = config.block_size, blocks, self._ratio, config.refresh_every
        keys = cache.tokens.keys
        heads = {layer: mine for layer, mine in self.scanned.items() if mine}
        form = config.scan_keys, keys.dtype
        scanned = ScannedKeys(heads, self._position, *form, cache.batch, slots, keys.shape[-1], device)
        more = cache.starts, device, self._ahead, scanned
        store = BlockStore(cache.tokens, readers, rows, selections, *shape, *more)
        means = ChunkMeans(tuple(self._factors), config.chunk_tokens, device) if self._factors else None
        return OffloadedState(selections, means=means, store=store, scanned=scanned)

    def attend_offloaded(
        self,
        layer: int,
        query: Tensor,
        kv: KV,
        state: OffloadedState,
        scale: float,
        refresh: bool,
        lengths: Tensor,
        starts: Tensor | None,
        filled: Tensor,
    ) -> Tensor:
        """Attention output `[B, Hq, D]` of one layer for one new token a sequence.

        Args:
            layer, query, state, scale, refresh: as in `__call__`.
            kv: of the layer's pools, the new token in their tails.
            lengths, starts: int32 `[B]`, of the sequences in the keys to scan.
            filled: int32 `[B]`, slots in use.
        """
        config, roles, store = self.config, self._layers[layer], state.store
        if roles.retrieval:
            asking = newest_keys(query, kv.keys, store.at, filled, roles.retrieval, state.scanned.of_layer(layer))
        if roles.retrieval and refresh:
            chosen = state.selections.rows(roles.first_row, len(roles.retrieval))
            seen, copy = state.scanned.seen(layer, lengths, starts)
            self.select(layer, asking, seen, tuple(range(len(roles.retrieval))), scale, chosen, copy=copy, newest=0)
            store.plan(self._position[layer])
        if refresh:
            store.fetch(self._position[layer])
        store.wait_for(self._position[layer])
        rows = constant(roles.donor_rows, torch.int64, query.device)
        more: dict[str, Any] = {"completion": self.completion_of(layer, state), "places": store.known.places}
        return ops.attend_blocks(query, kv, state.selections, rows, config.block_size, scale, **more)


def check_store_ratio(store_ratio: float) -> None:
    """Raise `ConfigError` for a store that cannot hold a selection."""
    if isinstance(store_ratio, bool) or not isinstance(store_ratio, (int, float)) or not 1 <= store_ratio < 1e6:
        raise ConfigError(
            f"store_ratio must be at least 1, so that the store holds a whole selection, not {store_ratio!r}."
        )


def reads_whole_cache(config: HybridConfig) -> str | None:
    """The setting, if any, that reads the whole cache at every token or every few tokens."""
    settings = {
        "retrieval_attention='full'": config.retrieval_attention == "full",
        "correction_every": config.correction_every,
        "verify_every": config.verify_every,
    }
    return next((name for name, given in settings.items() if given), None)


def refuse_unfit(config: HybridConfig, store_ratio: float, plan: HeadPlan | None = None) -> None:
    """Raise `ConfigError` for settings and plans that do not work with a cache in host memory."""
    check_store_ratio(store_ratio)
    if plan is not None and plan.budgets is not None:
        raise ConfigError(
            "A cache in host memory keeps the same number of blocks for every head on the GPU: "
            "take a head plan without budgets of heads, or decode with cache='resident'."
        )
    name = reads_whole_cache(config)
    if name is not None:
        raise ConfigError(
            f"{name} reads the whole cache again and again, which is too slow from host memory: leave it out, or "
            "decode with cache='resident'."
        )


class OffloadStep(FixedStep):
    """A `FixedStep` over a `HostCache`; windowed layers are those of a `FixedStep`."""

    _attention: OffloadedAttention
    _cache: HostCache
    state: OffloadedState

    def __init__(self, cache: HostCache, *arguments: Any) -> None:
        super().__init__(cache, *arguments)
        self._position = cache.position
        store = self.state.store
        self.counters = [self.kv_bytes, store.missed, store.asked, store.pulled, store.fresh]

    def run(self, forward: Forward, model: nn.Module) -> Tensor:
        """Logits float32 `[B, V]` of the next token."""
        self._lengths = self.filled if self._starts is None else self.filled - self._starts
        self.state.store.begin(self._lengths, self._refresh)
        logits = super().run(forward, model)
        if self._refresh:
            self.state.store.finish()
        return logits

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, rotation: Rotation | None = None
    ) -> Tensor:
        """See `Step`."""
        if layer not in self._position:
            return super().attend(layer, query, key, value, scale, rotation)
        self._passed[layer] += 1
        store = self.state.store
        kv = store.kv(self._position[layer], self._lengths)
        rotated = ops.append(kv.keys, kv.values, key, value, store.at, query, rotation)
        assert rotated is not None  # a query was given
        return self._attention.attend_offloaded(
            layer, rotated, kv, self.state, scale, self._refresh, self._lengths, self._starts, self.filled
        )
