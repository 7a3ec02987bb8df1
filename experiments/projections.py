"""Linear layers of a decode step, and the launches of them that studies try."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from lycheedecode.fusion.launches import LinearTuning
from lycheedecode.fusion.operator import EIGHT_BITS


class Projection(NamedTuple):
    """Linear layers of one input, and what is computed with them.

    Attributes:
        sizes: outputs of each layer.
        columns: inputs.
        norm: an RMSNorm comes first.
        residual: something is added to the output.
        gated: of two layers, `SiLU(first) * second`.
        eight_bits: weights are in 8-bit floats.
    """

    sizes: tuple[int, ...]
    columns: int
    norm: bool = False
    residual: bool = False
    gated: bool = False
    eight_bits: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        return sum(self.sizes) * self.columns * (1 if self.eight_bits else 2)

    @classmethod
    def of(cls, kind: Any) -> Projection:
        """The projection of a `fusion.launches.Kind`."""
        eight_bits = kind.dtype == EIGHT_BITS
        return cls(kind.sizes, kind.columns, kind.norm, kind.residual, kind.gated, eight_bits)


LLAMA_3_8B = {
    "qkv": Projection((4096, 1024, 1024), 4096, norm=True),
    "o": Projection((4096,), 4096, residual=True),
    "gate_up": Projection((14336, 14336), 4096, norm=True, gated=True),
    "down": Projection((4096,), 14336, residual=True),
    "head": Projection((128256,), 4096),
}
LAYER = ("qkv", "o", "gate_up", "down")


def candidates(projection: Projection, batch: int) -> list[LinearTuning]:
    """Launches with 40-176 KiB of loads in flight on each of 132 multiprocessors, and about the same work for each."""
    out = projection.sizes[0] if projection.gated else sum(projection.sizes)
    plain = [(16, 128), (16, 256), (32, 128), (32, 256), (64, 128), (16, 512)] if batch == 1 else []
    dotted = [(64, 64), (64, 128), (64, 256), (32, 128), (32, 256), (128, 64), (128, 128)]
    dotted += [(32, 512)] if projection.eight_bits else []
    shapes = [(0, *shape) for shape in plain] + [(8, *shape) for shape in dotted]
    shapes += [] if projection.eight_bits else [(16, *dotted[1])]
    number_bytes, found = (1 if projection.eight_bits else 2), []
    for (dot, rows, depth), splits, stages in product(shapes, (1, 2, 4, 7, 8), (3, 5)):
        warps = [8 if rows * depth > 8192 else 4]
        if dot and projection.eight_bits:
            warps = [2, 4] if rows == 64 else [2]  # see `launches._tuning_of_8_bits`
        programs = -(-out // rows) * splits
        stage = rows * depth * number_bytes * (2 if projection.gated else 1)
        fits = min((220 << 10) // (stage * stages), 8)
        in_flight = min(fits, programs / 132) * stage * (stages - 1)
        splits_well = splits == 1 or (
            programs <= 600 and not projection.gated and projection.columns % (depth * splits) == 0
        )
        if splits_well and 40 << 10 <= in_flight <= 176 << 10 and 180 <= programs <= 4096:
            found += [LinearTuning(rows, depth, splits, w, stages, dot, prefetch=512) for w in warps]
    return found


def evenly(grid: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many of them, from all over the grid."""
    return grid[:: max(-(-len(grid) // most), 1)]


def words(fields: Any) -> str:
    """Names and values of a named tuple."""
    return " ".join(f"{name} {value}" for name, value in fields._asdict().items())
