"""`python -m experiments profile`: where the time of a decode step goes, by kernels, from a trace of some steps.

`profile-round` does the same for the parts of a lossless round: drafts, and the pass that verifies them.

A tracer slows small kernels down, and charges a kernel that starts early while it waits for the one before. So shares
say where to look; how long a step takes, `bench step` measures without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lycheedecode.bench.harness import show
from lycheedecode.bench.lossless import make_rounds
from lycheedecode.bench.models import build, random_context, release
from lycheedecode.bench.settings import LosslessSettings, StepSettings
from lycheedecode.bench.step import ROOM, make_engine
from lycheedecode.engine.engine import Context, Engine

_WARM_UP, _STEPS, _SHOWN = 3, 3, 14


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step.

    Attributes:
        name: as the tracer knows it.
        launches: a step.
        us: microseconds a step, of all of them.
    """

    name: str
    launches: float
    us: float


@torch.inference_mode()
def run(settings: StepSettings, device: str) -> dict[str, Any]:
    """The kernels of a step of every form, batch and context."""
    model, profiles = build(settings.model, settings.layers, device, torch.bfloat16), []
    for length, batch in product(settings.contexts, settings.batches):
        context = random_context(model, batch, length, ROOM)
        for form in settings.forms:
            kernels = profile_step(make_engine(model, form, settings, settings.execution), context)
            show(f"{form}, batch {batch}, {length} tokens\n{format_kernels(kernels)}")
            case = {"form": form, "batch": batch, "context": length}
            profiles.append({**case, "kernels": [asdict(kernel) for kernel in kernels]})
        del context
        release()
    return {"rows": [], "profiles": profiles}


@torch.inference_mode()
def run_rounds(settings: LosslessSettings, device: str) -> dict[str, Any]:
    """The kernels of a full step, and of every part of a round, for every batch, context and number of drafts."""
    model, profiles = build(settings.model, settings.layers, device, torch.bfloat16), []
    for length, batch, drafts in product(settings.contexts, settings.batches, settings.drafts):
        context = random_context(model, batch, length, ROOM)
        case = {"batch": batch, "context": length, "drafts": drafts}
        found = {"full step": profile_step(Engine(model, execution=settings.execution), context)}
        engine, rounds = make_rounds(model, context, settings, drafts, max(settings.refresh), settings.weights[-1])
        with engine._decoder.route:
            for name, part in rounds.parts.items():
                found[name] = trace(part, rounds.rewind)
        for name, kernels in found.items():
            show(f"{name}, batch {batch}, {length} tokens\n{format_kernels(kernels)}")
            profiles.append({**case, "part": name, "kernels": [asdict(kernel) for kernel in kernels]})
        del context, rounds, engine
        release()
    return {"rows": [], "profiles": profiles}


def profile_step(engine: Engine, context: Context) -> list[Kernel]:
    """Kernels of a step on a GPU, those that take longest first; `context` is rewound before and after."""
    token_ids = torch.full((len(context.prompt_lengths),), 7, device=engine.device)
    context.rewind()
    kernels = trace(lambda: engine.decode_one_token(context, token_ids))
    context.rewind()
    return kernels


def trace(run: Callable[[], Any], before: Callable[[], Any] | None = None) -> list[Kernel]:
    """Kernels of a call of `run`, those that take longest first; `before` is called once in front of all calls."""
    return add_up(record(run, _STEPS, before), _STEPS)


def record(run: Callable[[], Any], steps: int, before: Callable[[], Any] | None = None) -> Any:
    """What a tracer records in so many calls of `run` on a GPU, after some that warm up."""

    def several(times: int) -> None:
        if before is not None:
            before()
        for _ in range(times):
            run()
        torch.cuda.synchronize()

    several(_WARM_UP)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as events:
        several(steps)
    return events.events()


def add_up(events: Any, steps: int) -> list[Kernel]:
    """Kernels by name, from what a tracer recorded in so many steps."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us())
    kernels = [Kernel(name, len(times) / steps, sum(times) / steps) for name, times in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.us)


def format_kernels(kernels: list[Kernel]) -> str:
    """A line for each of the first, and one for the rest."""
    rest = kernels[_SHOWN:]
    lines = [
        f"  {k.launches:6.1f} x {k.us / k.launches:8.2f} us = {k.us:8.1f} us  {k.name[:80]}" for k in kernels[:_SHOWN]
    ]
    if rest:
        lines.append(f"  {sum(k.launches for k in rest):6.1f} others {'':8} = {sum(k.us for k in rest):8.1f} us")
    return "\n".join(lines)
