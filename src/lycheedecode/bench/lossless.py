"""`bench lossless`: what a round costs, part by part, and what real models gain end to end.

    attend   attention of 1, 5, 9, 16 query tokens over one cache       they should take the time of one
    rounds   a full step, a draft, the pass, a whole round              random weights say nothing of acceptance: the
             of a model with random weights                             tokens that a round yields are given
    real     texts continued by full attention, and losslessly          how many drafts are accepted? how fast?
    exact    the same, with many budgets and seeds                      are all tokens full attention's?

Passes are verified against full steps before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import HybridConfig
from ..engine.context import Context
from ..engine.engine import Engine
from ..engine.sampling import Sampling
from ..engine.verify import Rounds, spare_slots
from ..errors import DeviceError
from ..ops import KV
from ..ops.attend import triton_dense, triton_rows
from ..ops.kernel_common import Tuning
from .harness import say, show
from .lossless_exact import check_exact
from .lossless_texts import bench_real
from .models import MODELS, build, plan_for, random_context, release
from .settings import LosslessSettings
from .timing import read_bandwidth, time_calls
from .verify import check_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 1, 5, 9, 16
_ROOM = 128
"""Slots for the tokens that timed steps and rounds append."""


def run(settings: LosslessSettings, device: str) -> Iterator[dict[str, Any]]:
    """Verify and time, a row after the other; raises `MismatchError` in place of times that mean nothing."""
    if "attend" in settings.parts and device == "cpu":
        raise DeviceError("Attention of several tokens is timed on a CUDA GPU.")
    parts = {"attend": bench_attend, "rounds": bench_rounds, "real": bench_real, "exact": check_exact}
    for part in settings.parts:
        for row in parts[part](settings, device):
            yield {"part": part, **row}


# ---------------------------------------------------------------------- attention


def bench_attend(settings: LosslessSettings, _: str) -> Iterator[dict[str, Any]]:
    """Times of a layer for every context, batch and number of query tokens, as a share of the read bandwidth."""
    pool = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    bandwidth = read_bandwidth(pool)
    del pool
    shape = MODELS[settings.model][1]
    heads, kv_heads, dim = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for context in settings.contexts:
        for batch in settings.batches:
            for dtype in (torch.bfloat16, torch.float8_e4m3fn):
                store = torch.randn(2, batch, kv_heads, context, dim, dtype=torch.bfloat16, device="cuda").to(dtype)
                kv = KV(store[0], store[1], torch.full((batch,), context, dtype=torch.int32, device="cuda"))
                for row in _attend_rows(kv, heads, settings.tune):
                    row |= {"batch": batch, "context": context, "dtype": str(dtype).removeprefix("torch.")}
                    row |= {"tb_s": store.nbytes / row["ms"] / 1e9, "share": store.nbytes / row["ms"] * 1e3 / bandwidth}
                    show(format_attend(row))
                    yield row
                del store, kv
                release()


def format_attend(row: Mapping[str, Any]) -> str:
    """A line for people."""
    case = f"{row['op']:9} T {row['tokens']:2} {row['batch']} x {row['context']} {row['dtype']}"
    return f"{case}: {row['ms']:.4f} ms, {row['tb_s']:.2f} TB/s, {row['share']:.1%}  {row['tuning']}"


def _attend_rows(kv: KV, heads: int, tune: bool) -> Iterator[dict[str, Any]]:
    batch, kv_heads, _, dim = kv.keys.shape
    eight_bits, scale, pairs = kv.keys.dtype == torch.float8_e4m3fn, dim**-0.5, batch * kv_heads
    scales = (torch.ones(kv_heads, device="cuda"),) * 2 if eight_bits else None
    query = torch.randn(batch, max(TOKENS), heads, dim, dtype=torch.bfloat16, device="cuda")
    one = partial(triton_dense.attend, query[:, 0].contiguous(), kv, scale, scales=scales)
    cases: list[tuple[str, int, Tuning, Callable[..., Any]]]
    cases = [("one token", 1, triton_dense.default_tuning(pairs, kv), one)]
    for tokens in TOKENS:
        several = partial(triton_rows.attend_tokens, query[:, :tokens].contiguous(), kv, scale, scales=scales)
        usual = triton_rows.default_tuning(pairs, tokens * heads // kv_heads, kv)
        cases.append(("several", tokens, usual, several))
    for op, tokens, usual, attend in cases:
        for tuning in _tunings(usual, pairs) if tune and (op == "one token" or tokens == 9) else [usual]:
            try:
                timing = time_calls([partial(attend, tuning=tuning)])
            except Exception as error:  # a launch that this GPU cannot hold is one less to choose from
                say(f"{tuple(tuning)}: {type(error).__name__}")
                continue
            yield {"op": op, "tokens": tokens, "tuning": str(tuple(tuning)), "ms": timing.ms}


def _tunings(usual: Tuning, pairs: int) -> list[Tuning]:
    """Launches around the usual one."""
    splits = [16, 33, 49] if pairs <= 16 else [4, 8, 12]
    shapes = (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (32, 4, 4), (32, 4, 3)
    return [usual, *(Tuning(s, *shape, usual.pdl) for s in splits for shape in shapes)]


# ---------------------------------------------------------------------- rounds


def bench_rounds(settings: LosslessSettings, device: str) -> Iterator[dict[str, Any]]:
    """Times of a full step, a draft, a pass and a round; raises `MismatchError` before it times a wrong pass."""
    for weights, drafts in product(settings.weights, settings.drafts):
        settings.yield_of(drafts, weights)  # what cannot be said is refused before the model is there
    model = build(settings.model, settings.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    for length in settings.contexts:
        for batch in settings.batches:
            spare = spare_slots(HybridConfig(verify_every=max(settings.drafts)))
            context = random_context(model, batch, length, _ROOM + spare)
            full_ms = _full_ms(model, context, settings)
            for weights, drafts in product(settings.weights, settings.drafts):
                for refresh in sorted({min(refresh, drafts) for refresh in settings.refresh}):
                    case = {"drafts": drafts, "refresh": refresh, "weights": weights}
                    row: dict[str, Any] = {"batch": batch, "context": length, "full_ms": full_ms, **case}
                    row |= _round(model, context, settings, drafts, refresh, weights, full_ms)
                    show(format_round(row))
                    yield row
            del context
            release()


def _full_ms(model: PreTrainedModel, context: Context, settings: LosslessSettings) -> float:
    engine = Engine(model, execution=settings.execution)
    token_ids = torch.full((len(context.prompt_lengths),), 7, device=engine.device)
    context.rewind()
    ms = _ms(lambda: engine.decode_one_token(context, token_ids), settings.steps, engine.device)
    context.rewind()
    return ms


def _round(
    model: PreTrainedModel,
    context: Context,
    settings: LosslessSettings,
    drafts: int,
    refresh: int,
    weights: str,
    full_ms: float,
) -> dict[str, Any]:
    began = time.perf_counter()
    engine, rounds = make_rounds(model, context, settings, drafts, refresh, weights)
    made = time.perf_counter() - began
    error = _verified(engine, rounds, context)
    with torch.inference_mode(), engine._decoder.route:
        parts = {name: _ms(part, settings.steps, engine.device, rounds.rewind) for name, part in rounds.parts.items()}

        def whole() -> None:
            for draft in range(drafts):
                rounds.parts["keep" if draft % refresh else "select"]()
            rounds.parts["verify"]()

        round_ms = _ms(whole, max(settings.steps // 4, 2), engine.device, rounds.rewind)
    yielded = settings.yield_of(drafts, weights)
    return {
        **{f"{name}_ms": ms for name, ms in parts.items()},
        "round_ms": round_ms,
        "tokens_per_round": yielded,
        "ms_per_token": round_ms / yielded,
        "speedup": full_ms * yielded / round_ms,
        "error": error,
        "way": engine.way,
        "first_seconds": made,
    }


def make_rounds(
    model: PreTrainedModel, context: Context, settings: LosslessSettings, drafts: int, refresh: int, weights: str
) -> tuple[Engine, Rounds]:
    """Rounds over a context, compiled and captured, and the engine that they belong to."""
    form: dict[str, Any] = {"budget_tokens": settings.budget_tokens, "block_size": settings.block_size}
    form |= {"step_weights": weights}
    config = HybridConfig(**form, refresh_every=refresh, verify_every=drafts)
    engine = Engine(model, plan=plan_for(model), config=config, execution=settings.execution)
    context.rewind()
    return engine, Rounds.over(engine._decoder, engine._full, context, Sampling(), config)


def _verified(engine: Engine, rounds: Rounds, context: Context) -> float:
    """Relative error of the logits of a pass against full steps over the same tokens."""
    full = Engine(engine.model, execution="eager")
    token_ids = torch.randint(4, 200, (len(context.prompt_lengths), rounds.tokens), device=engine.device)

    def steps() -> Tensor:
        context.rewind()
        return torch.stack([full.decode_one_token(context, one) for one in token_ids.unbind(1)], 1)

    def verifying() -> Tensor:
        context.rewind()
        return rounds.verify_logits(token_ids)

    return check_logits(f"logits of the pass of {rounds.tokens} tokens", verifying, steps)[0]


def _ms(run: Callable[[], Any], times: int, device: torch.device, between: Callable[[], Any] | None = None) -> float:
    """Mean milliseconds of calls in a row, so that the host is ahead as in a generation."""

    def several(count: int) -> None:
        for _ in range(count):
            if between is not None:
                between()
            run()

    several(3)
    if device.type != "cuda":
        began = time.perf_counter()
        several(times)
        return (time.perf_counter() - began) * 1e3 / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    several(times)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def format_round(row: Mapping[str, Any]) -> str:
    """A line for people."""
    keep = f", without scan {row['keep_ms']:.3f}" if "keep_ms" in row else ""
    eight = " in 8 bits" if row["weights"] == "float8" else ""
    return (
        f"{row['batch']} x {row['context']}, {row['drafts']} drafts{eight}, selected every {row['refresh']}: full step "
        f"{row['full_ms']:.3f} ms, draft {row['select_ms']:.3f}{keep}, pass {row['verify_ms']:.3f}, round "
        f"{row['round_ms']:.3f}; if a round yields {row['tokens_per_round']} tokens: {row['ms_per_token']:.3f} ms a "
        f"token, {row['speedup']:.2f}x  (error {row['error']:.1e}, {row['way']})"
    )
