"""A decode step: the model on one token a sequence, in whose attention layers a `DecodeAttention` reads our cache.

    token ids -> model { in every attention layer: append the token to the cache -> attend } -> logits

To the compiler, cache and attention are one opaque operator. What it compiles therefore knows neither the size of the
cache nor a plan nor a config: one compilation serves full and hybrid attention, every context, every engine of a model.
The operator finds what it belongs to in a context variable, as long as a step is open in its thread:

    FlexibleStep  appends after the last token, and attends over views of what is filled; anything may run in it
    FixedStep     appends at a slot that only the device knows, and attends over the whole store up to lengths in device
                  memory: the same launches at every length, fit for a CUDA graph

Dimensions as in `ops`; `V` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.cache_utils import Cache

from .. import ops
from ..attention import DecodeAttention, State
from ..models.routing import AttentionRoute, Window, layer_of, refuse_a_mask, refuse_unless_plain
from ..models.shape import ModelError
from ..models.versions import cache_argument
from ..ops import KV
from ..ops.append.rope import Rotation
from ..ops.torch_private import many_compilations
from ..scoped import scoped
from .cache import KVCache

Forward = Callable[[nn.Module, Tensor, Tensor, "Tensor | int"], Tensor]
"""`(model, token ids int64 [B], lengths int32 [B], filled) -> logits float32 [B, V]`.

With several tokens a sequence, `[B, T]`, the logits are `[B, T, V]`. `lengths` count the tokens of each sequence,
`filled` the slots in use, as a number or int32 `[1]`; both with the new tokens. Where sequences end in different slots,
there is no such number; the first one's is given. Lengths `[B, T]` count the tokens up to each new one.
"""


class Step(Protocol):
    """What the attention layers of an open step do."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, rotation: Rotation | None = None
    ) -> Tensor:
        """Take the token's key and value, `[B, Hkv, D]`; returns the output for its query, both `[B, Hq, D]`.

        With a `rotation`, query and key have not passed it yet.
        """


class Pass(Protocol):
    """What the attention layers of an open pass of several tokens a sequence do."""

    def attend_tokens(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, rotation: Rotation | None = None
    ) -> Tensor:
        """Take the tokens' keys and values, `[B, T, Hkv, D]`; the output for their queries, both `[B, T, Hq, D]`.

        A `rotation` as in `Step`, with rows for `B * T` tokens.
        """


class FlexibleStep:
    """A step over views of the cache; attention that runs in it may read from the device what it likes.

    Args:
        cache: grows by a token.
        attention: what the global layers do; windowed layers attend densely to what they see.
        windows: how far back each layer looks.
        state: of `attention`.
        refresh: whether retrieval heads select.
    """

    def __init__(
        self,
        cache: KVCache,
        attention: DecodeAttention,
        windows: Sequence[Window],
        state: State | None,
        refresh: bool,
    ) -> None:
        self._cache, self._attention, self._windows = cache, attention, windows
        self._state, self._refresh = state, refresh

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, rotation: Rotation | None = None
    ) -> Tensor:
        """See `Step`."""
        if rotation is not None:
            query, key = rotation.of_query(query), rotation.of_key(key)
        keys, values = self._cache.update(key[:, :, None], value[:, :, None], layer)
        window, starts = self._windows[layer], self._cache.starts
        if window.is_all:
            return self._attention(layer, query, KV(keys, values, None, starts), self._state, scale, self._refresh)
        filled = keys.shape[2]
        if starts is None:
            begin = window.first_slot(filled, 0)
        else:
            begin, starts = max(filled - window.span, 0), window.first_slot(filled, starts)
            starts = (starts - begin).int()
        return ops.attend(query, KV(keys[:, :, begin:], values[:, :, begin:], None, starts), scale)


