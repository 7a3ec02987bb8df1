"""What a KV cache needs, resident or in host memory, from the shape of a model alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...attention import HybridAttention
from ...config import HybridConfig
from ...models.shape import ModelShape
from ...ops import key_bytes
from ...plan import HeadPlan
from ..cache import grown
from .store import pool_blocks


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a batch's KV cache and of all that is kept beside it.

    Attributes:
        pools: blocks at hand of layers with full attention.
        scanned: keys that retrieval heads scan.
        means: of the completion.
        limited: windowed layers, which stay on the GPU.
        tables: selections, and which blocks lie where.
        host: in host memory.
        read: what a step reads of layers with full attention.
        selected: of that, keys and values of selected blocks.
    """

    pools: int = 0
    scanned: int = 0
    means: int = 0
    limited: int = 0
    tables: int = 0
    host: int = 0
    read: int = 0
    selected: int = 0

    @property
    def gpu(self) -> int:
        """Bytes on the GPU in all."""
        return self.pools + self.scanned + self.means + self.limited + self.tables


def resident_size(
    shape: ModelShape,
    batch: int,
    slots: int,
    itemsize: int,
    config: HybridConfig | None = None,
    retrieval: int = 0,
    plan: HeadPlan | None = None,
) -> CacheSize:
    """The size of a cache on the GPU.

    Args:
        shape: of the model.
        batch, slots: sequences, and the tokens of the longest.
        itemsize: bytes of a number in the cache.
        config: of hybrid decoding; None: full attention.
        retrieval: retrieval heads in layers with full attention.
        plan: whose heads may have budgets of their own; None: all have the same.
    """
    slots, all_layers = grown(slots, 0), _token_bytes(shape, itemsize) * shape.num_layers
    cache = batch * slots * all_layers
    if config is None:
        return CacheSize(pools=cache, read=cache // shape.num_layers * len(shape.global_layers))
    return CacheSize(
        pools=cache,
        scanned=0 if config.scan_keys == "cache" else _scanned(shape, batch, slots, itemsize, config, retrieval),
        tables=4 * batch * _selection_numbers(slots, config, retrieval, plan),
        **_read(shape, batch, slots, itemsize, config, retrieval, plan),
    )


def offloaded_size(
    shape: ModelShape,
    batch: int,
    slots: int,
    itemsize: int,
    config: HybridConfig,
    retrieval: int,
    store_ratio: float = 2.0,
) -> CacheSize:
    """The size of a cache in host memory; arguments as for `resident_size` and `Engine`."""
    slots, layers = grown(slots, 0), len(shape.global_layers)
    blocks = ceil((slots + config.refresh_every - 1) / config.block_size)
    capacity = config.capacity_blocks(blocks)
    held, tail = pool_blocks(store_ratio, capacity, blocks, config.block_size, config.refresh_every)
    token = _token_bytes(shape, itemsize)
    known = retrieval * (blocks + 3 * held + 2 * capacity + 1)
    return CacheSize(
        pools=layers * batch * (held + tail) * config.block_size * token,
        scanned=_scanned(shape, batch, slots, itemsize, config, retrieval),
        limited=(shape.num_layers - layers) * batch * slots * token,
        tables=4 * batch * (known + _selection_numbers(slots, config, retrieval)),
        host=layers * batch * slots * token,
        **_read(shape, batch, slots, itemsize, config, retrieval),
    )


def _read(
    shape: ModelShape,
    batch: int,
    slots: int,
    itemsize: int,
    config: HybridConfig,
    retrieval: int,
    plan: HeadPlan | None = None,
) -> dict[str, int]:
    """Keys that are scanned, means, and selected blocks; a step that selects."""
    blocks = ceil(slots / config.block_size)
    if plan is None or plan.budgets is None:
        of_heads = [config.capacity_blocks(blocks)] * (len(shape.global_layers) * shape.num_kv_heads)
    else:
        of_rows = HybridAttention(plan, config, shape.global_layers).row_blocks(blocks)
        of_heads = [of_rows[row] for layer in shape.global_layers for row in plan.donor_rows(layer)]
    tokens = batch * sum(min(each * config.block_size, slots) for each in of_heads)
    selected = tokens * 2 * shape.head_dim * itemsize
    scanned = _scanned(shape, batch, slots, itemsize, config, retrieval)
    means = _means(shape, batch, slots, itemsize, config)
    return {"means": means, "read": scanned + means + selected, "selected": selected}


def _scanned(shape: ModelShape, batch: int, slots: int, itemsize: int, config: HybridConfig, retrieval: int) -> int:
    return retrieval * batch * slots * key_bytes(config.scan_keys, shape.head_dim, itemsize)


def _token_bytes(shape: ModelShape, itemsize: int) -> int:
    """Keys and values of a token in one layer."""
    return 2 * shape.num_kv_heads * shape.head_dim * itemsize


def _chunks(slots: int, config: HybridConfig) -> int:
    return 0 if config.completion == "none" else max(slots // config.chunk_tokens, 1)


def _means(shape: ModelShape, batch: int, slots: int, itemsize: int, config: HybridConfig) -> int:
    return len(shape.global_layers) * batch * _chunks(slots, config) * _token_bytes(shape, itemsize)


def _selection_numbers(slots: int, config: HybridConfig, retrieval: int, plan: HeadPlan | None = None) -> int:
    blocks = ceil((slots + config.refresh_every - 1) / config.block_size)
    rows, capacity = retrieval, config.capacity_blocks(blocks)
    if plan is not None and plan.budgets is not None:
        rows, capacity = len(plan.selections), HybridAttention(plan, config).capacity_blocks(blocks)
    return rows * (capacity + 1 + _chunks(slots, config))
