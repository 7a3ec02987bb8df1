"""`bench step`: a whole decode step of a model with random weights, verified first, then timed against the memory.

    for every context and batch    compiled steps = eager steps? -> time of full attention -> of hybrid attention

A step is what `Engine` does for a token: the model, our attention, the choice of the next token. Every step appends to
the context, as in a generation. The bound is the time to read the weights and what the step reads of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import HybridConfig
from ..engine.engine import Context, Engine, Execution
from ..engine.memory import free_bytes, slot_bytes
from ..errors import MismatchError
from ..models.shape import ModelShape
from .harness import show
from .models import build, plan_for, random_context, release, weight_bytes
from .settings import FORMS, ModelSettings, StepSettings
from .timing import read_bandwidth
from .verify import check_logits
from .workload import uneven

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 512
"""Tokens that may be decoded after a context."""
_SPARE_BYTES = 6 << 30
"""What a step may need besides weights and cache."""
_FAR = 6
"""Two logits that lie further apart than this many times the typical error are not confused by rounding."""
_POOL_BYTES = 4 << 30


@dataclass(frozen=True)
class StepRow:
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


def run(settings: StepSettings, device: str) -> dict[str, Any]:
    """Verify and time; raises `MismatchError`, and then there are no times."""
    speed = bandwidth() if device == "cuda" else None
    model = build(settings.model, settings.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    if settings.smoke and device == "cpu":
        settings = replace(settings, execution="graph")
    rows: list[StepRow] = []
    left_out: list[str] = []
    show(HEADER)
    for context in settings.contexts:
        for batch in settings.batches:
            missing = missing_bytes(model, batch, context)
            if missing > 0:
                left_out.append(f"batch {batch}, context {context}: {missing / 1e9:.0f} GB of memory are missing")
                show(f"left out: {left_out[-1]}")
                continue
            rows += _bench_case(model, batch, context, speed, settings)
    if rows:
        ways = ", ".join(sorted({row.way for row in rows}))
        show(f"Steps ran {ways}; the error is that of the logits against an eager step.")
    return {
        "read_tb_s": speed and speed / 1e12,
        "weight_bytes": weight_bytes(model),
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }


def _bench_case(
    model: PreTrainedModel,
    batch: int,
    length: int,
    speed: float | None,
    settings: StepSettings,
) -> Iterator[StepRow]:
    context = random_context(model, batch, length, ROOM)
    full_ms = None
    for form in settings.forms:
        engine, eager = (make_engine(model, form, settings, execution) for execution in (settings.execution, "eager"))
        began = time.perf_counter()
        error = _verify(engine, eager, context, f"{form} (batch {batch}, context {length})")
        first_seconds = time.perf_counter() - began
        times = step_times(engine, context, settings.steps, (FORMS[form] or {}).get("refresh_every", 1))
        size = weight_bytes(model) + int(context.kv_bytes.sum().item() / context.steps)
        ms = median(times)
        full_ms = ms if form == "full" else full_ms
        row = StepRow(
            *(form, batch, length, ms, times[len(times) // 10], times[-1 - len(times) // 10], size),
            share=speed and size / speed * 1e3 / ms,
            speedup=full_ms and full_ms / ms,
            error=error,
            way=engine.way,
            first_seconds=first_seconds,
        )
        show(format_row(row))
        yield row
        context.rewind()
    del context, engine, eager
    release()


def make_engine(
    model: PreTrainedModel, form: str, settings: ModelSettings, execution: Execution, **options: Any
) -> Engine:
    """An engine whose decode steps have this form of attention; `options` are the engine's."""
    backend = None if settings.backend == "ours" else settings.backend
    how: dict[str, Any] = {"backend": backend, "execution": execution, **options}
    form_settings = FORMS[form]
    if form_settings is None:
        return Engine(model, **how)
    config = HybridConfig(budget_tokens=settings.budget_tokens, block_size=settings.block_size, **form_settings)
    plan = plan_for(model)
    return Engine(model, plan=uneven(plan) if form == "hybrid+budgets" else plan, config=config, **how)


def missing_bytes(model: PreTrainedModel, batch: int, length: int) -> int:
    """How much more memory than there is this device would need; 0 or less: it fits."""
    spare = _SPARE_BYTES if model.device.type == "cuda" else 0  # on a CPU, there are only tiny cases
    cache = (length + ROOM) * slot_bytes(ModelShape.of(model), batch, model.dtype)
    return cache + spare - free_bytes(model.device)


def _verify(engine: Engine, eager: Engine, context: Context, what: str) -> float:
    """Relative error of the logits after two steps each; raises `MismatchError`."""
    tokens = torch.tensor([[7] * len(context.prompt_lengths), [11] * len(context.prompt_lengths)]).to(engine.device)

    def logits(one: Engine) -> Tensor:
        context.rewind()
        return torch.stack([one.decode_one_token(context, token_ids) for token_ids in tokens])

    error, result, expected = check_logits(f"{what}: logits", partial(logits, engine), partial(logits, eager))
    if not _same_choice(expected, result, _FAR * error):
        raise MismatchError(f"{what}: the next token is not the eager step's, with logits that differ by {error:.1e}.")
    return error


def _same_choice(expected: Tensor, actual: Tensor, tolerance: float) -> bool:
    """Whether the token chosen is the best, or ties with it as far as rounding can tell."""
    chosen = expected.gather(-1, actual.argmax(-1, keepdim=True))
    return bool((expected.amax(-1, keepdim=True) - chosen <= tolerance * expected.std()).all())


def step_times(engine: Engine, context: Context, steps: int, together: int) -> list[float]:
    """Milliseconds of `steps` steps in the middle of a generation, ascending; each the mean of some in a row."""
    context.rewind()
    token_ids = torch.full((len(context.prompt_lengths),), 7, device=engine.device)
    warm_up = max(steps // 4, 3)
    events = []
    for _ in range(warm_up + steps):
        events.append(event_now(engine.device))
        token_ids = engine.decode_one_token(context, token_ids).argmax(-1)
    events.append(event_now(engine.device))
    marks = events[warm_up::together]
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in pairwise(marks)]
    else:
        times = [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    return sorted(time / together for time in times)


def event_now(device: torch.device) -> Any:
    """A CUDA event; the time in seconds elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def bandwidth() -> float:
    """Bytes a second that this GPU reads."""
    pool = torch.empty(_POOL_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    return read_bandwidth(pool)


# ---------------------------------------------------------------------- what is shown

_COLUMNS = f"{'ms/step':>8} {'TB/s':>6} {'of bound':>8} {'vs full':>8} {'error':>8}"
HEADER = f"{'attention':16} {'batch':>5} {'context':>8} {_COLUMNS}"


def format_row(row: StepRow) -> str:
    """A line of the table under `HEADER`."""
    share = f"{row.share:8.1%}" if row.share is not None else " " * 8
    speedup = f"{row.speedup:7.2f}x" if row.speedup is not None else " " * 8
    speed = f"{row.ms:8.3f} {row.bytes / row.ms / 1e9:6.2f} {share} {speedup}"
    return f"{row.form:16} {row.batch:5} {row.context:8} {speed} {row.error:8.1e}"
