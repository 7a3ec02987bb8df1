"""A copy of retrieval heads' keys in 8 or 4 bits: half of what a scan of a 16-bit cache reads, or about a quarter.

prompt, Cache Correction   `before_step` writes many tokens at once, before the step that scans them
every token after that     the scan that needs it writes it (`ops.scan_select`)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...config import ScanKeys
from ..reference import write_copy, write_slots_to_copy
from ..small_keys import SmallKeys


class KeyCopy:
    """The keys of a batch that scans read.

    Args:
        form: float8 or int4.
        heads: retrieval heads of every layer.
        newest: tokens that a scan writes into the copy itself.

    Attributes:
        copy: `[all heads, B, capacity]` keys, None before the first step.
        known: slots that the copy holds.
    """

    def __init__(self, form: ScanKeys, heads: Mapping[int, tuple[int, ...]], newest: int) -> None:
        self.form, self.heads, self.newest = form, heads, newest
        self.copy: SmallKeys | None = None
        self.known = 0

    def of_layer(self, layer: int) -> SmallKeys:
        """`[B, R, capacity]` keys, what `ops.scan_select` takes."""
        assert self.copy is not None, "before_step comes first"
        first = sum(len(heads) for other, heads in self.heads.items() if other < layer)
        return self.copy.views(lambda part: part[first : first + len(self.heads[layer])].transpose(0, 1))

    @property
    def key_bytes(self) -> int:
        """Bytes of a key."""
        assert self.copy is not None, "before_step comes first"
        return self.copy.key_bytes

    def truncate(self, slots: int) -> None:
        """The cache forgets every slot from `slots` on."""
        self.known = min(self.known, slots)

    def before_step(self, store_of: Callable[[int], tuple[Tensor, Tensor]], filled: int, refresh: bool) -> None:
        """Bring the copy up to date for a step; arguments as in `attention.State.before_step`."""
        if self.copy is None:
            keys = store_of(min(self.heads))[0]
            batch, _, capacity, dim = keys.shape
            shape = sum(map(len, self.heads.values())), batch, capacity
            self.copy = SmallKeys.allocate(self.form, shape, dim, keys.device)
        if filled - self.known >= self.newest:  # a prompt, or what Cache Correction has written anew
            for layer, heads in self.heads.items():
                write_copy(self.of_layer(layer), store_of(layer)[0], heads, self.known, filled)
            self.known = filled
        if refresh:
            self.known = filled + 1

    def follow(self, store_of: Callable[[int], tuple[Tensor, Tensor]], begin: Tensor, most: int) -> None:
        """Copy `most` slots of each sequence from `begin` on, int32 `[B]`; nothing reaches the host."""
        assert self.copy is not None, "before_step comes first"
        last = self.copy.numbers.shape[2] - 1
        slot = (begin[:, None] + torch.arange(most, device=begin.device)).clamp(max=last).long()
        for layer, heads in self.heads.items():
            if heads:
                write_slots_to_copy(self.of_layer(layer), store_of(layer)[0], heads, slot)
