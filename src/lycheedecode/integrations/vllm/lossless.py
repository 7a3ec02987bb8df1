"""Lossless decoding: the model drafts for itself with hybrid attention, vLLM verifies with full attention.

    step        vLLM's own: one pass over the last drafts, `verify` attends; rejection sampling keeps the right ones
    round       after it: so many steps of one token a sequence, each as a hybrid step       -> drafts for the next step

To vLLM the drafts come from a draft model, for whose tokens the scheduler keeps pages free. Here they are the model's
own pages: drafts are written where the tokens will be, and the pass that verifies them writes the same places again
before it reads them. So what stays in the cache, and what other requests find there, is full attention's.

Needs nothing of vLLM but a worker class, which its arguments may name: the worker gives its model runner, once that is
made, another drafter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import settings
from .parts import (
    BatchDescriptor,
    CommonAttentionMetadata,
    CUDAGraphMode,
    CUDAGraphWrapper,
    current_platform,
    set_forward_context,
)
from .requests import ServingError

import vllm.v1.sample.rejection_sampler  # isort: skip  (`parts` refuses unknown versions)
from vllm.v1.spec_decode.draft_model import DraftModelProposer  # isort: skip

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class DraftingWorker(Worker):
    """Whose model drafts for itself."""

    def init_device(self) -> None:
        settings.check_runner(self.vllm_config)
        super().init_device()
        if current_platform.is_cpu():
            vllm.v1.sample.rejection_sampler.expand_batch_to_tokens = _expanded
        runner = self.model_runner
        runner.drafter = TargetDrafter(self.vllm_config, runner.device, runner)


class TargetDrafter(DraftModelProposer):
    """What the model runner asks for drafts; `propose` and what sets it up are called as vLLM calls its own.

    Args:
        vllm_config: of the server.
        device: of the model.
        runner: whose model, batch and pages are used.
    """

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self._runner = runner
        self._sizes: list[int] = []
        most = vllm_config.scheduler_config.max_num_seqs
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._starts_on_host = torch.arange(most + 1, dtype=torch.int32)
        self._lengths = torch.zeros(most, dtype=torch.int32, device=device)
        self._slots: list[Tensor] = []

    # ------------------------------------------------------------------ what the model runner sets up

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Nothing is loaded; see `initialize_cudagraph_keys` for `model`."""
        self._target = target_model
        self._draft_attn_layer_names = set()

    def initialize_attn_backend(self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None) -> None:
        """Layers, their caches and builders are the model's."""
        groups = self._runner.attn_groups
        self._slots = [torch.full_like(self._lengths, -1, dtype=torch.int64) for _ in groups]
        builders = [group.get_metadata_builder() for of_cache in groups for group in of_cache]
        if all(getattr(builder, "hybrid", None) is None for builder in builders):
            raise ServingError("A lossless server needs layers that can be hybrid, and the log says why none is.")

    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Where vLLM has a graph for steps in which all decode, drafts have one for each power of two of sequences."""
        self.model, self._sizes = self._target, []
        if cudagraph_mode.decode_mode() is CUDAGraphMode.FULL:
            self.model = CUDAGraphWrapper(self._target, self.vllm_config, CUDAGraphMode.FULL)
            # The pass that verified leaves its output in the pool of vLLM's graphs.
            self.model.graph_pool = current_platform.graph_pool_handle()
            most = len(self._lengths)
            self._sizes = [*(1 << i for i in range((most - 1).bit_length())), most]

    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: Any = None,
    ) -> None:
        """Capture the graphs beside vLLM's; drafts need less memory than the pass that it has just run."""
        for size in reversed(self._sizes if is_graph_capturing else []):
            if _graph(size) not in self.model.concrete_cudagraph_entries:
                self.input_ids[:size], self.positions[:size], self._lengths[:size] = 0, 0, 1
                for slots in self._slots:
                    slots[:size] = -1
                for mode in (CUDAGraphMode.NONE, CUDAGraphMode.FULL):  # first what is made once
                    self._forward(size, self._metadata(size, None, self.max_model_len, None), mode)

    # ------------------------------------------------------------------ a round

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,
    ) -> Tensor:
        """Drafts `[sequences, num_speculative_tokens]` after `next_token_ids`, of which the cache has nothing yet."""
        rows = common_attn_metadata.batch_size()
        size, mode = next(
            ((size, CUDAGraphMode.FULL) for size in self._sizes if size >= rows), (rows, CUDAGraphMode.NONE)
        )
        verified = common_attn_metadata.seq_lens[:rows]
        if num_rejected_tokens_gpu is not None:
            verified = verified - num_rejected_tokens_gpu
        self._lengths[:rows], self._lengths[rows:size] = verified, 0
        at_most = torch.zeros(size, dtype=torch.int32)
        at_most[:rows] = self._runner.optimistic_seq_lens_cpu[:rows]
        tokens, found, probs = next_token_ids, [], []
        for index in range(num_speculative_tokens):
            at_most[:rows] += 1
            self._place(tokens, rows, size)
            metadata = self._metadata(size, at_most, common_attn_metadata.max_seq_len + index + 1, index)
            hidden = self._forward(size, metadata, mode)
            tokens, of_all = self._sample_draft_tokens(hidden[:rows], sampling_metadata)
            found.append(tokens)
            probs.append(of_all)
        self._last_draft_probs = torch.stack(probs, 1).contiguous() if probs and probs[0] is not None else None
        return torch.stack(found, 1) if found else next_token_ids.new_empty((rows, 0))

    def _place(self, tokens: Tensor, rows: int, size: int) -> None:
        """One more token of each sequence."""
        positions = self._lengths[:rows].long()
        self.input_ids[:rows], self.positions[:rows] = tokens, positions
        self.input_ids[rows:size], self.positions[rows:size] = 0, 0
        self._lengths[:rows] += 1
        for cache, (slots, of_cache) in enumerate(zip(self._slots, self._runner.attn_groups, strict=True)):
            page = of_cache[0].get_metadata_builder().kv_cache_spec.block_size
            pages = self._page_table(cache, rows).gather(1, positions[:, None] // page)[:, 0]
            slots[:rows], slots[rows:size] = pages * page + positions % page, -1

    def _page_table(self, cache: int, rows: int) -> Tensor:
        return self._runner.input_batch.block_table[cache].get_device_tensor(rows)

    def _metadata(self, size: int, at_most: Tensor | None, longest: int, index: int | None) -> dict[str, Any]:
        """Of each layer; `index` None: for a graph."""
        found = {}
        for cache, of_cache in enumerate(self._runner.attn_groups):
            common = CommonAttentionMetadata(
                query_start_loc=self._starts[: size + 1],
                query_start_loc_cpu=self._starts_on_host[: size + 1],
                seq_lens=self._lengths[:size],
                num_reqs=size,
                num_actual_tokens=size,
                max_query_len=1,
                max_seq_len=min(longest, self.max_model_len),
                block_table_tensor=self._page_table(cache, size),
                slot_mapping=self._slots[cache][:size],
                causal=True,
                seq_lens_cpu_upper_bound=at_most,
                positions=self.positions[:size],
            )
            for group in of_cache:
                metadata = group.get_metadata_builder().build_for_drafting(common, index)
                found.update(dict.fromkeys(group.layer_names, metadata))
        return found

    def _forward(self, size: int, metadata: dict[str, Any], mode: CUDAGraphMode) -> Tensor:
        """Hidden states `[size, hidden size]` of the tokens that were placed."""
        slots = {
            name: self._slots[cache][:size]
            for cache, of_cache in enumerate(self._runner.attn_groups)
            for group in of_cache
            for name in group.layer_names
        }
        context = set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=size,
            cudagraph_runtime_mode=mode,
            batch_descriptor=_graph(size),
            slot_mapping=slots,
        )
        with context:
            return self.model(
                input_ids=self.input_ids[:size],
                positions=self.positions[:size],
                intermediate_tensors=None,
                inputs_embeds=None,
            )


def _expanded(x: Tensor, ends: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """Numbers `[sequences]` once for each token: vLLM's own way on CPUs loses what it writes unless that is int64.

    So temperatures were whatever lay in memory (0.27.1, 0.32.0).
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts.long(), output_size=num_tokens)


def _graph(size: int) -> BatchDescriptor:
    return BatchDescriptor(num_tokens=size, num_reqs=size, uniform=True)
