"""`bench ops --tune`: which launch constants are fastest on this GPU; what wins goes into the kernels by hand.

    candidates -> compiled by many processes, into Triton's cache -> each compared with the default, then timed

Only launches that compute the same are timed; one that does not fit the GPU is left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from ..config import HybridConfig
from .timing import Call, read_bandwidth, rotations, time_calls
from .verify import relative_error
from .workload import Shape, Workload, make_pool

KERNELS = ("attend_blocks", "attend", "scan", "select")
SHORT = 2048
"""Tokens with which launches are compiled ahead: enough to be specialised like any longer context."""


@dataclass(frozen=True)
class Candidate:
    """One way to launch a kernel."""

    kernel: str
    batch: int
    heads: int
    block: int
    splits: int
    tile: int
    warps: int
    stages: int
    early: bool

    def __str__(self) -> str:
        early = " early" if self.early else ""
        return f"splits {self.splits:3} tile {self.tile:5} warps {self.warps:2} stages {self.stages}{early}"


def candidates(kernel: str, batch: int, block: int, context: int, kv_heads: int) -> Iterator[Candidate]:
    """The grid of a kernel, on a batch."""
    pairs = batch * kv_heads
    if kernel == "attend_blocks":
        splits = [s for s in (4, 8, 16, 32, 64) if 64 <= pairs * s <= 1024]
        for s, tile, warps, stages in product(splits, (32, 64, 128), (2, 4), (1, 2, 3)):
            yield Candidate(kernel, batch, kv_heads, block, s, tile, warps, stages, False)
            if stages == 2:
                yield Candidate(kernel, batch, kv_heads, block, s, tile, warps, stages, True)
    elif kernel == "attend":
        splits = [s for s in (4, 8, 16, 32, 64) if 128 <= pairs * s <= 1024]
        for s, tile, (warps, stages) in product(splits, (64, 128), ((4, 2), (4, 3), (4, 4), (8, 3))):
            yield Candidate(kernel, batch, kv_heads, block, s, tile, warps, stages, False)
    elif kernel == "scan":
        for heads in (1, kv_heads):
            splits = [s for s in (8, 16, 32, 64, 128, 256, 512) if 128 <= batch * heads * s <= 1024]
            for s, tile, (warps, stages) in product(splits, (64, 128, 256), ((4, 2), (4, 3), (4, 4), (8, 3))):
                if tile >= block:
                    yield Candidate(kernel, batch, heads, block, s, tile, warps, stages, False)
    else:
        blocks = context // block
        for heads, warps, early in product((1, kv_heads), (4, 8, 16, 32), (False, True)):
            yield Candidate(kernel, batch, heads, block, 64, max(blocks, 64), warps, 1, early)


def tune(
    batches: Sequence[int], contexts: Sequence[int], blocks: Sequence[int], kernels: Sequence[str], budget_tokens: int
) -> dict[str, Any]:
    """Time every candidate of the kernels; prints the best few of each workload."""
    if not torch.cuda.is_available():
        raise ValueError("There is no CUDA GPU here: launches can be tuned on one only.")
    kernels = kernels or KERNELS
    unknown = sorted(set(kernels) - set(KERNELS))
    if unknown:
        raise ValueError(f"There is no kernel {unknown[0]!r} to tune; there are {', '.join(KERNELS)}.")
    shape = Shape()
    workloads = [(kernel, batch, context, block) for kernel in kernels for context in contexts for batch in batches
                 for block in (blocks if kernel != "attend" else blocks[:1])]  # fmt: skip
    grids = {work: list(candidates(work[0], work[1], work[3], work[2], shape.kv_heads)) for work in workloads}
    _compile_ahead(sorted({c for grid in grids.values() for c in grid}, key=str), budget_tokens)
    pool = make_pool(shape, max(8 * 131072, max(batches) * max(contexts)), "cuda")
    bandwidth = read_bandwidth(pool)
    print(f"read bandwidth: {bandwidth / 1e12:.2f} TB/s", flush=True)
    found = []
    for (kernel, batch, context, block), grid in grids.items():
        work = Workload(shape, pool, batch, context)
        config = HybridConfig(budget_tokens=budget_tokens, block_size=block)
        for heads in sorted({candidate.heads for candidate in grid}):
            rows = _time_grid(work, config, [c for c in grid if c.heads == heads], bandwidth)
            print(f"{kernel}, {heads} heads, batch {batch}, context {context}, blocks of {block}", flush=True)
            print(*(f"  {row['launch']}  {row['us']:8.2f} us  {row['share']:6.1%}" for row in rows[:6]), sep="\n")
            found += [{"kernel": kernel, "heads": heads, "batch": batch, "context": context, "block": block, **row}
                      for row in rows]  # fmt: skip
    return {"read_tb_s": bandwidth / 1e12, "candidates": found}


def _time_grid(work: Workload, config: HybridConfig, grid: list[Candidate], bandwidth: float) -> list[dict[str, Any]]:
    rows, right = [], None
    for candidate in grid:
        try:
            size, calls = launches(candidate, work, config)
            result = calls[0]()
            right = result.clone() if right is None else right
            error = relative_error(result, right)
            if not error < 1e-2:
                print(f"  {candidate}: wrong by {error:.1e}", file=sys.stderr, flush=True)
                continue
            ms = time_calls(calls, 0.03).ms
        except Exception as error:  # shared memory or registers that the GPU does not have, as Triton reports them
            print(f"  {candidate}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr, flush=True)
            continue
        rows.append({"launch": str(candidate), "us": ms * 1e3, "share": size / bandwidth * 1e3 / ms})
    return sorted(rows, key=lambda row: row["us"])


def launches(candidate: Candidate, work: Workload, config: HybridConfig) -> tuple[int, list[Call]]:
    """Bytes that a call must read, and calls in this way of launching; each returns what it computed."""
    from ..ops.triton.common import Tuning

    make: dict[str, Callable[..., tuple[int, Callable[[int], Tensor]]]] = {
        "attend_blocks": _attend_blocks, "attend": _attend, "scan": _scan, "select": _select
    }  # fmt: skip
    torch.manual_seed(0)  # the same selections for every candidate
    tuning = Tuning(candidate.splits, candidate.tile, candidate.warps, candidate.stages, candidate.early)
    size, call = make[candidate.kernel](candidate, work, config, tuning)
    small = candidate.kernel in ("attend_blocks", "select")
    count = rotations(size, 32 if small else 4, 64) if size else 32
    return size, [lambda i=i: call(i) for i in range(count)]


def _attend_blocks(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from ..ops.triton.attend_blocks import attend_blocks

    selections, rows = work.random_selections(config)

    def call(i: int) -> Tensor:
        query, kv = work.inputs(i)
        scale, block = work.shape.scale, config.block_size
        return attend_blocks(query, kv, selections, rows[i % len(rows)], block, scale, None, tuning)

    return work.sparse_bytes(config), call


def _attend(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from ..ops.triton.attend import attend

    return work.dense_bytes, lambda i: attend(*work.inputs(i), work.shape.scale, None, tuning)


def _scan(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from ..ops.triton.scan import scan

    def call(i: int) -> Tensor:
        query, kv = work.inputs(i)
        heads = work.some_heads(i, candidate.heads)
        return scan(query, kv, heads, config.block_size, work.shape.scale, "mass", tuning).worth

    return work.scan_bytes(candidate.heads), call


def _select(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from ..ops.triton.scan import scan
    from ..ops.triton.select import Rule, select_from_scan

    query, kv = work.inputs(0)
    rule, out = Rule.of(config), work.selections(config, candidate.heads)
    heads = work.some_heads(0, candidate.heads)
    worth = scan(query, kv, heads, config.block_size, work.shape.scale, "mass", tuning._replace(tile=64, warps=4))

    def call(i: int) -> Tensor:
        select_from_scan(worth, kv, rule, out, tuning)
        return out.blocks

    return 0, call


def _compile_ahead(grid: list[Candidate], budget_tokens: int) -> None:
    """Compile in as many processes as there are cores; what fails will fail again where it is timed."""
    workers = min(len(os.sched_getaffinity(0)), 14, len(grid))
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        list(processes.map(_compile_some, [grid[i::workers] for i in range(workers)], [budget_tokens] * workers))


def _compile_some(grid: list[Candidate], budget_tokens: int) -> None:
    shape = Shape()
    pool = make_pool(shape, SHORT * 8, "cuda")
    for candidate in grid:
        config = HybridConfig(budget_tokens=min(budget_tokens, SHORT // 2), block_size=candidate.block)
        try:
            launches(candidate, Workload(shape, pool, candidate.batch, SHORT), config)[1][0]()
        except Exception as error:
            print(f"  {candidate}: {type(error).__name__}", file=sys.stderr, flush=True)
