"""The kernels behind the contracts of `ops`; inside `torch.compile` they are custom operators, which it never opens.

Eager calls go to the kernels directly: an operator's dispatch takes longer than a small kernel runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..config import HybridConfig
from .attend.triton_blocks import attend_blocks as attend_sparsely
from .attend.triton_dense import attend as attend_densely
from .attend.triton_rows import attend_tokens
from .attend.triton_select import attend_select
from .scan import triton as scan
from .select import triton as select
from .select.rule import Rule
from .small_keys import SmallKeys
from .types import KV, Completion, Selections, Shares

__all__ = ["attend", "attend_blocks", "attend_select", "attend_tokens", "scan_blocks", "scan_select", "select_blocks"]


def scan_blocks(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    block_size: int,
    scale: float,
    score: str = "mass",
    copy: SmallKeys | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `ops.scan_blocks`."""
    run = _scan_blocks_operator if is_compiling() else _scan_blocks
    more = (*(copy or (None, None)), sinks, *(scales or (None, None)))
    return run(query, *kv, heads, block_size, scale, score, *more)


def select_blocks(
    scores: Tensor,
    kv: KV,
    config: HybridConfig,
    out: Selections,
    limits: Tensor | None = None,
    shares: Shares | None = None,
) -> None:
    """See `ops.select_blocks`."""
    run: Callable[..., None] = _select_blocks_operator if is_compiling() else _select_blocks
    run(scores, *kv, *Rule.of(config), *out, limits, shares and shares.numbers)


def scan_select(
    query: Tensor,
    kv: KV,
    heads: tuple[int, ...],
    config: HybridConfig,
    scale: float,
    out: Selections,
    copy: SmallKeys | None = None,
    limits: Tensor | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    shares: Shares | None = None,
    newest: int | None = None,
) -> None:
    """See `ops.scan_select`."""
    newest = config.refresh_every if newest is None else newest
    run: Callable[..., None] = _scan_select_operator if is_compiling() else _scan_select
    more = (*(copy or (None, None)), newest, limits, sinks, *(scales or (None, None)), shares and shares.numbers)
    run(query, *kv, heads, *Rule.of(config), scale, config.block_score, *out, *more)


