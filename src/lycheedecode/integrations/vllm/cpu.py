"""The same on a CPU, where vLLM has one backend only: it decodes hybridly when CUSTOM is asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from .backend import HybridBuilder, HybridLayer
from .settings import is_chosen


class HybridBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[HybridImpl]:
        return HybridImpl

    @staticmethod
    def get_builder_cls() -> type[HybridMetadataBuilder]:
        return HybridMetadataBuilder


class HybridMetadataBuilder(HybridBuilder, CPUAttentionMetadataBuilder):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.isa = _readable(self.isa, vllm_config)


class HybridImpl(HybridLayer, CPUAttentionBackendImpl):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.isa = _readable(self.isa, get_current_vllm_config())

    def cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        pages, heads, page, double = kv_cache.shape
        halves = kv_cache.view(pages, heads, 2, page * double // 2)
        keys, values = halves.unbind(2)  # a page holds all keys, channel by channel, then all values, token by token
        return keys.unflatten(-1, (-1, page)).transpose(2, 3), values.unflatten(-1, (page, -1))


def _readable(isa: str, vllm_config: Any) -> str:
    """Kernels for matrix units and for other processors interleave the cache; the plain ones keep it as a tensor."""
    return isa if isa == "vec16" or not is_chosen(vllm_config) else "vec"
