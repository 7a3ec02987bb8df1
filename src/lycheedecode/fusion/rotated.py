"""Queries and keys that only attention reads: their norm and rotation move into its operator.

    q -> (RMSNorm) -> rotate ─┐
    k -> (RMSNorm) -> rotate ─┴-> decode_layer(q, k, v)      becomes      decode_layer(q, k, v, cos, sin, norms)

There the kernel that takes the newest token into the cache does it on the way: one launch instead of three to five.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from .match import Norm, annotated, erase, name_of, rms_norm, value_of
from .patterns import ROTATED, find


class _Rotated(NamedTuple):
    """A rotation in a graph, of whose result one token is taken; nodes users first."""

    x: Node
    cos: Node
    sin: Node
    nodes: list[Node]


def use_rotation(gm: GraphModule) -> int:
    """Hand rotations to the attention layers that alone read them; returns how many layers took theirs."""
    layers = [node for node in gm.graph.nodes if name_of(node) == "decode_layer.default"]
    tables: dict[Node, Node] = {}
    return sum(_take(gm, node, tables) for node in layers)


def _take(gm: GraphModule, node: Node, tables: dict[Node, Node]) -> bool:
    """`tables`: the row of each table that layers share."""
    if len(node.args) != 5 or node.kwargs:
        return False
    query, key = _rotated(node.args[0]), _rotated(node.args[1])
    if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
        return False
    norms = _norms(query.x, key.x)
    with gm.graph.inserting_before(node):
        sources = [r.x if n is None else _transposed(gm, n.x) for r, n in zip((query, key), norms, strict=True)]
        query_, key_ = (_item(gm, source, (slice(None), slice(None), 0)) for source in sources)
    for table in (query.cos, query.sin):
        if table not in tables:
            with gm.graph.inserting_after(table):
                tables[table] = _item(gm, table, (slice(None), 0))
    cos, sin = tables[query.cos], tables[query.sin]
    weights = [None if norm is None else norm.weight for norm in norms]
    node.args = (query_, key_, *node.args[2:], cos, sin, *weights, 0.0 if norms[0] is None else norms[0].eps)
    for rotated, norm in zip((query, key), norms, strict=True):
        erase(gm, [*rotated.nodes, *([rotated.x, *norm.nodes] if norm else [])])
    return True


def _rotated(taken: Any) -> _Rotated | None:
    """The rotation of `[B, H, 1, D]` by tables `[B, 1, D]` whose only token `taken` is."""
    found = find(ROTATED, taken)
    if found is None:
        return None
    x, cos, sin = (found.named[name] for name in ("x", "cos", "sin"))
    value = value_of(x)
    if value is None or value.ndim != 4 or value.shape[2] != 1:
        return None
    half, table = value.shape[-1] // 2, (value.shape[0], 1, value.shape[-1])
    indices = {
        "low": (Ellipsis, slice(None, half)),
        "high": (Ellipsis, slice(half, None)),
        "token": (slice(None), slice(None), 0),
    }
    if any(found.named[name] != index for name, index in indices.items()):
        return None
    if any(tuple(value_of(node).shape) != table for node in (cos, sin)):
        return None
    return _Rotated(x, cos, sin, found.nodes)


def _norms(query: Node, key: Node) -> tuple[Norm | None, Norm | None]:
    """The norms before the rotations, of `norm(x).transpose(1, 2)`; both or neither."""
    transposed = [name_of(x) == "transpose" and x.args[1:] == (1, 2) for x in (query, key)]
    found = [rms_norm(x.args[0]) if holds else None for x, holds in zip((query, key), transposed, strict=True)]
    if None in found or found[0].eps != found[1].eps:
        return None, None
    return found[0], found[1]


def _transposed(gm: GraphModule, x: Node) -> Node:
    return annotated(gm.graph.call_function(torch.transpose, (x, 1, 2)))


def _item(gm: GraphModule, x: Node, index: tuple[Any, ...]) -> Node:
    return annotated(gm.graph.call_function(operator.getitem, (x, index)))
