"""add_noise: logits -> logits + Gumbel noise that is a function of seed, sequence, position and token."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import HAS_COMPILER, HAS_TRITON
from . import reference

__all__ = ["add_noise", "seed_words"]


def add_noise(logits: Tensor, seed: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    """Logits plus noise: the index of their largest is a draw from their softmax.

    The 32 random bits behind each number are hashed from the four numbers that name its place by integer operations,
    the same on every device; the logarithms are taken in float64, so that devices differ by a rounding of float32 at
    most, and that once in many millions.

    Args:
        logits: float32 `[rows, V]`.
        seed: int32 `[2]`, its words (`seed_words`).
        sequences: int32 `[rows]`, which prompt of a batch.
        positions: int32 `[rows]`, place of the token in its answer.

    Returns:
        float32 `[rows, V]`; -inf stays -inf.
    """
    rows = logits.shape[:1]
    for name, tensor, shape in (("seed", seed, (2,)), ("sequences", sequences, rows), ("positions", positions, rows)):
        if tensor.dtype != torch.int32 or tensor.shape != shape:
            raise ValueError(f"{name} must be int32 {tuple(shape)}, not {tensor.dtype} {tuple(tensor.shape)}.")
    if logits.dtype != torch.float32 or logits.dim() != 2:
        raise ValueError(f"logits must be float32 [rows, V], not {logits.dtype} {tuple(logits.shape)}.")
    implementation: ModuleType = reference
    if logits.is_cuda and HAS_TRITON and HAS_COMPILER:
        from . import triton

        implementation = triton
    return implementation.add_noise(logits, seed, sequences, positions)


def seed_words(seed: int) -> Tensor:
    """A seed of up to 64 bits, int32 `[2]`."""
    return torch.tensor([reference.signed(seed), reference.signed(seed >> 32)], dtype=torch.int32)
