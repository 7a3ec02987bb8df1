"""Keys in 8 or 4 bits, which retrieval heads scan in place of the cache's: the format, and the one way into it.

float8   float8_e4m3fn, without scales: keys are far inside its range
int4     whole numbers from -7 to 7, with a scale for each half of a key

A key is rounded by itself, so a new token changes no other. A byte in 4 bits holds channel `d` of the first half in its
low bits and channel `d` of the second in its high ones: either half of a query meets the numbers of its half in order,
and their scale counts once, after the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import ScanKeys
from ..errors import ConfigError
from .reference_common import floats

LARGEST = 7
"""The largest number in 4 bits; numbers are stored plus `OFFSET`."""
OFFSET = 8


class SmallKeys(NamedTuple):
    """Keys `[..., D]` in fewer bits than the cache has.

    Attributes:
        numbers: float8_e4m3fn `[..., D]`; or, two in a byte, uint8 `[..., D / 2]`. What a GPU keeps of a cache in host
            memory may also have the cache's dtype.
        scales: of numbers in 4 bits, the first half's and the second's, bfloat16 `[..., 2]`; None: of all others.
    """

    numbers: Tensor
    scales: Tensor | None = None

    @classmethod
    def allocate(cls, form: ScanKeys, shape: tuple[int, ...], dim: int, device: torch.device | str) -> SmallKeys:
        """Zeros for `shape` keys; raises `ConfigError` for a head dim that has no halves."""
        with torch.inference_mode(False):  # what is made inside that mode could not be written outside of it
            if form == "float8":
                return cls(torch.zeros((*shape, dim), dtype=torch.uint8, device=device).view(torch.float8_e4m3fn))
            if dim % 2:
                raise ConfigError(f"scan_keys='int4' needs an even head dim, not {dim}.")
            numbers = torch.zeros((*shape, dim // 2), dtype=torch.uint8, device=device)
            return cls(numbers, torch.zeros((*shape, 2), dtype=torch.bfloat16, device=device))

    @property
    def dim(self) -> int:
        return self.numbers.shape[-1] * (1 if self.scales is None else 2)

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def key_bytes(self) -> int:
        """Bytes of one key, its scales included."""
        return sum(part.shape[-1] * part.itemsize for part in self if part is not None)

    def views(self, of: Callable[[Tensor], Tensor]) -> SmallKeys:
        """The same of both parts, whose dimensions but the last are alike."""
        return SmallKeys(of(self.numbers), None if self.scales is None else of(self.scales))

    def write(self, index: Any, keys: Tensor) -> None:
        """Round `keys [..., D]` to `self[index]`, an index of all dimensions but the last."""
        new = in_4_bits(keys) if self.scales is not None else SmallKeys(_as(keys, self.numbers.dtype))
        for mine, part in zip(self, new, strict=True):
            if mine is not None:
                mine.view(torch.uint8)[index] = part.view(torch.uint8)  # floats of 8 bits cannot be indexed

    def floats(self) -> Tensor:
        """float32 `[..., D]`; in 8 bits valid until the next call of `reference_common.floats`."""
        if self.scales is None:
            return floats(self.numbers)
        halves = torch.stack((self.numbers & 15, self.numbers >> 4), -2).float()
        return ((halves - OFFSET) * self.scales.float()[..., None]).flatten(-2)


def _as(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit floats have no infinity: what is beyond their range becomes their largest number."""
    if dtype != torch.float8_e4m3fn:
        return keys.to(dtype)
    most = torch.finfo(dtype).max
    return keys.float().clamp(-most, most).to(dtype)


def in_4_bits(keys: Tensor) -> SmallKeys:
    """Keys `[..., D]` as whole numbers and scales."""
    halves = keys.float().unflatten(-1, (2, -1))
    scales = (halves.abs().amax(-1) / LARGEST).bfloat16()
    numbers = halves / scales.float()[..., None]
    numbers = numbers.round_().clamp_(-LARGEST, LARGEST).masked_fill_(scales[..., None] == 0, 0.0)
    first, second = (numbers + OFFSET).to(torch.uint8).unbind(-2)
    return SmallKeys(first | second << 4, scales)


def key_bytes(form: ScanKeys, dim: int, itemsize: int) -> int:
    """Bytes of a key that is scanned, where the cache's numbers have `itemsize`."""
    return {"cache": dim * itemsize, "float8": dim, "int4": dim // 2 + 4}[form]
