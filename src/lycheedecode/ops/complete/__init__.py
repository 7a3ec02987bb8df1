"""complete: tokens of a chunk -> their mean key and mean value, which stand for those that are not read."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import kernel_obstacle
from ..types import KV
from . import reference

__all__ = ["write_means"]


def write_means(
    kv: KV,
    chunk: int,
    keys: Tensor,
    values: Tensor,
    first: Tensor | None = None,
    most: int | None = None,
    written: Tensor | None = None,
) -> None:
    """Write the mean key and mean value of chunks whose tokens are all there.

    Args:
        kv: a layer's cache.
        chunk: tokens per chunk.
        keys, values: of a `Completion` of that cache; written in place. Of a cache in 8-bit floats they are the means
            of its numbers as they stand there, without scales.
        first: int32 `[B]`, the chunks of each sequence that are known already; None: none.
        most: how many more a sequence has, at most; None: as many as there is room for. Others are not written.
        written: int32 `[B]`, tokens of each sequence that its cache holds so far; what a chunk has beyond them is still
            to come, and stays out of its means. None: all are there.
    """
    if keys.shape != values.shape or keys.stride() != values.stride():
        raise ValueError("mean keys and mean values must have the same shape and strides.")
    same = keys.dtype == kv.keys.dtype or kv.keys.dtype == torch.float8_e4m3fn
    if keys.shape[1] != kv.keys.shape[1] or keys.shape[3] != kv.keys.shape[3] or not same:
        raise ValueError(f"means {keys.dtype} {tuple(keys.shape)} do not fit a cache {tuple(kv.keys.shape)}.")
    most = kv.slots // chunk if most is None else most
    if not most:
        return
    implementation: ModuleType = reference
    if keys.is_cuda and kernel_obstacle(keys) is None:
        from . import triton

        implementation = triton
    implementation.write_means(kv, chunk, keys, values, first, most, written)
