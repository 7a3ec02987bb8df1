"""Queries and keys that only attention reads: their norm and rotation move into its operator.

    q -> (RMSNorm) -> rotate ─┐
    k -> (RMSNorm) -> rotate ─┴-> decode_layer(q, k, v)      becomes      decode_layer(q, k, v, cos, sin, norms)

The same holds for `pass_layer`, of several tokens a sequence. There the kernel that takes the new tokens into the cache
does it on the way: one launch instead of three to five.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from .match import Norm, annotated, erase, name_of, rms_norm, value_of
from .patterns import ROTATED, find


class _Rotated(NamedTuple):
    """A rotation in a graph, of whose result one token is taken, or all of them tokens first; nodes users first."""

    x: Node
    cos: Node
    sin: Node
    nodes: list[Node]
    is_one: bool


def use_rotation(gm: GraphModule) -> int:
    """Hand rotations to the attention layers that alone read them; returns how many layers took theirs."""
    layers = [node for node in gm.graph.nodes if name_of(node) in ("decode_layer.default", "pass_layer.default")]
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
    with gm.graph.inserting_before(node):  # before norm and transposition a token's heads stand together
        sources = [_transposed(gm, r.x) if n is None else n.x for r, n in zip((query, key), norms, strict=True)]
        if query.is_one:
            sources = [_item(gm, source, (slice(None), 0)) for source in sources]
    query_, key_ = sources
    cos, sin = (_table(gm, table, tables) if query.is_one else table for table in (query.cos, query.sin))
    weights = [None if norm is None else norm.weight for norm in norms]
    node.args = (query_, key_, *node.args[2:], cos, sin, *weights, 0.0 if norms[0] is None else norms[0].eps)
    for rotated, norm in zip((query, key), norms, strict=True):
        erase(gm, [*rotated.nodes, *([rotated.x, *norm.nodes] if norm else [])])
    return True


def _table(gm: GraphModule, table: Node, known: dict[Node, Node]) -> Node:
    """The only row of a table, for every sequence."""
    if table not in known:
        with gm.graph.inserting_after(table):
            known[table] = _item(gm, table, (slice(None), 0))
    return known[table]


def _rotated(taken: Any) -> _Rotated | None:
    """The rotation of `[B, H, T, D]` by tables `[B, T, D]` that `taken` is: its only token, or `[B, T, H, D]`."""
    found = find(ROTATED, taken)
    if found is None:
        return None
    x, cos, sin = (found.named[name] for name in ("x", "cos", "sin"))
    value = value_of(x)
    is_one = "token" in found.named
    if value is None or value.ndim != 4 or (is_one and value.shape[2] != 1):
        return None
    half, table = value.shape[-1] // 2, (value.shape[0], *value.shape[2:])
    indices: dict[str, tuple[Any, ...]] = {
        "low": (Ellipsis, slice(None, half)),
        "high": (Ellipsis, slice(half, None)),
        "token": (slice(None), slice(None), 0),
    }
    if any(found.named.get(name, index) != index for name, index in indices.items()):
        return None
    if any(tuple(value_of(node).shape) != table for node in (cos, sin)):
        return None
    return _Rotated(x, cos, sin, found.nodes, is_one)


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
