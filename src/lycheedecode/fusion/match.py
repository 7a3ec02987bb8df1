"""What a graph that Dynamo traced says, and how to change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv")


def name_of(node: Any) -> str | None:
    """What a call does, be it a function, an operator or a method."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", None)


def value_of(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_call(node: Any, name: str) -> bool:
    """Whether a node calls something of this name."""
    return name_of(node) == name


def is_parameter(node: Any, dims: int) -> bool:
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


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class Norm(NamedTuple):
    """An RMSNorm in a graph, and the nodes that nobody else needs when it is gone, last first."""

    x: Node
    weight: Node
    eps: float
    nodes: list[Node]


def rms_norm(node: Node) -> Norm | None:
    """`weight * to(h * rsqrt(mean(h ** 2) + eps))`, where `h` is `x` in float32."""
    if name_of(node) != "mul" or len(node.args) != 2:
        return None
    weight, rounded = node.args if is_parameter(node.args[0], 1) else node.args[::-1]
    scaled = rounded.args[0] if name_of(rounded) in ("to", "type_as") else rounded
    if not is_parameter(weight, 1) or name_of(scaled) != "mul":
        return None
    wide, root = scaled.args if name_of(scaled.args[1]) == "rsqrt" else scaled.args[::-1]
    total = root.args[0] if name_of(root) == "rsqrt" else None
    if name_of(total) != "add" or not isinstance(total.args[1], float):
        return None
    mean, eps = total.args
    square = mean.args[0] if name_of(mean) == "mean" else None
    if name_of(square) != "pow" or square.args != (wide, 2) or _mean_dim(mean) not in (-1, (-1,), [-1]):
        return None
    x = wide.args[0] if name_of(wide) in ("to", "float") else wide
    values = [value_of(x), value_of(weight), value_of(node)]
    if (
        not all(isinstance(v, Tensor) and v.dtype == values[0].dtype for v in values)
        or value_of(wide).dtype != torch.float32
    ):
        return None
    if values[1].shape != values[0].shape[-1:] or values[2].shape != values[0].shape or changes(x):
        return None
    nodes = [node, rounded, scaled, root, total, mean, square, wide]
    return Norm(x, weight, eps, [n for i, n in enumerate(nodes) if n is not x and n not in nodes[:i]])


def _mean_dim(mean: Node) -> Any:
    """The dimension of a mean that keeps it."""
    dim = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    return dim if mean.kwargs.get("keepdim") or (len(mean.args) > 2 and mean.args[2]) else None


# ---------------------------------------------------------------------- how to change it


def annotated(node: Node) -> Node:
    """Later passes ask every node for an example of its value."""
    node.meta["example_value"] = node.target(*map_arg(node.args, value_of))
    return node


def erase(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Remove nodes that nobody reads; users first. Not all dead code: what works in place looks dead, too."""
    for node in nodes:
        if not node.users:
            gm.graph.erase_node(node)
