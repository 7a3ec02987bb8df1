"""`bench step`: a whole decode step of a model with random weights, verified first, then timed against the memory.

    for every context and batch    compiled steps = eager steps? -> time of full attention -> of hybrid attention

A step is what `Engine` does for a token: the model, our attention, the choice of the next token. Every step appends to
the context, as in a generation. The bound is the time to read the weights and what the step reads of the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..config import HybridConfig
from ..engine.engine import Context, Engine, Execution
from ..engine.memory import free_bytes, slot_bytes
from ..errors import DeviceError, MismatchError
from ..models.shape import ModelShape
from . import harness
from .harness import say
from .models import build, plan_for, random_context, release, weight_bytes
from .profile import format_kernels, profile_step
from .timing import read_bandwidth
from .verify import relative_error

FORMS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "hybrid": {},
    "paper": {"retrieval_attention": "full"},
    "hybrid+float8": {"scan_keys": "float8"},
    "hybrid+refresh2": {"refresh_every": 2},
    "hybrid+centroid": {"completion": "centroid"},
}
"""Forms of decode attention: full, or hybrid with these settings; `paper`: with dense retrieval heads."""
_ROOM = 512
_SPARE_BYTES = 6 << 30
"""What a step may need besides weights and cache."""
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Of the logits, relative: a compiled model rounds to 16 bits at other places, which a deep random model amplifies."""
_FAR = 6
"""Two logits that lie further apart than this many times the typical error are not confused by rounding."""
_POOL_BYTES = 4 << 30


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        form: of attention, one of `FORMS`.
        batch, context: on what.
        ms: median time of a step; `fast_ms`, `slow_ms`: the fastest and slowest tenth.
        bytes: of weights and cache that it must read.
        share: of the bound: time to read them at the measured bandwidth over `ms`.
        speedup: over full attention in the same run.
        error: of the logits, against the eager step.
        way: how it ran.
        first_seconds: until the first step was compiled and captured.
    """

    form: str
    batch: int
    context: int
    ms: float
    fast_ms: float
    slow_ms: float
    bytes: int
    share: float | None
    speedup: float | None
    error: float
    way: str
    first_seconds: float


def bench_step(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Verify and time; raises `MismatchError`, and then there are no times."""
    bandwidth = _bandwidth() if device == "cuda" else None
    model = build(options.model, options.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    rows, profiles, left_out = [], [], []
    for context in options.contexts:
        for batch in options.batches:
            missing = _missing_bytes(model, batch, context)
            if missing > 0:
                left_out.append(f"batch {batch}, context {context}: {missing / 1e9:.0f} GB of memory are missing")
                say(f"left out: {left_out[-1]}")
                continue
            rows += _bench_case(model, batch, context, bandwidth, options, profiles)
    return {
        "read_tb_s": bandwidth and bandwidth / 1e12,
        "weight_bytes": weight_bytes(model),
        "rows": [asdict(row) for row in rows],
        "profiles": profiles,
        "left_out": left_out,
    }


def _bench_case(
    model: nn.Module,
    batch: int,
    length: int,
    bandwidth: float | None,
    options: argparse.Namespace,
    profiles: list[dict[str, Any]],
) -> Iterator[Row]:
    context = random_context(model, batch, length, _ROOM)
    full_ms = None
    for form in options.forms:
        engine, eager = (make_engine(model, form, options, execution) for execution in (options.execution, "eager"))
        began = time.perf_counter()
        error = _verify(engine, eager, context, f"{form} (batch {batch}, context {length})")
        first_seconds = time.perf_counter() - began
        times = _time(engine, context, options.steps, (FORMS[form] or {}).get("refresh_every", 1))
        size = weight_bytes(model) + int(context.kv_bytes.sum().item() / context.steps)
        ms = median(times)
        full_ms = ms if form == "full" else full_ms
        row = Row(
            *(form, batch, length, ms, times[len(times) // 10], times[-1 - len(times) // 10], size),
            share=bandwidth and size / bandwidth * 1e3 / ms,
            speedup=full_ms and full_ms / ms,
            error=error,
            way=engine.way,
            first_seconds=first_seconds,
        )
        say(format_row(row))
        if options.profile:
            kernels = profile_step(engine, context)
            say(format_kernels(kernels))
            profiles.append(
                {"form": form, "batch": batch, "context": length, "kernels": [asdict(kernel) for kernel in kernels]}
            )
        yield row
        context.rewind()
    del context, engine, eager
    release()


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Launches of the linear layers for the first context and batch, with the last form of attention."""
    from ..fusion.triton import Kind, Tuning, tuned
    from . import linear
    from .step_tuning import tune_step

    model = build(options.model, options.layers, "cuda", torch.bfloat16)
    context = random_context(model, options.batches[0], options.contexts[0], _ROOM)

    launches: dict[Kind, Tuning] = {}

    def step_ms() -> float:
        engine = make_engine(model, options.forms[-1], options, "compiled")
        with tuned(launches):
            ms = median(_time(engine, context, options.steps, 1))
        context.kept_steps.clear()
        return ms

    def compile_ahead(pairs: list[tuple[Any, Any]]) -> None:
        linear.compile_ahead([(linear.Projection.of(kind), kind.rows, launch) for kind, launch in pairs])

    step_ms()  # compiles the model, and finds the kinds of layers
    rows = tune_step(
        launches, lambda kind: linear.candidates(linear.Projection.of(kind), kind.rows), compile_ahead, step_ms
    )
    return {"rows": rows, "launches": {str(tuple(kind)): launch._asdict() for kind, launch in launches.items()}}


def make_engine(model: nn.Module, form: str, options: argparse.Namespace, execution: Execution) -> Engine:
    """An engine whose decode steps have this form of attention."""
    settings = {"backend": None if options.backend == "ours" else options.backend, "execution": execution}
    form_settings = FORMS[form]
    if form_settings is None:
        return Engine(model, **settings)
    config = HybridConfig(budget_tokens=options.budget, block_size=options.block, **form_settings)
    return Engine(model, plan=plan_for(model), config=config, **settings)


def _missing_bytes(model: nn.Module, batch: int, length: int) -> int:
    """How much more memory than there is this GPU would need; 0 or less: it fits."""
    if model.device.type != "cuda":
        return 0
    cache = (length + _ROOM) * slot_bytes(ModelShape.of(model), batch, model.dtype)
    return cache + _SPARE_BYTES - free_bytes(model.device)


def _verify(engine: Engine, eager: Engine, context: Context, what: str) -> float:
    """Relative error of the logits after two steps each; raises `MismatchError`."""
    tokens = torch.tensor([[7] * len(context.prompt_lengths), [11] * len(context.prompt_lengths)]).to(engine.device)
    results = []
    for one in (eager, engine):
        context.rewind()
        results.append(torch.stack([one.decode_one_token(context, token_ids) for token_ids in tokens]))
    error, tolerance = relative_error(results[1], results[0]), _TOLERANCES[engine.model.dtype]
    if not error <= tolerance:
        raise MismatchError(f"{what}: logits differ from the eager step's by {error:.2e} (allowed: {tolerance:.0e}).")
    if not _same_choice(*results, _FAR * error):
        raise MismatchError(f"{what}: the next token is not the eager step's, with logits that differ by {error:.2e}.")
    return error


def _same_choice(expected: Tensor, actual: Tensor, tolerance: float) -> bool:
    """Whether the token chosen is the best, or ties with it as far as rounding can tell."""
    chosen = expected.gather(-1, actual.argmax(-1, keepdim=True))
    return bool((expected.amax(-1, keepdim=True) - chosen <= tolerance * expected.std()).all())


def _time(engine: Engine, context: Context, steps: int, together: int) -> list[float]:
    """Milliseconds of `steps` steps in the middle of a generation, ascending; each the mean of some in a row."""
    context.rewind()
    token_ids = torch.full((len(context.prompt_lengths),), 7, device=engine.device)
    warm_up = max(steps // 4, 3)
    events = []
    for _ in range(warm_up + steps):
        events.append(_now(engine.device))
        token_ids = engine.decode_one_token(context, token_ids).argmax(-1)
    events.append(_now(engine.device))
    marks = events[warm_up::together]
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in pairwise(marks)]
    else:
        times = [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    return sorted(time / together for time in times)


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _bandwidth() -> float:
    pool = torch.empty(_POOL_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    return read_bandwidth(pool)


# ---------------------------------------------------------------------- what is shown

HEADER = f"{'':15} {'batch':>5} {'context':>8} {'ms':>8} {'TB/s':>6} {'of bound':>8} {'vs full':>8} {'error':>8}  way"


def format_row(row: Row) -> str:
    """A line of the table under `HEADER`."""
    share = f"{row.share:8.1%}" if row.share is not None else " " * 8
    speedup = f"{row.speedup:7.2f}x" if row.speedup is not None else " " * 8
    speed = f"{row.ms:8.3f} {row.bytes / row.ms / 1e9:6.2f} {share} {speedup}"
    return f"{row.form:15} {row.batch:5} {row.context:8} {speed} {row.error:8.1e}  {row.way}"


def _run(options: argparse.Namespace, device: str) -> dict[str, Any]:
    if options.smoke:
        options.model, options.contexts, options.budget, options.block, options.steps = "tiny", [300], 64, 16, 4
        options.execution = "graph" if device == "cpu" else options.execution
    if options.profile and device == "cpu":
        raise DeviceError("--profile needs a CUDA GPU: it shows kernels.")
    if options.tune:
        if device == "cpu":
            raise DeviceError("--tune needs a CUDA GPU.")
        return tune(options)
    result = bench_step(options, device)
    print("\n".join([HEADER, *(format_row(Row(**row)) for row in result["rows"])]))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print; 0 verified and timed, 1 a mismatch, 2 bad input."""
    made = harness.parser("step", "Verify and time whole decode steps.")
    made.add_argument("--forms", nargs="+", choices=FORMS, default=["full", "hybrid"], help="of decode attention")
    made.add_argument("--steps", type=int, default=60, help="steps that are timed")
    made.add_argument("--execution", default="compiled", choices=["compiled", "graph", "eager"], help="of a step")
    made.add_argument("--tune", action="store_true", help="search launches of the linear layers where they run")
    made.add_argument("--profile", action="store_true", help="show which kernels a step consists of (GPU only)")
    return harness.main(made, _run, arguments)


if __name__ == "__main__":
    sys.exit(main())
