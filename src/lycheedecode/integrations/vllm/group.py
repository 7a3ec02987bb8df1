"""The layers of one of vLLM's KV-cache groups that use hybrid attention, and what they share from step to step."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention import FullAttention, HybridAttention
from ...ops import EVERYTHING, KV, has_float8
from ...ops.dispatch import kernel_obstacle
from ...plan import HeadPlan
from . import counters, settings
from .beside import Beside, Grown, Page, PagedState, share_of_memory
from .parts import (
    Attention,
    AttentionType,
    FullAttentionSpec,
    envs,
    extract_layer_index,
    follow_requests,
    get_layers_from_vllm_config,
    get_pp_group,
    get_pp_indices,
    get_tensor_model_parallel_rank,
    init_logger,
)
from .requests import Requests
from .rows import Rows
from .settings import FLOAT8

logger = init_logger("vllm.lycheedecode")  # below `vllm`, whose handlers print it


class Shard(NamedTuple):
    """What this process decodes: the plan of its KV heads and layers, which begin at `first_layer` of the model."""

    plan: HeadPlan
    settings: settings.Settings
    first_layer: int


def shard_of_this_process(vllm_config: Any) -> Shard:
    """Read and check the settings; errors as in `settings.read` and `settings.of_rank`."""
    told = settings.read(vllm_config)
    plan = told.plan
    parallel, pipeline = vllm_config.parallel_config, get_pp_group()
    stages = [get_pp_indices(plan.num_layers, i, pipeline.world_size) for i in range(pipeline.world_size)]
    stage, rank = pipeline.rank_in_group, get_tensor_model_parallel_rank()
    own = settings.of_rank(plan, rank, parallel.tensor_parallel_size, stages, stage)
    return Shard(own, told, stages[stage][0])


class Group:
    """Layers that use hybrid attention, by name; their attention, selections and counters.

    All of them read the same metadata at a step, and a donor's selection is used in the step in which it was made: one
    set of buffers serves every batch.

    Args:
        shard: what this process decodes.
        layers: index in the shard's plan of each layer.
        vllm_config, spec: of the group.
        device: of the cache.
        sinks: whether the softmax of some layer has sinks.
    """

    def __init__(
        self,
        shard: Shard,
        layers: Mapping[str, int],
        vllm_config: Any,
        spec: Any,
        device: torch.device,
        sinks: bool = False,
    ) -> None:
        self.layers = dict(layers)
        self.last_layer = max(layers.values())
        self.settings = shard.settings
        self.first_layer = shard.first_layer
        self._has_sinks = sinks
        limits, config = shard.settings.limits, shard.settings.config
        if limits.most is not None:  # room for the largest budget that a request may have
            config = replace(config, budget_tokens=limits.most)
        self.attention = HybridAttention(shard.plan, config, tuple(layers.values()))
        self.requests = Requests(limits, vllm_config.kv_transfer_config is not None)
        self.beside = Beside(self.attention, _page(spec, vllm_config), device)
        self._key_bytes = spec.head_size * spec.dtype.itemsize
        self._full = FullAttention(len(layers), shard.plan.num_kv_heads)
        graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, graphs)  # a graph may hold rows of padding
        selections = self.attention.allocate(rows, vllm_config.model_config.max_model_len, device).selections
        self._state = PagedState(selections, beside=self.beside)
        capacity = self._state.selections.blocks.shape[-1]
        self._default = capacity if limits.default is None else min(limits.default, capacity)
        self._state.limits = torch.full((rows,), self._default, dtype=torch.int32, device=device)
        self._states: dict[int, PagedState] = {}
        self._some_ask = False
        self._drafting: Sequence[str] = ()
        self._grown = torch.zeros((2, rows), dtype=torch.int32, device=device)
        self._bytes = torch.zeros(2, rows, dtype=torch.float64, device=device)
        self._speaks = get_tensor_model_parallel_rank() == 0
        self._left_in = counters.folder_of(vllm_config.instance_id)
        self.counters = {"hybrid_steps": 0, "dense_steps": 0, "hybrid_tokens": 0, "off_tokens": 0}
        self._reported = dict.fromkeys((*self.counters, "bytes", "full"), 0)
        self._report_at = time.monotonic() + envs.VLLM_LOG_STATS_INTERVAL
        if device.type == "cuda":
            self._make_once(shard, vllm_config, spec, device)
        follow_requests()

    def state(self, rows: int) -> PagedState:
        """The state of the first `rows` sequences of a step: views of memory that stays where it is."""
        if rows not in self._states:
            self._states[rows] = self._state.first_rows(rows)
        return self._states[rows]

    def add_bytes(self, lengths: Tensor, state: PagedState) -> None:
        """Count on the device what the step read: after its last layer; a CUDA graph repeats it."""
        for attention, total in zip((self.attention, self._full), self._bytes, strict=True):
            attention.count_bytes(total[: len(lengths)], lengths, state, True, self._key_bytes)

    def limits_of(self, rows: int) -> Tensor:
        """Most blocks of the first `rows` sequences of a step, int32; `reset_limits` makes them the server's again."""
        self._some_ask = True
        return self._state.limits[:rows]

    def reset_limits(self) -> None:
        self._state.limits.fill_(self._default)
        self._some_ask = False

    def forget_step(self) -> None:
        """Drop what the last step counted: it served no request."""
        self.reset_limits()
        self._bytes.zero_()

    def begin_step(self, rows: Rows, kv_of: Callable[[int], KV], lengths: Callable[[], Sequence[int]]) -> None:
        """Set the rows' budgets, write what belongs beside their pages, count, and report from time to time.

        Args:
            rows: of the step.
            kv_of: a layer's cache, with the rows that get a single token.
            lengths: tokens of these, on the host.
        """
        names = self.requests.take()[: rows.single]
        asked = self._limit(names)
        if names and self.beside.is_used:
            after = list(lengths())[: len(names)]
            before = self.requests.grow(names, after, rows.decoding)
            self.beside.write(self.beside.layers, kv_of, before, after)
        off = asked[: rows.tokens].count(EVERYTHING)
        self.counters["hybrid_steps" if rows.tokens else "dense_steps"] += 1
        self.counters["hybrid_tokens"] += rows.tokens - off
        self.counters["off_tokens"] += off
        self._report_now_and_then()

    def begin_draft(
        self, index: int, drafts: int, kv_of: Callable[[int], KV], lengths: Callable[[], Sequence[int]]
    ) -> None:
        """As `begin_step`, for a token that all sequences draft; nothing is final until it is verified.

        Args:
            index: of the token in its round.
            drafts: of a round.
            kv_of: a layer's cache, with all sequences.
            lengths: tokens of these on the host, this one included, as if all drafts of the last two rounds had been
                accepted.
        """
        if index == 0:
            self._drafting = self.requests.take()
            self._limit(self._drafting)
            self.counters["dense_steps"] += 1  # which verified
            if self._drafting and self.beside.is_used:
                self._write_verified(drafts, kv_of, lengths()[: len(self._drafting)])
        self.counters["hybrid_steps"] += 1
        self.counters["hybrid_tokens"] += len(self._drafting)
        self._report_now_and_then()

    def _write_verified(self, drafts: int, kv_of: Callable[[int], KV], after: Sequence[int]) -> None:
        last = self.requests.verify(self._drafting, [length - 1 for length in after])
        # vLLM may schedule a step before it knows how many drafts the step before that had rejected.
        good = [max(length - 2 * drafts, 0) for length in last]
        meant = list(good)
        for row, (old, new) in enumerate(zip(last, after, strict=True)):
            if old and new - 1 - old <= drafts + 1:  # a round ago: layers write these means, see `grown`
                meant[row] = new
        self.beside.write(self.beside.layers, kv_of, good, after, meant)

    def grown(self, lengths: Tensor, drafts: int) -> Grown | None:
        """The means that a drafting step writes beside pages: those completed since the last round and within this one.

        Args:
            lengths: int32 `[rows]`, tokens of each sequence, the newest included.
            drafts: of a round.
        """
        if not self.beside.means:
            return None
        chunk, since = self.beside.chunk, 2 * drafts + 1
        before, first = self._grown[:, : len(lengths)].unbind()
        torch.sub(lengths, 1, out=before).clamp_(min=0)
        torch.sub(before, since, out=first).clamp_(min=0).div_(chunk, rounding_mode="floor")
        return Grown(before, first, since // chunk + 1)

    def _limit(self, names: Sequence[str]) -> list[int | None]:
        """Set the budgets of the first rows to what their requests ask for; returns that."""
        asked = self.requests.blocks(names)
        if asked.count(None) < len(asked):
            given = [self._default if blocks is None else blocks for blocks in asked]
            pinned = self._state.limits.is_cuda
            limits = self.limits_of(len(given))
            limits.copy_(torch.tensor(given, dtype=torch.int32, pin_memory=pinned), non_blocking=True)
        elif self._some_ask:
            self.reset_limits()
        return asked

    def _report_now_and_then(self) -> None:
        if time.monotonic() >= self._report_at:
            self._report_at = time.monotonic() + envs.VLLM_LOG_STATS_INTERVAL
            self.report()

    def announce(self, vllm_config: Any) -> None:
        """Log which layers are hybrid, and how much of the longest context a step will read."""
        if self._speaks:
            hybrid = {layer + self.first_layer for layer in self.layers.values()}
            logger.info("%s.", self.settings.announcement(hybrid, vllm_config.model_config.max_model_len))

    def report(self) -> dict[str, float]:
        """Everything counted so far; the rest since the last report goes to the log and to Prometheus."""
        read, full = self._bytes.sum(1).tolist()
        total = {**self.counters, "bytes": read, "full": full}
        new = {name: value - self._reported[name] for name, value in total.items()}
        self._reported = total
        for name, counter in counters.of_process().items():
            counter.inc(new[name])
        counters.leave(self._left_in, f"{os.getpid()}-{id(self)}", total)
        if self._speaks and new["hybrid_steps"] and new["full"]:
            logger.info(
                "LycheeDecode: %d hybrid steps with %d tokens and %d whose requests switched it off, %d dense steps; "
                "hybrid steps read %.3f GB of the KV cache, %.1f%% of what full attention reads.",
                *(new["hybrid_steps"], new["hybrid_tokens"], new["off_tokens"], new["dense_steps"]),
                *(new["bytes"] / 1e9, 100 * new["bytes"] / new["full"]),
            )
        return total

    def _make_once(self, shard: Shard, vllm_config: Any, spec: Any, device: torch.device) -> None:
        """Run every layer once on a tiny input: what kernels make at their first launch cannot be made in a CUDA graph.

        The page table is as wide as vLLM's, which holds whole 128 tokens: kernels are compiled for its stride.
        """
        shape, dtype = (1, shard.plan.num_kv_heads, spec.block_size, spec.head_size), vllm_config.model_config.dtype
        float8, more = vllm_config.cache_config.cache_dtype in FLOAT8, {"scales": None, "sinks": None}
        keys = torch.zeros(shape, dtype=torch.float8_e4m3fn if float8 else dtype, device=device)
        if float8:
            more["scales"] = (torch.ones(shape[1], device=device),) * 2
        one = torch.ones(1, dtype=torch.int32, device=device)
        pages = ceil(128 * ceil(vllm_config.model_config.max_model_len / 128) / spec.block_size)
        kv = KV(keys, keys, one, None, torch.zeros((1, pages), dtype=torch.int32, device=device))
        self.beside.fit(1)
        self.beside.write(self.beside.layers, lambda layer: kv, [0], [spec.block_size + 1])
        heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        query = torch.zeros((1, heads, spec.head_size), dtype=dtype, device=device)
        for sinks in (None, torch.zeros(heads, device=device)) if self._has_sinks else (None,):
            more["sinks"] = sinks
            for layer in sorted(self.layers.values()):
                self.attention(layer, query, kv, self.state(1), 1.0, out=torch.empty_like(query), **more)
        self.add_bytes(one, self.state(1))
        self._bytes.zero_()

    @classmethod
    def of(
        cls, vllm_config: Any, spec: Any, layer_names: list[str], device: torch.device, obstacle: str | None
    ) -> Group | None:
        """The group of those `layer_names` that can use hybrid attention; None if none can, and the log says why.

        Raises `PlanError` when such a layer has a donor in a layer that cannot. `obstacle`: what keeps all from it.
        """
        why_all = obstacle or why_all_dense(vllm_config, spec, device)
        able = able_layers(
            vllm_config, layer_names, lambda impl: why_all or why_dense(impl), "decode with full attention"
        )
        if not able:
            return None
        shard = shard_of_this_process(vllm_config)
        layers = {name: extract_layer_index(name) - shard.first_layer for name in able}
        settings.check_donors(shard.plan, set(layers.values()), shard.first_layer)
        sinks = any(getattr(module.impl, "sinks", None) is not None for module in able.values())
        return cls(shard, layers, vllm_config, spec, device, sinks)


def speculates_only(vllm_config: Any) -> bool:
    """Whether vLLM verifies drafts of another model, so that nothing is hybrid."""
    return vllm_config.speculative_config is not None and not settings.drafts(vllm_config)


def _page(spec: Any, vllm_config: Any) -> Page:
    return Page(spec.num_kv_heads, spec.block_size, spec.head_size, vllm_config.model_config.dtype)


def memory_left(worker: Any) -> float:
    """The share of the KV cache's memory that is left to it in a worker whose model is loaded."""
    vllm_config = worker.vllm_config
    if not settings.is_chosen(vllm_config) or speculates_only(vllm_config):
        return 1.0
    specs = {
        name: spec
        for name, spec in worker.model_runner.get_kv_cache_spec().items()
        if type(spec) is FullAttentionSpec and not spec.attention_chunk_size
    }
    if not specs:
        return 1.0
    shard, spec = shard_of_this_process(vllm_config), next(iter(specs.values()))
    layers = [extract_layer_index(name) - shard.first_layer for name in specs]
    layers = [layer for layer in layers if 0 <= layer < shard.plan.num_layers]
    attention = HybridAttention(shard.plan, shard.settings.config, tuple(layers))
    beside = Beside(attention, _page(spec, vllm_config), torch.device("meta"))
    share = share_of_memory(beside.bytes_of_page, [spec.page_size_bytes for spec in specs.values()])
    if beside.is_used:
        logger.info("LycheeDecode: %.1f%% of the cache's memory holds data beside its pages.", 100 * (1 - share))
    return share


def able_layers(
    vllm_config: Any, layer_names: list[str], why_not: Callable[[Any], str | None], instead: str
) -> dict[str, Any]:
    """Attention layers whose implementation `why_not` has nothing against; the log says what becomes of the others."""
    modules = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
    why = {name: why_not(module.impl) for name, module in modules.items()}
    for reason, count in Counter(filter(None, why.values())).items():
        logger.warning_once("LycheeDecode: %d layers %s: %s.", count, instead, reason)
    return {name: module for name, module in modules.items() if why[name] is None}


def why_all_dense(vllm_config: Any, spec: Any, device: torch.device) -> str | None:
    """What keeps a whole cache group from hybrid decoding, as the end of a sentence."""
    parallel = vllm_config.parallel_config
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        return "context parallelism divides the tokens of a sequence"
    if parallel.enable_dbo:
        return "dual batch overlap cuts batches in two"
    if type(spec) is not FullAttentionSpec or spec.attention_chunk_size:  # of a window every layer says itself
        return "they do not look at the whole context"
    cache = vllm_config.cache_config
    if cache.cache_dtype in FLOAT8:
        if getattr(cache, "calculate_kv_scales", False):  # up to 0.27
            return "the scales of the KV cache are found while it is filled"
        if not has_float8(device):
            return "this GPU has no 8-bit floats"
    elif spec.dtype != vllm_config.model_config.dtype:
        return f"there are no kernels for a KV cache of {cache.cache_dtype} beside {vllm_config.model_config.dtype}"
    if getattr(spec, "head_size_v", spec.head_size) != spec.head_size:
        return "keys and values differ in size"
    if device.type != "cuda":
        return None
    return kernel_obstacle(torch.empty((0, 1, spec.head_size), dtype=vllm_config.model_config.dtype))


def why_dense(impl: Any) -> str | None:
    """What keeps a layer from hybrid decoding, as the end of a sentence."""
    unlike = {
        "they are not a decoder's own attention": impl.attn_type != AttentionType.DECODER,
        "they look through a sliding window": impl.sliding_window not in (None, -1, (-1, -1)),
        "their logits have a bias (ALiBi)": impl.alibi_slopes is not None,
        "their logits are capped": bool(impl.logits_soft_cap),
        "they read another layer's cache": getattr(impl, "kv_sharing_target_layer_name", None) is not None,
    }
    return next((reason for reason, holds in unlike.items() if holds), None)
