"""The cache itself: one tensor of keys and one of values in host memory, a view of them for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention import DecodeAttention, State
from ...errors import ConfigError
from ...models.routing import Window
from ...models.shape import ModelShape
from ...ops.fetch import Tokens
from ..cache import GrowingLayer, KVCache, grown
from .pinned import HostMemoryError, Region, free_host_bytes, wait_for
from .staging import BUFFERS, Staging

if TYPE_CHECKING:
    from .attention import OffloadedState


class HostLayer(GrowingLayer):
    """Keys and values of one layer with full attention, `[B, Hkv, capacity, D]` in host memory.

    While a prompt passes, the layer's tokens so far are in a buffer on the model's device (`Staging`).
    """

    def __init__(self, cache: HostCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index

    @property
    def store(self) -> tuple[Tensor, Tensor]:
        """In host memory."""
        keys, values = self._cache.tokens
        return keys[self._index], values[self._index]

    @property
    def _keys(self) -> Tensor:  # type: ignore[override]  # never set here: `reserve` is the cache's
        return self.store[0]

    @property
    def _values(self) -> Tensor:  # type: ignore[override]
        return self.store[1]

    @property
    def slot_bytes(self) -> int:
        """Of the device, where these layers have none; the cache itself looks after host memory."""
        return 0

    @property
    def batch_size(self) -> int:
        return self._cache.batch

    @property
    def capacity(self) -> int:
        return self._cache.slots

    def reserve(self, slots: int) -> None:
        """Reserve slots for all layers, which share one tensor."""
        self._cache.grow(slots)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, T, D]` tokens; returns all tokens so far, valid until the next layer's."""
        end = self.length + key_states.shape[2]
        self._cache.append_densely(self.length, end)
        if not self._cache.is_staged:
            return super().update(key_states, value_states)
        self.reserve(end)
        self.lazy_initialization(key_states, value_states)
        staged = self._cache.staging.append(self._index, self.length, (key_states, value_states))
        self.length = end
        return staged


