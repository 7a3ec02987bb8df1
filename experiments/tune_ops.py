"""`python -m experiments tune-ops`: which launches are fastest on this GPU; what wins goes into the kernels by hand.

    candidates -> compiled by many processes, into Triton's cache -> each compared with the default, then timed

Only launches that compute the same are timed; one that does not fit the GPU is left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from math import ceil
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from lycheedecode.bench.harness import say, show
from lycheedecode.bench.settings import BenchSettings, check_names
from lycheedecode.bench.timing import Call, read_bandwidth, rotations, time_calls
from lycheedecode.bench.verify import relative_error
from lycheedecode.bench.workload import ROOM, Shape, Workload, make_pool
from lycheedecode.config import HybridConfig

KERNELS = ("scan", "select", "attend_blocks", "attend")


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
    pdl: int

    def __str__(self) -> str:
        launch = f"splits {self.splits:3} tile {self.tile:5} warps {self.warps:2} stages {self.stages}"
        return f"{launch} pdl {self.pdl}"


SHAPES = {
    "scan": ((128, 4, 3), (128, 4, 2), (64, 4, 4), (64, 4, 3), (64, 2, 4), (128, 8, 3), (256, 8, 2), (256, 8, 3)),
    "attend": ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 2), (128, 8, 3), (64, 8, 4), (32, 4, 5)),
    "attend_blocks": (
        (64, 4, 4), (64, 4, 3), (64, 4, 2), (64, 2, 2), (64, 2, 3), (32, 2, 2), (32, 2, 3), (32, 2, 4), (32, 1, 3),
        (16, 1, 4), (32, 4, 4), (128, 4, 2), (128, 8, 1), (128, 4, 1), (64, 4, 1), (64, 2, 1),
    ),
}  # fmt: skip
"""Tiles, warps and stages that are worth a try."""
PROGRAMS = 128, 1056
"""Fewest and most programs of a launch, in all."""


def candidates(kernel: str, batch: int, block: int, kv_heads: int) -> Iterator[Candidate]:
    """The grid of a kernel, on a batch; the first launch also without an early start (`pdl`), to compare."""
    for heads in (1, kv_heads) if kernel in ("scan", "select") else (kv_heads,):
        if kernel == "select":
            for warps, pdl in product((4, 8, 16, 32), (1, 0)):
                yield Candidate(kernel, batch, heads, block, 1, 32 * warps, warps, 1, pdl)
            continue
        two_each = {264 // (batch * heads)} if kernel == "attend" else set()  # programs, on an H200's processors
        numbers = sorted({2**i for i in range(11)} | two_each)
        splits = [s for s in numbers if PROGRAMS[0] <= batch * heads * s <= PROGRAMS[1]]
        for i, (s, (tile, warps, stages)) in enumerate(product(splits, SHAPES[kernel])):
            if tile >= block or kernel != "scan":
                for pdl in (1, 0) if i == 0 else (1, 2) if kernel == "attend_blocks" else (1,):
                    yield Candidate(kernel, batch, heads, block, s, tile, warps, stages, pdl)


@dataclass(frozen=True, kw_only=True)
class TuneOpsSettings(BenchSettings):
    """What `tune-ops` searches.

    Attributes:
        kernels: of scan, select, attend_blocks, attend.
        batches: sequences decoded together.
        contexts: tokens of each sequence.
        block_sizes: tokens of a block.
    """

    kernels: tuple[str, ...] = KERNELS
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (32768, 131072, 524288)
    block_sizes: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("kernels", self.kernels, KERNELS)


@torch.inference_mode()
def tune(settings: TuneOpsSettings, device: str) -> dict[str, Any]:
    """Time every candidate of the kernels; prints the best few of each workload."""
    batches, contexts, blocks = settings.batches, settings.contexts, settings.block_sizes
    budget_tokens, shape = settings.budget_tokens, Shape()
    workloads = [(kernel, batch, context, block) for kernel in settings.kernels for context in contexts
                 for batch in batches for block in (blocks if kernel != "attend" else blocks[:1])]  # fmt: skip
    grids = {work: list(candidates(work[0], work[1], work[3], shape.kv_heads)) for work in workloads}
    _compile_ahead([(c, work[2]) for work, grid in grids.items() for c in grid], budget_tokens)
    pool = make_pool(shape, max(8 * 131072, max(batches) * (max(contexts) + ROOM)), "cuda")
    bandwidth = read_bandwidth(pool)
    show(f"read bandwidth: {bandwidth / 1e12:.2f} TB/s")
    found = []
    for (kernel, batch, context, block), grid in grids.items():
        work = Workload(shape, pool, batch, context)
        config = HybridConfig(budget_tokens=budget_tokens, block_size=block)
        for heads in sorted({candidate.heads for candidate in grid}):
            rows, left_out = _time_grid(work, config, [c for c in grid if c.heads == heads], bandwidth)
            show(f"{kernel}, {heads} heads, batch {batch}, context {context}, blocks of {block}{left_out}")
            show("\n".join(map(_format, rows[:6])))
            found += [{"kernel": kernel, "heads": heads, "batch": batch, "context": context, "block": block, **row}
                      for row in rows]  # fmt: skip
    return {"read_tb_s": bandwidth / 1e12, "candidates": found}


def _format(row: dict[str, Any]) -> str:
    share = f"{row['share']:7.1%} of the read bandwidth" if row["share"] else ""
    return f"  {row['launch']}  {row['us']:8.2f} us  {share}".rstrip()


def _time_grid(
    work: Workload, config: HybridConfig, grid: list[Candidate], bandwidth: float
) -> tuple[list[dict[str, Any]], str]:
    """The candidates that work, fastest first, and how many do not."""
    rows, right = [], None
    failed: Counter[str] = Counter()
    for candidate in grid:
        try:
            size, calls = launches(candidate, work, config)
            result = calls[0]()
            right = result.clone() if right is None else right
            if not difference(result, right) < 1e-2:
                failed["wrong"] += 1
                say(f"  {candidate}: wrong by {difference(result, right):.1e}")
                continue
            ms = time_calls(calls, 0.02).ms
        except Exception as error:  # shared memory or registers that the GPU does not have, as Triton reports them
            failed[type(error).__name__] += 1
            continue
        rows.append({"launch": str(candidate), "us": ms * 1e3, "share": size / bandwidth * 1e3 / ms})
    left_out = "".join(f"; {count} {what}" for what, count in failed.items())
    return sorted(rows, key=lambda row: row["us"]), left_out


def difference(result: Tensor, right: Tensor) -> float:
    """Relative error; of selections, which are integers, the share of blocks that differ."""
    if result.is_floating_point():
        return relative_error(result, right)
    return 1.0 - (result[..., :, None] == right[..., None, :]).any(-1).float().mean().item()


def launches(candidate: Candidate, work: Workload, config: HybridConfig) -> tuple[int, list[Call]]:
    """Bytes that a call must read, and calls in this way of launching; each returns what it computed."""
    from lycheedecode.ops.kernel_common import Tuning

    make: dict[str, Callable[..., tuple[int, Callable[[int], Tensor]]]] = {
        "scan": _scan, "select": _select, "attend_blocks": _attend_blocks, "attend": _attend,
    }  # fmt: skip
    torch.manual_seed(0)  # the same selections for every candidate
    tuning = Tuning(candidate.splits, candidate.tile, candidate.warps, candidate.stages, candidate.pdl)
    size, call = make[candidate.kernel](candidate, work, config, tuning)
    small = candidate.kernel in ("attend_blocks", "select")
    count = rotations(size, 32 if small else 4, 64) if size else 32
    return size, [lambda i=i: call(i) for i in range(count)]


def _attend_blocks(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from lycheedecode.ops.attend.triton_blocks import attend_blocks

    selections, rows = work.random_selections(config)

    def call(i: int) -> Tensor:
        query, kv = work.inputs(i)
        scale, block = work.shape.scale, config.block_size
        return attend_blocks(query, kv, selections, rows[i % len(rows)], block, scale, None, tuning)

    return work.sparse_bytes(config), call


def _attend(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from lycheedecode.ops.attend.triton_dense import attend

    return work.dense_bytes, lambda i: attend(*work.full_inputs(i), work.shape.scale, None, tuning)


def _scan(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from lycheedecode.ops.scan.triton import scan

    def call(i: int) -> Tensor:
        query, kv = work.inputs(i)
        heads = work.some_heads(i, candidate.heads)
        return scan(query, kv, heads, config.block_size, work.shape.scale, "mass", tuning).worth

    return work.scan_bytes(candidate.heads), call


def _select(candidate: Candidate, work: Workload, config: HybridConfig, tuning: Any) -> tuple[int, Any]:
    from lycheedecode.ops.select.triton import Rule, select_blocks

    kv, rule, out = work.caches[0], Rule.of(config), work.selections(config, candidate.heads)
    shape = (candidate.heads, work.batch, ceil(kv.slots / config.block_size))
    scores = (2 * torch.randn(shape, device=work.pool.device)).softmax(-1)

    def call(i: int) -> Tensor:
        select_blocks(scores, kv, rule, out, tuning)
        return out.blocks

    return 0, call


def _compile_ahead(grid: list[tuple[Candidate, int]], budget_tokens: int) -> None:
    """Compile candidates, with their contexts, in as many processes as there are cores."""
    workers = min(len(os.sched_getaffinity(0)), 14, len(grid))
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        list(processes.map(_compile_some, [grid[i::workers] for i in range(workers)], [budget_tokens] * workers))


def _compile_some(grid: list[tuple[Candidate, int]], budget_tokens: int) -> None:
    """Launches that stop short of running: caches of the right shape, with no memory behind them, are enough."""
    from triton.runtime.jit import JITFunction

    torch.set_num_threads(1)
    run = JITFunction.run
    JITFunction.run = lambda self, *values, grid, warmup, **constants: run(
        self, *values, grid=grid, warmup=True, **constants
    )
    shape = Shape()
    for candidate, context in grid:
        tokens = candidate.batch * (context + ROOM)
        pool = torch.empty(2 * tokens * shape.kv_heads * shape.dim, dtype=shape.dtype)
        config = HybridConfig(budget_tokens=budget_tokens, block_size=candidate.block)
        with suppress(Exception):  # what fails will fail again where it is timed, and be counted
            launches(candidate, Workload(shape, pool, candidate.batch, context), config)[1][0]()
