"""`python -m experiments profile-memory`: how long attention waited in each layer for blocks from host memory.

From a trace of some steps over a replayed `bench memory`: a layer waits from the end of the last kernel that is not a
fetch to the beginning of its attention. A tracer slows small kernels down, so a step is longer here than untraced; the
layers that wait, and how busy the link is, are what this shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

from experiments.profile_step import record
from lycheedecode.bench.harness import show
from lycheedecode.bench.memory_steps import ReplayedCase, cases
from lycheedecode.bench.settings import MemorySettings
from lycheedecode.engine.engine import Context, Engine

_STEPS = 5
_FETCH, _ATTEND = "_fetch_kernel", "_attend_blocks_kernel"
Interval = tuple[str, float, float]
"""Name, beginning and end of a kernel, in microseconds."""


@torch.inference_mode()
def run(settings: MemorySettings, device: str) -> dict[str, Any]:
    """A row for every case and way to decode."""
    rows = []
    for case in cases(settings, device):
        if isinstance(case, ReplayedCase):
            for row, engine, context in case.filled():
                rows.append({**row, **waits(_trace(engine, context), _STEPS)})
                show("\n".join(_lines(rows[-1])))
    return {"rows": rows}


def waits(kernels: Sequence[Interval], steps: int) -> dict[str, Any]:
    """What so many steps waited for, from all of their kernels; microseconds, on average over the steps."""
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    free, waited = kernels[0][1], []
    for name, begin, end in kernels:
        if name.startswith(_ATTEND):
            waited.append(max(begin - free, 0.0))
        if not name.startswith(_FETCH):
            free = max(free, end)
    layers = len(waited) // steps
    by_layer = [sum(waited[layer::layers]) / steps for layer in range(layers)]
    fetches = [(begin, end) for name, begin, end in kernels if name.startswith(_FETCH)]
    span = max(end for *_, end in kernels) - kernels[0][1]
    return {
        "step_us": span / steps,
        "waited_us": sum(by_layer),
        "waited_us_by_layer": by_layer,
        "link_busy_us": _covered(fetches) / steps,
        "fetches": len(fetches) / steps,
    }


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


def _trace(engine: Engine, context: Context) -> list[Interval]:
    token_ids = torch.full((len(context.prompt_lengths),), 7, device=engine.device)
    events = record(lambda: engine.decode_one_token(context, token_ids), _STEPS)
    events = [event for event in events if event.device_type == DeviceType.CUDA]
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


def _lines(row: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{row['batch']} x {row['context']} {row['form']}, {row['reading']}, store {row['store_percent']}%: a step of "
        f"{row['step_us']:.0f} us, the link busy for {row['link_busy_us']:.0f} us in {row['fetches']:.0f} fetches, "
        f"attention waited for {row['waited_us']:.0f} us, by layer"
    )
    yield " ".join(f"{us:.0f}" for us in row["waited_us_by_layer"])