class FixedStep:
    """A step whose launches are the same at every length, over one cache as large as it is now.

    `filled` and `token_ids` are set before each run. Running a step twice leaves the cache as running it once does, but
    for its `counters`.

    Args:
        cache: its stores are written in place; its length is left to the caller.
        attention, windows, state, refresh: as in `FlexibleStep`.
        kv_bytes: float64 `[B]`, to which every run adds the bytes that it read.
        starts: int32 `[B]`, in place of the cache's.
        trims: on a CPU, read the lengths and attend over the slots in use only, which no CUDA graph can.
    """

    def __init__(
        self,
        cache: KVCache,
        attention: DecodeAttention,
        windows: Sequence[Window],
        state: State | None,
        refresh: bool,
        kv_bytes: Tensor,
        starts: Tensor | None = None,
        trims: bool = False,
    ) -> None:
        self.stores = [layer.store for layer in cache.layers]
        self._trims, self._slots = trims and kv_bytes.device.type == "cpu", None
        self.state, self.kv_bytes, self.counters = state, kv_bytes, [kv_bytes]
        self._attention, self._windows, self._refresh, self._key_bytes = attention, windows, refresh, cache.key_bytes
        batch, device = kv_bytes.shape[0], kv_bytes.device
        self.token_ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.filled = torch.ones(batch, dtype=torch.int32, device=device)
        self._starts = cache.starts if starts is None else starts
        self._newest = self.filled[:1]  # an object of its own: to the compiler, one tensor given twice is another case
        self._runs, self._passed = 0, [0] * len(self.stores)
        self._ends: dict[Window, tuple[Tensor | None, Tensor | None]] = {}

    def run(self, forward: Forward, model: nn.Module) -> Tensor:
        """Logits float32 `[B, V]` of the next token."""
        lengths = self.filled if self._starts is None else self.filled - self._starts
        starts = torch.zeros_like(lengths) if self._starts is None else self._starts
        for window in set(self._windows):
            if window.is_all:
                self._ends[window] = lengths, self._starts
            else:
                first = window.first_slot(self.filled, starts)
                self._ends[window] = self.filled - first, first
        if self._trims:
            self._trim()
        self._runs += 1
        with running(self):
            logits = forward(model, self.token_ids, lengths, self._newest)
        self._attention.count_bytes(self.kv_bytes, lengths, self.state, self._refresh, self._key_bytes)
        return logits

    def _trim(self) -> None:
        """Leave out the slots after the last token; where all sequences end in one slot, no length masks any."""
        ends = self.filled.tolist()
        self._slots = max(ends)
        if min(ends) == self._slots:
            from_zero = self._starts is None or not self._starts.any()
            for window, (_, first) in self._ends.items():
                self._ends[window] = None, None if window.is_all and from_zero else first

    def check_layers(self) -> None:
        """Raise `ModelError` unless every layer attended once in every run so far."""
        for layer, times in enumerate(self._passed):
            if times != self._runs:
                raise ModelError(
                    f"Layer {layer} of this model attended {times} times in {self._runs} decode steps; Engine needs "
                    "every token once in every layer."
                )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, rotation: Rotation | None = None
    ) -> Tensor:
        """See `Step`."""
        keys, values = self.stores[layer]
        self._passed[layer] += 1
        rotated = ops.append(keys, values, key, value, self.filled, query, rotation)
        assert rotated is not None  # a query was given
        window = self._windows[layer]
        kv = KV(keys[:, :, : self._slots], values[:, :, : self._slots], *self._ends[window])
        if window.is_all:
            return self._attention(layer, rotated, kv, self.state, scale, self._refresh)
        return ops.attend(rotated, kv, scale)


# ---------------------------------------------------------------------- how attention layers find their step

_running: ContextVar[Step | Pass] = ContextVar("lycheedecode_step")


def running(step: Step | Pass) -> AbstractContextManager[None]:
    """Attention layers of `route` that this thread passes belong to `step` while this is open."""
    return scoped(_running, step)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    rotation = None if cos is None or sin is None else Rotation(cos, sin, query_norm, key_norm, eps)
    return _open_step().attend(layer, query, key, value, scale, rotation)


def _attend_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    rotation = None
    if cos is not None and sin is not None:
        rotation = Rotation(cos.flatten(0, 1), sin.flatten(0, 1), query_norm, key_norm, eps)
    return _open_step().attend_tokens(layer, query, key, value, scale, rotation)


def _open_step() -> Any:
    step = _running.get(None)
    if step is None:
        raise ModelError("Another thread is decoding with this model; call it when that is done.")
    return step


