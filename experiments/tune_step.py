"""`python -m experiments tune-step`: launches of the linear layers, judged by the time of the step they are part of.

    for every kind of layer     its candidates in turn -> the step captured anew, and timed; the fastest stays

A launch that is fastest after itself need not be so between attention and the next layer: kernels start early, and what
one of them calls into the L2, another may need there. What wins goes into `fusion.launches.default_tuning` by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from statistics import median
from typing import Any

import torch

from experiments import linear
from experiments.projections import Projection, candidates, evenly, words
from lycheedecode.bench.harness import say, show
from lycheedecode.bench.models import build, random_context
from lycheedecode.bench.settings import StepSettings
from lycheedecode.bench.step import ROOM, make_engine, step_times
from lycheedecode.errors import first_line
from lycheedecode.fusion.launches import Kind, LinearTuning, tuned

STARTS = ({"prefetch": 128}, {"prefetch": 512}, {"prefetch": 2048}, {"overlap": 4}, {"overlap": 16}, {"overlap": 64})
"""How a launch overlaps with its neighbours; tried without compiling anything."""


def tune(settings: StepSettings, device: str) -> dict[str, Any]:
    """Launches of the linear layers for the first context and batch, with the last form of attention."""
    model = build(settings.model, settings.layers, device, torch.bfloat16)
    context = random_context(model, settings.batches[0], settings.contexts[0], ROOM)
    launches: dict[Kind, LinearTuning] = {}

    def step_ms() -> float:
        engine = make_engine(model, settings.forms[-1], settings, "compiled")
        with tuned(launches):
            ms = median(step_times(engine, context, settings.steps, 1))
        context.kept_steps.clear()
        return ms

    def compile_ahead(pairs: list[tuple[Any, Any]]) -> None:
        linear.compile_ahead([(Projection.of(kind), kind.rows, launch) for kind, launch in pairs])

    step_ms()  # compiles the model, and finds the kinds of layers
    rows = tune_step(launches, lambda kind: candidates(Projection.of(kind), kind.rows), compile_ahead, step_ms)
    return {"rows": rows, "launches": {str(tuple(kind)): launch._asdict() for kind, launch in launches.items()}}


def tune_step(
    launches: MutableMapping[Any, Any],
    candidates_of: Callable[[Any], Sequence[Any]],
    compile_ahead: Callable[[list[tuple[Any, Any]]], None],
    step_ms: Callable[[], float],
    most: int = 12,
) -> list[dict[str, Any]]:
    """Better launches, left in `launches`; returns every one that was tried, with the step's time.

    Args:
        launches: the launch of each kind of layer in the step, as `fusion.launches.tuned` takes them.
        candidates_of: other launches of a kind.
        compile_ahead: takes pairs of a kind and a launch.
        step_ms: captures the step with the launches as they are, and times it; raises where one of them cannot run.
        most: candidates of a kind, at most, taken evenly.
    """
    grids = {kind: list(evenly(candidates_of(kind), most)) for kind in launches}
    compile_ahead([(kind, launch) for kind, grid in grids.items() for launch in grid])
    best_ms, tried = step_ms(), []
    show(f"{best_ms:.4f} ms  as it is")
    for kind, grid in grids.items():
        for launch in _and_starts(grid, launches, kind):
            before, launches[kind] = launches[kind], launch
            try:
                ms = step_ms()
            except Exception as error:  # more shared memory than there is, as Triton reports it
                say(f"  left out: {launch}: {first_line(error, 80)}")
                ms = float("inf")
            tried.append({"layer": words(kind), "launch": words(launch), "step_ms": ms})
            if ms < best_ms:
                best_ms = ms
                show(f"{ms:.4f} ms  {words(kind)}: {words(launch)}")
            else:
                launches[kind] = before
    return sorted((row for row in tried if row["step_ms"] != float("inf")), key=lambda row: row["step_ms"])


def _and_starts(grid: Sequence[Any], launches: MutableMapping[Any, Any], kind: Any) -> Iterator[Any]:
    """The candidates; then the best of them so far with other starts."""
    yield from (launch for launch in grid if launch != launches[kind])
    for changes in STARTS:
        launch = launches[kind]._replace(**changes)
        if launch != launches[kind]:
            yield launch
