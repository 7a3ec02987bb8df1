"""What vLLM's first model runner asks for drafts; see `lossless`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .lossless import TargetDrafts
from .parts import CommonAttentionMetadata, CUDAGraphMode, current_platform

import vllm.v1.sample.rejection_sampler  # isort: skip  (`parts` refuses unknown versions)
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p  # isort: skip
from vllm.v1.spec_decode.draft_model import DraftModelProposer  # isort: skip


def install(runner: Any) -> None:
    """Make a new model runner draft with its own model."""
    if current_platform.is_cpu():
        vllm.v1.sample.rejection_sampler.expand_batch_to_tokens = _expanded
        vllm.v1.sample.rejection_sampler.apply_top_k_top_p = _of_some_rows
    runner.drafter = TargetDrafter(runner.vllm_config, runner.device, runner)


class TargetDrafter(TargetDrafts, DraftModelProposer):
    """vLLM calls `propose` and the methods that prepare it as those of its own drafters.

    Args:
        vllm_config: of the server.
        device: of the model.
        runner: whose model, batch and pages are used.
    """

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self._runner = runner
        self._prepare(device)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Nothing is loaded; see `initialize_cudagraph_keys` for `model`."""
        self._target = target_model
        self._draft_attn_layer_names = set()

    def initialize_attn_backend(self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None) -> None:
        self._take(self._runner.attn_groups)

    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode) -> None:
        self._make_graphs(self._target, cudagraph_mode)

    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: Any = None,
    ) -> None:
        """Capture the graphs beside vLLM's; drafts need less memory than the pass that it has just run."""
        if is_graph_capturing:
            self._capture()

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
        rows, probs = common_attn_metadata.batch_size(), []
        verified = common_attn_metadata.seq_lens[:rows]
        if num_rejected_tokens_gpu is not None:
            verified = verified - num_rejected_tokens_gpu

        certain = self._certain(self._runner.input_batch.req_ids)

        def sample(hidden: Tensor, index: int) -> Tensor:
            tokens, of_all = self._sample_draft_tokens(hidden, sampling_metadata)
            probs.append(of_all)
            if of_all is None:
                return tokens
            tokens = self._drawn_by_seed(tokens, of_all, sampling_metadata.generators)
            if certain is not None:
                tokens[certain] = of_all[certain].argmax(-1).to(tokens.dtype)
                of_all[certain] = one_hot(tokens[certain].long(), of_all.shape[-1]).to(of_all.dtype)
            return tokens

        at_most, longest = self._runner.optimistic_seq_lens_cpu[:rows], common_attn_metadata.max_seq_len
        drafts = self._round(num_speculative_tokens, next_token_ids, verified, at_most, longest, sample)
        self._last_draft_probs = torch.stack(probs, 1).contiguous() if probs and probs[0] is not None else None
        return drafts

    def _drawn_by_seed(self, tokens: Tensor, probs: Tensor, generators: Mapping[int, torch.Generator]) -> Tensor:
        """Drafts of requests with a seed drawn again, by it; vLLM draws what draft models say without."""
        tokens = tokens.clone()
        for row, generator in generators.items():
            if not self._runner.discard_request_mask.np[row]:  # else in prefill, which may be of any number of steps
                tokens[row] = (probs[row] / torch.empty_like(probs[row]).exponential_(generator=generator)).argmax()
        return tokens

    def _page_table(self, cache: int, rows: int) -> Tensor:
        return self._runner.input_batch.block_table[cache].get_device_tensor(rows)


def _expanded(x: Tensor, ends: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """Numbers `[sequences]` once for each token: vLLM's own way on CPUs loses what it writes unless that is int64.

    So temperatures were whatever lay in memory (0.27.1, 0.32.0).
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts.long(), output_size=num_tokens)


def _of_some_rows(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """Logits with all but the most probable tokens masked: on CPUs vLLM fails for no rows, and stops (0.32.0).

    There are none in a step that verifies no draft, as the first of a lone request that asks for `top_k`.
    """
    return apply_top_k_top_p(logits, k, p) if len(logits) else logits
