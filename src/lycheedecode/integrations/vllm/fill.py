"""A KV connector of vLLM that fills the cache with random numbers, also in 8 bits, as if prompts had been prefilled.

vLLM's own fills integers with zeros, and a cache in 8-bit floats is one of integers to PyTorch.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class FillConnector(DecodeBenchConnector):
    """vLLM loads it by this name from `kv_connector_module_path`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.connector_worker is not None:
            own = self.connector_worker
            own._fill_block_tensor = MethodType(fill_blocks, own)


def fill_blocks(
    worker: Any, cache: torch.Tensor, block_ids: list[int], mean: float | None = None, std: float | None = None, *_: Any
) -> None:
    """Normal numbers in some blocks, a hundred million at a time; 0.32 says of which mean, and more than is needed."""
    mean, std = worker.fill_mean if mean is None else mean, worker.fill_std if std is None else std
    ids = torch.tensor([block for block in block_ids if block < len(cache)], device=cache.device)
    shape, piece = cache.shape[1:], max(10**8 // cache[0].numel(), 1)
    wide = torch.float32 if cache.itemsize == 1 else cache.dtype
    for some in ids.split(piece):
        numbers = torch.empty((len(some), *shape), dtype=wide, device=cache.device)
        numbers.normal_(mean, std)
        if cache.itemsize == 1:
            cache.view(torch.uint8)[some] = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            cache[some] = numbers
