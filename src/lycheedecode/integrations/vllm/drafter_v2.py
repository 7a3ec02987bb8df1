"""What vLLM's second model runner (V2) asks for drafts; see `lossless`. Its batch is still in `input_block_tables`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lossless import TargetDrafts
from .parts import CUDAGraphMode

from vllm.distributed.parallel_state import graph_capture  # isort: skip  (`parts` refuses unknown versions)
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator  # isort: skip

_NEVER = -1e4
"""The logit of a token that has no probability beside one of 0. Kernels would subtract infinity from itself."""


def install(runner: Any) -> None:
    """Make a new model runner draft with its own model."""
    runner.speculator = None  # whose buffers are as large as the next one's
    runner.speculator = TargetSpeculator(runner.vllm_config, runner.device)


class TargetSpeculator(TargetDrafts, DraftModelSpeculator):
    """vLLM calls `propose` and the methods that prepare it as those of its own drafters.

    Args:
        vllm_config: of the server.
        device: of the model.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._prepare(device)
        self.input_ids, self.positions = self.input_buffers.input_ids, self.input_buffers.positions
        self._columns = torch.arange(self.num_speculative_steps, device=device)

    def load_draft_model(self, target_model: torch.nn.Module, target_attn_layer_names: set[str]) -> torch.nn.Module:
        """Nothing is loaded, and no layer is a draft model's."""
        self._target = target_model
        return target_model

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: Any,
        block_tables: Any,
        target_input_buffers: Any,
        target_attn_groups: list[list[Any]],
    ) -> None:
        self.block_tables = block_tables
        self._take(target_attn_groups)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self._make_graphs(self._target, cudagraph_mode)

    def capture(self) -> None:
        with graph_capture(device=self.device):
            self._capture()

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """Drafts `[sequences, num_speculative_steps]` after `last_sampled`; vLLM uses none of a sequence in prefill."""
        rows, places = input_batch.num_reqs, input_batch.idx_mapping
        if dummy_run:  # drafts need less memory than the pass that has just been run
            return self.draft_tokens[:rows]
        count = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens

        certain = self._certain(input_batch.req_ids)

        def sample(hidden: Tensor, index: int) -> Tensor:
            drawn = self.positions[:rows], places, temperature, seeds, self._columns[index]
            tokens = self.sample_draft(hidden, *drawn, self.draft_logits)
            if certain is not None:
                logits = self.draft_logits[places[certain], index]
                tokens[certain] = best = logits.argmax(-1)
                logits = torch.full_like(logits, _NEVER).scatter_(1, best[:, None], 0.0)
                self.draft_logits[places[certain], index] = logits
            return tokens

        verified, at_most = input_batch.seq_lens[:rows] - num_rejected, input_batch.seq_lens_cpu_upper_bound[:rows]
        tokens = last_sampled[places, 0]
        self.draft_tokens[:rows, :count] = self._round(count, tokens, verified, at_most, int(at_most.max()), sample)
        return self.draft_tokens[:rows]

    def _page_table(self, cache: int, rows: int) -> Tensor:
        return self.block_tables.input_block_tables[cache][:rows]
