"""Real models: texts continued with the cache in host memory, by the size of the store, against a resident cache.

prompts -> Engine, resident -> its tokens -> Engine, host, for every budget and size of the store: the same tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..config import HybridConfig
from ..engine.context import Context
from ..engine.engine import Engine
from ..engine.generation import Generation
from ..errors import ConfigError, MismatchError
from ..models.load import load_model
from ..plan import HeadPlan
from ..prompts.text import load_text
from .models import MODELS, build, check_positions, plan_for, prompts_for, release
from .settings import MemorySettings

Tokens = Mapping[int, list[tuple[int, ...]]]
"""Token ids of each sequence, by budget."""


def bench_texts(settings: MemorySettings, device: str) -> Iterator[dict[str, Any]]:
    """Generate greedily, never ending early."""
    model, tokenizer, plan = _model(settings, device)
    check_positions(model, max(length for _, length in settings.pairs), settings.tokens)
    for batch, length in settings.pairs:
        prompts = _prompts(model, tokenizer, batch, length, settings)
        expected: dict[int, list[tuple[int, ...]]] = {}
        size = {"batch": batch, "context": length}
        for row in _resident(model, plan, prompts, settings, expected):
            yield {**size, **row}
        release()
        for row in _from_host(model, plan, prompts, settings, expected):
            yield {**size, **row}
        release()


def _model(settings: MemorySettings, device: str) -> tuple[nn.Module, Any, HeadPlan]:
    if settings.model in MODELS:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = build(settings.model, settings.layers, device, dtype)
        return model, None, plan_for(model)
    if settings.layers:
        raise ConfigError("--layers cuts random models only.")
    plan = HeadPlan.load(settings.plan or settings.model)
    # Kernels give the same bits wherever a cache lies; a CPU has two ways to attend, which round 16 bits differently.
    return *load_model(settings.model, device=device, dtype="auto" if device == "cuda" else "float32"), plan


def _prompts(model: nn.Module, tokenizer: Any, batch: int, length: int, settings: MemorySettings) -> list[list[int]]:
    """Random tokens for random weights, slices of the texts in turn for a real model."""
    if tokenizer is None:
        return prompts_for(model, batch, length).tolist()
    prompts: list[list[int]] = []
    for i, source in enumerate(settings.texts):
        count = len(range(i, batch, len(settings.texts)))
        ids = tokenizer(load_text(source), verbose=False)["input_ids"] if count else []
        if count and len(ids) < length:
            raise ConfigError(f"{source} has {len(ids)} tokens, not {length}.")
        begins = (j * (len(ids) - length) // count for j in range(count))
        prompts += [ids[begin : begin + length] for begin in begins]
    return prompts


def _engine(model: nn.Module, plan: HeadPlan, settings: MemorySettings, budget: int, **options: Any) -> Engine:
    config = HybridConfig(budget_tokens=budget, block_size=settings.block_size)
    options |= {"prefill_chunk": settings.prefill_chunk, "execution": settings.execution}
    return Engine(model, plan=plan, config=config, **options)


def _resident(
    model: nn.Module, plan: HeadPlan, prompts: list[list[int]], settings: MemorySettings,
    expected: dict[int, list[tuple[int, ...]]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    context = None
    for budget in settings.budgets:
        engine = _engine(model, plan, settings, budget)
        context = engine.prefill(prompts, room=settings.tokens) if context is None else context
        row, expected[budget] = _generated(engine, context, settings)
        yield {"cache": "resident", "budget_tokens": budget, "store_percent": None, **row}


def _from_host(
    model: nn.Module, plan: HeadPlan, prompts: list[list[int]], settings: MemorySettings, expected: Tokens
) -> Iterator[dict[str, Any]]:
    context = None
    for budget in settings.budgets:
        for percent in settings.store_percents:
            engine = _engine(model, plan, settings, budget, cache="host", store_ratio=percent / 100)
            context = engine.prefill(prompts, room=settings.tokens) if context is None else context
            row, tokens = _generated(engine, context, settings)
            other = [i for i, (one, two) in enumerate(zip(tokens, expected[budget], strict=True)) if one != two]
            if other:
                raise MismatchError(
                    f"With a store of {percent}% of a selection of {budget} tokens, tokens of {len(other)} of "
                    f"{len(tokens)} sequences differ from those of a resident cache."
                )
            yield {"cache": "host", "budget_tokens": budget, "store_percent": percent, **row}


def _generated(
    engine: Engine, context: Context, settings: MemorySettings
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    on_gpu, half = engine.device.type == "cuda", (settings.tokens + 1) // 2
    _from_the_start(engine, context, half)
    early = _fetched(context)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    made = _from_the_start(engine, context, settings.tokens)
    asked, missed = (count - before for count, before in zip(_fetched(context), early, strict=True))
    seconds, steps = max(one.decode_seconds for one in made), max(settings.tokens - 1, 1)
    times = {
        "prefill_seconds": made[0].prefill_seconds,
        "ms": seconds / steps * 1e3,
        "tokens_per_second": len(made) * steps / seconds,
    }
    row = {
        **(times if on_gpu else {}),  # there is no link to wait for elsewhere, so times say nothing
        "bytes_on_gpu": made[0].bytes_on_gpu,
        "bytes_on_host": made[0].bytes_on_host,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "miss_rate": sum(one.miss_rate for one in made) / len(made),
        "later_miss_rate": missed / asked if asked else 0.0,
        "tokens": sum(len(one.token_ids) for one in made),
        "execution": engine.way,
    }
    return row, [one.token_ids for one in made]


def _from_the_start(engine: Engine, context: Context, tokens: int) -> list[Generation]:
    """Generate with a store that is empty at first."""
    context.kept_steps.clear()
    context.cache.forget_state()
    release()
    return engine.generate(context, tokens, ignore_eos=True)


def _fetched(context: Context) -> tuple[float, float]:
    """Blocks of all sequences that were selected and that were missing, so far."""
    counts = [context.cache.fetches(b) for b in range(len(context.prompt_lengths))]
    return sum(asked for asked, _ in counts), sum(missed for _, missed in counts)
