"""Lossless decoding: the model drafts for itself with hybrid attention, vLLM verifies with full attention.

    step        vLLM's own: one pass over the last drafts, `verify` attends; rejection sampling keeps the right ones
    round       after it: so many steps of one token a sequence, each as a hybrid step       -> drafts for the next step

To vLLM the drafts come from a draft model, for whose tokens the scheduler keeps pages free. Here they are the model's
own pages: drafts are written where the tokens will be, and the pass that verifies them writes the same places again
before it reads them. So what stays in the cache, and what other requests find there, is full attention's.

All it needs of vLLM is a worker class, which vLLM's arguments may name: the worker replaces the drafter of its model
runner by `drafter_v1` or `drafter_v2`, one for each of vLLM's two model runners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    version,
)
from .requests import ServingError

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class DraftingWorker(Worker):
    """A worker whose model drafts for itself."""

    def init_device(self) -> None:
        settings.check_runner(self.vllm_config.use_v2_model_runner, version)
        super().init_device()
        if self.vllm_config.use_v2_model_runner:
            from .drafter_v2 import install
        else:
            from .drafter_v1 import install
        install(self.model_runner)


class TargetDrafts:
    """Mixin, before one of vLLM's drafters in a class's bases, which has `vllm_config`, `max_model_len` and `model`.

    Attributes:
        input_ids, positions: int32 and int64, as long as a step has sequences at most; CUDA graphs read them.
    """

    input_ids: Tensor
    positions: Tensor

    def _prepare(self, device: torch.device) -> None:
        most = self.vllm_config.scheduler_config.max_num_seqs
        self._sizes: list[int] = []
        self._starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._starts_on_host = torch.arange(most + 1, dtype=torch.int32)
        self._lengths = torch.zeros(most, dtype=torch.int32, device=device)
        self._groups: list[list[Any]] = []
        self._slots: list[Tensor] = []

    def _page_table(self, cache: int, rows: int) -> Tensor:
        """The page table of a cache group, int32 `[rows, pages]`, in the batch's order; always the same memory."""
        raise NotImplementedError

    def _take(self, groups: list[list[Any]]) -> None:
        """Draft with the model's own layers, caches and builders: vLLM's attention groups, by cache group."""
        self._groups = groups
        self._slots = [torch.full_like(self._lengths, -1, dtype=torch.int64) for _ in groups]
        flat = [group for of_cache in groups for group in of_cache]
        hybrid = [getattr(group.get_metadata_builder(), "hybrid", None) for group in flat]
        if not any(hybrid):
            raise ServingError("A lossless server needs layers that can be hybrid, and the log says why none is.")
        self._requests = next(filter(None, hybrid)).requests  # every group knows all of them
        if any(getattr(group, "kernel_block_size", None) is not None for group in flat):
            raise ServingError("A lossless server needs pages that attention does not cut: choose another block_size.")

    def _certain(self, names: Sequence[str]) -> Tensor | None:
        """Rows of a batch whose drafts have to be the most probable tokens, drawn with certainty; None: none.

        vLLM drops a draft that a grammar refuses, and then samples as if there had been none. A sampled text keeps its
        distribution only if the draft was no matter of chance.
        """
        rows = self._requests.formed(names)
        return torch.tensor(rows, device=self._lengths.device) if rows else None

    def _make_graphs(self, target: torch.nn.Module, cudagraph_mode: CUDAGraphMode) -> None:
        """If vLLM has graphs for steps in which all decode, drafts get them for powers of two of sequences."""
        self.model, self._sizes = target, []
        if cudagraph_mode.decode_mode() is CUDAGraphMode.FULL:
            self.model = CUDAGraphWrapper(target, self.vllm_config, CUDAGraphMode.FULL)
            # The pass that verified leaves its output in the pool of vLLM's graphs.
            self.model.graph_pool = current_platform.graph_pool_handle()
            most = len(self._lengths)
            self._sizes = [*(1 << i for i in range((most - 1).bit_length())), most]

    def _capture(self) -> None:
        for size in reversed(self._sizes):
            if _graph(size) not in self.model.concrete_cudagraph_entries:
                self.input_ids[:size], self.positions[:size], self._lengths[:size] = 0, 0, 1
                for slots in self._slots:
                    slots[:size] = -1
                for mode in (CUDAGraphMode.NONE, CUDAGraphMode.FULL):  # first what is made once
                    self._forward(size, self._metadata(size, None, self.max_model_len, None), mode)

    def _round(
        self,
        count: int,
        tokens: Tensor,
        verified: Tensor,
        verified_at_most: Tensor,
        longest: int,
        sample: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Drafts `[sequences, count]`.

        Args:
            count: of each sequence.
            tokens: `[sequences]`, the newest, of which the cache has nothing yet.
            verified: `[sequences]`, how many the cache has of each.
            verified_at_most: the same on the host, as if no draft of the last two rounds had been rejected.
            longest: the largest of these.
            sample: takes hidden states `[sequences, hidden size]` and the number of a draft; gives tokens.
        """
        rows, found = len(verified), []
        size, mode = next(
            ((size, CUDAGraphMode.FULL) for size in self._sizes if size >= rows), (rows, CUDAGraphMode.NONE)
        )
        self._lengths[:rows], self._lengths[rows:size] = verified, 0
        at_most = torch.zeros(size, dtype=torch.int32)
        at_most[:rows] = verified_at_most
        for index in range(count):
            at_most[:rows] += 1
            if longest + index >= self.max_model_len:  # what comes after the last position is never verified
                self._lengths[:rows].clamp_(max=self.max_model_len - 1)
                at_most.clamp_(max=self.max_model_len)
            self._place(tokens, rows, size)
            metadata = self._metadata(size, at_most, longest + index + 1, index)
            tokens = sample(self._forward(size, metadata, mode)[:rows], index)
            found.append(tokens)
        return torch.stack(found, 1) if found else tokens.new_empty((rows, 0))

    def _place(self, tokens: Tensor, rows: int, size: int) -> None:
        """Set inputs, lengths and slots for one more token of each sequence."""
        positions = self._lengths[:rows].long()
        self.input_ids[:rows], self.positions[:rows] = tokens, positions
        self.input_ids[rows:size], self.positions[rows:size] = 0, 0
        self._lengths[:rows] += 1
        for cache, (slots, of_cache) in enumerate(zip(self._slots, self._groups, strict=True)):
            page = of_cache[0].get_metadata_builder().kv_cache_spec.block_size
            pages = self._page_table(cache, rows).gather(1, positions[:, None] // page)[:, 0]
            slots[:rows], slots[rows:size] = pages * page + positions % page, -1

    def _metadata(self, size: int, at_most: Tensor | None, longest: int, index: int | None) -> dict[str, Any]:
        """Attention metadata by layer; `index` None: for a CUDA graph."""
        found = {}
        for cache, of_cache in enumerate(self._groups):
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
            for cache, of_cache in enumerate(self._groups)
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


def _graph(size: int) -> BatchDescriptor:
    return BatchDescriptor(num_tokens=size, num_reqs=size, uniform=True)
