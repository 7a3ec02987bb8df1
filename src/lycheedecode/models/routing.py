"""Replaces the attention of a Hugging Face model while a context is open.

AttentionRoute    sends a model's attention layers through any function; `engine` routes its prefill and its steps so
RoutedAttention   such a function for `hybrid` and `identify`: dense for many tokens, ours for one
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..plan import HeadPlan, PlanError
from .shape import ModelError, ModelShape, inner_model, text_config
from .versions import attention_name, set_attention_name, unregister

Decode = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None", float], Tensor]
"""`(layer, query [B, Hq, D], keys, values [B, Hkv, S, D], mask, scale) -> [B, Hq, D]`."""

_NOT_PLAIN = {
    "softcap": "softcapped logits",
    "s_aux": "attention sinks in the softmax",
    "position_bias": "a position bias",
    "output_attentions": "attention weights as an output",
}


class RoutedAttention:
    """Attention of a routed model.

    Several tokens at once, and layers that are not global, are dense: transformers' own SDPA. One token of a global
    layer goes to `decode`, unless that is None.
    """

    def __init__(self, shape: ModelShape, decode: Decode | None = None) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self._dense = sdpa_attention_forward
        self._shape, self._global_layers = shape, frozenset(shape.global_layers)
        self.decode = decode

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        refuse_unless_plain(options)
        if self.decode is None or query.shape[2] != 1 or layer_of(module) not in self._global_layers:
            return self._dense(module, query, key, value, attention_mask, scaling=scaling, **options)
        layer = layer_of(module)
        self._shape.check_heads(layer, key.shape[1])
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = self.decode(layer, query[:, :, 0], key, value, attention_mask, scale)
        return output[:, None], None


def refuse_unless_plain(options: Mapping[str, Any]) -> None:
    """Raise `ModelError` when a model asks its attention for more than a softmax; `options` are what it passes."""
    for name, what in _NOT_PLAIN.items():
        given = options.get(name)
        if given is not None and given is not False:
            raise ModelError(f"LycheeDecode supports plain softmax attention only, not {what} ({name}).")


def refuse_a_mask(mask: Tensor | None) -> None:
    """Raise `ModelError` when a model brings a mask although none was asked for."""
    if mask is not None:
        raise ModelError("This model masks its attention in its own way, which Engine cannot follow.")


def layer_of(module: nn.Module) -> int:
    """The number of an attention module's layer; raises `ModelError` where it has none."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ModelError(f"{type(module).__name__} does not say which layer it belongs to (layer_idx).")
    return layer


class Window(NamedTuple):
    """How far back a layer looks.

    Attributes:
        kind: `full_attention`; `sliding_attention`: over the last `span` tokens; `chunked_attention`: over the tokens
            of its own chunk of `span` tokens.
        span: tokens; 0 for all.
    """

    kind: str = "full_attention"
    span: int = 0

    @property
    def is_all(self) -> bool:
        return self.kind == "full_attention"

    def first_slot(self, filled: Any, start: Any) -> Any:
        """The first slot that the newest token sees.

        Args:
            filled: slots in use, the newest token's included; a number, or int32 `[B]`.
            start: slot of the first token of the sequence; a number where `filled` is one, else int32 `[B]`.
        """
        if self.kind == "sliding_attention":
            first = filled - self.span
            return first.clamp(min=start) if isinstance(first, Tensor) else _at_least(start, first)
        if self.kind == "chunked_attention":
            return start + (filled - 1 - start) // self.span * self.span
        return start

    @classmethod
    def of_layers(cls, model: nn.Module, shape: ModelShape) -> tuple[Window, ...]:
        """The window of every layer of a model; raises `ModelError` for a kind of layer that has none."""
        config = text_config(inner_model(model))
        spans: dict[str, Any] = {
            "full_attention": 0,
            "sliding_attention": getattr(config, "sliding_window", None),
            "chunked_attention": getattr(config, "attention_chunk_size", None),
        }
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * shape.num_layers
        for kind in kinds:
            if spans.get(kind) is None:
                raise ModelError(f"{shape.architecture} has layers of the kind {kind}, which Engine cannot decode.")
        return tuple(cls(kind, spans[kind]) for kind in kinds)


def _at_least(start: Any, least: int) -> Any:
    return start.clamp(min=least) if isinstance(start, Tensor) else max(start, least)


