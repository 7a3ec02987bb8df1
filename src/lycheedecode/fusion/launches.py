"""How linear layers of a few rows are launched: what was fastest, and a place to try others."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch

from ..ops.types import power_of_two
from ..scoped import scoped
from .operator import EIGHT_BITS

PROGRAMS = 396
"""Programs that an H200's 132 multiprocessors hold at once, three each: one wave, whose loads keep the memory busy."""


class LinearTuning(NamedTuple):
    """How the kernel cuts its work; never changes what it computes.

    Attributes:
        rows: of a weight, that a program multiplies.
        depth: columns that it handles at once.
        splits: programs that share the columns of a row.
        warps: of a program.
        stages: depth of its load pipeline.
        dot: rows of input that a matrix instruction takes at least, 8 or 16, padded to a power of two where there are
            more; 0: ordinary multiplications, for one row only.
        prefetch: columns of its rows that a program calls into the L2 while the kernel before it drains; 0 starts
            when that kernel has ended.
        overlap: MiB that are left to read when the kernel after it may start.
    """

    rows: int
    depth: int
    splits: int
    warps: int
    stages: int
    dot: int = 8
    prefetch: int = 0
    overlap: int = 16


class Kind(NamedTuple):
    """What a launch is chosen by; `dtype` is that of the weights."""

    rows: int
    sizes: tuple[int, ...]
    columns: int
    dtype: torch.dtype
    gated: bool
    norm: bool = False
    residual: bool = False


_launches: ContextVar[MutableMapping[Kind, LinearTuning] | None] = ContextVar("lycheedecode_launches", default=None)


def tuned(launches: MutableMapping[Kind, LinearTuning]) -> AbstractContextManager[None]:
    """Layers that this thread computes while this is open take their launches from `launches`.

    Kinds of layers that it lacks are added to it, with their default.
    """
    return scoped(_launches, launches)


def launch_of(kind: Kind) -> LinearTuning:
    """The launch that is being tried for this kind, or else the default."""
    launches = _launches.get()
    if launches is None:
        return default_tuning(*kind[:5])
    return launches.get(kind) or launches.setdefault(kind, default_tuning(*kind[:5]))


@lru_cache(maxsize=1024)
def default_tuning(rows: int, sizes: tuple[int, ...], columns: int, dtype: torch.dtype, gated: bool) -> LinearTuning:
    """What was fastest on an H200 within a step; `python -m experiments tune-step` measures it."""
    if dtype == EIGHT_BITS:
        return _tuning_of_8_bits(rows, sizes, columns, gated)
    if rows > 16:
        return _tuning_of_many_rows(rows, sizes, columns, gated)
    far, near = (512, 128) if dtype.itemsize == 2 else (0, 0)
    out = sizes[0] if gated else sum(sizes)
    if rows == 1:
        if gated:
            return LinearTuning(rows=16, depth=256, splits=1, warps=4, stages=3, dot=0, prefetch=far, overlap=4)
        if out >= 32 * PROGRAMS and dtype.itemsize == 2:
            return LinearTuning(rows=64, depth=128, splits=1, warps=4, stages=3, dot=16, prefetch=near)
        if columns > 8192:
            return LinearTuning(rows=16, depth=512, splits=1, warps=4, stages=5, dot=0, prefetch=far)
        if out <= 4096:
            return LinearTuning(rows=16, depth=512, splits=1, warps=4, stages=5, dot=0, prefetch=near)
        return LinearTuning(rows=16, depth=512, splits=1, warps=4, stages=3, dot=0, prefetch=far, overlap=4)
    if gated:
        return LinearTuning(rows=64, depth=128, splits=1, warps=4, stages=3, prefetch=near)
    tiles = sum(-(-size // 64) for size in sizes)
    if tiles >= PROGRAMS:
        return LinearTuning(rows=64, depth=128, splits=1, warps=4, stages=3, dot=16, prefetch=far)
    splits = min(power_of_two(PROGRAMS // tiles), max(columns // 128, 1))
    if columns > 8192:
        return LinearTuning(rows=32, depth=256, splits=2, warps=4, stages=5, prefetch=far)
    if out <= 4096:
        return LinearTuning(rows=32, depth=128, splits=2, warps=4, stages=5, prefetch=near)
    return LinearTuning(rows=64, depth=128, splits=splits, warps=4, stages=3, dot=16, prefetch=near)


def _tuning_of_many_rows(rows: int, sizes: tuple[int, ...], columns: int, gated: bool) -> LinearTuning:
    """For 17 to 64 rows: near the fastest on an H200 and on an H100; `python -m experiments linear-rows` measures it.

    Each program reads all rows of the input, from the L2: of 36 rows half as many bytes as of 64 rows of a weight.
    """
    tiles, few = sum(-(-size // 64) for size in sizes), rows <= 32
    deep = LinearTuning(rows=64, depth=128, splits=1, warps=4, stages=3, dot=16, prefetch=128)
    flat = deep._replace(depth=64, stages=4)
    if gated:
        return flat
    if tiles >= PROGRAMS:
        return deep
    tuning = flat if few else deep
    if sum(sizes) > 4096:
        tuning = flat._replace(stages=6 if few else 4)
    steps = max(columns // tuning.depth, 1)
    most = 8 if few and columns > 8192 else min(PROGRAMS // tiles, steps // 2, 8)
    return tuning._replace(splits=max(splits for splits in range(1, max(most, 1) + 1) if steps % splits == 0))


def _tuning_of_8_bits(rows: int, sizes: tuple[int, ...], columns: int, gated: bool) -> LinearTuning:
    """For weights in 8-bit floats: more loads at once, and matrix instructions of 16 rows of a weight for each warp.

    Four warps of 64 rows would get a warpgroup's matrix instructions, for which weights come from shared memory two at
    a time; and of warps that share 16 rows each would convert all of them. So it is two warps.
    """
    usual = default_tuning(rows, sizes, columns, torch.bfloat16, gated)
    if usual.dot == 0:
        return usual._replace(stages=max(usual.stages, 4), prefetch=2 * usual.prefetch)
    if gated and rows <= 8:
        return LinearTuning(rows=32, depth=512, splits=1, warps=2, stages=3, prefetch=512)
    if gated:
        return LinearTuning(rows=32, depth=128, splits=1, warps=2, stages=4, prefetch=256)
    if columns > 8192 and rows <= 8:
        return LinearTuning(rows=64, depth=256, splits=4, warps=2, stages=5, prefetch=512)
    if sum(sizes) <= 4096 and rows <= 8:
        return LinearTuning(rows=32, depth=256, splits=2, warps=2, stages=5, prefetch=512)
    tiles = sum(-(-size // 64) for size in sizes)
    splits = max(min(power_of_two(PROGRAMS // tiles), columns // 128), 1)
    return LinearTuning(rows=64, depth=128, splits=splits, warps=2, stages=4, prefetch=256)
