"""`bench lossless` on real models: texts continued by full attention, and losslessly.

real    every way over one prefill: tokens a second, drafts that stood
exact   greedy and sampled texts of a ragged batch, for every budget: the first token that differs from full
        attention's has to be a near tie, which rounding decides in full attention itself
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any

import torch

from ..config import HybridConfig
from ..engine.context import Context
from ..engine.engine import Engine
from ..engine.generation import Generation
from ..engine.sampling import Sampler, Sampling
from ..engine.verify import spare_slots
from ..errors import ConfigError, MismatchError
from ..models.load import load_model
from ..plan import HeadPlan, bundled_plan_of
from ..prompts.text import load_text
from .harness import say
from .models import plan_for, release
from .settings import LosslessSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEAR = 4.0
"""Scores of two tokens are a near tie when they lie no further apart than so many times what rounding does to them."""
_TEMPERATURE = 0.7
_CHARACTERS = 6
"""Of a token, at most, in texts that are not odd."""


def _prompts(tokenizer: Any, settings: LosslessSettings, length: int, batch: int) -> list[list[int]]:
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


def _config(way: str, budget_tokens: int, settings: LosslessSettings, refresh: int, weights: str) -> HybridConfig:
    form: dict[str, Any] = {"budget_tokens": budget_tokens, "block_size": settings.block_size, "step_weights": weights}
    every = 0 if way == "hybrid" else int(way) if way.isdecimal() else way
    return HybridConfig(**form, refresh_every=refresh, verify_every=every)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- how fast


def bench_real(settings: LosslessSettings, device: str) -> list[dict[str, Any]]:
    """Texts continued in every way; the first one is full attention."""
    plan = HeadPlan.load(settings.plan) if settings.plan else bundled_plan_of(settings.model)
    if plan is None:
        raise ConfigError(f"No plan ships for {settings.model}: give one with --plan.")
    model, tokenizer = load_model(settings.model, device=device, dtype=settings.dtype)
    rows: list[dict[str, Any]] = []
    for length, batch in product(settings.contexts, settings.batches):
        rows += _real_case(model, tokenizer, plan, _prompts(tokenizer, settings, length, batch), length, settings)
    return rows


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
            ways[name] = _config(way, settings.budget_tokens, settings, refresh, weights)
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
        say(format_real(row))
        yield row
        del engine
        _forget(context)


def _forget(context: Context) -> None:
    """What engines keep with a context: graphs, and what they wrote beside the cache."""
    context._kept_steps.clear()
    context.cache.forget_state()
    release()


def _generate(engine: Engine, context: Context, settings: LosslessSettings) -> tuple[list[Generation], float]:
    """Texts, and the time of processors that they took, which tells more than a clock where others compute, too."""
    sampling = Sampling(temperature=settings.temperature or 0.0, seed=settings.seed)
    engine.generate(context, min(settings.tokens, 40), sampling=sampling, ignore_eos=True)  # compiles and captures
    began = time.process_time()
    return engine.generate(context, settings.tokens, sampling=sampling, ignore_eos=True), time.process_time() - began


def _same(one: Generation, other: Generation) -> int:
    """Tokens until the first that differs."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _real_row(name: str, results: list[Generation], first: list[Generation], length: int) -> dict[str, Any]:
    seconds = max(result.decode_seconds for result in results)
    total = sum(len(result.token_ids) - 1 for result in results)
    speed, base = total / seconds, sum(len(result.token_ids) - 1 for result in first)
    rounds, drafted, accepted = (sum(getattr(r, n) for r in results) for n in ("rounds", "drafted", "accepted"))
    return {
        "way": name, "batch": len(results), "context": length, "tokens": len(results[0].token_ids), "seconds": seconds,
        "tokens_per_second": speed, "speedup": speed / (base / max(result.decode_seconds for result in first)),
        "gained": total / rounds if rounds else 1.0, "stood": accepted / drafted if drafted else None,
        "same": [_same(a, b) for a, b in zip(results, first, strict=True)],
        "kv_bytes_per_token": sum(r.kv_bytes_per_token for r in results) / len(results),
    }  # fmt: skip


def format_real(row: Mapping[str, Any]) -> str:
    """A line for people."""
    if row["stood"] is None:
        stood = ""
    else:
        stood = f", {row['gained']:.2f} tokens a round, {row['stood']:.0%} of drafts accepted"
    return (
        f"{row['way']:40} {row['batch']} x {row['context']}: {row['tokens_per_second']:8.1f} tokens/s, "
        f"{row['speedup']:.2f}x, {row['cpu_seconds']:.1f} s of processors{stood}; first {min(row['same'])} to "
        f"{max(row['same'])} of {row['tokens']} tokens are full attention's"
    )


# ---------------------------------------------------------------------- how exact


