"""`bench lossless --parts real`: texts continued by full attention, hybrid and losslessly, all over one prefill."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from ..config import HybridConfig
from ..engine.context import Context
from ..engine.engine import Engine
from ..engine.generation import Generation
from ..engine.prefix import shared_tokens
from ..engine.sampling import Sampling
from ..engine.verify import spare_slots
from ..errors import ConfigError
from ..models.load import load_model
from ..plan import HeadPlan, bundled_plan_of
from ..prompts.text import load_text
from .harness import say, show
from .models import check_positions, release
from .settings import LosslessSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHARACTERS = 6
"""Most characters of a token, in ordinary text."""


def prompts_of(tokenizer: Any, settings: LosslessSettings, length: int, batch: int) -> list[list[int]]:
    """Slices from all over the texts."""
    rows: list[list[int]] = []
    for i, source in enumerate(settings.texts):
        text, share = load_text(source), len(settings.texts)
        count = batch * (i + 1) // share - batch * i // share
        last = max(len(text) - _CHARACTERS * length, 0)
        rows += [_slice(tokenizer, source, text[at * last // max(count - 1, 1) :], length) for at in range(count)]
    return rows


def _slice(tokenizer: Any, source: str, text: str, length: int) -> list[int]:
    """The first tokens of a text, of which no more is read than that takes."""
    size = 0
    while size < len(text):
        size = max(2 * size, _CHARACTERS * length)
        ids: list[int] = tokenizer(text[:size], verbose=False)["input_ids"]
        if len(ids) > length:
            return ids[:length]
    raise ConfigError(f"{source} has {len(text)} characters only, too few for a prompt of {length} tokens.")


def config_of(way: str, budget_tokens: int, settings: LosslessSettings, refresh: int, weights: str) -> HybridConfig:
    """The config of one of `LosslessSettings.ways`."""
    form: dict[str, Any] = {"budget_tokens": budget_tokens, "block_size": settings.block_size, "step_weights": weights}
    every = 0 if way == "hybrid" else int(way) if way.isdecimal() else way
    return HybridConfig(**form, refresh_every=refresh, verify_every=every)  # type: ignore[arg-type]


def bench_real(settings: LosslessSettings, device: str) -> Iterator[dict[str, Any]]:
    """Texts continued in every way; the first one is full attention."""
    plan = HeadPlan.load(settings.plan) if settings.plan else bundled_plan_of(settings.model)
    if plan is None:
        raise ConfigError(f"No plan ships for {settings.model}: give one with --plan.")
    model, tokenizer = load_model(settings.model, device=device, dtype=settings.dtype)
    check_positions(model, max(settings.contexts), settings.tokens)
    for length, batch in product(settings.contexts, settings.batches):
        prompts = prompts_of(tokenizer, settings, length, batch)
        yield from _real_case(model, tokenizer, plan, prompts, length, settings)


def _real_case(
    model: PreTrainedModel,
    tokenizer: Any,
    plan: HeadPlan,
    prompts: list[list[int]],
    length: int,
    settings: LosslessSettings,
) -> Iterator[dict[str, Any]]:
    ways: dict[str, HybridConfig | None] = {"full": None}
    for way, weights in product(settings.ways, settings.weights):
        for refresh in settings.refresh if way != "hybrid" else [1]:
            eight = ", 8-bit drafts" if weights == "float8" else ""
            name = f"{way}, selected every {refresh}{eight}"
            ways[name] = config_of(way, settings.budget_tokens, settings, refresh, weights)
    spare = max(spare_slots(config) for config in ways.values() if config is not None)
    context = Engine(model, tokenizer).prefill(prompts, room=settings.tokens + spare)
    say(f"{len(prompts)} x {length}: prefill in {context.prefill_seconds:.1f} s")
    first: list[Generation] = []
    for name, config in ways.items():
        engine = Engine(
            model, tokenizer, plan=None if config is None else plan, config=config, execution=settings.execution
        )
        results, cpu_seconds = _generate(engine, context, settings)
        first = first or results
        row = _real_row(name, results, first, length)
        row |= {"cpu_seconds": cpu_seconds, "prefill_seconds": context.prefill_seconds}
        show(format_real(row))
        yield row
        del engine
        forget(context)


def forget(context: Context) -> None:
    """Drop what engines keep with a context: graphs, and what they wrote beside the cache."""
    context._kept_steps.clear()
    context.cache.forget_state()
    release()


def _generate(engine: Engine, context: Context, settings: LosslessSettings) -> tuple[list[Generation], float]:
    """Texts, and the processor time that they took: a clock says less where other work shares the machine."""
    sampling = Sampling(temperature=settings.temperature or 0.0, seed=settings.seed)
    engine.generate(context, min(settings.tokens, 40), sampling=sampling, ignore_eos=True)  # compiles and captures
    began = time.process_time()
    return engine.generate(context, settings.tokens, sampling=sampling, ignore_eos=True), time.process_time() - began


def _real_row(name: str, results: list[Generation], first: list[Generation], length: int) -> dict[str, Any]:
    seconds = max(result.decode_seconds for result in results)
    total = sum(len(result.token_ids) - 1 for result in results)
    speed, base = total / seconds, sum(len(result.token_ids) - 1 for result in first)
    rounds, drafted, accepted = (sum(getattr(r, n) for r in results) for n in ("rounds", "drafted", "accepted"))
    return {
        "way": name, "batch": len(results), "context": length, "tokens": len(results[0].token_ids), "seconds": seconds,
        "tokens_per_second": speed, "speedup": speed / (base / max(result.decode_seconds for result in first)),
        "tokens_per_round": total / rounds if rounds else 1.0,
        "accepted_share": accepted / drafted if drafted else None,
        "same": [shared_tokens(a.token_ids, b.token_ids) for a, b in zip(results, first, strict=True)],
        "kv_bytes_per_token": sum(r.kv_bytes_per_token for r in results) / len(results),
    }  # fmt: skip


def format_real(row: Mapping[str, Any]) -> str:
    """A line for people."""
    if row["accepted_share"] is None:
        drafts = ""
    else:
        drafts = f", {row['tokens_per_round']:.2f} tokens a round, {row['accepted_share']:.0%} of drafts accepted"
    return (
        f"{row['way']:40} {row['batch']} x {row['context']}: {row['tokens_per_second']:8.1f} tokens/s, "
        f"{row['speedup']:.2f}x, {row['cpu_seconds']:.1f} s of processors{drafts}; first {min(row['same'])} to "
        f"{max(row['same'])} of {row['tokens']} tokens are full attention's"
    )
