"""`bench generate`: tokens a second from prompt to last token, ours and that of Hugging Face's `generate`.

    prompts -> Engine, full and hybrid -> Hugging Face, eager SDPA

Decoding is timed from the first new token to the last, the prefill up to the first; our forms share one. Every way
reads a short prompt before. Nothing is verified here: `bench step` and the tests do that; both sides say which tokens
they chose first, and how many of those are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..engine.engine import Context, Engine
from ..engine.prefix import shared_tokens
from ..errors import DeviceError
from ..models.versions import attention_name
from ..policies.base import roles_of
from .harness import show
from .models import build, check_positions, prompts_for, release
from .settings import FORMS, GenerateSettings
from .step import make_engine

Made = TypeVar("Made")
_WARM_UP = 2048
"""Tokens of each prompt that are read, and continued a little, before anything is timed."""


def run(settings: GenerateSettings, device: str) -> dict[str, Any]:
    """Generate with every way; greedy, never ending early."""
    model = build(settings.model, settings.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    check_positions(model, max(settings.contexts), settings.tokens)
    rows = []
    show(HEADER)
    for context in settings.contexts:
        for batch in settings.batches:
            prompts = prompts_for(model, batch, context)
            found = {row["way"]: row for row in _ours(model, prompts, settings)}
            release()  # before another cache of the same prompts
            for way in settings.ways:
                if way not in FORMS:
                    time_it = _from_host if way == "hybrid+host" else _transformers
                    time_it(model, prompts[:, :_WARM_UP], way, replace(settings, tokens=3))
                    release()
                    row, peak = _with_peak(device, partial(time_it, model, prompts, way, settings))
                    found[way] = {"way": way, **row, **peak}
                release()
            shape = {"batch": batch, "context": context}
            rows += _compared([{"way": way, **shape, **found[way]} for way in settings.ways])
    show("Speeds are those of decoding, without prefill; same: tokens equal to the first row's before one differs.")
    for way, execution in dict.fromkeys((row["way"], row["execution"]) for row in rows):
        show(f"{way}: {execution}")
    return {"rows": rows}


def _with_peak(device: str, make: Callable[[], Made]) -> tuple[Made, dict[str, int]]:
    """What `make` makes, and for its row the most memory of a GPU that it took."""
    if device != "cuda":
        return make(), {}
    torch.cuda.reset_peak_memory_stats()
    return make(), {"peak_bytes": torch.cuda.max_memory_allocated()}


def _ours(model: PreTrainedModel, prompts: Tensor, settings: GenerateSettings) -> Iterator[dict[str, Any]]:
    context: Context | None = None
    for form in settings.ways:
        if form not in FORMS:
            continue
        engine = make_engine(model, form, settings, settings.execution)
        device = engine.device.type
        if context is None:
            engine.prefill(prompts[:, :_WARM_UP].tolist())
            release()
            begun = _with_peak(device, partial(engine.prefill, prompts.tolist(), settings.tokens))
            context, read = begun
        row, made = _with_peak(device, partial(_generate, engine, context, settings))
        yield {"way": form, **row, **{name: max(made[name], read[name]) for name in made}}


def _from_host(model: PreTrainedModel, prompts: Tensor, _: str, settings: GenerateSettings) -> dict[str, Any]:
    engine = make_engine(model, "hybrid", settings, settings.execution, cache="host")
    return _generate(engine, engine.prefill(prompts.tolist(), room=settings.tokens), settings)


def _generate(engine: Engine, context: Context, settings: GenerateSettings) -> dict[str, Any]:
    results = engine.generate(context, settings.tokens, ignore_eos=True)
    plan = getattr(engine.attention, "plan", None)
    return {
        **({} if plan is None else {"retrieval_heads": len(roles_of(plan, engine.shape))}),
        "prefill_seconds": results[0].prefill_seconds,
        "decode_seconds": results[0].decode_seconds,
        "steps": settings.tokens - 1,
        "execution": engine.way,
        "token_ids": list(results[0].token_ids),
    }


class _Clock(BaseStreamer):
    """Notes when tokens arrive; `generate` hands the prompt in first.

    From the first token on, PyTorch may not take cuDNN, which plans anew for every length of the cache: on an H100
    that took 50 to 80 ms a token.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.tolist()  # waits for the device
        self.times.append(time.perf_counter())
        torch.backends.cuda.enable_cudnn_sdp(len(self.times) < 2)

    def end(self) -> None:
        pass


def _transformers(model: PreTrainedModel, prompts: Tensor, way: str, settings: GenerateSettings) -> dict[str, Any]:
    offloaded = way.endswith("+offloaded")
    if offloaded and not next(model.parameters()).is_cuda:
        raise DeviceError("Hugging Face's offloaded cache (transformers+offloaded) needs a CUDA GPU.")
    prompts, clock = prompts.to(next(model.parameters()).device), _Clock()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=settings.tokens,
            min_new_tokens=settings.tokens,
            do_sample=False,
            streamer=clock,
            cache_implementation="offloaded" if offloaded else None,
        )
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    began, first, *_rest, last = clock.times
    return {
        "prefill_seconds": first - began,
        "decode_seconds": last - first,
        "steps": settings.tokens - 1,
        "execution": f"eager, {attention_name(model.config)}{', cuDNN for prompts alone' * prompts.is_cuda}",
        "token_ids": tokens[0, prompts.shape[1] :].tolist(),
    }


def _compared(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second, the speed-up over Hugging Face, and how many tokens are the first case's."""
    base = next((case for case in cases if case["way"] == "transformers"), None)
    first = cases[0]["token_ids"]
    for case in cases:
        case["ms"] = case["decode_seconds"] / case["steps"] * 1e3
        case["tokens_per_second"] = case["batch"] * 1e3 / case["ms"]
        case["same_tokens"] = shared_tokens(first, case["token_ids"])
    for case in cases:
        del case["token_ids"]
        case["speedup"] = base and base["ms"] / case["ms"]
        show(format_row(case))
    return cases


HEADER = (
    f"{'':16} {'batch':>5} {'context':>8} {'prefill s':>9} {'ms/token':>8} {'tokens/s':>8} {'vs HF':>7} {'same':>5}"
)


def format_row(row: Mapping[str, Any]) -> str:
    """A line of the table under `HEADER`."""
    speedup = f"{row['speedup']:6.2f}x" if row["speedup"] else " " * 7
    speed = f"{row['prefill_seconds']:9.2f} {row['ms']:8.3f} {row['tokens_per_second']:8.1f} {speedup}"
    return f"{row['way']:16} {row['batch']:5} {row['context']:8} {speed} {row['same_tokens']:5}"
