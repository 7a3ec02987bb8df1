"""`lycheedecode::linear`: a custom operator, so that `torch.compile` never opens it and CUDA graphs hold its launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_ROWS, KERNEL_ROWS_8_BITS = 64, 16
"""Rows that the kernel takes."""
MAX_ROWS, MAX_WEIGHTS = 64, 3
"""The backend leaves linear layers of more rows to cuBLAS; `python -m experiments linear-rows` times both."""
EIGHT_BITS = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number in e4m3."""


@torch.no_grad()
def quantize(weight: Tensor, rows: int = 8192) -> tuple[Tensor, Tensor]:
    """A weight `[out, in]` in 8-bit floats, and what to multiply its rows by, float32 `[out]`.

    It takes `rows` of them at a time: a table of the vocabulary in float32 would need more memory than the result.
    """
    eight = torch.empty(weight.shape, dtype=EIGHT_BITS, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for part, into, scale in zip(weight.split(rows), eight.split(rows), scales.split(rows), strict=True):
        wide = part.float()
        largest = wide.abs().amax(1)
        scale.copy_(torch.where(largest > 0, largest / LARGEST, 1.0))
        into.copy_((wide / scale[:, None]).clamp_(-LARGEST, LARGEST))
    return eight, scales


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """What `linear` computes, in plain PyTorch, rounded where a Hugging Face model rounds."""
    if norm is not None:
        wide = x.float()
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * norm
    every_bias: Sequence[Tensor | None] = biases or [None] * len(weights)
    if scales:
        parts = zip(weights, scales, every_bias, strict=True)
        outputs = [_scaled(x, weight, scale, bias) for weight, scale, bias in parts]
    else:
        outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, every_bias, strict=True)]
    y = F.silu(outputs[0]) * outputs[1] if gated else torch.cat(outputs, -1)
    return y if residual is None else residual + y


def _scaled(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x.float(), weight.float()) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    scales: Sequence[Tensor],
) -> Tensor:
    if not x.is_cuda:
        return reference(x, weights, biases, residual, norm, eps, gated, scales)
    from .triton import linear as launch

    return launch(x, weights, biases, residual, norm, eps, gated, scales)


_operator = torch.library.custom_op("lycheedecode::linear", _linear, mutates_args=())


@_operator.register_fake
def _(x, weights, biases, residual, norm, eps, gated, scales):
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
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """Linear layers of the same input, in one launch; on CUDA `KERNEL_ROWS` rows and `MAX_WEIGHTS` weights at most.

    Args:
        x: `[..., in]`.
        weights: `[out_i, in]` each, wherever they lie.
        biases: none, or `[out_i]` for each weight.
        residual: `[..., out]`, added to the result.
        norm: `[in]`, the weight of an RMSNorm that `x` passes first, with `eps`.
        gated: of two weights, return `SiLU(first) * second`.
        scales: float32 `[out_i]` for each weight, if weights are in 8-bit floats: what `quantize` makes.

    Returns:
        `[..., out]`, where `out` is the sum of `out_i`, or one of them if gated.
    """
    return _operator(x, list(weights), list(biases), residual, norm, eps, gated, list(scales))
