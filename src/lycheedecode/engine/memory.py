"""What fits on a GPU: the KV cache that a prompt asks for, and how much of the prompt may pass through at once."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import LycheeError
from ..models.shape import ModelShape, inner_model, text_config

_CPU_CHUNK = 2048
_STEP = 1024
_SHARE = 0.5
"""Share of the memory left beside the cache that a chunk's activations may take; the rest covers what this estimate
misses."""


class CacheMemoryError(LycheeError):
    """A KV cache that does not fit; the message says how much is needed and what would fit."""


def prefill_chunk(model: nn.Module, shape: ModelShape, batch: int, slots: int, layers: int | None = None) -> int:
    """Tokens of each sequence that may pass through the model at once, next to a cache of `slots` slots.

    `layers`: how many layers' caches the GPU holds meanwhile; None: all.

    Raises:
        CacheMemoryError: the cache does not fit.
    """
    weight = next(model.parameters())
    if not weight.is_cuda:
        return _CPU_CHUNK
    layers = shape.num_layers if layers is None else layers
    each = slot_bytes(shape, batch, weight.dtype) * layers // shape.num_layers
    free = free_bytes(weight.device)
    left = free - slots * each
    if left < 0:
        raise CacheMemoryError(
            f"The KV cache of {batch} x {slots} tokens needs {slots * each / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} GiB are free: up to {free // each} tokens a sequence would fit."
        )
    config = text_config(inner_model(model))
    width = getattr(config, "intermediate_size", 0) + 3 * config.hidden_size
    tokens = int(_SHARE * left) // (4 * width * weight.element_size() * batch)
    return max(tokens // _STEP, 1) * _STEP


def slot_bytes(shape: ModelShape, batch: int, dtype: torch.dtype) -> int:
    """Keys and values of one token of every sequence, in all layers."""
    return 2 * batch * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU, what PyTorch keeps for reuse included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
