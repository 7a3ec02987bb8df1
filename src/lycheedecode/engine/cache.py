"""KV cache with room to grow in place, and what an attention keeps beside it.

transformers' `DynamicCache` copies all of itself for every token; this one copies the new token. The operations get
views of the filled part. Dimensions as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention import DecodeAttention, State
from ..models.shape import ModelError
from ..ops import KV
from .memory import ROOM, CacheMemoryError, bytes_beside

_GROWTH = 1.5


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one layer, `[B, Hkv, capacity, D]`, of which the first `length` slots are filled.

    Sliding-window layers use it too: they keep everything and their mask hides what lies outside the window.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:  # not the mixin's, which assigns `keys` and `values`: here they are views
        self.length = 0
        self.reserved = 0
        self.is_initialized = False
        self._keys: Tensor
        self._values: Tensor

    @property
    def keys(self) -> Tensor | None:
        """`[B, Hkv, length, D]`, a view; None before the first token."""
        return self._keys[:, :, : self.length] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """`[B, Hkv, length, D]`, a view; None before the first token."""
        return self._values[:, :, : self.length] if self.is_initialized else None

    @property
    def store(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, `[B, Hkv, capacity, D]` each, filled or not."""
        return self._keys, self._values

    @property
    def capacity(self) -> int:
        """Slots there is room for."""
        return self._keys.shape[2] if self.is_initialized else self.reserved

    @property
    def batch_size(self) -> int:
        return self._keys.shape[0] if self.is_initialized else -1

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one token of every sequence; 0 where nothing is allocated yet."""
        return sum(part.nbytes for part in self.store) // self.capacity if self.is_initialized else 0

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens in all; moves the cache only when there is none."""
        self.reserved = max(self.reserved, ceil(slots / ROOM) * ROOM)
        if self.is_initialized and slots > self._keys.shape[2]:
            more = max(self.reserved, grown(slots, self._keys.shape[2]))
            self._keys, self._values = self._moved(self._keys, more), self._moved(self._values, more)

    def _moved(self, store: Tensor, slots: int) -> Tensor:
        moved = _room_for(store, slots)
        moved[:, :, : self.length] = store[:, :, : self.length]
        return moved

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = max(self.reserved, ROOM)
        self._keys = _room_for(key_states, slots)
        self._values = _room_for(value_states, slots)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, T, D]` tokens; returns views of all tokens so far."""
        end = self.length + key_states.shape[2]
        if not self.is_initialized:
            self.reserve(end)
            self.lazy_initialization(key_states, value_states)
        elif end > self._keys.shape[2]:
            self.reserve(end)
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget every token from slot `length` on; what is appended next overwrites them."""
        if not 0 <= length <= self.length:
            raise ValueError(f"A cache of {self.length} tokens cannot be cut to {length}.")
        self.length = length

    def crop(self, tokens: int) -> None:
        """transformers' `truncate`: drop `-tokens` tokens, or (releases before 5.23) keep `tokens` of them."""
        if tokens:
            self.truncate(min(tokens, self.length) if tokens > 0 else max(self.length + tokens, 0))

    def reset(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers 5

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, in that order; they may repeat."""
        if self.is_initialized:
            indices = indices.to(self.device)
            self._keys, self._values = self._keys[indices], self._values[indices]

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))


class KVCache(Cache):
    """The cache of a batch: a `GrowingLayer` for every layer, where each sequence starts, and an attention's state.

    Args:
        num_layers: layers of the model.
        starts: int32 `[B]`, slot of each sequence's first token (left padding); None when all start at slot 0.

    Attributes:
        state: of the attention that decodes, None before the first step or where it keeps nothing.
        selected_at: length of the cache when the first selection was made; None makes the next step select.
        place: a number that changes whenever buffers are replaced or moved; what was captured over them is then stale.
    """

    def __init__(self, num_layers: int, starts: Tensor | None = None) -> None:
        super().__init__(layers=[GrowingLayer() for _ in range(num_layers)])
        self.starts = starts
        self.place = 0
        self.state: State | None = None
        self.selected_at: int | None = None
        self._owner: tuple[DecodeAttention | None, int] = None, 0

    @property
    def length(self) -> int:
        """Filled slots, padding included."""
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        """Slots there is room for, padding included."""
        return self.layers[0].capacity

    @property
    def layers_in_prefill(self) -> int:
        """Layers whose tokens lie on the device while a prompt is read."""
        return len(self.layers)

    @property
    def key_bytes(self) -> int:
        """Bytes of one key of one KV head."""
        keys, _ = self.layers[0].store
        return keys.shape[-1] * keys.element_size()

    def token_counts(self) -> Tensor:
        """int32 `[B]`: cached tokens of each sequence."""
        return self.kv(0).token_counts()

    def first_slots(self, sequences: int) -> list[int]:
        """Where each of so many sequences starts."""
        return [0] * sequences if self.starts is None else self.starts.tolist()

    def missing(self, slots: int) -> int:
        """Slots to allocate before there is room for `slots`."""
        if not self.layers[0].is_initialized:
            return max(self.capacity, slots)
        return grown(slots, self.capacity) - self.capacity if slots > self.capacity else 0

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots in every layer.

        Raises:
            CacheMemoryError: they do not fit into memory; the cache is as it was.
        """
        if slots > self.capacity:
            if each := sum(layer.slot_bytes for layer in self.layers):
                first = self.layers[0]
                bytes_beside(first.batch_size, self.missing(slots), each, first.device, "more ")
            self.place += 1
        for layer in self.layers:
            layer.reserve(slots)

    def advance(self, tokens: int = 1) -> None:
        """Count tokens that were written into the stores."""
        for layer in self.layers:
            layer.length += tokens

    def check_length(self, length: int) -> None:
        """Raise `ModelError` unless every layer holds `length` tokens: each was stored once, in a slot of its own."""
        for number, layer in enumerate(self.layers):
            if layer.length != length:
                raise ModelError(
                    f"Layer {number} of this model stored {layer.length} of {length} tokens; Engine needs every token "
                    "once in every layer."
                )

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on, and the selections made there."""
        for layer in self.layers:
            layer.truncate(length)
        if self.state is not None:
            self.state.truncate(length)
        self.selected_at = None

    def start_at(self, padding: Sequence[int] | None, kept: Sequence[int]) -> None:
        """Let each sequence start after `padding` unused slots (None: none), and take its first `kept` tokens along."""
        before = self.first_slots(len(kept))
        after = [0] * len(before) if padding is None else list(padding)
        if before == after:
            return
        self.forget_state()
        with torch.inference_mode():
            for part in (part for layer in self.layers for part in layer.store):
                for b, (old, new, count) in enumerate(zip(before, after, kept, strict=True)):
                    if old != new and count:
                        part[b, :, new : new + count] = part[b, :, old : old + count].clone()  # they may overlap
        device = self.layers[0].device
        self.starts = None if padding is None else torch.tensor(after, dtype=torch.int32, device=device)

    def state_for(self, attention: DecodeAttention) -> tuple[State | None, bool]:
        """The attention's state, ready for the step to come, and whether it selects; makes room for its token.

        Its buffers stay the same from step to step, and when the cache is truncated; they change when the cache moves
        to a larger place, its sequences change, or another attention takes over.
        """
        position = self.length
        self.reserve(position + 1)
        owner = attention, self.capacity
        if self._owner != owner:
            self.place += 1
            self.state = self._allocate(attention)
            self._owner, self.selected_at = owner, None
        if self.selected_at is None:
            self.selected_at = position
        refresh = (position - self.selected_at) % attention.refresh_every == 0
        if self.state is not None:
            self.state.before_step(lambda layer: self.layers[layer].store, position, refresh, self.starts)
        return self.state, refresh

    def _allocate(self, attention: DecodeAttention) -> State | None:
        return attention.allocate(self.layers[0].batch_size, self.capacity, self.layers[0].device)

    def memory(self) -> tuple[int, int]:
        """Bytes of the KV cache on the device that attends, and in host memory beside it."""
        return sum(part.nbytes for layer in self.layers for part in layer.store), 0

    def fetches(self, sequence: int) -> tuple[float, float]:
        """Blocks that steps asked for, and those of them that had to come from elsewhere."""
        return 0.0, 0.0

    def forget_state(self) -> None:
        """Make the next step select, into new buffers."""
        self.state, self.selected_at = None, None
        self.place += 1
        self._owner = None, 0

    def kv(self, layer: int) -> KV:
        """What the operations read of a layer."""
        return KV(self.layers[layer].keys, self.layers[layer].values, None, self.starts)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.starts is not None:
            self.starts = self.starts[indices.to(self.starts.device)]
        self.forget_state()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.starts is not None:
            self.starts = self.starts.repeat_interleave(repeats)
        self.forget_state()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


def grown(slots: int, capacity: int) -> int:
    """Slots of a store with room for `slots` that has `capacity` of them so far."""
    return max(ceil(slots / ROOM), ceil(capacity * _GROWTH / ROOM)) * ROOM


def _room_for(states: Tensor, slots: int) -> Tensor:
    batch, heads, _, dim = states.shape
    try:
        return states.new_empty(batch, heads, slots, dim)
    except torch.OutOfMemoryError:  # a GPU's, which says so itself
        raise
    except RuntimeError as error:  # a limit that free_bytes knows nothing of
        size = batch * heads * slots * dim * states.element_size()
        raise CacheMemoryError(
            f"The system does not give {size / 2**30:.1f} GiB for the keys of {batch} x {slots} tokens in one layer: "
            "give fewer sequences or shorter ones."
        ) from error