def attend_blocks(
    query: Tensor,
    kv: KV,
    selections: Selections,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: tuple[int, ...] | None = None,
    out: Tensor | None = None,
    completion: Completion | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """See `ops.attend_blocks`."""
    if not is_compiling():
        forms: dict[str, Any] = {"completion": completion, "sinks": sinks, "scales": scales, "places": places}
        return attend_sparsely(query, kv, selections, rows, block_size, scale, heads, out=out, **forms)
    means = (None, None, 0, ()) if completion is None else completion
    more = (*means, sinks, *(scales or (None, None)), places)
    result = _attend_blocks_operator(query, *kv, *selections, rows, block_size, scale, heads, *more)
    return result if out is None else out.copy_(result)


def attend(
    query: Tensor,
    kv: KV,
    scale: float,
    heads: tuple[int, ...] | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `ops.attend`."""
    run = _attend_operator if is_compiling() else _attend
    return run(query, *kv, scale, heads, sinks, *(scales or (None, None)))


# ---------------------------------------------------------------------- tensors and numbers instead of our types


def _scan_blocks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    page_table: Tensor | None,
    heads: Sequence[int],
    block_size: int,
    scale: float,
    score: str,
    copy: Tensor | None,
    copy_scales: Tensor | None,
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    kv, scales = KV(keys, values, lengths, starts, page_table), _pair(key_scales, value_scales)
    return scan.scan_blocks(query, kv, tuple(heads), block_size, scale, score, _small(copy, copy_scales), sinks, scales)


def _select_blocks(
    scores: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    page_table: Tensor | None,
    strategy: str,
    amount: float,
    sink_tokens: int,
    recent_tokens: int,
    refresh_every: int,
    block_size: int,
    chunk_tokens: int,
    blocks: Tensor,
    counts: Tensor,
    taken: Tensor | None,
    limits: Tensor | None,
    shares: Sequence[int] | None,
) -> None:
    kv = KV(keys, values, lengths, starts, page_table)
    rule = Rule(strategy, amount, sink_tokens, recent_tokens, refresh_every, block_size, chunk_tokens)
    select.select_blocks(scores, kv, rule, Selections(blocks, counts, taken), None, limits, Shares.from_numbers(shares))


def _scan_select(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    page_table: Tensor | None,
    heads: Sequence[int],
    strategy: str,
    amount: float,
    sink_tokens: int,
    recent_tokens: int,
    refresh_every: int,
    block_size: int,
    chunk_tokens: int,
    scale: float,
    score: str,
    blocks: Tensor,
    counts: Tensor,
    taken: Tensor | None,
    copy: Tensor | None,
    copy_scales: Tensor | None,
    newest: int,
    limits: Tensor | None,
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    shares: Sequence[int] | None,
) -> None:
    kv, out = KV(keys, values, lengths, starts, page_table), Selections(blocks, counts, taken)
    of_rows = Shares.from_numbers(shares)
    select.check_selections(out, (select.num_rows(len(heads), of_rows), query.shape[0]))
    rule = Rule(strategy, amount, sink_tokens, recent_tokens, refresh_every, block_size, chunk_tokens)
    whole_up_to = out.whole_up_to(strategy, block_size, refresh_every, of_rows)
    small = _small(copy, copy_scales)
    asked = (query, kv, tuple(heads), block_size, scale, score, None, small, newest, whole_up_to)
    worth = scan.scan(*asked, limits, sinks, _pair(key_scales, value_scales))
    scores = scan.normalise(worth, kv, block_size, whole_up_to, limits)
    select.select_blocks(scores, kv, rule, out, None, limits, of_rows)


def _attend_blocks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    page_table: Tensor | None,
    blocks: Tensor,
    counts: Tensor,
    taken: Tensor | None,
    rows: Tensor,
    block_size: int,
    scale: float,
    heads: Sequence[int] | None,
    mean_keys: Tensor | None,
    mean_values: Tensor | None,
    chunk: int,
    factors: Sequence[float],
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    places: Tensor | None,
) -> Tensor:
    kv, selections = KV(keys, values, lengths, starts, page_table), Selections(blocks, counts, taken)
    completion = (
        None if mean_keys is None or mean_values is None else Completion(mean_keys, mean_values, chunk, tuple(factors))
    )
    scales = _pair(key_scales, value_scales)
    more: dict[str, Any] = {"completion": completion, "sinks": sinks, "scales": scales, "places": places}
    return attend_sparsely(query, kv, selections, rows, block_size, scale, _as_tuple(heads), **more)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    page_table: Tensor | None,
    scale: float,
    heads: Sequence[int] | None,
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> Tensor:
    kv, scales = KV(keys, values, lengths, starts, page_table), _pair(key_scales, value_scales)
    return attend_densely(query, kv, scale, _as_tuple(heads), sinks=sinks, scales=scales)


def _pair(keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if keys is None or values is None else (keys, values)


def _small(numbers: Tensor | None, scales: Tensor | None) -> SmallKeys | None:
    return None if numbers is None else SmallKeys(numbers, scales)


def _as_tuple(heads: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if heads is None else tuple(heads)


# ---------------------------------------------------------------------- the operators, and the shapes they return

_operator = torch.library.custom_op
_scan_blocks_operator = _operator("lycheedecode::scan_blocks", _scan_blocks, mutates_args=())
_select_blocks_operator = _operator(
    "lycheedecode::select_blocks", _select_blocks, mutates_args=("blocks", "counts", "taken")
)
_scan_select_operator = _operator(
    "lycheedecode::scan_select", _scan_select, mutates_args=("blocks", "counts", "taken", "copy", "copy_scales")
)
_attend_blocks_operator = _operator("lycheedecode::attend_blocks", _attend_blocks, mutates_args=())
_attend_operator = _operator("lycheedecode::attend", _attend, mutates_args=())


@_scan_blocks_operator.register_fake
def _(query, keys, values, lengths, starts, page_table, heads, block_size, scale, score, *more):
    slots = KV(keys, values, lengths, starts, page_table).slots
    num_blocks = (slots + block_size - 1) // block_size
    return query.new_empty((len(heads), query.shape[0], num_blocks), dtype=torch.float32)


@_attend_blocks_operator.register_fake
def _(query, keys, values, lengths, starts, page_table, blocks, counts, taken, rows, block_size, scale, heads, *more):
    group = query.shape[1] // keys.shape[1]
    return query.new_empty((query.shape[0], rows.shape[0] * group, query.shape[2]))


@_attend_operator.register_fake
def _(query, keys, values, lengths, starts, page_table, scale, heads, *more):
    group, count = query.shape[1] // keys.shape[1], keys.shape[1] if heads is None else len(heads)
    return query.new_empty((query.shape[0], count * group, query.shape[2]))
