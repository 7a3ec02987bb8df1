"""Time of work on a CUDA GPU: replayed as a CUDA graph, over more memory than the L2 holds, as a median."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[[], Any]
L2_TIMES = 4
"""Buffers that are read in turn hold this many times what the L2 does."""


class Timing(NamedTuple):
    """Milliseconds of one call: the median of `repeats` replays, and what the fastest and slowest tenth took."""

    ms: float
    fast_ms: float
    slow_ms: float
    repeats: int


def time_calls(calls: Sequence[Call], seconds: float = 0.2) -> Timing:
    """Time of one of `calls`, which run one after the other in a single CUDA graph.

    Each call should read memory of its own (`rotations` says how many it takes), so that none finds its data in the L2.
    """
    graph = _captured(calls)
    first = _replay_ms(graph, 3)[-1]
    repeats = min(max(int(seconds * 1e3 / max(first, 1e-3)), 7), 200)
    _replay_ms(graph, repeats // 2)  # the clocks settle
    times = sorted(time / len(calls) for time in _replay_ms(graph, repeats))
    return Timing(median(times), times[repeats // 10], times[-1 - repeats // 10], repeats)


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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
    from ..ops.triton import read

    words = pool.view(-1).view(torch.int32)[: 1 << 29]
    out = read.scratch(words.device)
    timing = time_calls([lambda: read.read_all(words, out)], seconds)
    chunk = read.TILE * read.STEPS
    return words.numel() // chunk * chunk * 4 / timing.ms * 1e3
