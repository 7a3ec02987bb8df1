"""`python -m experiments tune-memory`: which launches of fetches, and how far ahead, make a whole step fastest.

    python -m experiments tune-memory --model llama-3-8b --cases 3x131072 --budgets 4096 --store-percents 200 \\
        --readings share --reuse docs/results/h100-memory-qwen2.5-coder-1.5b.json

A fetch beside the model takes processors from it, which a search of fetches alone would not see. From the defaults, one
setting after the other is varied in steps over a replayed `bench memory`, and what is faster by more than the noise
stays. What wins goes into `ops/fetch/triton.py` and `engine/offload/store.py` by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch

from lycheedecode.bench.harness import show
from lycheedecode.bench.memory_steps import ReplayedCase, cases, intervals
from lycheedecode.bench.settings import MemorySettings
from lycheedecode.bench.step import event_now
from lycheedecode.engine.context import Context
from lycheedecode.engine.engine import Engine
from lycheedecode.engine.offload import store

NOISE = 0.003
"""What must be gained, as a share of a step."""
GROUPS: tuple[tuple[dict[str, int], ...], ...] = (
    (
        {"programs": 16, "warps": 4, "piece": 1024},
        {"programs": 64, "warps": 4, "piece": 1024},
        {"programs": 128, "warps": 1, "piece": 256},
        {"programs": 32, "warps": 2, "piece": 512},
        {"programs": 16, "warps": 8, "piece": 2048},
    ),
    (
        {"programs_alone": 64},
        {"programs_alone": 256},
        {"programs_alone": 128, "warps_alone": 4, "piece_alone": 1024},
    ),
    ({"plan_warps": 1}, {"plan_warps": 8}),
    ({"window": 1}, {"window": 3}),
)
"""Changes that exclude each other; of every group the best one stays."""


@torch.inference_mode()
def tune(settings: MemorySettings, device: str) -> dict[str, Any]:
    """Rows of all that was tried, for every case."""
    rows: list[dict[str, Any]] = []
    for case in cases(settings, device):
        if isinstance(case, ReplayedCase):
            rows += _search(case, settings.steps)
    return {"rows": rows}


def _search(case: ReplayedCase, steps: int) -> Iterator[dict[str, Any]]:
    best: dict[str, int] = {}
    ms, row = _timed(case, best, steps)
    yield row
    for group in GROUPS:
        found = []
        for change in group:
            other, row = _timed(case, best | change, steps)
            found.append((other, change))
            yield row
        fastest, change = min(found, key=lambda one: one[0])
        if fastest < ms * (1 - NOISE):
            ms, best = fastest, best | change
    ms, row = _timed(case, best, steps)
    yield row | {"best": True}


def _timed(case: ReplayedCase, changes: dict[str, int], steps: int) -> tuple[float, dict[str, Any]]:
    """Median ms of a step, on average over the ways to decode."""
    with _changed(changes):
        times = {}
        for what, engine, context in case.filled():
            name = f"{what['form']}, {what['reading']}, {what['store_percent']}%"
            times[name] = median(_step_ms(engine, context, steps))
    ms = mean(times.values())
    show(f"{ms:8.3f} ms  {changes or 'defaults'}")
    return ms, {"batch": what["batch"], "context": what["context"], "changes": changes, "ms": ms, "ms_by_way": times}


@contextmanager
def _changed(changes: dict[str, int]) -> Iterator[None]:
    """Engines that are made and steps that are captured while this is open are launched so."""
    from lycheedecode.ops.fetch import triton

    launch, window = triton.LAUNCH, store._WINDOW
    triton.LAUNCH = launch._replace(**{name: value for name, value in changes.items() if name != "window"})
    store._WINDOW = changes.get("window", window)
    try:
        yield
    finally:
        triton.LAUNCH, store._WINDOW = launch, window


def _step_ms(engine: Engine, context: Context, steps: int) -> list[float]:
    token_ids = torch.full((len(context.prompt_lengths),), 7, device=engine.device)
    events = [event_now(engine.device)]
    for _ in range(steps):
        engine.decode_one_token(context, token_ids)
        events.append(event_now(engine.device))
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return intervals(events)
