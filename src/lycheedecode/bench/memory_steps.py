"""Steps of a model with random weights over a cache in host memory, against those over a resident one.

    host memory, filled once with random numbers -> a HostCache of every case, in turn -> its steps, timed
                                                 -> the same numbers on the GPU        -> steps over these: same logits?

Selections are replayed (`reuse`), after the scan that would have made them: random weights select as they like.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import DecodeAttention, HybridAttention
from ..config import HybridConfig
from ..engine.cache import KVCache, grown
from ..engine.context import Context
from ..engine.engine import Engine
from ..engine.memory import slot_bytes
from ..engine.offload import HostCache, OffloadedAttention
from ..engine.offload.pinned import Region, free_host_bytes
from ..engine.offload.store import BlockStore
from ..errors import ConfigError, MismatchError
from ..models.routing import Window
from ..models.shape import ModelShape
from ..ops import KV, Selections
from ..ops.torch_private import clear_cublas_workspaces
from .models import build, plan_for, release
from .reuse import Reuse, replay, reuse_of, unchanged
from .settings import MEMORY_FORMS, MemorySettings
from .step import ROOM, event_now, missing_bytes, weight_bytes
from .verify import relative_error

_TOLERANCE = 1e-2
"""Relative, for logits: the same kernels read the same blocks in as many parts."""
_SMOKE = Reuse({100: 0.2, 150: 0.1, 200: 0.06, 300: 0.03}, 80, 400)
_SAMPLES = 256
_PIECE = 1 << 27


class _Replayed(HybridAttention):
    """Scans and selects as ever, then decodes with given selections, int32 `[steps, R, B, K]`."""

    def give(self, made: Tensor, first: int) -> None:
        """`first`: tokens of a sequence at the step that gets the first of them."""
        self._given, self._begin = made, first
        self._parts: dict[int, Tensor] = {}

    @property
    def given_bytes(self) -> int:
        """What is kept on the device for the sake of the replay."""
        return sum(part.nbytes for part in self._parts.values())

    def select(
        self, layer: int, query: Tensor, kv: KV, heads: tuple[int, ...], scale: float, out: Selections, **more: Any
    ) -> None:
        """See `HybridAttention`."""
        super().select(layer, query, kv, heads, scale, out, **more)
        if layer not in self._parts:
            first, (rows, batch, capacity) = self._layers[layer].first_row, out.blocks.shape
            mine = self._given[:, first : first + rows].reshape(len(self._given), rows * batch * capacity)
            self._parts[layer] = mine.to(out.blocks.device)
        if layer == 0:
            self._step = (kv.token_counts()[:1] - self._begin) % len(self._given)
        torch.index_select(self._parts[layer], 0, self._step, out=out.blocks.view(1, -1))


class _ReplayedOffloaded(_Replayed, OffloadedAttention):
    pass


def bench_steps(settings: MemorySettings, device: str) -> Iterator[dict[str, Any]]:
    """Rows of every case: full attention and a resident cache where they fit, and host memory."""
    for case in cases(settings, device):
        yield from case.rows() if isinstance(case, ReplayedCase) else [case]


def cases(settings: MemorySettings, device: str) -> Iterator[ReplayedCase | dict[str, Any]]:
    """The cases in turn, over one region of host memory; a row for one that host memory does not hold."""
    if settings.reuse is None and not settings.smoke and settings.readings != ("none",):
        raise ConfigError(
            "Random weights select as they like: give --reuse a result of bench memory on a real model, whose misses "
            "are replayed."
        )
    model = build(settings.model, settings.layers, device, torch.bfloat16 if device == "cuda" else torch.float32)
    region, speed = None, 0.0
    sizes = {case: _host_bytes(model, *case) for case in settings.pairs}
    free = free_host_bytes()
    fitting = [size for size in sizes.values() if size <= free]
    if fitting:
        began = time.perf_counter()
        region = Region(max(fitting), torch.device(device))
        speed = region.data.nbytes / 2**30 / (time.perf_counter() - began)
        _fill(region, model)
    for pair, size in sizes.items():
        if size <= free and region is not None:
            yield ReplayedCase(model, settings, region, speed, *pair)
        else:
            missing = f"{size / 2**30:.0f} GiB of host memory are needed, {free / 2**30:.0f} are free"
            yield {"cache": "host", "batch": pair[0], "context": pair[1], "left_out": missing}
        release()


@dataclass(frozen=True)
class _Replay:
    """How a case decodes, and whose selections it replays."""

    form: str
    budget: int
    reading: str
    reuse: Reuse

    @property
    def row(self) -> dict[str, Any]:
        """What rows say about it."""
        more = {"reading": self.reading, "reuse_budget_tokens": self.reuse.budget_tokens}
        more |= {"reuse_context": self.reuse.context, "replayed_misses": self.reuse.misses}
        return {"form": self.form, "budget_tokens": self.budget, **more}


class ReplayedCase:
    """A batch and a context.

    Args:
        region: host memory that is full of random numbers.
        speed: GiB a second at which it was pinned.
    """

    def __init__(
        self, model: nn.Module, settings: MemorySettings, region: Region, speed: float, batch: int, length: int
    ) -> None:
        self._model, self._settings, self._region, self._speed = model, settings, region, speed
        self._shape, self._batch, self._length = ModelShape.of(model), batch, length
        self._weight = next(model.parameters())
        self._fits = missing_bytes(model, batch, length) <= 0  # on the GPU, as a whole
        wanted = product(settings.forms, settings.budgets, settings.readings)
        self._ways = [_Replay(form, budget, reading, self._reuse(budget, reading)) for form, budget, reading in wanted]

    def filled(self) -> Iterator[tuple[dict[str, Any], Engine, Context]]:
        """Every way to decode from host memory, after the steps that fill its store."""
        host = self._host_cache()
        for way, percent in product(self._ways, self._settings.store_percents):
            attention = self._attention(_ReplayedOffloaded, way, self._selections(way), percent / 100)
            engine = Engine(self._model, attention=attention, execution=self._settings.execution)
            context = self._context(host)
            token_ids = torch.full((self._batch,), 7, device=engine.device)
            for _ in range(self._settings.steps):
                engine.decode_one_token(context, token_ids)
            yield {"batch": self._batch, "context": self._length, **way.row, "store_percent": percent}, engine, context
            del context
            host.forget_state()
            release()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The measurements; raises `MismatchError` where steps differ from those over a resident cache."""
        size = {"batch": self._batch, "context": self._length, "pin_gib_per_second": self._speed}
        host, found = self._host_cache(), []
        for way in self._ways:
            made = self._selections(way)
            for percent, ahead in product(self._settings.store_percents, (True, False)[: 1 + self._settings.at_once]):
                attention = self._attention(_ReplayedOffloaded, way, made, percent / 100, ahead)
                context = self._context(host)
                row, logits = self._measured(attention, context)
                assert host.state is not None, "a step was measured"
                _check_store(host.state.store)
                row |= size | way.row | {"cache": "host", "store_percent": percent, "ahead": ahead}
                found.append((way, row, logits))
                if not self._fits:
                    yield row | {"error": None}
                del context
                host.forget_state()
                release()
        if self._fits:
            yield from self._against(host, found, size)

    def _against(
        self, host: HostCache, found: list[tuple[_Replay, dict[str, Any], Tensor]], size: dict[str, float]
    ) -> Iterator[dict[str, Any]]:
        """The rows so far, and those of steps over a copy of the cache on the GPU."""
        copy = self._resident(host)
        for way in self._ways:
            attention = self._attention(_Replayed, way, self._selections(way))
            resident, right = self._measured(attention, self._context(copy))
            yield resident | size | way.row | {"cache": "resident"}
            for row, logits in ((row, logits) for other, row, logits in found if other is way):
                error = relative_error(logits, right)
                if not error <= _TOLERANCE:
                    raise MismatchError(f"Logits of {size} from host memory differ by {error:.1e} from resident ones.")
                yield row | {"error": error, "slower": row["mean_ms"] / resident["mean_ms"] - 1}
            copy.forget_state()
            release()
        full, _ = self._measured(None, self._context(copy))
        yield full | size | {"cache": "full"}

    # ------------------------------------------------------------------ caches

    def _host_cache(self) -> HostCache:
        windows = Window.of_layers(self._model, self._shape)
        where = (self._batch, self._weight.dtype, self._weight.device)
        cache = HostCache(self._shape, *where, windows, region=self._region)
        cache.reserve(self._length + ROOM)
        return self._filled(cache)

    def _resident(self, host: HostCache) -> KVCache:
        cache = KVCache(self._shape.num_layers)
        cache.reserve(self._length + ROOM)
        self._filled(cache)
        for layer, whole in zip(cache.layers, host.layers, strict=True):
            for near, far in zip(layer.store, whole.store, strict=True):
                near.copy_(far, non_blocking=True)
        return cache

    def _filled(self, cache: KVCache) -> Any:
        token = self._weight.new_empty(self._batch, self._shape.num_kv_heads, 1, self._shape.head_dim)
        for layer in cache.layers:
            layer.lazy_initialization(token, token)
            layer.length = self._length
        return cache

    def _context(self, cache: KVCache) -> Context:
        cache.truncate(self._length)
        logits = torch.zeros(self._batch, 1, device=self._weight.device)
        kv_bytes = torch.zeros(self._batch, dtype=torch.float64, device=self._weight.device)
        return Context(cache, logits, [self._length] * self._batch, 0.0, kv_bytes)

    # ------------------------------------------------------------------ steps

    def _reuse(self, budget: int, reading: str) -> Reuse:
        path = self._settings.reuse
        if reading == "none":
            return Reuse({}, budget, self._length)
        return _SMOKE if path is None else reuse_of(path, budget, self._length, reading)

    def _config(self, way: _Replay) -> HybridConfig:
        size: dict[str, Any] = {"budget_tokens": way.budget, "block_size": self._settings.block_size}
        return HybridConfig(**size, completion="none", **MEMORY_FORMS[way.form])

    def _selections(self, way: _Replay) -> Tensor:
        """The selections of every step, also of those that do not select."""
        config, rows = self._config(way), len(plan_for(self._model).retrieval)
        newest = self._length + config.refresh_every - 1  # a selection stands for the tokens to come
        capacity = config.capacity_blocks(newest // config.block_size)
        size = rows, self._batch, capacity, newest, config.block_size
        misses = unchanged(capacity) if way.reading == "none" else way.reuse.misses
        return replay(misses, 2 * self._settings.steps, *size, self._settings.seed)

    def _attention(self, kind: type[_Replayed], way: _Replay, made: Tensor, *more: float) -> _Replayed:
        attention = kind(plan_for(self._model), self._config(way), self._shape.global_layers, *more)
        attention.give(made, self._length + 1)
        return attention

    def _measured(self, attention: DecodeAttention | None, context: Context) -> tuple[dict[str, Any], Tensor]:
        """Times of `steps` steps after as many that fill the store, and the logits of the first and the last ones."""
        engine = Engine(self._model, attention=attention, execution=self._settings.execution)
        steps, cache, on_gpu = self._settings.steps, context.cache, engine.device.type == "cuda"
        kept: list[Tensor] = []
        events: list[Any] = []
        if on_gpu:
            release()
            clear_cublas_workspaces()  # of prompts: what steps need, they make
        _peak(on_gpu)
        token_ids, before = torch.full((self._batch,), 7, device=engine.device), (0.0, 0.0, 0.0)
        first_peak = None
        for step in range(2 * steps):
            if step == steps:
                before, first_peak = _fetched(cache), _peak(on_gpu)  # of compiling and capturing, too
            events.append(event_now(engine.device))
            logits = engine.decode_one_token(context, token_ids)
            token_ids = logits.argmax(-1)
            if step < 2 or step >= 2 * steps - 2:
                kept.append(logits.cpu())
        events.append(event_now(engine.device))
        if on_gpu:
            torch.cuda.synchronize()
        asked, missed, pulled = (after - was for after, was in zip(_fetched(cache), before, strict=True))
        times = intervals(events)[steps:-2]  # the last ones wait for what is kept
        near, far = cache.memory()
        token = 2 * self._shape.head_dim * self._weight.element_size()
        whole = (self._length + ROOM) * slot_bytes(self._shape, self._batch, self._weight.dtype)
        peak = _peak(on_gpu)
        given = attention.given_bytes if isinstance(attention, _Replayed) else 0
        weights = sum(weight.nbytes for weight in self._model.parameters())
        read = weight_bytes(self._model) + int(context.kv_bytes.sum()) // context.steps
        return {
            "ms": median(times),
            "mean_ms": mean(times),
            "tokens_per_second": self._batch * 1e3 / mean(times),
            "bytes_on_gpu": near,
            "bytes_on_host": far,
            "part_of_full_cache": near / whole,
            "first_peak_bytes": first_peak,
            "peak_bytes": peak,
            "weight_bytes": weights,
            "replay_bytes": given,
            "part_at_peak": None if peak is None else (peak - weights - given) / whole,
            "bytes_read": read,
            "miss_rate": missed / asked if asked else 0.0,
            "fetched_bytes": pulled * self._settings.block_size * token / steps,
            "execution": engine.way,
        }, torch.stack(kept)


def _peak(on_gpu: bool) -> int | None:
    """Most bytes of the GPU's memory that were allocated since the last call."""
    if not on_gpu:
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _fetched(cache: KVCache) -> tuple[float, float, float]:
    """Blocks so far that were selected, that were missing, and that crossed the link."""
    if not isinstance(cache, HostCache) or cache.state is None:
        return 0.0, 0.0, 0.0
    store = cache.state.store
    return float(store.asked.sum()), float(store.missed.sum()), float(store.pulled.sum())


def intervals(events: list[Any]) -> list[float]:
    """Milliseconds between events of `event_now`."""
    if isinstance(events[0], float):
        return [(end - begin) * 1e3 for begin, end in pairwise(events)]
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def _host_bytes(model: nn.Module, batch: int, length: int) -> int:
    return grown(length + ROOM, 0) * slot_bytes(ModelShape.of(model), batch, next(model.parameters()).dtype)


def _fill(region: Region, model: nn.Module) -> None:
    """Fill it with random numbers that the GPU makes."""
    weight = next(model.parameters())
    numbers = region.data.view(weight.dtype)
    for piece in numbers.split(_PIECE):
        piece.copy_(torch.randn(len(piece), dtype=weight.dtype, device=weight.device))


def _check_store(store: BlockStore) -> None:
    """Raise `MismatchError` unless what the store holds, some of it, is what host memory does."""
    size, (held, slot_of) = store.block_size, (part.cpu() for part in (store.known.block_of, store.known.slot_of))
    pairs = [(row, layer, head) for row, readers in enumerate(store.readers) for layer, head in readers]
    some = torch.randint(len(pairs), (_SAMPLES,)).tolist()
    for row, layer, head in (pairs[i] for i in some):
        b = int(torch.randint(held.shape[1], ()))
        slot = int(torch.randint(held.shape[2], ()))
        block = int(held[row, b, slot])
        if block < 0:
            continue
        for near, whole in zip(store.pool, store.source, strict=True):
            here = near[layer, b, head, slot * size : (slot + 1) * size].cpu()
            if slot_of[row, b, block] != slot or not torch.equal(here, whole[layer, b, head, block * size :][:size]):
                raise MismatchError(f"Block {block} of head {head} in layer {layer} is not the cache's.")
