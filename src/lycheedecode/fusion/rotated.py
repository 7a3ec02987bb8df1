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

from .match import Norm, annotated, erase, is_call, rms_norm, value_of


class _Rotated(NamedTuple):
    """`x * cos + rotate_half(x) * sin` in a graph, of which one token is taken; nodes last first."""

    x: Node
    cos: Node
    sin: Node
    nodes: list[Node]


def use_rotation(gm: GraphModule) -> int:
    """Hand rotations to the attention layers that alone read them; returns how many layers took theirs."""
    layers = [node for node in gm.graph.nodes if is_call(node, "decode_layer.default")]
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
    """Of `rotated[:, :, 0]`; `cos` and `sin` are `[B, 1, D]`."""
    if not is_call(taken, "getitem") or taken.args[1] != (slice(None), slice(None), 0):
        return None
    total = taken.args[0]
    if not is_call(total, "add") or len(total.args) != 2:
        return None
    straight, turned = total.args
    if not (is_call(straight, "mul") and is_call(turned, "mul") and is_call(turned.args[0], "cat")):
        return None
    (x, cos), (halves, sin) = straight.args, turned.args
    if _dim(halves) != -1 or len(halves.args[0]) != 2 or not is_call(halves.args[0][0], "neg"):
        return None
    negated, first = halves.args[0]
    second = negated.args[0]
    value = value_of(x)
    if value is None or value.ndim != 4 or value.shape[2] != 1:
        return None
    half = value.shape[-1] // 2
    if not _is_slice(first, x, slice(None, half)) or not _is_slice(second, x, slice(half, None)):
        return None
    tables = [_table(cos, value), _table(sin, value)]
    if None in tables:
        return None
    return _Rotated(x, *tables, [taken, total, turned, halves, negated, first, second, straight])


def _table(node: Any, value: torch.Tensor) -> Node | None:
    """Of `table.unsqueeze(1)`: the table, if there is a row of it for each sequence."""
    if not is_call(node, "unsqueeze") or node.args[1:] != (1,):
        return None
    shape = value_of(node.args[0]).shape
    return node.args[0] if tuple(shape) == (value.shape[0], 1, value.shape[-1]) else None


def _norms(query: Node, key: Node) -> tuple[Norm | None, Norm | None]:
    """The norms before the rotations, of `norm(x).transpose(1, 2)`; both or neither."""
    found = [rms_norm(x.args[0]) if is_call(x, "transpose") and x.args[1:] == (1, 2) else None for x in (query, key)]
    if None in found or found[0].eps != found[1].eps:
        return None, None
    return found[0], found[1]


def _transposed(gm: GraphModule, x: Node) -> Node:
    return annotated(gm.graph.call_function(torch.transpose, (x, 1, 2)))


def _item(gm: GraphModule, x: Node, index: tuple[Any, ...]) -> Node:
    return annotated(gm.graph.call_function(operator.getitem, (x, index)))


def _dim(cat: Node) -> Any:
    return cat.kwargs.get("dim", cat.args[1] if len(cat.args) > 1 else 0)


def _is_slice(node: Any, x: Node, channels: slice) -> bool:
    return is_call(node, "getitem") and node.args == (x, (Ellipsis, channels))
