"""Which implementation of an operation runs, and what all of them refuse."""

from __future__ import annotations

import os
import shutil
import warnings
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from ..errors import LycheeWarning
from .types import KV

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
HAS_TRITON = bool(torch.version.cuda and find_spec("triton"))
HAS_COMPILER = bool(os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc"))))


@lru_cache(maxsize=1)
def _operators() -> ModuleType:
    from . import operators

    return operators


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The module of Triton kernels where they can run on this tensor, else None; on a GPU that is worth a warning."""
    if not tensor.is_cuda:
        return None
    reason = kernel_obstacle(tensor)
    if reason is None:
        return _operators()
    said = f"Decode attention takes the slow path in plain PyTorch: {reason}."
    warnings.warn(said, LycheeWarning, stacklevel=3)
    return None


def kernel_obstacle(tensor: Tensor) -> str | None:
    """What keeps the kernels from this query, `[..., D]`, as the end of a sentence; None when nothing does."""
    if tensor.dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {tensor.dtype}"
    if tensor.shape[-1] > MAX_HEAD_DIM:
        return f"there are no kernels for head dims above {MAX_HEAD_DIM}"
    if not HAS_TRITON:
        return "Triton is not installed"
    if not HAS_COMPILER:
        return "Triton needs a C compiler: install gcc, or name one in the variable CC"
    return None


def check(query: Tensor, kv: KV, sinks: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None) -> None:
    """Refuse a query, `[B, Hq, D]`, a cache, sinks of heads and scales of the cache that do not fit each other."""
    keys, values = kv.keys, kv.values
    if query.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            f"query must be [B, Hq, D] and keys and values [P, Hkv, S, D]; they are {tuple(query.shape)}, "
            f"{tuple(keys.shape)} and {tuple(values.shape)}."
        )
    if query.shape[2] != keys.shape[3] or query.shape[1] % keys.shape[1]:
        raise ValueError(f"query {tuple(query.shape)} does not fit keys {tuple(keys.shape)}: Hq = G * Hkv, same D.")
    if scales is not None:
        _check_scales(query, kv, scales)
    elif query.dtype != keys.dtype or keys.dtype != values.dtype or not query.dtype.is_floating_point:
        raise ValueError(f"query, keys and values must share one float dtype, not {query.dtype}, {keys.dtype}.")
    if sinks is not None and (sinks.shape != query.shape[1:2] or sinks.dtype != torch.float32):
        raise ValueError(f"sinks must be float32 [{query.shape[1]}], not {sinks.dtype} {tuple(sinks.shape)}.")
    if kv.page_table is None and keys.shape[0] != query.shape[0]:
        raise ValueError(f"a contiguous cache needs one page a sequence: {keys.shape[0]} for {query.shape[0]} queries.")
    for name in ("lengths", "starts", "page_table"):
        tensor = getattr(kv, name)
        if tensor is not None and (tensor.dtype != torch.int32 or tensor.shape[0] != query.shape[0]):
            raise ValueError(f"{name} must be int32 with a row for each of the {query.shape[0]} sequences.")


def _check_scales(query: Tensor, kv: KV, scales: tuple[Tensor, Tensor]) -> None:
    heads = kv.keys.shape[1]
    if {kv.keys.dtype, kv.values.dtype} != {torch.float8_e4m3fn} or query.dtype not in KERNEL_DTYPES:
        raise ValueError(f"scales belong to keys and values in float8_e4m3fn, not in {kv.keys.dtype}.")
    if any(one.shape != (heads,) or one.dtype != torch.float32 for one in scales):
        raise ValueError(f"keys and values in 8 bits need two scales, float32 [{heads}] each.")
