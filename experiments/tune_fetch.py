"""`python -m experiments tune-fetch`: which launches of a cache in host memory are fastest; what wins goes in by hand.

    plan   look selected blocks up in a store, by the warps of a program
    fetch  blocks that several heads lack, from pinned host memory, by programs and their warps

A fetch of few blocks is what attention waits for in the layer that selects; one of many shows what the link carries.
Each launch is compared with the default, then timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lycheedecode.bench.harness import say
from lycheedecode.bench.reuse import Misses, replay
from lycheedecode.bench.settings import BenchSettings
from lycheedecode.bench.timing import time_calls
from lycheedecode.engine.offload.pinned import Region
from lycheedecode.errors import MismatchError
from lycheedecode.ops import fetch
from lycheedecode.ops.fetch import BlockMap, Tokens

_SIZE, _DIM, _TAIL, _HEADS = 32, 128, 2, 8
_MISSES: Misses = {100: 0.29, 150: 0.21, 200: 0.164, 300: 0.115}
"""Of Qwen2.5-Coder-1.5B at 30K tokens."""
_PLANS = (1, 2, 4, 8, 16)
_FETCHES = ((32, 16), (16, 16), (64, 16), (128, 16), (32, 8), (64, 8), (128, 8), (64, 4), (128, 4), (256, 4))
_STEPS = 32


@dataclass(frozen=True, kw_only=True)
class TuneFetchSettings(BenchSettings):
    """What is tried.

    Attributes:
        batches: sequences.
        readers: heads that a fetch serves.
        store_percents: store sizes, in percent of a selection.
        context: tokens.
    """

    batches: tuple[int, ...] = (1, 6)
    readers: tuple[int, ...] = (1, 3, 8)
    store_percents: tuple[int, ...] = (200, 300)
    context: int = 131072


@torch.inference_mode()
def tune(settings: TuneFetchSettings, device: str) -> dict[str, Any]:
    """Rows of all launches."""
    rows = []
    for batch, percent in product(settings.batches, settings.store_percents):
        case = _Case(settings, batch, percent, device)
        for row in (*case.plans(), *(row for readers in settings.readers for row in case.fetches(readers))):
            rows.append({"batch": batch, "store_percent": percent, **row})
            say(" ".join(f"{name} {value:.5g}" if name != "kernel" else value for name, value in rows[-1].items()))
    return {"rows": rows}


class _Case:
    def __init__(self, settings: TuneFetchSettings, batch: int, percent: int, device: str) -> None:
        self._batch, capacity, context = batch, settings.budget_tokens // _SIZE, settings.context
        self._slots = capacity * percent // 100 - _TAIL - 1
        self._blocks = context // _SIZE + 2
        made = replay(_MISSES, _STEPS, 2, batch, capacity, context, _SIZE, settings.seed)
        self._selections = list(made.to(device))
        self._newest = torch.full((batch,), context // _SIZE, dtype=torch.int32, device=device)
        self._clocks = list(torch.arange(1, _STEPS + 1, dtype=torch.int32, device=device)[:, None])
        shape = 1, batch, _HEADS, self._blocks * _SIZE, _DIM
        region = Region(4 * torch.Size(shape).numel(), torch.device(device))
        self.source, self._region = Tokens(*region.halves(shape, torch.bfloat16)), region
        for part in self.source:
            part.copy_(torch.randn(shape[3:], device=device).to(torch.bfloat16))
        self._new_map = partial(BlockMap.allocate, 2, batch, self._blocks, self._slots, capacity, device)
        self.known = self._new_map()
        self._plan(self.known)

    def _plan(self, known: BlockMap) -> None:
        for blocks, clock in zip(self._selections, self._clocks, strict=True):
            fetch.plan_fetch(blocks, known, self._newest, clock, _TAIL)

    def plans(self) -> Iterator[dict[str, Any]]:
        """A row for every number of warps."""
        for warps in _PLANS:
            with launches(plan_warps=warps):
                known = self._new_map()
                self._plan(known)
                if not all(torch.equal(part, right) for part, right in zip(known[:-1], self.known[:-1], strict=True)):
                    raise MismatchError(f"A plan by {warps} warps differs.")
                pairs = zip(self._selections, self._clocks, strict=True)
                calls = [partial(fetch.plan_fetch, one, known, self._newest, clock, _TAIL) for one, clock in pairs]
                yield {"kernel": "plan", "warps": warps, "us": time_calls(calls).ms * 1e3}

    def fetches(self, readers: int) -> Iterator[dict[str, Any]]:
        """A row for every launch."""
        device = self.known.misses.device
        table = torch.tensor([[i % 2, 0, i, -1] for i in range(readers)], dtype=torch.int32, device=device)
        right: Tensor | None = None
        shape = *self.source.keys.shape[:3], (self._slots + _TAIL) * _SIZE, _DIM
        blocks = int(self.known.misses[table[:, 0].long()].sum())
        for programs, warps in _FETCHES:
            pool = Tokens(*(torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2)))
            with launches(programs_alone=programs, warps_alone=warps):
                run = partial(fetch.fetch, self.source, pool, self.known, table, None, None, _SIZE)
                run()
                right = pool.values if right is None else right
                if not torch.equal(pool.values, right) or not right.any():
                    raise MismatchError(f"A fetch by {programs} programs of {warps} warps differs.")
                us = time_calls([run]).ms * 1e3
            gb = blocks * 2 * _SIZE * _DIM * 2 / us / 1e3
            size = {"readers": readers, "blocks": blocks, "programs": programs, "warps": warps}
            yield {"kernel": "fetch", **size, "us": us, "gb_per_second": gb}


@contextmanager
def launches(**changes: int) -> Iterator[None]:
    """The kernels are launched so while this is open."""
    from lycheedecode.ops.fetch import triton

    before = triton.LAUNCH
    triton.LAUNCH = before._replace(**changes)
    try:
        yield
    finally:
        triton.LAUNCH = before
