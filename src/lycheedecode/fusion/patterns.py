"""What the backend looks for in a graph that Dynamo traced, as a table of patterns.

    RMS_NORM    weight * to(h * rsqrt(mean(h ** 2) + eps)), h is x in float32      x, weight, eps
    GATED       silu(gate) * up                                                    gate, up
    SUM         left + right                                                       left, right
    ROTATED     (x * cos + cat(-high(x), low(x)) * sin)[:, :, 0]                   x, cos, sin, low, high, token
                the same, .transpose(1, 2) in place of [:, :, 0]                   x, cos, sin, low, high

The patterns are torch's own (`torch._inductor.pattern_matcher`), a private module: this file is all that we take from
it, seen to work in torch 2.11 and 2.13. Inner nodes of a pattern have no other users, so a match can go as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    CallMethod,
    Ignored,
    KeywordArg,
    Match,
    PatternExpr,
)
from torch.fx import Node


class Found(NamedTuple):
    """A pattern in a graph: what its names stand for, and its nodes, users before what they use."""

    named: dict[str, Any]
    nodes: list[Node]


def find(patterns: Sequence[PatternExpr], node: Any) -> Found | None:
    """The first of `patterns` that ends in `node`."""
    if not isinstance(node, Node):
        return None
    for pattern in patterns:
        match = pattern.match(node)
        if isinstance(match, Match):
            return Found(match.kwargs, list(dict.fromkeys(reversed(match.nodes))))
    return None


def _rms_norms() -> Iterator[PatternExpr]:
    x, weight, eps = KeywordArg("x"), KeywordArg("weight"), KeywordArg("eps")
    for wide in (CallMethod("to", x, torch.float32, _users=2), CallMethod("float", x, _users=2), x):
        variance = CallMethod("mean", CallMethod("pow", wide, 2), -1, keepdim=True)
        root = CallFunction(torch.rsqrt, CallFunction(operator.add, variance, eps))
        scaled = CallFunction(operator.mul, wide, root)
        for rounded in (CallMethod("to", scaled, Ignored()), CallMethod("type_as", scaled, x), scaled):
            yield CallFunction(operator.mul, weight, rounded)
            yield CallFunction(operator.mul, rounded, weight)


def _rotated() -> tuple[PatternExpr, ...]:
    x = KeywordArg("x")
    cos, sin = (CallMethod("unsqueeze", KeywordArg(name), 1, _users=MULTIPLE) for name in ("cos", "sin"))
    low, high = (CallFunction(operator.getitem, x, KeywordArg(name)) for name in ("low", "high"))
    turned = CallFunction(torch.cat, (CallFunction(operator.neg, high), low), dim=-1)
    straight, turned = CallFunction(operator.mul, x, cos), CallFunction(operator.mul, turned, sin)
    rotated = CallFunction(operator.add, straight, turned)
    return CallFunction(operator.getitem, rotated, KeywordArg("token")), CallMethod("transpose", rotated, 1, 2)


RMS_NORM = tuple(_rms_norms())
GATED = tuple(
    CallFunction(operator.mul, *pair)
    for silu in [CallFunction(F.silu, KeywordArg("gate"))]
    for pair in ((silu, KeywordArg("up")), (KeywordArg("up"), silu))
)
SUM = (CallFunction(operator.add, KeywordArg("left"), KeywordArg("right")),)
ROTATED = _rotated()
