"""The ceiling: a kernel that reads memory and does nothing else.

    buffer      |chunk|chunk|chunk| ... |        `STEPS` tiles a chunk, in flight together; chunks go round the programs

Benchmarks measure every other kernel by how fast this one reads on the same machine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Way(NamedTuple):
    """How to read: words of a tile, tiles of a chunk, warps of a program, programs (0: one a chunk)."""

    tile: int = 2048
    steps: int = 8
    warps: int = 4
    programs: int = 0


WAYS = (Way(), Way(2048, 4, 4), Way(4096, 4, 8), Way(2048, 8, 4, 132 * 4), Way(1024, 8, 4, 132 * 8), Way(1024, 4, 2))
"""The fastest of them is the ceiling: which one it is differs from GPU to GPU."""


@triton.jit
def _read_kernel(data, out, chunks, TILE: tl.constexpr, STEPS: tl.constexpr):
    bits = tl.zeros([TILE], tl.int32)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        first = chunk.to(tl.int64) * (TILE * STEPS)  # type: ignore[attr-defined]  # in a kernel, numbers are tensors
        for step in tl.static_range(STEPS):
            bits |= tl.load(data + first + step * TILE + tl.arange(0, TILE))
    found = tl.max(bits, 0)
    if found == 0x12345678:  # practically never, but the compiler cannot know
        tl.store(out, found)


def read_all(data: Tensor, out: Tensor, way: Way = WAYS[0]) -> int:
    """Read int32 `data`, whole chunks of it, and return their bytes; `out` is an int32 that is hardly ever written."""
    chunks = data.numel() // (way.tile * way.steps)
    _read_kernel[way.programs or chunks,](data, out, chunks, way.tile, way.steps, num_warps=way.warps)
    return chunks * way.tile * way.steps * 4


def scratch(device: torch.device | str) -> Tensor:
    """What `read_all` may write."""
    return torch.zeros(1, dtype=torch.int32, device=device)