# It writes the cache behind the compiler's back. That is safe: layers depend on each other through their outputs, so
# they run in order and none is left out; and no cache is ever copied to keep a graph functional.
_attend_operator = torch.library.custom_op("lycheedecode::decode_layer", _attend, mutates_args=())
_attend_tokens_operator = torch.library.custom_op("lycheedecode::pass_layer", _attend_tokens, mutates_args=())


@_attend_tokens_operator.register_fake
@_attend_operator.register_fake
def _(query, key, value, layer, scale, cos=None, sin=None, query_norm=None, key_norm=None, eps=0.0):
    return query.new_empty(query.shape)


def _attention_layer(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for new tokens; the keys and values are theirs only."""
    refuse_unless_plain(options)
    refuse_a_mask(attention_mask)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] > 1:
        attend = _attend_tokens_operator if is_compiling() else _attend_tokens
        rows = [x.transpose(1, 2) for x in (query, key, value)]
        return attend(rows[0], rows[1], rows[2], layer_of(module), scale), None
    attend = _attend_operator if is_compiling() else _attend
    return attend(query[:, :, 0], key[:, :, 0], value[:, :, 0], layer_of(module), scale)[:, None], None


class _PassThrough(Cache):
    """The cache that a model gets while attention layers append to ours: it hands new keys and values through.

    Args:
        filled: slots in use, the new tokens' included; a number, or int32 `[1]`.
        tokens: how many of them are new.
    """

    def __init__(self, filled: Tensor | int, tokens: int) -> None:
        super().__init__(layers=[])
        self._filled, self._tokens = filled, tokens

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> Any:
        """Slots before the new tokens: a number, or int32 `[]` on the device, which a CUDA graph can hold."""
        return (self._filled if isinstance(self._filled, int) else self._filled[0]) - self._tokens


def route(model: nn.Module) -> AttentionRoute:
    """Attention layers of `model` take part in the running step while the route is open."""
    return AttentionRoute(model, _attention_layer, masks=False, name="step", brief=True)


def forward(model: nn.Module, token_ids: Tensor, lengths: Tensor, filled: Tensor | int) -> Tensor:
    """A `Forward`, eager."""
    several = token_ids.dim() == 2
    positions = (lengths if lengths.dim() == 2 else lengths[:, None]).long() - 1
    if several and lengths.dim() == 1:
        positions = positions - torch.arange(token_ids.shape[1] - 1, -1, -1, device=lengths.device)
    output = model(
        input_ids=token_ids if several else token_ids[:, None],
        position_ids=positions,
        **cache_argument(_PassThrough(filled, token_ids.shape[1] if several else 1)),
        use_cache=True,
        logits_to_keep=0 if several else 1,
    )
    return output.logits.float() if several else output.logits[:, -1].float()


def within_positions(forward: Forward, most: int) -> Forward:
    """`forward` for tokens of which some may lie past the model's `most` positions, and be dropped; 0: no matter."""
    if not most:
        return forward

    def bounded(model: nn.Module, token_ids: Tensor, lengths: Tensor, filled: Tensor | int) -> Tensor:
        if token_ids.dim() == 2:
            lengths = lengths[:, None] - torch.arange(token_ids.shape[1] - 1, -1, -1, device=lengths.device)
        return forward(model, token_ids, lengths.clamp(max=most), filled)

    return bounded


INDUCTOR: dict[str, Any] = {"coordinate_descent_tuning": True}
"""Options of the compiler: matrix-vector products are its own kernels, worth a search for their launch constants."""


@lru_cache(maxsize=8)
def compiled_forward(backend: Any = None) -> Forward:
    """A `Forward` that compiles the whole model, once for every batch size.

    The whole model rather than layer by layer: the end of a layer and the norm that begins the next are one kernel
    then. Its kernels repeat from layer to layer, so most of the compiler's work is found in its cache.

    Args:
        backend: of `torch.compile`; None: `lycheedecode.fusion.backend`.
    """
    if backend is None:
        from .. import fusion

        backend = fusion.backend
    options = INDUCTOR if backend == "inductor" else None
    run = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend, options=options)

    def compiled(model: nn.Module, token_ids: Tensor, lengths: Tensor, filled: Tensor | int) -> Tensor:
        with many_compilations():
            return run(model, token_ids, lengths, filled)

    return compiled