class HostCache(KVCache):
    """The cache of a batch whose layers with full attention lie in host memory; the others stay on the device.

    Args:
        shape: of the model.
        batch: sequences.
        dtype, device: of keys and values, and where steps run.
        windows: how far back each layer looks.
        starts: as in `KVCache`.
        region: host memory to lie in, as long as it is large enough; None: its own.

    Attributes:
        tokens: of the layers with full attention, `[L, B, Hkv, capacity, D]`; pinned where the device is a GPU, whose
            kernels then read and write it where it lies.
        position: index of each of these layers in it.
        is_staged: whether prompts pass through a buffer on the device; otherwise this memory is the device's own.
    """

    state: OffloadedState | None

    def __init__(
        self,
        shape: ModelShape,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[Window],
        starts: Tensor | None = None,
        region: Region | None = None,
    ) -> None:
        super().__init__(len(windows), starts)
        self.position = {layer: i for i, layer in enumerate(i for i, window in enumerate(windows) if window.is_all)}
        self.batch = batch
        self._region: Region | None = None
        self._spare = region
        self._shape = len(self.position), batch, shape.num_kv_heads, 0, shape.head_dim
        self.tokens = Tokens(*(torch.empty(self._shape, dtype=dtype) for _ in range(2)))
        self._dtype, self._device = dtype, device
        self._staging: Staging | None = None
        self.is_staged = device.type != "cpu"
        for layer, i in self.position.items():
            self.layers[layer] = HostLayer(self, i)

    @property
    def capacity(self) -> int:
        """See `KVCache`."""
        return self.slots

    @property
    def layers_in_prefill(self) -> int:
        """See `KVCache`: windowed layers, and buffers for the one that attends and the next, if any."""
        return len(self.layers) - len(self.position) + BUFFERS * self.is_staged

    @property
    def slots(self) -> int:
        """Slots there is room for in host memory."""
        return self.tokens.keys.shape[3]

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots; moves the cache when there is none.

        Raises:
            HostMemoryError: host memory does not hold it.
        """
        if slots <= self.slots:
            return
        self._settle()
        before, filled = self.tokens, min(max(layer.length for layer in self.layers), self.slots)
        old = self._allocate_tokens(grown(slots, self.slots))
        for new, part in zip(self.tokens, before, strict=True):
            new[:, :, :, :filled] = part[:, :, :, :filled]
        if old is not None:
            old.release()

    def _allocate_tokens(self, slots: int) -> Region | None:
        """Room for the tokens of so many slots; returns where they were before, which is the cache's own."""
        layers, batch, heads, _, dim = self._shape
        shape = layers, batch, heads, slots, dim
        needed, before = 2 * torch.Size(shape).numel() * self._dtype.itemsize, self._region
        region, self._spare = self._spare, None
        if region is None or region.data.nbytes < needed:
            free = free_host_bytes()
            if needed > free:
                raise HostMemoryError(
                    f"A KV cache of {batch} x {slots} tokens in host memory needs {needed / 2**30:.1f} GiB, but "
                    f"{free / 2**30:.1f} GiB are free: give fewer sequences or shorter ones."
                )
            region = self._region = Region(needed, self._device)
        self.tokens = Tokens(*region.halves(shape, self._dtype))
        return before

    def append_densely(self, filled: int, end: int) -> None:
        """Slots `filled` to `end - 1` of a layer come to host memory without a step."""
        if self.state is not None:
            self.state.store.append_densely(filled, end)

    @property
    def staging(self) -> Staging:
        """Buffers through which a prompt passes, until a step is made."""
        if self._staging is None:
            self._staging = Staging(self.tokens, self._device)
        return self._staging

    def missing(self, slots: int) -> int:
        """See `KVCache`; of the layers that `layers_in_prefill` counts, which stage anew for every prompt."""
        return max(self.slots, slots)

    # ------------------------------------------------------------------ what the state knows better

    def state_for(self, attention: DecodeAttention) -> tuple[State | None, bool]:
        """See `KVCache`; only attention that can read from host memory has a state here."""
        if not hasattr(attention, "allocate_offloaded"):
            raise ConfigError(
                "The cache of this context is in host memory: only an Engine with a head plan and cache='host' or "
                "'auto' decodes from there; prefill with cache='resident' for others."
            )
        self._end_staging()  # no prompt passes any more
        if self._owner[0] is not attention:
            self._settle()
        return super().state_for(attention)

    def _allocate(self, attention: Any) -> State | None:
        return attention.allocate_offloaded(self)

    def _end_staging(self) -> None:
        if self._staging is not None:
            self._staging.finish()
            self._staging = None

    def _settle(self) -> None:
        """Bring host memory up to date: the state's pools are about to be left alone."""
        self._end_staging()
        if self.state is not None:
            self.state.write_back(self.length)
        wait_for(self._device)  # the host is going to read what kernels and copies wrote

    def forget_state(self) -> None:
        """See `KVCache`."""
        if getattr(self, "state", None) is not None:
            self._settle()
        super().forget_state()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order; they may repeat."""
        self._settle()
        for layer in self.layers:
            if not isinstance(layer, HostLayer):
                layer.batch_select_indices(indices)
        before, self.batch = self.tokens, len(indices)
        self._shape = (self._shape[0], self.batch, *self._shape[2:])
        old = self._allocate_tokens(self.slots)
        for new, part in zip(self.tokens, before, strict=True):
            torch.index_select(part, 1, indices.to(part.device), out=new)
        if old is not None:
            old.release()
        if self.starts is not None:
            self.starts = self.starts[indices.to(self.starts.device)]
        self.state = None
        self.forget_state()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def memory(self) -> tuple[int, int]:
        """Bytes of the KV cache on the device that attends, and in host memory."""
        near = sum(2 * layer.store[0].nbytes for layer in self.layers if not isinstance(layer, HostLayer))
        near += 0 if self.state is None else self.state.nbytes
        return near, sum(part.nbytes for part in self.tokens)

    def fetches(self, sequence: int) -> tuple[float, float]:
        """See `KVCache`."""
        if self.state is None:
            return 0.0, 0.0
        return float(self.state.store.asked[sequence]), float(self.state.store.missed[sequence])
