"""The means of a growing cache, kept beside it: written before a step, for the chunks that were filled since."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..types import KV
from . import write_means


class ChunkMeans:
    """Mean keys and mean values of the chunks of a batch.

    Steps only read the means of chunks that end before their own token: nothing has to be written inside of a step,
    and a step may be a CUDA graph.

    Args:
        layers: that have them.
        chunk: tokens per chunk.
        device: of the means; None: that of the cache.

    Attributes:
        means: `[2, layers, B, Hkv, C, D]`, keys and values; None before the first step.
        known: slots whose complete chunks have their means.
    """

    def __init__(self, layers: Sequence[int], chunk: int, device: torch.device | None = None) -> None:
        self.layers, self.chunk, self._device = tuple(layers), chunk, device
        self.means: Tensor | None = None
        self.known = 0
        self._starts = [0]

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, C, D]`, as a `Completion` has them."""
        assert self.means is not None, "before_step comes first"
        keys, values = self.means[:, self.layers.index(layer)]
        return keys, values

    def truncate(self, slots: int) -> None:
        """The cache forgets every slot from `slots` on."""
        self.known = min(self.known, slots)

    def has_new(self, filled: int) -> bool:
        """Whether `before_step` will read the cache."""
        return self.means is None or any(
            self._chunks(filled, start) > self._chunks(self.known, start) for start in self._starts
        )

    def before_step(
        self, store_of: Callable[[int], tuple[Tensor, Tensor]], filled: int, starts: Tensor | None = None
    ) -> None:
        """Bring the means up to date for a step; arguments as in `attention.State.before_step`."""
        if self.means is None:
            self._starts = [0] if starts is None else starts.tolist()
            self._allocate(store_of(self.layers[0])[0])
        new = max(self._chunks(filled, start) - self._chunks(self.known, start) for start in self._starts)
        if new > 0:
            first = self._known_chunks(starts)
            for layer in self.layers:
                keys, values = (x[:, :, :filled] for x in store_of(layer))
                write_means(KV(keys, values, None, starts), self.chunk, *self.of_layer(layer), first, new)
        self.known = filled

    def follow(
        self,
        store_of: Callable[[int], tuple[Tensor, Tensor]],
        begin: Tensor,
        written: Tensor,
        end: Tensor,
        most: int,
        starts: Tensor | None = None,
    ) -> None:
        """Write the means of chunks that end in slots from `begin` to before `end`; see `attention.State.follow`."""
        begin, written, end = ((x if starts is None else x - starts).int() for x in (begin, written, end))
        # A sequence that has ended begins where it ends, and what it wrote last lies before that.
        first, number = begin.clamp(min=0) // self.chunk, most // self.chunk + 1
        for layer in self.layers:
            write_means(KV(*store_of(layer), end, starts), self.chunk, *self.of_layer(layer), first, number, written)

    def write(self, layer: int, kv: KV) -> None:
        """Write all means of a layer, for a cache not seen before."""
        if self.means is None or self.means.shape[2] != kv.batch or self.means.shape[4] < kv.slots // self.chunk:
            self._allocate(kv.keys, kv.slots + kv.slots // 4)
        write_means(kv, self.chunk, *self.of_layer(layer))

    def shared(self, batch: int) -> ChunkMeans:
        """A view of one sequence's means as those of `batch` sequences, each a beginning of it."""
        view = copy.copy(self)
        view.means = None if self.means is None else self.means.expand(-1, -1, batch, -1, -1, -1)
        return view

    def _chunks(self, slots: int, start: int) -> int:
        return max(slots - start, 0) // self.chunk

    def _known_chunks(self, starts: Tensor | None) -> Tensor:
        """int32 `[B]`."""
        if starts is None:
            batch = self.means.shape[2]
            return torch.full((batch,), self.known // self.chunk, dtype=torch.int32, device=self.means.device)
        return ((self.known - starts).clamp(min=0) // self.chunk).int()

    def _allocate(self, keys: Tensor, slots: int = 0) -> None:
        batch, heads, capacity, dim = keys.shape
        chunks = max(max(capacity, slots) // self.chunk, 1)
        with torch.inference_mode(False):  # a step may be prepared outside of that mode, and write it there
            shape = 2, len(self.layers), batch, heads, chunks, dim
            self.means = torch.empty(shape, dtype=keys.dtype, device=self._device or keys.device)
