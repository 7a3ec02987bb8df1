"""A copy of retrieval heads' keys in 8-bit floats: half of what a scan of a 16-bit cache reads.

prompt, Cache Correction   `follow` writes many tokens at once, before the step that scans them
every token after that     the scan that needs it writes it (`ops.scan_select`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..reference import write_copy
from ..types import Selections


class CopyingSelections(Selections):
    """Selections, and a copy in 8-bit floats of the keys that they are made from.

    Attributes:
        heads: retrieval heads of every layer that the copy serves.
        newest: tokens that a scan writes into the copy itself.
        copy: float8_e4m3fn `[heads, B, capacity, D]`, None before the first step.
        known: slots that the copy holds.
    """

    def __init__(self, *_: Tensor) -> None:
        self.heads: Mapping[int, tuple[int, ...]] = {}
        self.newest = 1
        self.copy: Tensor | None = None
        self.known = 0

    def of(self, heads: Mapping[int, tuple[int, ...]], newest: int) -> CopyingSelections:
        """These, for such heads and scans."""
        self.heads, self.newest = heads, newest
        return self

    def copy_of(self, layer: int) -> Tensor:
        """See `Selections`: `[B, R, capacity, D]`."""
        first = sum(len(heads) for other, heads in self.heads.items() if other < layer)
        return self.copy[first : first + len(self.heads[layer])].transpose(0, 1)

    def scan_bytes(self, key_bytes: int) -> float:
        """See `Selections`; before the first step that of a 16-bit cache."""
        return key_bytes / 2 if self.copy is None else self.copy.shape[-1]

    def truncate(self, slots: int) -> None:
        """See `Selections`."""
        self.known = min(self.known, slots)

    def follow(self, store_of: Callable[[int], tuple[Tensor, Tensor]], filled: int, refresh: bool) -> None:
        """See `Selections`."""
        if self.copy is None:
            batch, _, capacity, dim = store_of(min(self.heads))[0].shape
            rows = sum(map(len, self.heads.values()))
            with torch.inference_mode(False):  # a step may be prepared outside of that mode, and write it there
                self.copy = self.blocks.new_empty((rows, batch, capacity, dim), dtype=torch.float8_e4m3fn)
        if filled - self.known >= self.newest:  # a prompt, or what Cache Correction has written anew
            for layer, heads in self.heads.items():
                write_copy(self.copy_of(layer), store_of(layer)[0], heads, self.known, filled)
            self.known = filled
        if refresh:
            self.known = filled + 1
