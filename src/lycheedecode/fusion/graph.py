"""A `torch.compile` backend: the linear layers of a graph that Dynamo traced become `linear`, the rest is Inductor's.

    x -> RMSNorm -> q, k, v              one launch, norm included
    x -> RMSNorm -> SiLU(gate) * up      one launch, all included
    residual + linear(x)                 one launch
    q, k -> norm, rotation, cache        one launch (`rotated`)

Linear layers with weights in 8-bit floats come as calls of `linear`, one for each layer, and merge in the same way.
It looks at the graph only, never at classes of models. What does not match exactly stays as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..ops.torch_private import compile_by_inductor
from . import operator as limits
from .match import Norm, annotated, changes, erase, is_parameter, name_of, only_user, rms_norm, value_of
from .operator import EIGHT_BITS, MAX_WEIGHTS  # this registers the operator, too
from .patterns import GATED, SUM, find
from .rotated import use_rotation


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
    use_rotation(gm)
    use_linear(gm, norms, everywhere)
    return compile_by_inductor(gm, example_inputs, {"coordinate_descent_tuning": True, **(options or {})})


def use_linear(gm: GraphModule, norms: bool = True, everywhere: bool = False) -> int:
    """Replace the linear layers of a graph that `linear` can compute; returns how many calls of it there are now."""
    groups: dict[Any, list[Node]] = {}
    for node in gm.graph.nodes:
        if _suits(node, everywhere):
            x, _weight, bias, scale = _arguments(node)
            groups.setdefault((x, bias is None, scale is None), []).append(node)
    return sum(_replace(gm, group, norms) for group in groups.values())


def _replace(gm: GraphModule, group: list[Node], norms: bool) -> int:
    """Linear layers of one input -> one call, or a few."""
    x = _arguments(group[0])[0]
    norm = rms_norm(x) if norms and len(group) <= MAX_WEIGHTS and set(x.users) == set(group) else None
    product, chain = _gated(group)
    if product is not None:
        new = _call(gm, product, group if chain[0] is group[0] else group[::-1], norm, gated=True)
        product.replace_all_uses_with(new)
        erase(gm, [product, *chain[1:], *group, *(norm.nodes if norm else [])])
        return 1
    total = _residual_sum(group)
    if total is not None:
        other: Any = total.args[1] if total.args[0] is group[0] else total.args[0]
        new = _call(gm, total, group, norm, residual=other)
        total.replace_all_uses_with(new)
        erase(gm, [total, *group, *(norm.nodes if norm else [])])
        return 1
    parts = [group[i : i + MAX_WEIGHTS] for i in range(0, len(group), MAX_WEIGHTS)]
    for part in parts:
        new = _call(gm, part[0], part, norm)
        if len(part) == 1:
            part[0].replace_all_uses_with(new)
        else:
            sizes = [value_of(node).shape[-1] for node in part]
            with gm.graph.inserting_after(new):
                pieces = annotated(gm.graph.call_function(torch.split, (new, sizes, -1)))
            for i, node in reversed(list(enumerate(part))):
                with gm.graph.inserting_after(pieces):
                    node.replace_all_uses_with(annotated(gm.graph.call_function(operator.getitem, (pieces, i))))
        erase(gm, part)
    erase(gm, norm.nodes if norm else [])
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
    layers = [_arguments(node) for node in group]
    weights, biases, scales = ([one[i] for one in layers if one[i] is not None] for i in (1, 2, 3))
    before_norm, factor, eps = (layers[0].x, None, 0.0) if norm is None else norm[:3]
    with gm.graph.inserting_before(before):
        arguments = (before_norm, weights, biases, residual, factor, eps, gated, scales)
        return annotated(gm.graph.call_function(torch.ops.lycheedecode.linear.default, arguments))


class _Linear(NamedTuple):
    """What a linear layer is given; `scale` where its weight is in 8-bit floats."""

    x: Any
    weight: Any
    bias: Any
    scale: Any = None


def _arguments(node: Node) -> _Linear:
    if node.target is torch.ops.lycheedecode.linear.default:
        x, weights, biases, *_, scales = node.args
        return _Linear(x, *(one[0] if one else None for one in (weights, biases, scales)))  # type: ignore[index]
    named = dict(zip(("input", "weight", "bias"), node.args, strict=False), **node.kwargs)
    return _Linear(named.get("input"), named.get("weight"), named.get("bias"))


def _suits(node: Node, everywhere: bool) -> bool:
    """Whether this is a linear layer that `linear` computes, and faster."""
    if node.target is not torch.ops.lycheedecode.linear.default and name_of(node) != "linear":
        return False
    x, weight, bias, scale = _arguments(node)
    values = [value_of(x), value_of(weight), value_of(node)]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    if not is_parameter(weight, 2) or not all(one is None or is_parameter(one, 1) for one in (bias, scale)):
        return False
    dtypes = [values[0].dtype, values[0].dtype if scale is None else EIGHT_BITS, values[0].dtype]
    if [value.dtype for value in values] != dtypes or len({value.device for value in values}) > 1:
        return False
    if any(isinstance(size, torch.SymInt) for value in values for size in value.shape) or values[2].requires_grad:
        return False
    if not 1 <= values[0].shape[:-1].numel() <= limits.MAX_ROWS or changes(x):
        return False
    return everywhere or (values[0].is_cuda and values[0].dtype in (torch.bfloat16, torch.float16))


def _gated(group: list[Node]) -> tuple[Node | None, list[Node]]:
    """The product of `SiLU(gate) * up`, if that is what becomes of the group; and the nodes of gate and SiLU."""
    for gate, up in (group, group[::-1]) if len(group) == 2 else ():
        silu, product = only_user(gate), only_user(up)
        found = find(GATED, product)
        multiplies = found is not None and (found.named["gate"], found.named["up"]) == (gate, up)
        if multiplies and silu is not None and value_of(gate).shape == value_of(up).shape:
            return product, [gate, silu]
    return None, []


def _residual_sum(group: list[Node]) -> Node | None:
    """The sum of a linear layer that is alone and something of the same shape."""
    found = find(SUM, only_user(group[0])) if len(group) == 1 else None
    if found is None or found.named["left"] is found.named["right"]:
        return None
    [total], shape = found.nodes, value_of(group[0]).shape
    values = [value_of(argument) for argument in found.named.values()]
    same = all(isinstance(v, Tensor) and v.shape == shape and v.dtype == value_of(total).dtype for v in values)
    return total if same else None
