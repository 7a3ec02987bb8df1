"""The definition of `add_noise`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
FACTORS = (16, 0x7FEB352D), (15, 0x846CA68B)
"""Shifts, and what is multiplied after each: the constants that C. Wellons' search found."""


def add_noise(logits: Tensor, seed: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
    keys: list[Tensor] = []
    for word in seed.unbind():
        key = mixed(sequences * signed(GOLDEN) + (word ^ signed(GOLDEN >> len(keys))))
        keys.append(mixed(key + positions + 1)[:, None])
    bits = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device) * signed(GOLDEN) + keys[0]
    bits = mixed(mixed(bits) ^ keys[1])
    uniform = (bits.double() + (2**31 + 0.5)) * 2.0**-32  # in (0, 1), neither end included
    return logits + uniform.log_().neg_().log_().neg_().float()


def mixed(bits: Tensor) -> Tensor:
    """A hash of 32 bits, one to one."""
    for shift, factor in FACTORS:
        bits = (bits ^ ((bits >> shift) & ((1 << 32 - shift) - 1))) * signed(factor)
    return bits ^ ((bits >> 16) & 0xFFFF)


def signed(word: int) -> int:
    """32 bits as the int32 that they are."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
