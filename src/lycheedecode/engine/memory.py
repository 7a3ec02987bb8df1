"""What fits into memory: the KV cache that a prompt asks for, and how much of the prompt may pass through at once."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..errors import LycheeError
from ..models.shape import ModelShape, inner_model, text_config

_CPU_CHUNK = 2048
_STEP = 1024
_SHARE = 0.5
"""Share of the memory left beside the cache that a chunk's activations may take; the rest covers what this estimate
misses."""
ROOM = 256
"""Slots are allocated in multiples of this, which every block size divides."""
_NO_LIMIT = 2**62


class CacheMemoryError(LycheeError):
    """A KV cache that does not fit; the message says how much is needed and what would fit."""


def prefill_chunk(
    model: nn.Module, shape: ModelShape, batch: int, slots: int, layers: int | None = None, asked: int | None = None
) -> int:
    """Tokens of each sequence that may pass through the model at once, next to a cache of `slots` slots.

    Args:
        model, shape: who reads.
        batch, slots: of the cache, as far as it is still to be allocated.
        layers: how many layers' caches the device holds meanwhile; None: all.
        asked: so many, whatever would fit beside the cache.

    Raises:
        CacheMemoryError: the cache does not fit.
    """
    weight = next(model.parameters())
    layers = shape.num_layers if layers is None else layers
    each = slot_bytes(shape, batch, weight.dtype) * layers // shape.num_layers
    left = bytes_beside(batch, slots, each, weight.device)
    if asked or not weight.is_cuda:
        return asked or _CPU_CHUNK
    config = text_config(inner_model(model))
    width = getattr(config, "intermediate_size", 0) + 3 * config.hidden_size
    tokens = int(_SHARE * left) // (4 * width * weight.element_size() * batch)
    return max(tokens // _STEP, 1) * _STEP


def slot_bytes(shape: ModelShape, batch: int, dtype: torch.dtype) -> int:
    """Keys and values of one token of every sequence, in all layers."""
    return 2 * batch * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize


def bytes_beside(batch: int, slots: int, each: int, device: torch.device, more: str = "") -> int:
    """Bytes of a device's memory that are left beside `slots` slots of a KV cache, of `each` bytes for all sequences.

    `more`: a word for slots that come to others.

    Raises:
        CacheMemoryError: there is no room for them.
    """
    free = free_bytes(device)
    if slots * each > free:
        raise CacheMemoryError(
            f"The KV cache needs {slots * each / 2**30:.1f} GiB for {batch} x {slots} {more}tokens, but "
            f"{free / 2**30:.1f} GiB are free: up to {free // each // ROOM * ROOM} tokens a sequence would fit."
        )
    return free - slots * each


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, what PyTorch keeps for reuse on a GPU included."""
    if device.type != "cuda":
        return min(_free_host_bytes(), _container_left())
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _free_host_bytes() -> int:
    """Bytes of host memory that are free; where the system does not say, all that the machine has, or no limit."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # macOS and Windows
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return _NO_LIMIT


def _container_left() -> int:
    """Bytes that a container's limit leaves, what the system keeps of files included; all there are without one."""
    found = []
    for name in ("memory.max", "memory.current", "memory.stat"):
        try:
            with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as lines:
                found.append(lines.read())
        except OSError:
            return _NO_LIMIT
    most, current, stat = found
    if not most.strip().isdecimal():  # "max"
        return _NO_LIMIT
    files = sum(int(line.split()[1]) for line in stat.splitlines() if line.split()[0] == "inactive_file")
    return int(most) - int(current) + files
