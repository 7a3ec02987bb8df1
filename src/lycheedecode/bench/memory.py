"""`bench memory`: generation with the KV cache in host memory, by the size of the store, against a resident cache.

    prompts -> Engine, resident -> its tokens -> Engine, host, for every size of the store: the same tokens, or no times

Selections of trained models change little from token to token; those of random weights do as they like, so misses mean
something with a real model alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..config import HybridConfig
from ..engine.context import Context
from ..engine.engine import Engine
from ..errors import MismatchError
from ..results import Result
from .harness import say
from .models import build, plan_for, prompts_for, release
from .settings import MemorySettings


def run(settings: MemorySettings, device: str) -> dict[str, Any]:
    """Generate greedily, never ending early."""
    model = build(settings.model, settings.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    rows = []
    for context in settings.contexts:
        for batch in settings.batches:
            prompts = prompts_for(model, batch, context).tolist()
            resident, tokens = _resident(model, prompts, settings)
            release()
            for row in (resident, *_from_host(model, prompts, settings, tokens)):
                rows.append({"batch": batch, "context": context, **row})
                say(format_row(rows[-1]))
            release()
    return {"rows": rows}


def _engine(model: nn.Module, settings: MemorySettings, **options: Any) -> Engine:
    config = HybridConfig(budget_tokens=settings.budget_tokens, block_size=settings.block_size)
    return Engine(model, plan=plan_for(model), config=config, execution=settings.execution, **options)


def _resident(
    model: nn.Module, prompts: list[list[int]], settings: MemorySettings
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    engine = _engine(model, settings)
    row, tokens = _generated(engine, engine.prefill(prompts, room=settings.tokens), settings)
    return {"store_percent": None, **row}, tokens


def _from_host(
    model: nn.Module, prompts: list[list[int]], settings: MemorySettings, expected: list[tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    context = None
    for percent in settings.store_percents:
        engine = _engine(model, settings, cache="host", store_ratio=percent / 100)
        context = engine.prefill(prompts, room=settings.tokens) if context is None else context
        row, tokens = _generated(engine, context, settings)
        if tokens != expected:
            raise MismatchError(
                f"With a store of {percent}% of a selection, tokens differ from those of a resident cache."
            )
        yield {"store_percent": percent, **row}


def _generated(
    engine: Engine, context: Context, settings: MemorySettings
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    made = engine.generate(context, settings.tokens, ignore_eos=True)
    seconds, steps = max(one.decode_seconds for one in made), max(settings.tokens - 1, 1)
    times: dict[str, float | None] = {
        "prefill_seconds": made[0].prefill_seconds,
        "ms": seconds / steps * 1e3,
        "tokens_per_second": len(made) * steps / seconds,
    }
    if engine.device.type != "cuda":  # there is no link to wait for, so they say nothing
        times = dict.fromkeys(times)
    row = {
        **times,
        "bytes_on_gpu": made[0].bytes_on_gpu,
        "bytes_on_host": made[0].bytes_on_host,
        "peak_bytes": torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None,
        "miss_rate": sum(one.miss_rate for one in made) / len(made),
        "execution": engine.way,
    }
    return row, [one.token_ids for one in made]


HEADER = (
    f"{'store':>8} {'batch':>5} {'context':>8} {'prefill s':>9} {'ms/token':>9} {'GPU MB':>8} {'host MB':>8} {'new':>6}"
)


def format_row(row: Mapping[str, Any]) -> str:
    """A line of the table under `HEADER`."""
    store = "resident" if row["store_percent"] is None else f"{row['store_percent']}%"
    sizes = f"{row['bytes_on_gpu'] / 1e6:8.1f} {row['bytes_on_host'] / 1e6:8.1f}"
    times = " " * 19 if row["ms"] is None else f"{row['prefill_seconds']:9.2f} {row['ms']:9.3f}"
    return f"{store:>8} {row['batch']:5} {row['context']:8} {times} {sizes} {row['miss_rate']:6.1%}"


def lines(result: Result) -> Iterator[str]:
    """The measurements, a line each."""
    yield HEADER
    yield from (format_row(row) for row in result.rows)
    yield "Times are those of a GPU; none are given without."
    yield "store: in percent of a selection; new: share of selected blocks that were fetched, for every head."