def check_exact(settings: LosslessSettings, device: str) -> list[dict[str, Any]]:
    """Lossless texts against full attention's; raises `MismatchError` for a difference that is no near tie.

    Without a plan, and where none ships, it takes one of spread heads: the text must not depend on it.
    """
    if "hybrid" in settings.ways:
        raise ConfigError("parts=exact compares lossless texts, which hybrid alone does not write: take other ways.")
    model, tokenizer = load_model(settings.model, device=device, dtype=settings.dtype)
    plan = HeadPlan.load(settings.plan) if settings.plan else bundled_plan_of(settings.model) or plan_for(model)
    samplings = [Sampling(), *(Sampling(temperature=_TEMPERATURE, seed=seed) for seed in settings.seeds)]
    rows: list[dict[str, Any]] = []
    for length, batch in product(settings.contexts, settings.batches):
        prompts = [
            ids[i * length // (2 * batch) :] for i, ids in enumerate(_prompts(tokenizer, settings, length, batch))
        ]
        spare = max(spare_slots(_config(way, 1024, settings, 1, "model")) for way in settings.ways)
        full = Engine(model, tokenizer, execution=settings.execution)
        context = full.prefill(prompts, room=settings.tokens + spare)
        right = [full.generate(context, settings.tokens, sampling=one, ignore_eos=True) for one in samplings]
        for budget, way, weights in product(settings.budgets, settings.ways, settings.weights):
            config = _config(way, budget, settings, 1, weights)
            engine = Engine(model, tokenizer, plan=plan, config=config, execution=settings.execution)
            for sampling, expected in zip(samplings, right, strict=True):
                found = engine.generate(context, settings.tokens, sampling=sampling, ignore_eos=True)
                pairs = list(zip(prompts, found, expected, strict=True))
                near = [tie for i, pair in enumerate(pairs) if (tie := _tie(full, i, *pair, sampling))]
                case = {"budget_tokens": budget, "way": way, "weights": weights, "seed": sampling.seed}
                rows.append({**case, "context": length, **_exact_row(found, expected, near), "dtype": str(model.dtype)})
                say(format_exact(rows[-1]))
            _forget(context)
        _forget(context)
    return rows


def _exact_row(found: list[Generation], expected: list[Generation], near: list[dict[str, Any]]) -> dict[str, Any]:
    drafted, accepted = (sum(getattr(one, name) for one in found) for name in ("drafted", "accepted"))
    return {
        "batch": len(found),
        "tokens": len(expected[0].token_ids),
        "same": [_same(a, b) for a, b in zip(found, expected, strict=True)],
        "stood": accepted / drafted if drafted else None,
        "near_ties": near,
    }


def _tie(
    full: Engine, sequence: int, prompt: list[int], found: Generation, expected: Generation, sampling: Sampling
) -> dict[str, Any] | None:
    """How close the first two tokens that differ are; None if none do, `MismatchError` if rounding cannot explain it.

    Full attention's scores are computed in two shapes, a step and a prefill; how far they lie apart is the rounding.
    """
    at = _same(found, expected)
    if at == min(len(found.token_ids), len(expected.token_ids)):
        return None
    tokens = [*prompt, *expected.token_ids[:at]]
    context = full.prefill([tokens[:-1]], room=1)
    logits = [
        full.prefill([tokens]).logits,
        full.decode_one_token(context, torch.tensor(tokens[-1:], device=full.device)),
    ]
    sampler, place = Sampler(sampling, full.device), torch.tensor([sequence], device=full.device)
    scores = torch.cat([sampler.scores(one, place, at) for one in logits])
    chosen = scores[:, [found.token_ids[at], expected.token_ids[at]]]
    gap = float((chosen[:, 0] - chosen[:, 1]).abs().min())
    rounding = float((logits[0] - logits[1]).abs().max()) / (sampling.temperature or 1.0)
    tie = {"sequence": sequence, "token": at, "gap": gap, "rounding": rounding}
    if not gap <= _NEAR * rounding:
        raise MismatchError(
            f"sequence {sequence}, token {at}: {found.token_ids[at]} in place of full attention's "
            f"{expected.token_ids[at]}, whose score is {gap:.2e} higher where rounding moves scores by {rounding:.2e}."
        )
    return tie


def format_exact(row: Mapping[str, Any]) -> str:
    """A line for people."""
    how = "greedy" if row["seed"] is None else f"seed {row['seed']}"
    eight = ", 8-bit drafts" if row["weights"] == "float8" else ""
    equal = sum(same == row["tokens"] for same in row["same"])
    ties = "".join(
        f"; sequence {tie['sequence']} leaves at token {tie['token']}: a tie within {tie['gap']:.1e} where rounding is "
        f"{tie['rounding']:.1e}"
        for tie in row["near_ties"]
    )
    stood = "" if row["stood"] is None else f", {row['stood']:.0%} of drafts accepted"
    return (
        f"{row['dtype'].removeprefix('torch.')}, budget {row['budget_tokens']}, {row['way']} drafts{eight}, {how}: "
        f"{equal} of {row['batch']} texts of {row['tokens']} tokens are full attention's"
        f"{stood}{ties}"
    )
