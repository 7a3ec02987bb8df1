"""Compares one hybrid step with one of vLLM's own attention before accepting requests.

A small cache of random numbers is filled by vLLM's backend; then every hybrid layer decodes a token of three sequences
both ways. One gets everything, one is shorter than any budget, one is cut short. The first two must agree with vLLM;
of the third the kernels must agree with their definition. Layout and scales of the cache, what lies beside its pages,
sinks, kernels and the device are all in it.
"""

from __future__ import annotations

import copy
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ...ops import EVERYTHING, KV
from ...ops.attend import reference
from .parts import CommonAttentionMetadata, version
from .requests import ServingError

_TOLERANCES = {1: 0.15, 2: 0.03, 4: 2e-3}
"""Largest difference as a share of the largest output, by bytes of a number in the cache."""


def check(builder: Any, modules: dict[str, Any], device: torch.device) -> None:
    """Raise `ServingError` where a hybrid step of the builder's group goes wrong.

    Args:
        builder: of metadata, with a hybrid group.
        modules: the group's layers by name.
        device: of the cache.
    """
    group, spec = builder.hybrid, builder.kv_cache_spec
    rows = min(3, builder.vllm_config.scheduler_config.max_num_seqs)  # buffers hold no more
    longest = 3 * spec.block_size
    if group.attention.completed:  # by two chunks, unread as far as nothing forces them
        longest = max(longest, 2 * group.attention.config.chunk_tokens + 3)
    pages = [2, 6, *range(7, 5 + ceil(longest / spec.block_size))]
    lengths = [2 * spec.block_size + 3, 2, longest][:rows]
    table = [[*row, *[0] * (len(pages) - len(row))] for row in ([5, 1, 4], [3], pages)][:rows]
    common = _batch(lengths, table, spec.block_size, device)
    shape = (pages[-1] + 1, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
    group.beside.fit(shape[0])
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        limits = torch.tensor([EVERYTHING, EVERYTHING, _few(group)], dtype=torch.int32)
        group.limits_of(rows).copy_(limits[:rows])
        metadata = builder._build(rows, 0, common, False)
        stock = copy.copy(metadata)
        stock.hybrid = None
        for name in sorted(group.layers, key=group.layers.get):
            cache = torch.zeros(shape, dtype=spec.dtype, device=device)
            layer = modules[name]
            query, new = _fill(layer, cache, lengths, table, spec, made, device)
            kv = KV(*layer.impl.views(cache), common.seq_lens, None, common.block_table_tensor)
            group.beside.write({group.layers[name]}, lambda layer, kv=kv: kv, [0] * rows, lengths)
            outputs = [torch.zeros_like(query) for _ in range(2)]
            for output, of in zip(outputs, (metadata, stock), strict=True):
                given = _as_the_layer_gives_it(layer, query)
                layer.impl.forward(layer, given, *new, cache, of, output)
            right = _defined(layer, query, cache, metadata.hybrid, outputs[1])
            _compare(name, outputs[0], right, cache.dtype.itemsize, device)
        group.forget_step()


def _few(group: Any) -> int:
    config = group.attention.config
    return min(config.forced_blocks + 1, config.budget_blocks or config.forced_blocks + 1)


def _batch(lengths: list[int], table: list[list[int]], page: int, device: torch.device) -> CommonAttentionMetadata:
    """A step in which three sequences get a token each."""
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    last = [
        pages[(length - 1) // page] * page + (length - 1) % page for length, pages in zip(lengths, table, strict=True)
    ]
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        num_reqs=len(lengths),
        num_actual_tokens=len(lengths),
        max_query_len=1,
        max_seq_len=max(lengths),
        block_table_tensor=torch.tensor(table, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(last, device=device),
    )


def _fill(
    layer: Any,
    cache: Tensor,
    lengths: list[int],
    table: list[list[int]],
    spec: Any,
    made: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Let the backend write random keys and values; the newest tokens' queries, and their keys and values."""
    dtype, size = layer.dtype, spec.block_size
    slots = [
        pages[t // size] * size + t % size for pages, length in zip(table, lengths, strict=True) for t in range(length)
    ]
    heads, dim = spec.num_kv_heads, spec.head_size
    asked = len(lengths) * layer.num_heads
    numbers = torch.randn(2 * len(slots) * heads + asked, dim, generator=made).to(device, dtype)
    keys, values = numbers[: 2 * len(slots) * heads].view(2, len(slots), heads, dim)
    query = numbers[2 * len(slots) * heads :].view(len(lengths), layer.num_heads, dim)
    layer.impl.do_kv_cache_update(layer, keys, values, cache, torch.tensor(slots, device=device))
    newest = torch.tensor(lengths).cumsum(0) - 1
    return query, (keys[newest], values[newest])


def _as_the_layer_gives_it(layer: Any, query: Tensor) -> Tensor:
    """Some layers hand the backend queries in 8 bits, where the cache has 8 bits."""
    if getattr(layer, "query_quant", None) is None:
        return query
    flat = query.reshape(query.shape[0], -1)
    return layer.query_quant(flat, layer._q_scale)[0].view(query.shape)


def _defined(layer: Any, query: Tensor, cache: Tensor, step: Any, stock: Tensor) -> Tensor:
    """The right output: vLLM's, but for the third sequence what is defined for its selections."""
    group = step.group
    index = group.layers[layer.layer_name]
    if group.attention.config.retrieval_attention == "full":
        return torch.cat((stock[:2], torch.full_like(stock[2:], float("nan"))))
    more = {**layer.impl.extras(layer), "completion": group.attention.completion_of(index, step.state)}
    kv = KV(*layer.impl.views(cache), step.lengths, None, step.page_table)
    rows = torch.tensor(group.attention.plan.donor_rows(index), device=query.device)
    size = group.attention.config.block_size
    cut = reference.attend_blocks(query, kv, step.state.selections, rows, size, layer.impl.scale, None, **more)
    return torch.cat((stock[:2], cut[2:].to(stock.dtype)))


def _compare(name: str, found: Tensor, right: Tensor, itemsize: int, device: torch.device) -> None:
    known = ~right.isnan()
    off = float((found.float() - right.float())[known].abs().max() / right.float()[known].abs().max())
    if not off <= _TOLERANCES[itemsize]:
        raise ServingError(
            f"LycheeDecode does not serve: in its self-check a step of {name} was {off:.1%} off vLLM's own attention "
            f"(vLLM {version}, {_name(device)}); please report this."
        )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
