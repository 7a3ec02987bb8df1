"""What the benchmarks of operations run on: caches cut out of one pool of random numbers, and the calls to time.

    pool      | layer 0: keys, values | layer 1: keys, values | ...      as many layers as fit, at most the model's

Successive calls take successive layers, so that together they read more than the L2 holds. Caches have room for the
tokens to come, as they have in a generation: rows of blocks are longer than the context, and not by a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from math import ceil
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..attention import HybridAttention
from ..config import HybridConfig, ScanKeys
from ..ops import KV, Completion, Selections, SmallKeys, reference
from ..plan import HeadPlan
from .timing import Call

ROOM = 512
"""Slots of a cache that hold nothing yet."""
SMALL: tuple[tuple[str, ScanKeys], ...] = ("8-bit", "float8"), ("4-bit", "int4")
"""Copies that scans may read, as tables and settings call them."""


@dataclass(frozen=True)
class Shape:
    """The attention of a model."""

    query_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    layers: int = 32
    retrieval_heads: int = 32
    dtype: torch.dtype = torch.bfloat16

    @property
    def key_bytes(self) -> int:
        """Bytes of one key of one KV head."""
        return self.dim * self.dtype.itemsize

    @property
    def scale(self) -> float:
        return self.dim**-0.5


def make_pool(shape: Shape, tokens: int, device: torch.device | str) -> Tensor:
    """Random numbers for `tokens` keys and values of all KV heads of a layer."""
    return torch.empty(2 * tokens * shape.kv_heads * shape.dim, dtype=shape.dtype, device=device).normal_()


def spread_plan(shape: Shape) -> HeadPlan:
    """Retrieval heads all over the model: all of layer 0, the rest over every second layer; donors in turn."""
    spread = range(1, shape.layers, 2)
    chosen = [(0, head) for head in range(shape.kv_heads)]
    for i in range(shape.retrieval_heads - shape.kv_heads):
        chosen.append((spread[i % len(spread)], (3 * i + i // len(spread)) % shape.kv_heads))
    donors = []
    for layer in range(shape.layers):
        earlier = [head for head in sorted(chosen) if head[0] <= layer]
        donors.append(
            [
                (layer, head) if (layer, head) in chosen else earlier[(5 * layer + head) % len(earlier)]
                for head in range(shape.kv_heads)
            ]
        )
    return HeadPlan.from_donors(donors)


def uneven(plan: HeadPlan) -> HeadPlan:
    """The plan with budgets of heads from a quarter to four times the budget, in turn, whose mean is 1 or nearly so."""
    turn = cycle((0.5, 0.25, 4.0, 0.25, 0.5, 0.5, 1.0))
    return replace(plan, budgets=tuple(tuple(next(turn) for _ in row) for row in plan.donors))


@dataclass(frozen=True)
class Workload:
    """Decoding `batch` sequences of `context` tokens each.

    Attributes:
        shape: the model's attention.
        pool: random numbers, see `make_pool`.
        batch: sequences.
        context: tokens of each.
    """

    shape: Shape
    pool: Tensor
    batch: int
    context: int

    @property
    def slots(self) -> int:
        """Slots of a cache."""
        return self.context + ROOM

    @cached_property
    def caches(self) -> list[KV]:
        """One for each layer that fits into the pool, at least one and at most the model's."""
        return self._caches(self.slots)

    @cached_property
    def full_caches(self) -> list[KV]:
        """Contiguous ones, without room, as full attention of others wants them; in the same memory."""
        return self._caches(self.context)

    def _caches(self, slots: int) -> list[KV]:
        shape = self.shape
        sizes = (self.batch, shape.kv_heads, slots, shape.dim)
        half = self.batch * shape.kv_heads * slots * shape.dim
        layers = min(self.pool.numel() // (2 * half), shape.layers)
        lengths = torch.full((self.batch,), self.context, dtype=torch.int32, device=self.pool.device)
        halves = [self.pool[i * half : (i + 1) * half].view(sizes) for i in range(2 * layers)]
        return [KV(halves[2 * i], halves[2 * i + 1], lengths) for i in range(layers)]

    @cached_property
    def queries(self) -> list[Tensor]:
        """A query for each cache."""
        size = (len(self.caches), self.batch, self.shape.query_heads, self.shape.dim)
        return list(torch.randn(size, device=self.pool.device).to(self.shape.dtype))

    def inputs(self, i: int) -> tuple[Tensor, KV]:
        """Query and cache of the i-th call."""
        return self.queries[i % len(self.caches)], self.caches[i % len(self.caches)]

    def full_inputs(self, i: int) -> tuple[Tensor, KV]:
        """Query and cache of the i-th call of full attention, which has at least as many caches."""
        return self.queries[i % len(self.queries)], self.full_caches[i % len(self.queries)]

    # ------------------------------------------------------------------ bytes that must be read

    @property
    def dense_bytes(self) -> int:
        """Keys and values of one layer."""
        return 2 * self.scan_bytes(self.shape.kv_heads)

    def scan_bytes(self, heads: int, keys: ScanKeys = "cache") -> int:
        """Keys of some heads."""
        return self.batch * heads * self.context * ops.key_bytes(keys, self.shape.dim, self.shape.dtype.itemsize)

    def sparse_bytes(self, config: HybridConfig) -> int:
        """Keys and values of one layer's selections."""
        assert config.budget_blocks is not None, "benchmarks have a budget"
        tokens = min(config.budget_blocks * config.block_size, self.context)
        return 2 * self.batch * self.shape.kv_heads * tokens * self.shape.key_bytes

    def step_bytes(self, config: HybridConfig) -> int:
        """Keys and values that a hybrid step reads in all layers."""
        scanned = self.scan_bytes(self.shape.retrieval_heads, config.scan_keys)
        means = self.means_bytes(config) if config.completion == "centroid" else 0
        return scanned + self.shape.layers * (self.sparse_bytes(config) + means)

    def means_bytes(self, config: HybridConfig) -> int:
        """Mean keys and mean values of one layer's chunks."""
        chunks = (self.context - 1) // config.chunk_tokens
        return 2 * self.batch * self.shape.kv_heads * chunks * self.shape.key_bytes

    # ------------------------------------------------------------------ calls

    def scans(self, count: int, heads: int, config: HybridConfig) -> list[Call]:
        """`count` scans of `heads` heads, different ones each time; of copies if the config says so."""

        def scan(i: int) -> Any:
            (query, kv), chosen = self.inputs(i), self.some_heads(i, heads)
            copy = copies[i] if copies else None
            return ops.scan_blocks(query, kv, chosen, config.block_size, self.shape.scale, copy=copy)

        copies = [self.copy(i, heads, config.scan_keys) for i in range(count)] if config.scan_keys != "cache" else []
        return [partial(scan, i) for i in range(count)]

    def copy(self, i: int, heads: int, keys: ScanKeys) -> SmallKeys:
        """A copy of the keys of the i-th call's heads, in 8 or 4 bits."""
        kv, chosen = self.inputs(i)[1], self.some_heads(i, heads)
        copy = SmallKeys.allocate(keys, (self.batch, heads, kv.slots), self.shape.dim, self.pool.device)
        reference.write_copy(copy, kv.keys, chosen, 0, self.context)
        return copy

    def scan_selects(self, count: int, heads: int, config: HybridConfig) -> list[Call]:
        """Like `scans`, with the selection."""
        out = self.selections(config, heads)

        def scan_select(i: int) -> None:
            query, kv = self.inputs(i)
            ops.scan_select(query, kv, self.some_heads(i, heads), config, self.shape.scale, out)

        return [partial(scan_select, i) for i in range(count)]

    def attends(self, count: int, config: HybridConfig) -> list[Call]:
        """`count` layers of attention over random selections, a row for each head; completed if the config says so."""
        selections, rows = self.random_selections(config)
        means = [self.completion(i, config) for i in range(len(self.caches))]
        size, scale = config.block_size, self.shape.scale

        def attend(i: int) -> Tensor:
            (query, kv), completion = self.inputs(i), means[i % len(means)]
            return ops.attend_blocks(query, kv, selections, rows[i % len(rows)], size, scale, completion=completion)

        return [partial(attend, i) for i in range(count)]

    def completion(self, i: int, config: HybridConfig) -> Completion | None:
        """Completion over the i-th cache with factors of 1; None unless the config asks for it."""
        if config.completion != "centroid":
            return None
        kv, chunk = self.inputs(i)[1], config.chunk_tokens
        means = kv.keys.new_zeros((2, self.batch, self.shape.kv_heads, self.slots // chunk, self.shape.dim))
        keys, values = means
        ops.write_means(kv, chunk, keys, values)
        return Completion(keys, values, chunk, (1.0,) * self.shape.kv_heads)

    def step(self, config: HybridConfig) -> Call:
        """All attention of a decode step."""
        attention = HybridAttention(spread_plan(self.shape), config)
        state = attention.allocate(self.batch, self.slots, self.pool.device)
        inputs = [self.inputs(layer) for layer in range(self.shape.layers)]
        state.before_step(lambda layer: inputs[layer][1][:2], self.context, True)

        def step() -> None:
            for layer, (query, kv) in enumerate(inputs):
                attention(layer, query, kv, state, self.shape.scale)

        return step

    def some_heads(self, i: int, heads: int) -> tuple[int, ...]:
        """`heads` KV heads; the i-th choice shares none with the ones around it, as far as there are others."""
        first = i // len(self.caches) * heads
        return tuple(sorted((first + j) % self.shape.kv_heads for j in range(heads)))

    def selections(self, config: HybridConfig, rows: int) -> Selections:
        """Empty ones."""
        capacity = config.capacity_blocks(ceil(self.slots / config.block_size))
        chunks = self.slots // config.chunk_tokens if config.completion == "centroid" else 0
        return Selections.allocate(rows, self.batch, capacity, self.pool.device, chunks)

    def random_selections(self, config: HybridConfig) -> tuple[Selections, list[Tensor]]:
        """Full rows for every retrieval head of the model, and rows of donors for four layers."""
        num_rows, heads = self.shape.retrieval_heads, self.shape.kv_heads
        out, num_blocks = self.selections(config, num_rows), ceil(self.context / config.block_size)
        for r in range(num_rows):
            noise = torch.rand(self.batch, num_blocks, device=self.pool.device)
            out.blocks[r] = noise.topk(out.blocks.shape[2]).indices.sort(-1).values.int()
        out.counts.fill_(out.blocks.shape[2])
        if out.taken is not None:
            out.count_taken(config.chunk_tokens // config.block_size)
        row = torch.arange(num_rows, device=self.pool.device)
        return out, [row.roll(-heads * i)[:heads].clone() for i in range(max(num_rows // heads, 1))]
