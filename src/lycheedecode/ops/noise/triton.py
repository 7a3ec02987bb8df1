"""Gumbel noise, hashed and added in one launch: a program for each stretch of the vocabulary of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import kernel_common as common
from ..kernel_common import Tuning

_STRETCH = 2048


@triton.jit
def _mixed(bits):
    """As `reference.mixed`; bits are uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _key(sequence, position, word, GOLDEN: tl.constexpr, MASK: tl.constexpr):
    return _mixed(_mixed(sequence * GOLDEN + (word ^ MASK)) + position + 1)


@triton.jit(do_not_specialize=["V"])
def _add_noise_kernel(
    out, logits, seed, sequences, positions, V, stride, STRETCH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * STRETCH + tl.arange(0, STRETCH)
    common.wait_for_inputs(PDL)
    sequence = tl.load(sequences + row).to(tl.uint32)
    position = tl.load(positions + row).to(tl.uint32)
    first = _key(sequence, position, tl.load(seed).to(tl.uint32), 0x9E3779B9, 0x9E3779B9)
    second = _key(sequence, position, tl.load(seed + 1).to(tl.uint32), 0x9E3779B9, 0x4F1BBCDC)
    bits = _mixed(_mixed(token.to(tl.uint32) * 0x9E3779B9 + first) ^ second).to(tl.int32, bitcast=True)
    uniform = (bits.to(tl.float64) + 2147483648.5) * 2.3283064365386963e-10
    noise = -tl.log(-tl.log(uniform))
    x = tl.load(logits + row * stride + token, mask=token < V, other=0.0)
    tl.store(out + row * V + token, x + noise.to(tl.float32), mask=token < V)


def add_noise(logits: Tensor, seed: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    """See `ops.add_noise`."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have a contiguous last dimension, not strides {logits.stride()}.")
    rows, vocabulary = logits.shape
    out = torch.empty((rows, vocabulary), dtype=torch.float32, device=logits.device)
    with common.on_device(logits):
        _add_noise_kernel[triton.cdiv(vocabulary, _STRETCH), rows](
            *(out, logits, seed, sequences.contiguous(), positions.contiguous(), vocabulary, logits.stride(0)),
            STRETCH=_STRETCH,
            **Tuning(1, 1, 8, 1, common.has_pdl(logits.device)).options,
        )
    return out
