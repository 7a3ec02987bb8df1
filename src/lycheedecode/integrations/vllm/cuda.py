"""`--attention-backend CUSTOM` on a GPU: vLLM's FlashAttention, with hybrid attention for single tokens."""

from __future__ import annotations

from torch import Tensor

from . import settings

from .backend import HybridBuilder, HybridLayer  # isort: skip  (refuses unknown versions)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .parts import get_current_vllm_config


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
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Pages as long as chunks: shorter ones would waste room on unused means (see `beside`)."""
        preferred = super().get_preferred_block_size(default_block_size)
        told = settings.read(get_current_vllm_config())
        return max(preferred, min(told.config.chunk_tokens, 128)) if told.completes else preferred

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # kernels share out their work by the size of the batch


class HybridMetadataBuilder(HybridBuilder, FlashAttentionMetadataBuilder):
    pass


class HybridImpl(HybridLayer, FlashAttentionImpl):
    def cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return kv_cache.split(self.head_size, dim=-1)  # [P, Hkv, page, 2 D] in any order of strides
