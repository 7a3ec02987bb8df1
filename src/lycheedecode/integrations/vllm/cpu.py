"""`--attention-backend CUSTOM` on a CPU: vLLM's one backend there, whose single tokens use hybrid attention."""

from __future__ import annotations

from torch import Tensor

from .backend import HybridBuilder, HybridLayer  # isort: skip  (refuses unknown versions)

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)


class HybridBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[HybridImpl]:
        return HybridImpl

    @staticmethod
    def get_builder_cls() -> type[HybridMetadataBuilder]:
        return HybridMetadataBuilder


class HybridMetadataBuilder(HybridBuilder, CPUAttentionMetadataBuilder):
    def obstacle(self) -> str | None:
        if self.isa in ("vec", "vec16"):
            return None
        return f"vLLM's kernels for {self.isa} keep the cache in an order of their own (float32 has others)"


class HybridImpl(HybridLayer, CPUAttentionBackendImpl):
    def cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        pages, heads, page, double = kv_cache.shape
        halves = kv_cache.view(pages, heads, 2, page * double // 2)
        keys, values = halves.unbind(2)  # a page holds all keys, channel by channel, then all values, token by token
        return keys.unflatten(-1, (-1, page)).transpose(2, 3), values.unflatten(-1, (page, -1))
