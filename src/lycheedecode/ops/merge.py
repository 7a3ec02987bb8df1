"""How the partial results of the programs that share a head meet: the last one to arrive merges them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel_common import finite, mask_if, power_of_two

# ---------------------------------------------------------------------- before a launch


class _Arrivals:
    """Counters that are zero between launches: the last program to arrive sets its own back to zero.

    Calls take turns in one buffer, so that launches that are in flight together do not share a counter. Each gets whole
    16 bytes: kernels are compiled for how their arguments are aligned.
    """

    _SIZE = 1 << 18
    _buffers: dict[torch.device, tuple[Tensor, int]]

    def __init__(self) -> None:
        self._buffers = {}

    def take(self, count: int, device: torch.device) -> Tensor:
        """int32 `[count]` zeros."""
        buffer, first = self._buffers.get(device, (None, 0))
        taken = -(-count // 4) * 4
        if buffer is None or taken > len(buffer):
            buffer, first = torch.zeros(max(self._SIZE, taken), dtype=torch.int32, device=device), 0
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return buffer[:count]  # it lives in the graph, which zeroes it at every replay
        if first + taken > len(buffer):
            first = 0
        self._buffers[device] = buffer, first + taken
        return buffer[first : first + count]


take_arrivals = _Arrivals().take


def merge_space(batch: int, heads: int, splits: int, group: int, dim: int, device: torch.device) -> tuple[Any, ...]:
    """What `finish` needs to merge splits: partial results, their log-sums, counters."""
    if splits == 1:
        return None, None, None
    partial = torch.empty((batch * heads, splits, group, dim), dtype=torch.float32, device=device)
    sums = torch.empty((batch * heads, splits, group), dtype=torch.float32, device=device)
    return partial, sums, take_arrivals(batch * heads, device)


def merge_chunk(splits: int, group: int, dim: int, warps: int) -> int:
    """Splits merged at once: as many as fit into 64 registers a thread."""
    fits = 64 * 32 * warps // (power_of_two(group) * max(16, power_of_two(dim)))
    return min(max(1 << max(fits, 1).bit_length() - 1, 1), power_of_two(splits))


# ---------------------------------------------------------------------- inside a kernel


@triton.jit
def finish(
    output, partial, sums, arrivals, acc, peak, total, pair, split,
    G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write row `pair` of `output [B * H, G, D]`: at once, or by the program that arrives last of its splits."""
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    mask = (g < G)[:, None] & (d < D)[None, :]
    within = g[:, None] * D + d[None, :]
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        tl.store(output + pair.to(tl.int64) * (G * D) + within, result.to(output.dtype.element_ty), mask=mask)
    else:
        part = pair.to(tl.int64) * SPLITS + split
        tl.store(partial + part * (G * D) + within, result, mask=mask)
        tl.store(sums + part * G + g, peak + tl.log2(total), mask=g < G)
        if is_last(arrivals, pair, SPLITS):
            _merge(output, partial, sums, pair, G, D, DP, SPLITS, CHUNK)


@triton.jit
def is_last(arrivals, pair, SPLITS: tl.constexpr):
    """Whether this program is the last of its pair's to come here; then it sees what the others wrote before."""
    tl.debug_barrier()  # every thread has written before the arrival is counted
    last = tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(arrivals + pair, 0)  # for the next launch
        tl.debug_barrier()
    return last


@triton.jit
def _merge(
    output, partial, sums, pair,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Average of the partial results of all splits, weighted by their mass; `CHUNK` splits at a time.

    Others wrote what is read here during this launch: it comes from the L2, past this processor's own cache. No load
    waits for another: at this point of a launch a step to the L2 and back is most of what there is left to do.
    """
    g = tl.arange(0, triton.next_power_of_2(G))
    d = tl.arange(0, DP)
    mask = (g < G)[:, None] & (d < D)[None, :]
    within = g[:, None] * D + d[None, :]
    first = pair.to(tl.int64) * SPLITS

    acc = tl.zeros(within.shape, tl.float32)
    peak = tl.full(g.shape, float("-inf"), tl.float32)
    total = tl.zeros(g.shape, tl.float32)
    for chunk in range(0, SPLITS, CHUNK):
        parts, masses = (), ()
        for c in tl.static_range(CHUNK):
            part = first + chunk + c
            here = chunk + c < SPLITS
            at = partial + part * (G * D) + within
            part_output = tl.load(at, mask=mask_if(here, mask), other=0.0, cache_modifier=".cg")
            parts += (part_output,)  # type: ignore[assignment]  # the loop is unrolled
            at = sums + part * G + g
            part_mass = tl.load(at, mask=mask_if(here, g < G), other=float("-inf"), cache_modifier=".cg")
            masses += (part_mass,)  # type: ignore[assignment]  # the loop is unrolled
        new_peak = peak
        for c in tl.static_range(CHUNK):
            new_peak = tl.maximum(new_peak, masses[c])
        shift = finite(new_peak)
        fade = tl.exp2(peak - shift)
        acc, total, peak = acc * fade[:, None], total * fade, new_peak
        for c in tl.static_range(CHUNK):
            weight = tl.exp2(masses[c] - shift)
            acc += weight[:, None] * parts[c]
            total += weight
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = output + pair.to(tl.int64) * (G * D) + g[:, None] * D + d[None, :]
    tl.store(at, result.to(output.dtype.element_ty), mask=mask)
