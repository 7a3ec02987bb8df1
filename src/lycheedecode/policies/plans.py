"""Policies that are head plans: the same fold over the layers, with other roles and donors.

Tables of donors are made over the layers with full attention alone; in the other layers every head keeps to itself, as
nobody asks there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..models.shape import ModelShape
from ..plan import Head, HeadPlan, PlanError

_TIDAL_DENSE = 2
"""Layers at the bottom that select nothing in TidalDecode."""
_TIDAL_DEPTH = 13 / 32
"""Where in the model TidalDecode selects again."""


def same_index(roles: Iterable[Head], shape: ModelShape) -> HeadPlan:
    """The paper's inheritance: each sparse head has the nearest earlier retrieval head of its own index as donor.

    All heads of the first layer retrieve, whether they are among `roles` or not.
    """
    layers = shape.global_layers
    depth = {layer: i for i, layer in enumerate(layers)}
    inside = [(depth[layer], head) for layer, head in roles if layer in depth]
    donors = [[(layer, head) for head in range(shape.num_kv_heads)] for layer in range(shape.num_layers)]
    for layer, row in zip(layers, HeadPlan.same_index(inside, len(layers), shape.num_kv_heads).donors, strict=True):
        donors[layer] = [(layers[donor], head) for donor, head in row]
    return HeadPlan.from_donors(donors)


def random_roles(number: int, shape: ModelShape, seed: int) -> HeadPlan:
    """`number` retrieval heads at random, those of the first layer among them; donors of the same index."""
    rest = shape.global_layers[1:]
    others = [(layer, head) for layer in rest for head in range(shape.num_kv_heads)]
    drawn = min(max(number - shape.num_kv_heads, 0), len(others))
    return same_index(random.Random(seed).sample(others, drawn), shape)


def tidal_layers(num_layers: int) -> tuple[int, ...]:
    """The layers of TidalDecode that attend densely: two at the bottom, the one that selects, and one that selects
    again, 13 layers up in a model of 32 and as far up in proportion in others."""
    return tuple(sorted({*range(min(_TIDAL_DENSE + 1, num_layers)), round(num_layers * _TIDAL_DEPTH)}))


def tidaldecode(shape: ModelShape) -> HeadPlan:
    """TidalDecode as a plan: all heads of some layers retrieve, and serve the same index in the layers that follow."""
    layers = [shape.global_layers[i] for i in tidal_layers(len(shape.global_layers))]
    return same_index(((layer, head) for layer in layers for head in range(shape.num_kv_heads)), shape)


def kascade(coverage: Tensor, shape: ModelShape, anchors: int | Sequence[int]) -> HeadPlan:
    """Kascade as a plan: all heads of the anchor layers retrieve; each other head has the head of the latest anchor
    layer as donor whose selection covers it best.

    Args:
        coverage: float `[L * Hkv, L * Hkv]`, `[head, donor]`, from `identify.donors.measure_coverage`.
        shape: of the model, whose layers must all have full attention.
        anchors: the anchor layers, 0 among them, or how many: those that cover most.

    Raises:
        PlanError: a coverage of another model, a number that does not fit, or anchors without layer 0.
    """
    layers, width = shape.num_layers, shape.num_kv_heads
    if coverage.shape != (layers * width, layers * width) or len(shape.global_layers) != layers:
        raise PlanError(f"Kascade needs the coverage of {layers} x {width} heads, all with full attention.")
    table = coverage.view(layers, width, layers, width).permute(0, 2, 1, 3)  # [layer, anchor, head, donor]
    if isinstance(anchors, int):
        if not 1 <= anchors <= layers:
            raise PlanError(f"A model of {layers} layers cannot have {anchors} anchor layers.")
        anchors = _best_anchors(table, anchors)
    chosen = sorted(set(anchors))
    if not chosen or chosen[0] != 0 or chosen[-1] >= layers:
        raise PlanError(f"Anchor layers must be in 0 to {layers - 1}, and layer 0 must be one of them.")
    donors: list[list[Head]] = []
    for layer in range(layers):
        anchor = max(a for a in chosen if a <= layer)
        best = range(width) if anchor == layer else table[layer, anchor].argmax(-1).tolist()
        donors.append([(anchor, head) for head in best])
    return HeadPlan.from_donors(donors)


def _best_anchors(table: Tensor, number: int) -> list[int]:
    """The anchor layers with which heads are covered best on average, by dynamic programming over their number."""
    layers = table.shape[0]
    served = table.amax(-1).mean(-1)  # [layer, anchor]
    served.diagonal().copy_(table.diagonal().diagonal().mean(-1))  # an anchor's heads serve themselves
    total = served.double().cumsum(0)

    def segment(anchor: int, end: int) -> float:
        before = float(total[anchor - 1, anchor]) if anchor else 0.0
        return float(total[end - 1, anchor]) - before

    best = {first: (segment(first, layers), [first]) for first in range(layers)}  # with one anchor from `first` on
    for _ in range(number - 1):
        best = {
            first: max(
                (segment(first, following) + value, [first, *rest])
                for following, (value, rest) in best.items()
                if following > first
            )
            for first in range(layers)
            if any(following > first for following in best)
        }
    return best[0][1]
