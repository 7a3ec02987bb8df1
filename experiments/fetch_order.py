"""`python -m experiments fetch-order`: how long a step over a cache in host memory takes, by the order of its fetches.

A model of one step, event by event. The layers run one after the other; the fetches of a layer's own selection hold it
up, those for later layers run in a lane, one after the other. Fetches that run at once share the link, and the model is
slower meanwhile. What is measured goes in: how long steps over a resident cache take, the share of blocks that are
missing, the link. The window is how many layers ahead a layer's blocks are fetched. With 0, all that a selection serves
in later layers comes at once and in one piece, whoever needs it first.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lycheedecode.bench.settings import BenchSettings
from lycheedecode.bench.workload import Shape, spread_plan
from lycheedecode.engine.offload.store import fetch_order, readers_of
from lycheedecode.errors import ConfigError
from lycheedecode.results import Result

_BEFORE = 0.35
"""Share of a layer's time until its attention may need blocks."""


@dataclass(frozen=True, kw_only=True)
class OrderSettings(BenchSettings):
    """A step of Llama-3-8B's shape, an eighth of whose heads retrieve.

    Attributes:
        batches: sequences.
        step_ms: how long a step over a resident cache takes, of each batch.
        misses: share of selected blocks that are missing.
        windows: layers ahead; 0 for one piece.
        link: what it carries, GB/s.
        beside: speed of the model beside a fetch, of each batch; with which steps of one H100 come out as
            measured on 2026-11-27, when 32 programs of 16 warps fetched.
        start_us: until a fetch that was launched carries bytes.
        plan_us: to look a selection up in the store.
        block_size: tokens per block.
        far_keys: fetch the keys of retrieval heads, too (8-bit scan keys).
    """

    batches: tuple[int, ...] = (1, 3, 6)
    step_ms: tuple[float, ...] = (6.22, 7.77, 9.2)
    misses: tuple[float, ...] = (0.165, 0.104)
    windows: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 31)
    link: float = 49.0
    beside: tuple[float, ...] = (0.88, 0.7, 0.7)
    start_us: float = 8.0
    plan_us: float = 12.0
    block_size: int = 32
    far_keys: bool = False


class Link:
    """Time, and the fetches in it: each lane's one after the other, those of different lanes at once.

    Args:
        speed: bytes a millisecond.
        beside: speed of the model meanwhile.
    """

    def __init__(self, speed: float, beside: float) -> None:
        self.now, self._speed, self._beside = 0.0, speed, beside
        self._lanes: dict[str, deque[list[float]]] = defaultdict(deque)
        self._launched: dict[str, int] = defaultdict(int)
        self._arrived: dict[str, int] = defaultdict(int)

    def fetch(self, lane: str, size: float, start: float) -> int:
        """Launch; returns its number in the lane."""
        self._lanes[lane].append([start, size])
        self._launched[lane] += 1
        return self._launched[lane]

    def wait(self, lane: str, number: int) -> float:
        """Until a fetch has arrived; returns how long that took."""
        began = self.now
        while self._arrived[lane] < number:
            self._advance(float("inf"))
        return self.now - began

    def compute(self, work: float) -> None:
        """So many milliseconds of the model, if nothing is fetched meanwhile."""
        while work > 1e-9:
            speed = self._beside if self._carrying() else 1.0
            work -= speed * self._advance(work / speed)

    def _carrying(self) -> list[list[float]]:
        return [lane[0] for lane in self._lanes.values() if lane and lane[0][0] <= 0]

    def _advance(self, most: float) -> float:
        """To the next event, at most so far; returns how far."""
        carrying = self._carrying()
        starting = [lane[0] for lane in self._lanes.values() if lane and lane[0][0] > 0]
        each = self._speed / max(len(carrying), 1)
        step = min([most, *(one[1] / each for one in carrying), *(one[0] for one in starting)])
        for one in carrying:
            one[1] -= each * step
        for one in starting:
            one[0] = max(one[0] - step, 0.0)
        self.now += step
        for name, lane in self._lanes.items():
            if lane and lane[0][0] <= 0 and lane[0][1] <= 1:
                lane.popleft()
                self._arrived[name] += 1
        return step


def run(settings: OrderSettings, device: str) -> dict[str, Any]:
    """A row for every batch, share of misses and window."""
    if not len(settings.batches) == len(settings.step_ms) == len(settings.beside):
        raise ConfigError("Give step_ms and beside for each of batches.")
    return {
        "rows": [
            {"batch": batch, "misses": misses, "window": window, **step(settings, batch, ms, beside, misses, window)}
            for batch, ms, beside in zip(settings.batches, settings.step_ms, settings.beside, strict=True)
            for misses in settings.misses
            for window in (0, *settings.windows)
        ]
    }


def step(
    settings: OrderSettings, batch: int, model_ms: float, beside: float, misses: float, window: int
) -> dict[str, float]:
    """Milliseconds of a step, and how much of that layers waited for their own selection and for earlier ones."""
    shape = Shape(32, 8, 128, 32, 32)
    plan = spread_plan(shape)
    readers, rows = readers_of(plan, {layer: layer for layer in range(shape.layers)})
    order = fetch_order(readers, rows, window or shape.layers)
    block = 4 * settings.block_size * shape.dim  # keys and values
    each = batch * misses * settings.budget_tokens / settings.block_size * block
    near = set() if settings.far_keys else set(plan.retrieval)
    link, last, waited = Link(settings.link * 1e6, beside), {}, {"own": 0.0, "late": 0.0}
    for layer in range(shape.layers):
        link.compute(model_ms / shape.layers * _BEFORE + settings.plan_us / 1e3 * (layer in rows))
        sizes = {to: sum(each * (0.5 if one[1:] in near else 1) for one in jobs) for to, jobs in order.get(layer, ())}
        if layer in sizes:
            waited["own"] += link.wait("own", link.fetch("own", sizes.pop(layer), settings.start_us / 1e3))
        pieces = [({to}, size) for to, size in sizes.items()]
        if not window and pieces:
            pieces = [(set(sizes), sum(sizes.values()))]
        for layers, size in pieces:
            last |= dict.fromkeys(layers, link.fetch("lane", size, settings.start_us / 1e3))
        waited["late"] += link.wait("lane", last.get(layer, 0))
        link.compute(model_ms / shape.layers * (1 - _BEFORE))
    return {"ms": link.now, "own_ms": waited["own"], "late_ms": waited["late"], "slower": link.now / model_ms - 1}


def lines(result: Result) -> Iterator[str]:
    """A line for every row."""
    for row in result.rows:
        ahead = f"{row['window']:2} layers ahead" if row["window"] else "in one piece   "
        yield (
            f"batch {row['batch']}, {row['misses']:.1%} missing, {ahead}: {row['ms']:6.2f} ms ({row['slower']:+.0%}), "
            f"waited {row['own_ms']:.2f} ms for own selections, {row['late_ms']:.2f} for earlier ones"
        )
