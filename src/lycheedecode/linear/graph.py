"""A `torch.compile` backend: the linear layers of a graph that Dynamo traced become `linear`, the rest is Inductor's.

    x -> RMSNorm -> q, k, v              one launch, norm included
    x -> RMSNorm -> SiLU(gate) * up      one launch, all included
    residual + linear(x)                 one launch

It looks at the graph only, never at classes of models. What does not match exactly, stays as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .operator import MAX_ROWS, MAX_WEIGHTS  # this registers the operator, too

IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv")


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    norms: bool = True,
    everywhere: bool = False,
    options: dict[str, Any] | None = None,
) -> Any:
    """For `torch.compile(step, backend=backend)`; `functools.partial` sets what follows the star.

    Args:
        norms: compute an RMSNorm in the linear layers that alone read it.
        everywhere: replace linear layers of every device and dtype, for tests on a CPU.
        options: Inductor's, on top of ours.
    """
    from torch._inductor.compile_fx import compile_fx

    use_linear(gm, norms, everywhere)
    return compile_fx(gm, list(example_inputs), config_patches={"coordinate_descent_tuning": True, **(options or {})})


def use_linear(gm: GraphModule, norms: bool = True, everywhere: bool = False) -> int:
    """Replace the linear layers of a graph that `linear` can compute; returns how many calls of it there are now."""
    groups: dict[Any, list[Node]] = {}
    for node in gm.graph.nodes:
        if _name(node) == "linear" and _suits(node, everywhere):
            x, _weight, bias = _arguments(node)
            groups.setdefault((x, bias is None), []).append(node)
    return sum(_replace(gm, group, norms) for group in groups.values())


class Norm(NamedTuple):
    """An RMSNorm in a graph, and the nodes that nobody else needs when it is gone, last first."""

    x: Node
    weight: Node
    eps: float
    nodes: list[Node]


def _replace(gm: GraphModule, group: list[Node], norms: bool) -> int:
    """Linear layers of one input -> one call, or a few."""
    x = _arguments(group[0])[0]
    norm = _rms_norm(x) if norms and set(x.users) == set(group) and len(group) <= MAX_WEIGHTS else None
    product, chain = _gated(group)
    if product is not None:
        new = _call(gm, product, group if chain[0] is group[0] else group[::-1], norm, gated=True)
        product.replace_all_uses_with(new)
        _erase(gm, [product, *chain[1:], *group, *(norm.nodes if norm else [])])
        return 1
    total = _residual_sum(group)
    if total is not None:
        other = total.args[1] if total.args[0] is group[0] else total.args[0]
        new = _call(gm, total, group, norm, residual=other)
        total.replace_all_uses_with(new)
        _erase(gm, [total, *group, *(norm.nodes if norm else [])])
        return 1
    parts = [group[i : i + MAX_WEIGHTS] for i in range(0, len(group), MAX_WEIGHTS)]
    for part in parts:
        new = _call(gm, part[0], part, norm)
        if len(part) == 1:
            part[0].replace_all_uses_with(new)
        else:
            sizes = [_value(node).shape[-1] for node in part]
            with gm.graph.inserting_after(new):
                pieces = _annotated(gm.graph.call_function(torch.split, (new, sizes, -1)))
            for i, node in reversed(list(enumerate(part))):
                with gm.graph.inserting_after(pieces):
                    node.replace_all_uses_with(_annotated(gm.graph.call_function(operator.getitem, (pieces, i))))
        _erase(gm, part)
    _erase(gm, norm.nodes if norm else [])
    return len(parts)


def _call(
    gm: GraphModule,
    before: Node,
    group: list[Node],
    norm: Norm | None,
    residual: Node | None = None,
    gated: bool = False,
) -> Node:
    """A call of the operator in front of a node."""
    x, weights, biases = _arguments(group[0])[0], [_arguments(n)[1] for n in group], [_arguments(n)[2] for n in group]
    biases = [] if biases[0] is None else biases
    before_norm, scale, eps = (x, None, 0.0) if norm is None else norm[:3]
    with gm.graph.inserting_before(before):
        arguments = (before_norm, weights, biases, residual, scale, eps, gated)
        return _annotated(gm.graph.call_function(torch.ops.lycheedecode.linear.default, arguments))


def _annotated(node: Node) -> Node:
    """Later passes ask every node for an example of its value."""
    node.meta["example_value"] = node.target(*map_arg(node.args, _value))
    return node


def _erase(gm: GraphModule, nodes: Sequence[Node]) -> None:
    """Remove nodes that nobody reads; users first. Not all dead code: what works in place looks dead, too."""
    for node in nodes:
        if not node.users:
            gm.graph.erase_node(node)


# ---------------------------------------------------------------------- what a graph says


def _name(node: Any) -> str | None:
    """What a call does, be it a function, an operator or a method."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", None)


