"""`bench ops`: the operations of a decode step on this GPU, verified first, then timed against the memory's speed.

    for every batch and context    verify -> full attention, ours and others' -> scan, select, attend -> a whole step

Time is that of a CUDA graph's replay (see `timing`). Bytes are those that an operation must read at least once; their
share of the bound is how long reading them alone takes, over how long the operation took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .. import ops
from ..config import HybridConfig
from ..errors import MismatchError, first_line
from .baselines import all_baselines
from .harness import show
from .settings import OpsSettings
from .timing import Call, read_bandwidth, rotations, time_calls
from .verify import check_close, verify
from .workload import ROOM, SMALL, Shape, Workload, make_pool


@dataclass(frozen=True)
class OpRow:
    """One measurement.

    Attributes:
        op: what ran.
        batch, context, block: on what; block 0 where there are none.
        ms: median time of one call.
        spread: slowest over fastest tenth of the replays.
        bytes: that it must read.
        share: of the bound: time to read them at the measured bandwidth over `ms`; None where bytes do not rule.
        speedup: over the same work by the fastest full attention.
    """

    op: str
    batch: int
    context: int
    block: int
    ms: float
    spread: float
    bytes: int
    share: float | None
    speedup: float | None


@dataclass
class Meter:
    """Times calls on one GPU of known read bandwidth (bytes a second)."""

    bandwidth: float
    seconds: float
    rows: list[OpRow]

    def add(
        self, op: str, work: Workload, block: int, calls: Sequence[Call], size: int, full_ms: float | None = None
    ) -> OpRow:
        """Time calls that each must read `size` bytes; `full_ms`: the same work by full attention."""
        timing = time_calls(calls, self.seconds)
        share = size / self.bandwidth * 1e3 / timing.ms if size else None
        speedup = None if full_ms is None else full_ms / timing.ms
        spread = timing.slow_ms / timing.fast_ms
        row = OpRow(op, work.batch, work.context, block, timing.ms, spread, size, share, speedup)
        self.rows.append(row)
        show(format_row(row))
        return row


@torch.inference_mode()
def run(settings: OpsSettings, device: str, shape: Shape | None = None) -> dict[str, Any]:
    """Verify and time all operations; raises `MismatchError`, and then there are no times."""
    if settings.smoke:
        return smoke(device)
    shape = shape or Shape()
    tokens = int(settings.pool_gib * 2**30) // (2 * shape.kv_heads * shape.key_bytes)
    pool = make_pool(shape, max(tokens, max(settings.batches) * (max(settings.contexts) + ROOM)), device)
    meter = Meter(read_bandwidth(pool), settings.seconds, [])
    show(f"This GPU reads {meter.bandwidth / 1e12:.2f} TB/s.\n{HEADER}")
    errors: list[dict[str, Any]] = []
    notes: list[str] = []
    configs = [HybridConfig(budget_tokens=settings.budget_tokens, block_size=size) for size in settings.block_sizes]
    for context in settings.contexts:
        for batch in settings.batches:
            work = Workload(shape, pool, batch, context)
            for config in configs:
                what = {"batch": batch, "context": context, "block": config.block_size}
                errors.append({**what, **verify(work, config)})
            _time_reading(meter, work)
            full_ms = _time_full(meter, work, notes)
            for config in configs:
                _time_hybrid(meter, work, config, full_ms)
    return {
        "read_tb_s": meter.bandwidth / 1e12,
        "rows": [asdict(row) for row in meter.rows],
        "errors": errors,
        "notes": notes,
    }


def _time_reading(meter: Meter, work: Workload) -> None:
    """Time a mere read of the bytes that a scan and full attention read: the floor of their launches."""
    from . import read

    words, out = work.pool.view(-1).view(torch.int32), read.scratch(work.pool.device)
    for what, size in (("keys", work.scan_bytes(work.shape.kv_heads)), ("keys and values", work.dense_bytes)):
        parts = words.split(size // 4)[: rotations(size, 4, 32)]
        ways = [[lambda part=part, way=way: read.read_all(part, out, way) for part in parts] for way in read.WAYS]
        fastest = min(ways, key=lambda calls: time_calls(calls, 0.02).ms)
        meter.add(f"read only, {what}", work, 0, fastest, size)


def _time_full(meter: Meter, work: Workload, notes: list[str]) -> float:
    """Full attention by everyone who can; returns the least time of a layer."""
    best = float("inf")
    count = rotations(work.dense_bytes, 4, 32)
    scale = work.shape.scale
    right = ops.attend(*work.full_inputs(0), scale)
    for name, make in all_baselines().items():
        try:
            calls = [make(*work.full_inputs(i), scale) for i in range(count)]
            check_close(name, calls[0](), right, 2e-2)
            best = min(best, meter.add(f"full, {name}", work, 0, calls, work.dense_bytes).ms)
        except (ImportError, RuntimeError, MismatchError) as error:
            if name == "ours":
                raise
            why = f"{type(error).__name__}: {first_line(error)}"
            notes.append(f"full, {name}, batch {work.batch}, context {work.context}: {why}")
            show(notes[-1])
    return best


def _time_hybrid(meter: Meter, work: Workload, config: HybridConfig, full_ms: float) -> None:
    block, heads = config.block_size, work.shape.kv_heads
    small = SMALL if ops.has_float8(work.pool.device) else ()
    for count in (1, heads):
        size = work.scan_bytes(count)
        calls = work.scans(rotations(size, 8, 64), count, config)
        meter.add(f"scan, {_heads(count)}", work, block, calls, size)
        for bits, keys in small:
            less, scanned = replace(config, scan_keys=keys), work.scan_bytes(count, keys)
            copied = work.scans(rotations(scanned, 8, 64), count, less)
            meter.add(f"scan, {_heads(count)}, {bits}", work, block, copied, scanned)
            del copied
        meter.add(f"scan + select, {_heads(count)}", work, block, work.scan_selects(len(calls), count, config), size)
        scores, out = calls[0](), work.selections(config, count)
        select = _select_call(scores, work, config, out)
        meter.add(f"select, {_heads(count)}", work, block, [select] * 16, 0)
    size = work.sparse_bytes(config)
    meter.add("attend", work, block, work.attends(rotations(size, 32, 64), config), size, full_ms)
    completed = replace(config, completion="centroid")
    more = size + work.means_bytes(completed)
    meter.add("attend, completed", work, block, work.attends(rotations(more, 32, 64), completed), more, full_ms)
    forms = {"all of a step": config, "the same, completed": completed}
    forms |= {f"the same, {bits} scan": replace(config, scan_keys=keys) for bits, keys in small}
    for name, form in forms.items():
        meter.add(name, work, block, [work.step(form)], work.step_bytes(form), work.shape.layers * full_ms)


def _select_call(scores: torch.Tensor, work: Workload, config: HybridConfig, out: ops.Selections) -> Call:
    return lambda: ops.select_blocks(scores, work.caches[0], config, out)


def smoke(device: str) -> dict[str, Any]:
    """Verify the operations on small shapes, nothing else; runs anywhere."""
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        shape = Shape(query_heads=8, kv_heads=2, dim=64, layers=4, retrieval_heads=4, dtype=dtype)
        pool = make_pool(shape, 2 * 3 * 1000, device)
        for block in (16, 64):
            config = HybridConfig(budget_tokens=256, block_size=block)
            for batch, context in ((1, 1000), (3, 777)):
                work = Workload(shape, pool, batch, context)
                what = {"dtype": str(dtype), "batch": batch, "context": context, "block": block}
                errors.append({**what, **verify(work, config)})
    show(f"verified {len(errors)} workloads")
    return {"rows": [], "errors": errors}


# ---------------------------------------------------------------------- what is shown

HEADER = (
    f"{'operation':24} {'batch':>5} {'context':>8} {'block':>5} {'ms':>9} {'TB/s':>6} {'of bound':>8} {'vs full':>8}"
)


def format_row(row: OpRow) -> str:
    """A line of the table under `HEADER`."""
    speed = f"{row.bytes / row.ms / 1e9:6.2f}" if row.bytes else " " * 6
    share = f"{row.share:8.1%}" if row.share is not None else " " * 8
    speedup = f"{row.speedup:7.2f}x" if row.speedup is not None else ""
    block = row.block or ""
    return f"{row.op:24} {row.batch:5} {row.context:8} {block:>5} {row.ms:9.4f} {speed} {share} {speedup}".rstrip()


def _heads(count: int) -> str:
    return "1 head" if count == 1 else f"{count} heads"