def supported_shape(model: nn.Module, plan: HeadPlan | None) -> ModelShape:
    """The shape of a model that can be decoded with a plan.

    Raises:
        ModelError: its attention does not pass through transformers' attention interface, is not plain, or spread over
            several devices.
        PlanError: the plan does not fit the model.
    """
    shape, inner = ModelShape.of(model), inner_model(model)
    config = text_config(inner)
    if inner.config.is_encoder_decoder or config.is_encoder_decoder:
        raise ModelError(f"{shape.architecture} is an encoder and a decoder; only plain decoders can be decoded.")
    if getattr(config, "add_cross_attention", False) or getattr(config, "cross_attention_layers", None):
        raise ModelError(f"{shape.architecture} has cross attention; only plain decoders can be decoded.")
    if not getattr(inner, "_supports_attention_backend", False):
        raise ModelError(f"The attention of {shape.architecture} cannot be replaced (no attention interface).")
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(f"{shape.architecture} has multi-head latent attention, which has no KV heads to choose from.")
    devices = sorted({str(device) for device in getattr(inner, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ModelError(
            f"{shape.architecture} is spread over devices {', '.join(devices)}; decoding needs one device."
        )
    if not shape.global_layers:
        raise ModelError(f"{shape.architecture} has no layer with full attention, so there is nothing to make sparse.")
    if plan is not None:
        check_plan(plan, shape)
    return shape


def check_plan(plan: HeadPlan, shape: ModelShape) -> None:
    """Raise `PlanError` when a plan does not fit a model."""
    plan.check_fits(
        num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, architecture=shape.architecture
    )  # fmt: skip
    for layer in shape.global_layers:
        for head, donor in enumerate(plan.donors[layer]):
            if donor[0] not in shape.global_layers:
                raise PlanError(
                    f"The donor {donor} of layer {layer}, KV head {head} is in a layer without full attention."
                )


_ROUTE_PREFIX = "lycheedecode_"
_route_numbers = itertools.count()


@dataclass(eq=False)
class _Opening:
    """A route that is open, or waits to be.

    Attributes:
        name: what its function is registered as.
        configs: ids of the config objects that name the model's attention; the route keeps these objects alive.
        thread: that opened it for one pass; None: it lasts, and serves all threads.
    """

    name: str
    configs: frozenset[int]
    thread: int | None
    registered: bool = False


_turns = threading.Condition()
_openings: list[_Opening] = []
"""In the order in which they came; `_turns` guards this list and what we register in transformers."""


class AttentionRoute:
    """Sends every attention layer of a Hugging Face model through `function` while it is open (a context manager).

    `function` has the signature of transformers' attention interface: `(module, query, key, value, attention_mask,
    scaling=..., **kwargs) -> (output [B, T, Hq, D], None)`. Nothing is left behind on exit: the registered name is
    removed with the last route of that name. Opening costs microseconds, so a generation loop can open the route for
    each step and leave the model alone in between.

    A model has one open route at a time; models that share a config object count as one. Brief routes in several
    threads take turns, first come, first served. Nothing waits for a lasting one.

    Args:
        model: a Hugging Face decoder.
        function: what attends; None leaves the model's own, but takes the turn.
        masks: give `function` the masks that SDPA would get; otherwise no mask is made, and it gets None.
        name: what `function` is registered as; None makes up a name that no other route has. Compiled code is valid
            for one name. Routes of one name have one function.
        brief: open for one pass through the model, by one thread.

    Raises:
        ModelError: on opening, when this thread or a lasting route has the model's attention already.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any] | None,
        *,
        masks: bool = True,
        name: str | None = None,
        brief: bool = False,
    ) -> None:
        self._function, self._masks, self._brief = function, masks, brief
        self._name = f"{_ROUTE_PREFIX}{next(_route_numbers) if name is None else name}"
        modules = (module for module in model.modules() if hasattr(module, "config"))
        self._configs = list({id(module.config): module.config for module in modules}.values())
        self._ids = frozenset(map(id, self._configs))

    def __enter__(self) -> None:
        me = threading.get_ident()
        opening = _Opening(self._name, self._ids, me if self._brief else None)
        with _turns:
            ahead = [other for other in _openings if other.configs & self._ids]
            if any(other.thread in (None, me) for other in ahead):
                raise ModelError(
                    "The attention of this model is already routed by LycheeDecode: leave that context first."
                )
            _openings.append(opening)
            try:
                _turns.wait_for(lambda: not any(other in _openings for other in ahead))
                self._register(opening)
            except BaseException:
                self._forget(opening)
                raise
        self._opening = opening
        self._before = [attention_name(config) for config in self._configs]
        if self._function is not None:
            for config in self._configs:
                set_attention_name(config, self._name)

    def __exit__(self, *_: object) -> None:
        for config, implementation in zip(self._configs, self._before, strict=True):
            set_attention_name(config, implementation)
        with _turns:
            self._forget(self._opening)

    def _register(self, opening: _Opening) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self._function is None:
            return
        # Masks are made only for names in the class-wide mapping, so assignment to the registry would not do.
        opening.registered = True
        ALL_ATTENTION_FUNCTIONS.register(self._name, self._function)
        if self._masks:
            ALL_MASK_ATTENTION_FUNCTIONS.register(self._name, sdpa_mask)

    def _forget(self, opening: _Opening) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        _openings.remove(opening)
        if not any(other.registered and other.name == self._name for other in _openings):
            for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                unregister(registry, self._name)
        _turns.notify_all()


def route_attention(model: nn.Module, function: Callable[..., Any]) -> AttentionRoute:
    """`with route_attention(model, function): ...`; see `AttentionRoute`."""
    return AttentionRoute(model, function)
