"""Where the KV cache of a batch is kept: on the model's device, or in host memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from ...attention import DecodeAttention
from ...config import HybridConfig
from ...errors import ConfigError, LycheeWarning
from ...models.routing import Window
from ...models.shape import ModelShape
from ...plan import HeadPlan
from ..cache import KVCache
from ..memory import CacheMemoryError, free_bytes, slot_bytes
from .attention import OffloadedAttention, check_store_ratio, reads_whole_cache, refuse_unfit
from .cache import HostCache
from .size import CacheSize

CachePlace = Literal["resident", "host", "auto"]


def check_place(place: str, plan: HeadPlan | None, config: HybridConfig, store_ratio: float, on_gpu: bool) -> str:
    """The place to use.

    `auto` is decided when the size of a batch is known. It is `resident` without a GPU or a plan, with budgets of
    heads, and with settings that read the whole cache again and again.

    Raises:
        ConfigError: the cache cannot be kept in host memory, or `store_ratio` is invalid.
    """
    if place not in get_args(CachePlace):
        raise ConfigError(f"cache must be one of {', '.join(get_args(CachePlace))}, not {place!r}.")
    check_store_ratio(store_ratio)
    if place == "resident":
        return place
    if place == "auto":
        may_offload = on_gpu and plan is not None and plan.budgets is None and reads_whole_cache(config) is None
        return "auto" if may_offload else "resident"
    if plan is None:
        raise ConfigError(
            "cache='host' needs a head plan: attention that reads the whole cache at every token is too slow from host "
            "memory."
        )
    refuse_unfit(config, store_ratio, plan)
    if not on_gpu:
        warnings.warn(
            "Without a GPU the KV cache is in host memory anyway: cache='host' works, but gains nothing.",
            LycheeWarning,
            stacklevel=3,
        )
    return place


def new_cache(
    place: str,
    model: nn.Module,
    shape: ModelShape,
    batch: int,
    slots: int,
    windows: Sequence[Window],
    starts: Tensor | None,
    attention: DecodeAttention,
) -> KVCache:
    """An empty cache with room for `slots` slots of `batch` sequences, where `place` says.

    Raises:
        HostMemoryError: host memory does not hold it.
        CacheMemoryError: the GPU does not hold what `attention` keeps there of a cache in host memory.
    """
    cache = KVCache(shape.num_layers, starts)
    if _is_in_host_memory(place, model, shape, batch, slots):
        weight = next(model.parameters())
        if weight.is_cuda and isinstance(attention, OffloadedAttention):
            check_room(attention.size(shape, batch, slots, weight.element_size()), free_bytes(weight.device))
        cache = HostCache(shape, batch, weight.dtype, weight.device, windows, starts)
    cache.reserve(slots)
    return cache


def check_room(size: CacheSize, free: int) -> None:
    """Raise `CacheMemoryError` unless what decoding is going to keep on the GPU fits into `free` bytes."""
    if size.gpu > free:
        raise CacheMemoryError(
            f"Beside {size.host / 2**30:.1f} GiB of its KV cache in host memory, this batch keeps "
            f"{size.gpu / 2**30:.1f} GiB on the GPU, but {free / 2**30:.1f} GiB are free: give fewer sequences or "
            "shorter ones, a smaller budget, scan_keys='float8' or 'int4', or a lower store_ratio."
        )


def _is_in_host_memory(place: str, model: nn.Module, shape: ModelShape, batch: int, slots: int) -> bool:
    """Says so where that was left open."""
    if place != "auto":
        return place == "host"
    weight = next(model.parameters())
    needed, free = slots * slot_bytes(shape, batch, weight.dtype), free_bytes(weight.device)
    if needed <= free:
        return False
    warnings.warn(
        f"The KV cache of {batch} x {slots} tokens ({needed / 2**30:.1f} GiB) goes to host memory: "
        f"{free / 2**30:.1f} GiB of the GPU's are free.",
        LycheeWarning,
        stacklevel=4,
    )
    return True
