"""What a graph that Dynamo traced says, and how to change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .patterns import RMS_NORM, find

IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv")


def name_of(node: Any) -> str | None:
    """What a call does, be it a function, an operator or a method."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", None)


def value_of(node: Any) -> Any:
    """An example of a node's value."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_parameter(node: Any, dims: int) -> bool:
    """Whether a node is a contiguous tensor of so many dimensions that the graph is given."""
    value = value_of(node)
    return (
        isinstance(node, Node)
        and node.op == "placeholder"
        and isinstance(value, Tensor)
        and value.ndim == dims
        and value.is_contiguous()
    )


def changes(node: Node) -> bool:
    """Whether something works in place on a node's value, which then matters when it is read."""
    names = [name_of(user) or "" for user in node.users]
    return any(name in IN_PLACE or name.endswith("_") for name in names)


def only_user(node: Node | None) -> Node | None:
    """The one node that reads this one."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


class Norm(NamedTuple):
    """An RMSNorm in a graph, and the nodes that nobody else needs when it is gone, users first."""

    x: Node
    weight: Node
    eps: float
    nodes: list[Node]


def rms_norm(node: Any) -> Norm | None:
    """The RMSNorm that ends in a node: over the last dimension, in float32, with a weight that the graph is given."""
    found = find(RMS_NORM, node)
    if found is None:
        return None
    x, weight, eps = (found.named[name] for name in ("x", "weight", "eps"))
    values = [value_of(x), value_of(weight), value_of(node)]
    if not isinstance(eps, float) or not is_parameter(weight, 1) or changes(x):
        return None
    if not all(isinstance(value, Tensor) and value.dtype == values[0].dtype for value in values):
        return None
    in_float32 = any(value_of(n) is not None and value_of(n).dtype == torch.float32 for n in (x, *found.nodes[1:]))
    if not in_float32 or values[1].shape != values[0].shape[-1:] or values[2].shape != values[0].shape:
        return None
    return Norm(x, weight, eps, found.nodes)


# ---------------------------------------------------------------------- how to change it


def annotated(node: Node) -> Node:
    """Later passes ask every node for an example of its value."""
    target: Any = node.target  # a function, as every call here
    node.meta["example_value"] = target(*map_arg(node.args, value_of))
    return node


def erase(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Remove nodes that nobody reads; users first. Not all dead code: what works in place looks dead, too."""
    for node in nodes:
        if not node.users:
            gm.graph.erase_node(node)
