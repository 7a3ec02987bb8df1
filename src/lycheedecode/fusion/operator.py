"""`lycheedecode::linear`: a custom operator, so that `torch.compile` never opens it and CUDA graphs hold its launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 16
MAX_WEIGHTS = 3


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> Tensor:
    """What `linear` computes, in plain PyTorch, rounded where a Hugging Face model rounds."""
    if norm is not None:
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * norm
    every_bias: Sequence[Tensor | None] = biases or [None] * len(weights)
    outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, every_bias, strict=True)]
    y = F.silu(outputs[0]) * outputs[1] if gated else torch.cat(outputs, -1)
    return y if residual is None else residual + y


def _linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
) -> Tensor:
    if not x.is_cuda:
        return reference(x, weights, biases, residual, norm, eps, gated)
    from .triton import linear as launch

    return launch(x, weights, biases, residual, norm, eps, gated)


_operator = torch.library.custom_op("lycheedecode::linear", _linear, mutates_args=())


@_operator.register_fake
def _(x, weights, biases, residual, norm, eps, gated):
    width = weights[0].shape[0] if gated else sum(weight.shape[0] for weight in weights)
    return x.new_empty((*x.shape[:-1], width))


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> Tensor:
    """Linear layers of the same input, in one launch; on CUDA `MAX_ROWS` rows and `MAX_WEIGHTS` weights at most.

    Args:
        x: `[..., in]`.
        weights: `[out_i, in]` each, wherever they lie.
        biases: none, or `[out_i]` for each weight.
        residual: `[..., out]`, added to the result.
        norm: `[in]`, the weight of an RMSNorm that `x` passes first, with `eps`.
        gated: of two weights, return `SiLU(first) * second`.

    Returns:
        `[..., out]`, where `out` is the sum of `out_i`, or one of them if gated.
    """
    return _operator(x, list(weights), list(biases), residual, norm, eps, gated)
