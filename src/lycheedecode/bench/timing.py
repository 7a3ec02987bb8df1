"""Time of work on a CUDA GPU: replayed as a CUDA graph, over more memory than the L2 holds, as a median."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.decoder import without_collection

Call = Callable[[], Any]
L2_TIMES = 4
"""Buffers that are read in turn hold this many times what the L2 does."""
GRAPH_MS, MOST_CALLS = 2.0, 1024
"""How long a timed graph lasts, unless that takes too many calls."""


class Timing(NamedTuple):
    """Milliseconds of one call: the median of `repeats` replays, and what the fastest and slowest tenth took."""

    ms: float
    fast_ms: float
    slow_ms: float
    repeats: int


def time_calls(calls: Sequence[Call], seconds: float = 0.2) -> Timing:
    """Time of one of `calls`, which run one after the other in a single CUDA graph.

    Each call should read memory of its own (`rotations` says how many it takes), so that none finds its data in the L2.
    The graph goes through them as often as it takes for its own launch not to show.
    """
    _warm_up(calls)
    graph = _captured(calls)
    first = _replay_ms(graph, 3)[-1]
    rounds = min(ceil(GRAPH_MS / max(first, 1e-3)), max(MOST_CALLS // len(calls), 1))
    if rounds > 1:
        calls = [*calls] * rounds
        graph = _captured(calls)
        first *= rounds
    repeats = min(max(int(seconds * 1e3 / first), 7), 200)
    _replay_ms(graph, repeats // 2)  # the clocks settle
    times = sorted(time / len(calls) for time in _replay_ms(graph, repeats))
    return Timing(median(times), times[repeats // 10], times[-1 - repeats // 10], repeats)


def _warm_up(calls: Sequence[Call]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def l2_bytes() -> int:
    """Size of the current GPU's L2."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def rotations(bytes_per_call: int, least: int = 1, most: int = 256) -> int:
    """How many different inputs a call must go through, so that none of them stays in the L2."""
    return min(max(-(-L2_TIMES * l2_bytes() // max(bytes_per_call, 1)), least), most)


def read_bandwidth(pool: Tensor, seconds: float = 0.2) -> float:
    """Bytes a second at which this GPU reads `pool`, a contiguous tensor of at least a gigabyte."""
    from . import read

    words = pool.view(-1).view(torch.int32)[: 1 << 29]
    out = read.scratch(words.device)
    speeds = []
    for way in read.WAYS:
        size = read.read_all(words, out, way)
        timing = time_calls([partial(read.read_all, words, out, way)], seconds / len(read.WAYS))
        speeds.append(size / timing.ms * 1e3)
    return max(speeds)
