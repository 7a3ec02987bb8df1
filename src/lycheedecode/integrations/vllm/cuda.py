"""`--attention-backend CUSTOM` on a GPU: vLLM's FlashAttention, with hybrid attention for single tokens."""

from __future__ import annotations

from torch import Tensor

from .backend import HybridBuilder, HybridLayer  # isort: skip  (refuses unknown versions)

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)


class HybridBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HybridImpl]:
        return HybridImpl

    @staticmethod
    def get_builder_cls() -> type[HybridMetadataBuilder]:
        return HybridMetadataBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # kernels share out their work by the size of the batch


class HybridMetadataBuilder(HybridBuilder, FlashAttentionMetadataBuilder):
    pass


class HybridImpl(HybridLayer, FlashAttentionImpl):
    def cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return kv_cache.split(self.head_size, dim=-1)  # [P, Hkv, page, 2 D] in any order of strides
