"""Hooks into vLLM's attention: subclasses of one of its own backends (`cuda`, `cpu`).

    builder   once a step and cache group: which rows decode, and their state        -> metadata.hybrid
    layer     once a layer: rows that decode follow the plan, all others the backend

vLLM puts sequences that decode before those that are prefilled. The former are hybrid, alone or beside others; the
latter are dense. A CUDA graph cannot tell them apart when all get one token: the last token of a prompt is hybrid, too,
where it is all that a step has to do for the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention import HybridState
from ...ops import KV
from . import self_check, settings, verify
from .beside import Grown
from .group import Group, memory_left, shard_of_this_process, speculates_only
from .parts import (
    FIELDS_OF_ROWS,
    FIELDS_OF_TOKENS,
    Attention,
    AttentionCGSupport,
    CommonAttentionMetadata,
    get_current_vllm_config,
    get_layers_from_vllm_config,
    reserve,
    swap_whole_rows,
)
from .rows import Rows
from .settings import FLOAT8


class BatchStep(NamedTuple):
    """What the layers of a group need at one step.

    Attributes:
        group: the layers.
        rows: how many sequences decode, the first of the batch; padding of a CUDA graph counts, with length 0.
        lengths: int32 `[rows]`, tokens of each, the new one included.
        page_table: int32 `[rows, pages]`.
        state: of these rows.
        others: the backend's metadata of the other sequences; None when there are none.
        grown: means to write beside the pages of sequences that draft; None where there are none.
    """

    group: Group
    rows: int
    lengths: Tensor
    page_table: Tensor
    state: HybridState
    others: Any
    grown: Grown | None = None


class HybridBuilder:
    """Mixin, before a backend's metadata builder in a class's bases."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        swap_whole_rows()
        given = vllm_config, kv_cache_spec, layer_names, device, self.obstacle()
        self.hybrid = self.verifying = None
        self._is_all = False
        self._drafts, self._speculates = settings.drafts(vllm_config), vllm_config.speculative_config is not None
        if self._speculates:
            self.verifying = verify.Verifying.of(*given)
            if self.verifying is not None:
                self.reorder_batch_threshold = self.verifying.most
                self.supports_draft_decode_metadata_update = False  # `VerifyStep` would not follow
                self.supports_update_block_table = False
        if speculates_only(vllm_config):
            return
        self.hybrid = Group.of(*given)
        if self.hybrid is not None:
            if not self._drafts:
                self.reorder_batch_threshold = 1  # vLLM sorts sequences that get one token to the front
            self.supports_update_block_table = False  # the page table is in `BatchStep`, too
            modules = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
            self._modules = {index: modules[name] for name, index in self.hybrid.layers.items()}
        self._is_all = self.hybrid is not None and len(self.hybrid.layers) == len(layer_names)
        if self.hybrid is not None and self.hybrid.settings.self_check:
            self_check.check(self, get_layers_from_vllm_config(vllm_config, Attention, layer_names), device)
        if self.hybrid is not None:
            self.hybrid.announce(vllm_config)

    def obstacle(self) -> str | None:
        """What keeps all of the backend's layers from hybrid decoding, as the end of a sentence; None: nothing."""
        return None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        most = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        if vllm_config.speculative_config is not None:
            most = AttentionCGSupport.UNIFORM_BATCH
        return min(support, most, key=lambda level: level.value)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        if self._speculates:
            return self._build_verifying(common_prefix_len, common_attn_metadata, fast_build)
        rows = 0 if self.hybrid is None else self._begin(common_prefix_len, common_attn_metadata)
        return self._build(rows, common_prefix_len, common_attn_metadata, fast_build)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        if self._speculates:
            return self._build_verifying(0, common_attn_metadata, False)
        if self.hybrid is not None:
            self._fit()
        return self._build(0 if self.hybrid is None else common_attn_metadata.num_reqs, 0, common_attn_metadata, False)

    def build_for_drafting(self, common_attn_metadata: CommonAttentionMetadata, draft_index: int | None) -> Any:
        """Metadata for one drafted token of every sequence; `draft_index` None: for a CUDA graph."""
        if self.hybrid is None:
            return super().build_for_drafting(common_attn_metadata, draft_index)
        self._fit()
        if draft_index is not None:
            kv_of = self._kv_of(common_attn_metadata, common_attn_metadata.num_reqs)
            on_host = common_attn_metadata.seq_lens_cpu_upper_bound.tolist
            self.hybrid.begin_draft(draft_index, self._drafts, kv_of, on_host)
        metadata = self._build(common_attn_metadata.num_reqs, 0, common_attn_metadata, True)
        grown = self.hybrid.grown(common_attn_metadata.seq_lens, self._drafts)
        metadata.hybrid = metadata.hybrid._replace(grown=grown)
        return metadata

    def use_cascade_attention(self, *arguments: Any, **options: Any) -> bool:
        # It reads a shared prefix once for many sequences, but hybrid rows hardly read it.
        ours = self.hybrid is not None or self.verifying is not None
        return not ours and super().use_cascade_attention(*arguments, **options)

    def _begin(self, common_prefix_len: int, common: CommonAttentionMetadata) -> int:
        """Begin a step; returns how many sequences, the first of the batch, are hybrid."""
        self._fit()
        rows = Rows.of(common)
        if common_prefix_len:
            rows = rows._replace(decoding=0, tokens=0)

        def on_host() -> list[int]:
            known = common.seq_lens_cpu_upper_bound  # exact, without speculation
            return (common.seq_lens[: rows.single].cpu() if known is None else known[: rows.single]).tolist()

        self.hybrid.begin_step(rows, self._kv_of(common, rows.single), on_host)
        return rows.decoding

    def _kv_of(self, common: CommonAttentionMetadata, rows: int) -> Callable[[int], KV]:
        """A layer's cache, with the first rows of a step."""

        def kv_of(layer: int) -> KV:  # most steps do not ask
            module = self._modules[layer]
            lengths, table = common.seq_lens[:rows], common.block_table_tensor[:rows]
            return KV(*module.impl.views(module.kv_cache), lengths, None, table)

        return kv_of

    def _fit(self) -> None:
        """Make room beside the pages of vLLM's cache, which exists by now, before a CUDA graph needs it."""
        pages = next(iter(self._modules.values())).kv_cache.shape[0]  # the first dimension with every backend
        if pages:
            self.hybrid.beside.fit(pages)

    def _build(self, rows: int, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool) -> Any:
        # The backend need not plan work that it will not do.
        all_hybrid = self._is_all and rows == common.num_reqs
        metadata = super().build(common_prefix_len, common, fast_build or all_hybrid)
        metadata.hybrid = self._step(common, rows) if rows else None
        return metadata

    def _build_verifying(self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool) -> Any:
        metadata = super().build(common_prefix_len, common, fast_build)
        metadata.verify = None
        counts = [] if common_prefix_len or self.verifying is None else self.verifying.counts(common)
        if counts:
            left = int(common.query_start_loc_cpu[-1]) - sum(counts)  # padding has no tokens
            others = super().build(0, from_row(common, len(counts)), True) if left else None
            metadata.verify = verify.step_of(self.verifying.layers, common, counts, others)
        return metadata

    def _step(self, common: CommonAttentionMetadata, rows: int) -> BatchStep:
        others = None
        if rows < common.num_reqs:
            # Planning ahead would overwrite the plan for the layers that treat all sequences alike.
            others = super().build(0, from_row(common, rows), True)
        table = common.block_table_tensor[:rows]
        if not table.is_cuda:  # launches need not have the same shape every time
            table = table[:, : -(-common.max_seq_len // self.kv_cache_spec.block_size)]
        return BatchStep(self.hybrid, rows, common.seq_lens[:rows], table, self.hybrid.state(rows), others)


class HybridLayer:
    """Mixin, before a backend's attention implementation in a class's bases, which defines `cache`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        vllm_config = get_current_vllm_config()
        if not speculates_only(vllm_config):  # whose drafts have a model of their own
            shard_of_this_process(vllm_config)  # refuses before any weights are loaded
            reserve(memory_left)
        self._extras: dict[str, Any] | None = None

    def cache(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[P, Hkv, page, D]`, views of vLLM's cache of this layer."""
        raise NotImplementedError

    def views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """The same, in the dtype that its numbers have."""
        keys, values = self.cache(kv_cache)
        if self.kv_cache_dtype in FLOAT8:
            return keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
        return keys, values

    def extras(self, layer: torch.nn.Module) -> dict[str, Any]:
        """What `HybridAttention` needs to know of the layer besides; made once, as CUDA graphs keep its address."""
        if self._extras is None:
            sinks, scales = getattr(self, "sinks", None), None
            if self.kv_cache_dtype in FLOAT8:
                both = layer._k_scale, layer._v_scale
                scales = tuple(one.float().expand(self.num_kv_heads).contiguous() for one in both)
            self._extras = {"sinks": None if sinks is None else sinks.float(), "scales": scales}
        return self._extras

    def _verify(self, layer: torch.nn.Module, query: Tensor, kv_cache: Tensor, step: Any, output: Tensor) -> None:
        """Several tokens of each sequence."""
        asked = _as_output(layer, query[: step.tokens], output)
        scales = self.extras(layer)["scales"]
        output[: step.tokens] = verify.attend(step, asked, self.views(kv_cache), self.scale, scales)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **scales: Any,
    ) -> Tensor:
        step: BatchStep | None = getattr(attn_metadata, "hybrid", None)  # a run that only profiles has no metadata
        index = None if step is None else step.group.layers.get(layer.layer_name)
        drafted: verify.VerifyStep | None = getattr(attn_metadata, "verify", None)
        if drafted is not None and layer.layer_name in drafted.layers:
            self._verify(layer, query, kv_cache, drafted, output)
            self._attend_others(layer, query, key, value, kv_cache, drafted, drafted.tokens, output, scales)
            return output
        if index is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **scales)
        rows, attention = step.rows, step.group.attention
        kv = KV(*self.views(kv_cache), step.lengths, None, step.page_table)
        asked = _as_output(layer, query[:rows], output)
        if step.grown is not None:
            step.group.beside.follow(index, kv, step.grown)
        attention(index, asked, kv, step.state, self.scale, out=output[:rows], **self.extras(layer))
        if index == step.group.last_layer:
            step.group.add_bytes(step.lengths, step.state)
        self._attend_others(layer, query, key, value, kv_cache, step, rows, output, scales)
        return output

    def _attend_others(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        step: Any,
        done: int,
        output: Tensor,
        scales: dict[str, Any],
    ) -> None:
        """The tokens after the first `done` ones, as the backend does it."""
        if step.others is not None:
            # A fused operation may have written keys and values into the cache already, and hands none on.
            new = (None if tensor is None else tensor[done:] for tensor in (key, value))
            super().forward(layer, query[done:], *new, kv_cache, step.others, output[done:], **scales)


def _as_output(layer: torch.nn.Module, query: Tensor, output: Tensor) -> Tensor:
    """Queries in the output's dtype: beside an 8-bit cache, vLLM may hand them over in 8 bits."""
    return query if query.dtype == output.dtype else (query.float() * layer._q_scale).to(output.dtype)


def from_row(common: CommonAttentionMetadata, rows: int) -> CommonAttentionMetadata:
    """The batch without its first `rows` sequences."""
    given = {field.name: getattr(common, field.name) for field in fields(common)}
    tokens = int(common.query_start_loc_cpu[rows])
    cut = {
        name: given[name][tokens if name in FIELDS_OF_TOKENS else rows :]
        for name in (FIELDS_OF_ROWS | FIELDS_OF_TOKENS) & given.keys()
        if given[name] is not None
    }
    return common.replace(
        query_start_loc=common.query_start_loc[rows:] - tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[rows:] - tokens,
        num_reqs=common.num_reqs - rows,
        num_actual_tokens=common.num_actual_tokens - tokens,
        **cut,
        **{name: None for name in given if name.endswith("_cache")},  # made of the whole batch
    )