def _value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def _arguments(node: Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a linear layer."""
    named = dict(zip(("input", "weight", "bias"), node.args, strict=False), **node.kwargs)
    return named.get("input"), named.get("weight"), named.get("bias")


def _is_parameter(node: Any, dims: int) -> bool:
    value = _value(node)
    return (
        isinstance(node, Node)
        and node.op == "placeholder"
        and isinstance(value, Tensor)
        and value.ndim == dims
        and value.is_contiguous()
    )


def _suits(node: Node, everywhere: bool) -> bool:
    """Whether `linear` computes this linear layer, and faster."""
    x, weight, bias = _arguments(node)
    values = [_value(x), _value(weight), _value(node)]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    if not _is_parameter(weight, 2) or not (bias is None or _is_parameter(bias, 1)):
        return False
    if len({value.dtype for value in values}) > 1 or len({value.device for value in values}) > 1:
        return False
    if any(isinstance(size, torch.SymInt) for value in values for size in value.shape) or values[2].requires_grad:
        return False
    if not 1 <= values[0].shape[:-1].numel() <= MAX_ROWS or _changes(x):
        return False
    return everywhere or (values[0].is_cuda and values[0].dtype in (torch.bfloat16, torch.float16))


def _changes(node: Node) -> bool:
    """Whether something works in place on a node's value, which then matters when it is read."""
    names = [_name(user) or "" for user in node.users]
    return any(name in IN_PLACE or name.endswith("_") for name in names)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _gated(group: list[Node]) -> tuple[Node | None, list[Node]]:
    """Of `SiLU(gate) * up`: the product, and gate and SiLU."""
    for gate, up in (group, group[::-1]) if len(group) == 2 else ():
        silu = _only_user(gate)
        product = _only_user(silu) if _name(silu) == "silu" else None
        multiplies = _name(product) == "mul" and product is _only_user(up) and set(product.args) == {silu, up}
        if multiplies and _value(gate).shape == _value(up).shape:
            return product, [gate, silu]
    return None, []


def _residual_sum(group: list[Node]) -> Node | None:
    """The sum of a linear layer that is alone and something of the same shape."""
    total = _only_user(group[0]) if len(group) == 1 else None
    if _name(total) != "add" or len(total.args) != 2 or total.kwargs or total.args[0] is total.args[1]:
        return None
    values = [_value(argument) for argument in total.args]
    same = all(
        isinstance(v, Tensor) and v.shape == _value(total).shape and v.dtype == _value(total).dtype for v in values
    )
    return total if same else None


def _rms_norm(node: Node) -> Norm | None:
    """`weight * to(h * rsqrt(mean(h ** 2) + eps))`, where `h` is `x` in float32."""
    if _name(node) != "mul" or len(node.args) != 2:
        return None
    weight, rounded = node.args if _is_parameter(node.args[0], 1) else node.args[::-1]
    scaled = rounded.args[0] if _name(rounded) in ("to", "type_as") else rounded
    if not _is_parameter(weight, 1) or _name(scaled) != "mul":
        return None
    wide, root = scaled.args if _name(scaled.args[1]) == "rsqrt" else scaled.args[::-1]
    total = root.args[0] if _name(root) == "rsqrt" else None
    if _name(total) != "add" or not isinstance(total.args[1], float):
        return None
    mean, eps = total.args
    square = mean.args[0] if _name(mean) == "mean" else None
    if _name(square) != "pow" or square.args != (wide, 2) or _mean_dim(mean) not in (-1, (-1,), [-1]):
        return None
    x = wide.args[0] if _name(wide) in ("to", "float") else wide
    values = [_value(x), _value(weight), _value(node)]
    if (
        not all(isinstance(v, Tensor) and v.dtype == values[0].dtype for v in values)
        or _value(wide).dtype != torch.float32
    ):
        return None
    if values[1].shape != values[0].shape[-1:] or values[2].shape != values[0].shape or _changes(x):
        return None
    nodes = [node, rounded, scaled, root, total, mean, square, wide]
    return Norm(x, weight, eps, [n for i, n in enumerate(nodes) if n is not x and n not in nodes[:i]])


def _mean_dim(mean: Node) -> Any:
    """The dimension of a mean that keeps it."""
    dim = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
    return dim if mean.kwargs.get("keepdim") or (len(mean.args) > 2 and mean.args[2]) else None
