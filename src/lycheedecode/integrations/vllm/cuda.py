"""`--attention-backend CUSTOM` on a GPU: vLLM's FlashAttention, with hybrid attention for single tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import settings

from .backend import HybridBuilder, HybridLayer  # isort: skip  (refuses unknown versions)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .parts import get_current_vllm_config, says_cache_layout


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
    def get_required_kv_cache_layout(cls) -> str | None:
        """The tokens of a head together; in vLLM's default a scan of one head skips the others' after each of its own.

        vLLM up to 0.28 lets this overrule the user and KV connectors, so it is asked for where they say nothing.
        """
        return None if says_cache_layout(get_current_vllm_config()) else "HND"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """The same for vLLM from 0.29 on: any layout will do, that one is taken where nobody says which."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return tuple(sorted(KVCacheLayout, key=lambda layout: layout is not KVCacheLayout.LBHNC))

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # kernels share out their work by the size of the batch


class HybridMetadataBuilder(HybridBuilder, FlashAttentionMetadataBuilder):
    pass


class HybridImpl(HybridLayer, FlashAttentionImpl):
    def cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        return kv_cache.split(self.head_size, dim=-1)  # [P, Hkv, page, 2 D] in any order of strides
